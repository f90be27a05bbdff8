"""The script that measures how tidy the code is: each measure, its limit, and its exceptions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "house.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = load_script()

FILES = "files of more than 500 lines"
FUNCTIONS = "functions of more than 80 lines"
PARAMETERS = "functions with more than 8 parameters"
WIDE = "lines wider than 100 columns"
DOCSTRINGS = "public names without a docstring"
BLOCKS = "repeated blocks of 8 or more lines"
LOCALS = "locals that say nothing"

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes one Python file into the measured folder."""

    def write(text: str, name: str = "src/a.py") -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return write


def results(root: Path) -> dict[str, Any]:
    """Return the result of every measure by its title."""
    measured = house.measure_sources(house.read_sources(root))
    return {result.measure.title: result for result in measured}


def offenders(root: Path, title: str) -> list[tuple[int, str, int | None]]:
    """Return line, name and number of every offender of one measure."""
    return [(o.line, o.name, o.number) for o in results(root)[title].offenders]


def reasons(root: Path, title: str) -> list[str]:
    """Return the reasons of the exceptions of one measure."""
    return [offence.reason for offence in results(root)[title].allowed]


def function(lines: int, comment: str = "") -> str:
    """Return a private function of the given number of lines."""
    return f"def _f():{comment}\n" + "".join(f"    x{i} = {i}\n" for i in range(lines - 1))


def block(lines: int, start: int = 0) -> str:
    """Return different lines of code."""
    return "".join(f"x{i} = {i}\n" for i in range(start, start + lines))


# --- files and functions


def test_a_file_over_the_limit_counts(tmp_path: Path, write: Write) -> None:
    write("\n" * 501)
    write("\n" * 500, "src/b.py")
    write("\n" * 499 + "x = 1", "src/c.py")  # 500 lines, the last without a line end
    write("\n" * 501, "tests/d.py")
    assert offenders(tmp_path, FILES) == [(1, "a.py", 501)]


def test_a_file_has_an_exception_in_its_first_three_lines(tmp_path: Path, write: Write) -> None:
    write("\n\n# house: one table\n" + "\n" * 500)
    assert offenders(tmp_path, FILES) == [] and reasons(tmp_path, FILES) == ["one table"]
    write("\n\n\n# house: one table\n" + "\n" * 500)
    assert offenders(tmp_path, FILES) == [(1, "a.py", 504)]


def test_a_function_over_the_limit_counts(tmp_path: Path, write: Write) -> None:
    write(function(81))
    write("@staticmethod\n@property\n" + function(80), "src/b.py")  # decorators do not count
    write(function(81), "tests/c.py")
    assert offenders(tmp_path, FUNCTIONS) == [(1, "_f", 81)]


def test_a_nested_function_counts_in_the_outer_one_too(tmp_path: Path, write: Write) -> None:
    inner = "".join(f"    {line}\n" for line in function(81).splitlines())
    write("class A:\n" + "".join(f"    {line}\n" for line in f"def g():\n{inner}".splitlines()))
    assert offenders(tmp_path, FUNCTIONS) == [(2, "A.g", 82), (3, "A.g._f", 81)]


@pytest.mark.parametrize(
    "signature, number",
    [
        ("def _f(a, b, c, d, e, f, g, h, i)", 9),
        ("async def _f(a, b, /, c, d, e, *, f, g, h, i)", 9),
        ("def _f(a, b, c, d, e, f, g, *h, **i)", 9),
        ("def _f(self, a, b, c, d, e, f, g, h, i)", 9),
        ("def _f(a, b, c, d, e, f, g, h)", None),
        ("def _f(self, a, b, c, d, e, f, g, h)", None),
        ("def _f(cls, a, /, b, c, d, e, *f, g, **h)", None),
    ],
)
def test_parameters(tmp_path: Path, write: Write, signature: str, number: int | None) -> None:
    write(f"{signature}: ...\n")
    assert offenders(tmp_path, PARAMETERS) == ([(1, "_f", number)] if number else [])


