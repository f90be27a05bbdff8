"""Measure how tidy the code is, and list each place that breaks a limit.

    python tools/house.py                    # this repository
    python tools/house.py FOLDER             # another checkout
    python tools/house.py --compare HEAD~5   # this repository, and a revision in a second column
    python tools/house.py --json             # the same as JSON

A place may break a limit for a good reason. Write the reason in a comment, and the place moves to a
list of its own:

    def command(  # house: Typer reads one parameter for each option

The comment goes on the offending line. For a function or a class it goes on the `def` line, or on
the line above the definition and its decorators. For a file it goes in the first three lines. For a
repeated block it goes on the first line of one copy.

The exit status is 0 if all counts are zero, and 1 if one is not.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, count
from pathlib import Path
from typing import NamedTuple

FILE_LINES = 500
FUNCTION_LINES = 80
PARAMETERS = 8
COLUMNS = 100
BLOCK_LINES = 8
VAGUE_NAMES = frozenset({"found", "told", "own", "here"})

LIBRARY = ("src",)
ALL_CODE = ("src", "tests", "benchmarks", "tools")

EXCEPTION = re.compile(r"#\s*house:\s*([^\s#].*)")
"""A comment that allows an exception. The first character after `house:` begins the reason."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DefinitionNode = FunctionNode | ast.ClassDef


class Source(NamedTuple):
    """A parsed Python file."""

    path: str
    """The path relative to the measured folder, with forward slashes."""
    lines: list[str]
    """The physical lines, without line ends. Line 1 has index 0."""
    tree: ast.Module
    comments: dict[int, tokenize.TokenInfo]
    """The comments by line number."""


class Offence(NamedTuple):
    """A place that breaks a limit."""

    path: str
    line: int
    name: str
    number: int | None
    """The measured number, for example the lines of a function, if the measure has one."""
    reason: str = ""
    """The reason for an exception. Empty if the place has no exception."""


class Measure(NamedTuple):
    """A measure of the code: its title, the folders it reads, and its function."""

    title: str
    folders: tuple[str, ...]
    list_offences: Callable[[Sequence[Source]], list[Offence]]
    form: str = "{path}:{line} {name} ({number})"
    """How an offence is printed."""


class Result(NamedTuple):
    """The offences that one measure lists."""

    measure: Measure
    offenders: list[Offence]
    allowed: list[Offence]


def read_sources(root: Path) -> list[Source]:
    """Return every Python file in the measured folders under `root`, in order of path."""
    folders = [root / folder for folder in ALL_CODE]
    return [read_source(root, path) for folder in folders for path in sorted(folder.rglob("*.py"))]


def read_source(root: Path, path: Path) -> Source:
    """Return one parsed file. Exit with a message if it is not valid Python."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise SystemExit(f"{path} is not valid Python: {error}. Correct the file first.") from None
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    lines = text.removesuffix("\n").split("\n")
    return Source(path.relative_to(root).as_posix(), lines, tree, comments)


def definitions(
    node: ast.AST, prefix: str = "", public: bool = True
) -> Iterator[tuple[str, DefinitionNode, bool]]:
    """Yield the full name, the node and the visibility of every function and class under `node`.

    The full name includes the enclosing functions and classes, joined by dots. The visibility is
    True if no name in it begins with an underscore and no function encloses the definition.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DefinitionNode):
            visible = public and not child.name.startswith("_")
            yield prefix + child.name, child, visible
            inner_public = visible and isinstance(child, ast.ClassDef)
            yield from definitions(child, f"{prefix}{child.name}.", inner_public)
        else:
            yield from definitions(child, prefix, public)


def functions(source: Source) -> Iterator[tuple[str, FunctionNode]]:
    """Yield the full name and the node of every function in a file."""
    for name, node, _ in definitions(source.tree):
        if not isinstance(node, ast.ClassDef):
            yield name, node


def reason_on(source: Source, *lines: int) -> str:
    """Return the reason of the first exception on the given lines, or an empty string."""
    for comment in filter(None, map(source.comments.get, lines)):
        if match := EXCEPTION.search(comment.string):
            return match.group(1).strip()
    return ""


def reason_for(source: Source, node: DefinitionNode) -> str:
    """Return the reason of an exception on the `def` line or above the definition."""
    above = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    is_whole_line = source.lines[above - 1].lstrip().startswith("#")
    return reason_on(source, node.lineno, *([above] if is_whole_line else []))


def long_files(sources: Sequence[Source]) -> list[Offence]:
    """Return the files that have more than `FILE_LINES` lines."""
    return [
        Offence(source.path, 1, Path(source.path).name, length, reason_on(source, 1, 2, 3))
        for source in sources
        if (length := len(source.lines)) > FILE_LINES
    ]