NINE = "(a, b, c, d, e, f, g, h, i): ..."


@pytest.mark.parametrize(
    "text",
    [
        f"def _f{NINE}  # house: one option each\n",
        f"# house: one option each\ndef _f{NINE}\n",
        f"# house: one option each\n@first\n@second(\n    1\n)\ndef _f{NINE}\n",
        f"@first\ndef _f{NINE}  # noqa: E501  # house: one option each\n",
        f"class _A:\n    # house:one option each\n    def _f{NINE}\n",
    ],
)
def test_an_exception_for_a_function(tmp_path: Path, write: Write, text: str) -> None:
    write(text)
    assert offenders(tmp_path, PARAMETERS) == []
    assert reasons(tmp_path, PARAMETERS) == ["one option each"]


@pytest.mark.parametrize(
    "text",
    [
        f"def _f{NINE}  # house:\n",
        f"def _f{NINE}  # house:   # noqa: E501\n",
        f"def _f{NINE}  # the house: one option each\n",
        f"x = 1  # house: the reason for x\ndef _f{NINE}\n",
        f"# house: too far above\n\ndef _f{NINE}\n",
        f"x = '''\n# house: a string'''\ndef _f{NINE}\n",
    ],
)
def test_not_an_exception(tmp_path: Path, write: Write, text: str) -> None:
    write(text)
    assert len(offenders(tmp_path, PARAMETERS)) == 1 and reasons(tmp_path, PARAMETERS) == []


# --- lines and docstrings


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "tools"])
def test_a_wide_line_counts_in_every_folder(tmp_path: Path, write: Write, folder: str) -> None:
    write(f"x = '{'é' * 95}'\n# {'é' * 98}\n", f"{folder}/deep/a.py")  # characters, not bytes
    assert offenders(tmp_path, WIDE) == [(1, "x = '" + "é" * 35, 101)]


def test_a_wide_line_has_an_exception(tmp_path: Path, write: Write) -> None:
    write(f"x = '{'x' * 100}'  # house: a link\ny = '{'x' * 100}'  # house:\n")
    assert [line for line, _, _ in offenders(tmp_path, WIDE)] == [2]
    assert reasons(tmp_path, WIDE) == ["a link"]


def test_missing_docstrings(tmp_path: Path, write: Write) -> None:
    write(
        """
def f(): ...
async def g():
    def inner(): ...
class A:
    def method(self): ...
    def __len__(self): ...
    def _private(self): ...
    @property
    def p(self): ...
    @p.setter
    def p(self, value): ...
    class Inner: ...
    class _Inner:
        def method(self): ...
class _B:
    def method(self): ...
def _private():
    class Local:
        def method(self): ...
@overload
def h(x: int): ...
@typing.overload
def h(x: str): ...
def h(x):
    '''Do.'''
class C:
    '''A class.'''
    def method(self):
        '''Do.'''
if True:
    def i(): ...
def j(): ...  # house: a hook
""",
        "src/_private_module.py",
    )
    names = [name for _, name, _ in offenders(tmp_path, DOCSTRINGS)]
    assert names == ["f", "g", "A", "A.method", "A.p", "A.Inner", "i"]
    assert reasons(tmp_path, DOCSTRINGS) == ["a hook"]


def test_tests_need_no_docstrings(tmp_path: Path, write: Write) -> None:
    write("def f(): ...\n", "tests/a.py")
    assert offenders(tmp_path, DOCSTRINGS) == []


# --- repeated blocks


def test_a_repeated_block_counts_once(tmp_path: Path, write: Write) -> None:
    write("a = 1\n" + block(9) + "b = 1\n")
    write("c = 1\n\n" + block(9) + "d = 1\n", "src/b.py")
    write(block(9), "tests/c.py")
    assert offenders(tmp_path, BLOCKS) == [(2, "src/a.py:2-10 ~ src/b.py:3-11", 9)]