def long_functions(sources: Sequence[Source]) -> list[Offence]:
    """Return the functions that have more than `FUNCTION_LINES` lines, decorators excluded."""
    return [
        Offence(source.path, node.lineno, name, length, reason_for(source, node))
        for source in sources
        for name, node in functions(source)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    ]


def wide_signatures(sources: Sequence[Source]) -> list[Offence]:
    """Return the functions that have more than `PARAMETERS` parameters."""
    return [
        Offence(source.path, node.lineno, name, number, reason_for(source, node))
        for source in sources
        for name, node in functions(source)
        if (number := parameter_count(node)) > PARAMETERS
    ]


def parameter_count(node: FunctionNode) -> int:
    """Return the number of parameters, with `*args` and `**kwargs`, without `self` or `cls`."""
    positional = [*node.args.posonlyargs, *node.args.args]
    bound = bool(positional) and positional[0].arg in ("self", "cls")
    variable = [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
    return len(positional) - bound + len(node.args.kwonlyargs) + len(variable)


def wide_lines(sources: Sequence[Source]) -> list[Offence]:
    """Return the lines that have more than `COLUMNS` characters. The name is the line's start."""
    return [
        Offence(source.path, number, text.strip()[:40], len(text), reason_on(source, number))
        for source in sources
        for number, text in enumerate(source.lines, start=1)
        if len(text) > COLUMNS
    ]


def missing_docstrings(sources: Sequence[Source]) -> list[Offence]:
    """Return the public functions, classes, methods and properties that have no docstring."""
    return [
        Offence(source.path, node.lineno, name, None, reason_for(source, node))
        for source in sources
        for name, node, public in definitions(source.tree)
        if public and not is_overload_or_setter(node) and not ast.get_docstring(node)
    ]


def is_overload_or_setter(node: DefinitionNode) -> bool:
    """Return True if another definition of the same name carries the docstring."""
    last_names = {ast.unparse(item).rpartition(".")[2] for item in node.decorator_list}
    return bool(last_names & {"overload", "setter", "deleter"})


def vague_locals(sources: Sequence[Source]) -> list[Offence]:
    """Return the places that bind one of `VAGUE_NAMES`."""
    return [
        Offence(source.path, line, name, None, reason_on(source, line))
        for source in sources
        for line, name in sorted(bindings(source.tree))
        if name in VAGUE_NAMES
    ]


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every parameter and every assigned variable."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Name(id=name, ctx=ast.Store(), lineno=line)
                | ast.arg(arg=name, lineno=line)
                | ast.ExceptHandler(name=str(name), lineno=line)
                | ast.MatchAs(name=str(name), lineno=line)
                | ast.MatchStar(name=str(name), lineno=line)
                | ast.MatchMapping(rest=str(name), lineno=line)
            ):
                yield line, name


class CodeLine(NamedTuple):
    """A line of code without its indentation and comment."""

    text: str
    source: Source
    number: int


def repeated_blocks(sources: Sequence[Source]) -> list[Offence]:
    """Return the runs of `BLOCK_LINES` or more equal lines that occur in two places or more.

    A run is as long as possible: the line before it or the line after it differs between the
    places. An offence names all places of one run.
    """
    lines = [line for source in sources for line in code_lines(source)]
    runs: defaultdict[tuple[str, ...], set[int]] = defaultdict(set)
    for first, second, length in maximal_runs([line.text for line in lines]):
        runs[tuple(line.text for line in lines[first : first + length])].update((first, second))
    return sorted(block_offence(lines, starts, len(texts)) for texts, starts in runs.items())


def code_lines(source: Source) -> Iterator[CodeLine]:
    """Yield the lines that hold code, then one line that no other file has.

    Leave out imports, docstrings, comments, blank lines, and lines of punctuation alone.
    """
    skipped: set[int] = set()
    for node in ast.walk(source.tree):
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
                skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(source.lines, start=1):
        comment = source.comments.get(number)
        text = (line[: comment.start[1]] if comment else line).strip()
        if number not in skipped and re.search(r"\w", text):
            yield CodeLine(text, source, number)
    yield CodeLine(f"\n{source.path}", source, len(source.lines))  # no run crosses a file's end