def test_a_block_below_the_limit_does_not_count(tmp_path: Path, write: Write) -> None:
    write(block(7) + "a = 1\n")
    write(block(7) + "b = 1\n", "src/b.py")
    assert offenders(tmp_path, BLOCKS) == []


def test_layout_and_comments_hide_no_block(tmp_path: Path, write: Write) -> None:
    write("def f(a, b):\n" + "".join(f"    x{i} = f(\n        {i}\n    )\n" for i in range(4)))
    write(
        "def g(a, b):\n    '''Do\n    this.'''\n    import sys\n    if a:\n"
        + "".join(f"        x{i} = f(  # {i}\n\n            {i}\n        )\n" for i in range(4)),
        "src/b.py",
    )
    assert offenders(tmp_path, BLOCKS) == [(2, "src/a.py:2-12 ~ src/b.py:6-20", 8)]


def test_lines_that_hold_no_code_do_not_count(tmp_path: Path, write: Write) -> None:
    imports = "import sys\nfrom typing import (\n    Any,\n    Final,\n)\n"
    no_code = imports * 2 + "f(\n)\n" + "'''A string\n" + "of words\n" * 9 + "'''\n# note\n" * 9
    write("a = 1\n" + no_code + block(6))
    write("b = 1\n" + no_code + block(6), "src/b.py")  # 7 equal code lines: f( and block(6)
    assert offenders(tmp_path, BLOCKS) == []


def test_no_block_crosses_the_end_of_a_file(tmp_path: Path, write: Write) -> None:
    write(block(4))
    write(block(4, 4) + "a = 1\n" + block(8), "src/b.py")
    assert offenders(tmp_path, BLOCKS) == []


def test_two_places_never_overlap(tmp_path: Path, write: Write) -> None:
    write("x = 1\n" * 15)
    assert offenders(tmp_path, BLOCKS) == []
    write("x = 1\n" * 16)
    assert offenders(tmp_path, BLOCKS) == [(1, "src/a.py:1-8 ~ src/a.py:9-16", 8)]


def test_an_offence_names_all_places_of_a_block(tmp_path: Path, write: Write) -> None:
    write(block(8) + "a = 1\n" + block(8) + "b = 1\n" + block(8))
    places = "src/a.py:1-8 ~ src/a.py:10-17 ~ src/a.py:19-26"
    assert offenders(tmp_path, BLOCKS) == [(1, places, 8)]


def test_a_longer_and_a_shorter_block(tmp_path: Path, write: Write) -> None:
    write(block(10) + "a = 1\n" + block(10) + "b = 1\n" + block(8) + "c = 1\n")
    three = "src/a.py:1-8 ~ src/a.py:12-19 ~ src/a.py:23-30"
    two = "src/a.py:1-10 ~ src/a.py:12-21"
    assert offenders(tmp_path, BLOCKS) == [(1, two, 10), (1, three, 8)]


def test_one_copy_of_a_block_has_an_exception(tmp_path: Path, write: Write) -> None:
    marked = block(8).replace("\n", "  # house: read apart\n", 1)
    write(block(8) + "a = 1\n" + marked)
    assert offenders(tmp_path, BLOCKS) == [] and reasons(tmp_path, BLOCKS) == ["read apart"]
    write(block(8) + "a = 1\n" + marked + "b = 1\n" + block(8))
    assert offenders(tmp_path, BLOCKS) == [(1, "src/a.py:1-8 ~ src/a.py:19-26", 8)]
    write(block(8) + "a = 1\n" + block(8).replace("\n", "  # house:\n", 1))
    assert len(offenders(tmp_path, BLOCKS)) == 1


# --- locals


@pytest.mark.parametrize(
    "text",
    [
        "found = 1",
        "told: int = 1",
        "own, x = 1, 2",
        "def f(here): ...",
        "def f(*found, x=1): ...",
        "f = lambda own: own",
        "for here in x: ...",
        "x = [found for found in y]",
        "print(told := 1)",
        "with x as own: ...",
        "try: ...\nexcept OSError as here: ...",
        "match x:\n    case [1, found]: ...",
        "match x:\n    case {1: 2, **own}: ...",
        "match x:\n    case [1, *told]: ...",
    ],
)
@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "tools"])
def test_a_local_that_says_nothing(tmp_path: Path, write: Write, text: str, folder: str) -> None:
    write(text, f"{folder}/a.py")
    assert len(offenders(tmp_path, LOCALS)) == 1