def maximal_runs(texts: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Yield first start, second start and length of each longest run. The two never overlap."""
    windows: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for start in range(len(texts) - BLOCK_LINES + 1):
        windows[tuple(texts[start : start + BLOCK_LINES])].append(start)
    pairs = {pair for starts in windows.values() for pair in combinations(starts, 2)}
    for first, second in sorted(pairs):
        if (first - 1, second - 1) in pairs:
            continue
        more = next(n for n in count() if (first + n + 1, second + n + 1) not in pairs)
        length = min(BLOCK_LINES + more, second - first)
        if length >= BLOCK_LINES:
            yield first, second, length


def block_offence(lines: Sequence[CodeLine], starts: set[int], length: int) -> Offence:
    """Return the offence for one repeated run. A copy with an exception is left out.

    The whole run is allowed if fewer than two copies remain.
    """
    places = sorted(starts)
    reasons = [reason_on(lines[start].source, lines[start].number) for start in places]
    remaining = [start for start, reason in zip(places, reasons, strict=True) if not reason]
    reason = "" if len(remaining) > 1 else next(filter(None, reasons))
    places = places if reason else remaining
    name = " ~ ".join(
        f"{lines[start].source.path}:{lines[start].number}-{lines[start + length - 1].number}"
        for start in places
    )
    return Offence(lines[places[0]].source.path, lines[places[0]].number, name, length, reason)


PLACE = "{path}:{line} {name}"
BLOCK = "{name} ({number} lines)"
MEASURES = (
    Measure(f"files of more than {FILE_LINES} lines", LIBRARY, long_files),
    Measure(f"functions of more than {FUNCTION_LINES} lines", LIBRARY, long_functions),
    Measure(f"functions with more than {PARAMETERS} parameters", LIBRARY, wide_signatures),
    Measure(f"lines wider than {COLUMNS} columns", ALL_CODE, wide_lines),
    Measure("public names without a docstring", LIBRARY, missing_docstrings, PLACE),
    Measure(f"repeated blocks of {BLOCK_LINES} or more lines", LIBRARY, repeated_blocks, BLOCK),
    Measure("locals that say nothing", ALL_CODE, vague_locals, PLACE),
)


def measure_sources(sources: Sequence[Source]) -> list[Result]:
    """Return the result of every measure, in the order of `MEASURES`."""
    results = []
    for measure in MEASURES:
        read = [source for source in sources if source.path.split("/")[0] in measure.folders]
        offences = measure.list_offences(read)
        offenders = [offence for offence in offences if not offence.reason]
        results.append(Result(measure, offenders, [item for item in offences if item.reason]))
    return results


def measure_revision(root: Path, revision: str) -> list[Result]:
    """Return the results for another git revision of the folder."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(root), "archive", "--format=tar", revision]
        archive = subprocess.run(git, capture_output=True)
        if archive.returncode:
            raise SystemExit(f"git cannot read {revision}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        return measure_sources(read_sources(Path(folder)))


def as_text(results: Sequence[Result], before: Sequence[Result] | None) -> str:
    """Return the table of counts, followed by the offenders and the exceptions."""
    rows = [("measure", *(["before", "now"] if before else ["count"]))]
    for old, new in zip(before or results, results, strict=True):
        counts = [old, new] if before else [new]
        rows.append((new.measure.title, *(str(len(result.offenders)) for result in counts)))
    width = max(len(title) for title, *_ in rows)
    text = [f"{title:<{width}}" + "".join(f"{n:>8}" for n in counts) for title, *counts in rows]
    for measure, offenders, _ in results:
        text += ["", measure.title] if offenders else []
        text += [f"  {measure.form.format(**offence._asdict())}" for offence in offenders]
    text += ["", "allowed, with the reason"] if any(result.allowed for result in results) else []
    for measure, _, allowed in results:
        text += [f"  {measure.form.format(**item._asdict())}: {item.reason}" for item in allowed]
    return "\n".join(text)


def as_json(results: Sequence[Result], before: Sequence[Result] | None) -> str:
    """Return the same as `as_text`, as JSON: one object for each measure."""
    measures = [
        {
            "measure": new.measure.title,
            **({"before": len(old.offenders)} if before else {}),
            "now": len(new.offenders),
            "offenders": [offence._asdict() for offence in new.offenders],
            "allowed": [offence._asdict() for offence in new.allowed],
        }
        for old, new in zip(before or results, results, strict=True)
    ]
    return json.dumps({"measures": measures}, indent=2, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measures and return the exit status."""
    parser = argparse.ArgumentParser(description="Measure how tidy the code is.")
    default = Path(__file__).resolve().parents[1]
    parser.add_argument("folder", nargs="?", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--compare", metavar="REV", help="also measure this git revision")
    options = parser.parse_args(argv)
    sources = read_sources(options.folder)
    if not sources:
        parser.error(f"{options.folder} has no Python files in {', '.join(ALL_CODE)}")
    results = measure_sources(sources)
    before = measure_revision(options.folder, options.compare) if options.compare else None
    print((as_json if options.json else as_text)(results, before))
    return 1 if any(result.offenders for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