@pytest.mark.parametrize(
    "text",
    ["print(found, x.told, f(own=1))", "x.found = x['own'] = 1", "founded = HERE = here_ = 1"],
)
def test_other_names_do_not_count(tmp_path: Path, write: Write, text: str) -> None:
    write(text)
    assert offenders(tmp_path, LOCALS) == []


def test_a_local_has_an_exception(tmp_path: Path, write: Write) -> None:
    write("found = 1  # house: the name of the field\nfound = 2  # house:\nown = 3\n")
    assert offenders(tmp_path, LOCALS) == [(2, "found", None), (3, "own", None)]
    assert reasons(tmp_path, LOCALS) == ["the name of the field"]


# --- the command


def test_text_and_exit_status(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("x = 1\n")
    assert house.main([str(tmp_path)]) == 0
    assert set(capsys.readouterr().out.split("\n")[1].split()[-1]) == {"0"}
    write("own = 1\n" + function(81) + "found = 1  # house: a reason\n")
    assert house.main([str(tmp_path)]) == 1
    table, functions, names, allowed = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split()[-1] for line in table.split("\n")] == ["count", *"0100001"]
    assert functions == f"{FUNCTIONS}\n  src/a.py:2 _f (81)"
    assert names == f"{LOCALS}\n  src/a.py:1 own"
    assert allowed == "allowed, with the reason\n  src/a.py:83 found: a reason"


def test_only_exceptions_exit_with_zero(tmp_path: Path, write: Write) -> None:
    write("found = 1  # house: a reason\n")
    assert house.main([str(tmp_path)]) == 0
    write("found = 1  # house:\n")
    assert house.main([str(tmp_path)]) == 1


def test_json(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("own = 1\nfound = 1  # house: a reason\n")
    assert house.main([str(tmp_path), "--json"]) == 1
    measures = json.loads(capsys.readouterr().out)["measures"]
    assert [m["now"] for m in measures] == [0, 0, 0, 0, 0, 0, 1]
    offence = {"path": "src/a.py", "line": 1, "name": "own", "number": None, "reason": ""}
    allowed = {"path": "src/a.py", "line": 2, "name": "found", "number": None, "reason": "a reason"}
    assert measures[-1] == {
        "measure": LOCALS,
        "now": 1,
        "offenders": [offence],
        "allowed": [allowed],
    }


def test_compare(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    def git(*words: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True)

    git("init", "--quiet")
    write("own = 1\ntold = 1\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    write("own = 1\n" + function(81))
    assert house.main([str(tmp_path), "--compare", "HEAD"]) == 1
    table = capsys.readouterr().out.split("\n\n")[0].split("\n")
    assert [line.split()[-2:] for line in (table[0], table[2], table[-1])] == [
        ["before", "now"],
        ["0", "1"],
        ["2", "1"],
    ]
    write("x = 1\n")  # the exit status follows the present code
    assert house.main([str(tmp_path), "--compare", "HEAD", "--json"]) == 0
    measures = json.loads(capsys.readouterr().out)["measures"]
    assert [(m["before"], m["now"]) for m in measures][-1] == (2, 0)
    with pytest.raises(SystemExit, match="git cannot read no-such-revision"):
        house.main([str(tmp_path), "--compare", "no-such-revision"])


def test_a_folder_without_code_and_a_broken_file(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        house.main([str(tmp_path)])
    assert "has no Python files in src, tests, benchmarks, tools" in capsys.readouterr().err
    write("def\n")
    with pytest.raises(SystemExit, match=r"a\.py is not valid Python"):
        house.main([str(tmp_path)])
