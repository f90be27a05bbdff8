"""What the commands share: options, opening a model or a workspace, printing, and the pictures that --out names.

Torch and transformers take seconds to import: what needs a model imports them where it is called, so that `--help` does not.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from ..core import tables
from ..core.errors import InputError
from ..core.files import write_file
from ..core.progress import Progress
from ..core.tables import visible
from ..keep.ledger import Ledger

if TYPE_CHECKING:
    from ..keep.workbench import Workbench
    from ..model.language_model import LanguageModel


LARGEST_SEED = 2**32 - 1

_RECORDS = (
    "trace",
    "average",
    "neurons",
    "explain",
)  # what stands under "factsmith" in the JSON beside a picture

# ---- options --------------------------------------------------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

Where = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        metavar="DIR",
        help="The workspace; by default the current folder, if it is one.",
    ),
]

Device = Annotated[
    str | None,
    typer.Option(help="Where to run the model, such as cuda or cpu.", show_default="cpu"),
]

Out = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Also draw it: .png, .svg or .pdf; without a suffix .png and .svg. The numbers go beside it.",
    ),
]

Model = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="A bundled model, a folder or a hub id.")
]

ModelAndPrompt = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PROMPT",
        help="A bundled model, a folder or a hub id (left out: the workspace's), and the text.",
    ),
]


def model_and_prompt(words: list[str]) -> tuple[str | None, str]:
    """The two apart; raises InputError for more words than two."""
    if len(words) > 2:
        raise InputError(
            f"got {len(words)} words where a model and a text are expected; put the text in quotes"
        )
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def model_and_facts(words: list[str]) -> tuple[str | None, Path | None]:
    """A model and a file of facts, where they are given; raises InputError for more than one of either."""
    files = [word for word in words if is_facts(word)]
    models = [word for word in words if word not in files]
    if len(files) > 1 or len(models) > 1:
        raise InputError(
            f"got {' '.join(words)!r}; expected at most one model and one file of facts (.yaml or .json)"
        )
    return (models[0] if models else None), (Path(files[0]) if files else None)


def is_facts(word: str) -> bool:
    """Whether an argument is a file of facts, and not a text that ends in such a name."""
    if Path(word).suffix.lower() not in (".yaml", ".yml", ".json"):
        return False
    return not any(map(str.isspace, word)) or os.path.isfile(word)


# ---- models and workspaces ------------------------------------------------------------------------------------------------------------


def need_model(model: str | None, workspace: Path | None) -> None:
    """Raises InputError when there is neither a model nor a workspace."""
    if model is None and workspace is None and not (Path() / "ledger.db").is_file():
        raise InputError(
            "no model was given and this folder is no workspace; name a model before everything else, or a workspace with --workspace"
        )


def load_model(name: str, device: str | None, dtype: str | None, tell: Progress) -> LanguageModel:
    """A model by name, with dtype "float32" or the like."""
    tell(f"loading {Path(name).name}", 0, None)
    import torch

    from ..model.load import load

    return load(name, device=device, dtype=None if dtype is None else getattr(torch, dtype))


@contextlib.contextmanager
def opened(
    model: str | None, workspace: Path | None, device: str | None, tell: Progress
) -> Iterator[tuple[LanguageModel, Workbench | None]]:
    """A model, and the workbench that holds it if there is a workspace: the one given, or the current folder if made for this model."""
    if workspace is None and model is not None and _holds(Path(), model):
        workspace = Path()
    if workspace is None and model is not None and not (Path(model) / "ledger.db").is_file():
        yield load_model(model, device, None, tell), None
        return
    if workspace is None:
        workspace, model = Path(model or ""), None
    with Ledger(workspace) as ledger:
        name, dtype = ledger.model, ledger.dtype
    lm = load_model(model or name, device, dtype, tell)
    from ..keep.workbench import Workbench

    with Workbench(lm, workspace) as bench:
        yield lm, bench


def _holds(folder: Path, model: str) -> bool:
    """Whether a folder is a workspace made for this model."""
    if not (folder / "ledger.db").is_file():
        return False
    with Ledger(folder) as ledger:
        return ledger.model in (model, str(Path(model).resolve()))


# ---- printing -------------------------------------------------------------------------------------------------------------------------


def print_result(
    found: dict[str, Any],
    show: Callable[[Console], None],
    as_json: bool,
    saved: Sequence[Path] | None = None,
) -> None:
    """One JSON document, or what `show` prints; either names the files `saved`, of a command that takes --out."""
    if as_json:
        print_json(found if saved is None else {**found, "out": [str(path) for path in saved]})
        return
    console = plain_console()
    show(console)
    for path in saved or ():
        line(console, "saved", str(path))


def print_json(found: Any) -> None:
    """One line on standard output."""
    typer.echo(_json(found))


def _json(found: Any) -> str:
    return json.dumps(found, ensure_ascii=False, allow_nan=False)


def complain(what: str, text: str) -> None:
    """A "warning" or "error" on standard error."""
    style = "bold yellow" if what == "warning" else "bold red"
    plain_console(stderr=True).print(
        Text.assemble((f"{what}: ", style), visible(text)), soft_wrap=True
    )


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A function to report progress to, shown as bars on standard error when that is a terminal; gone at the end.

    What can be spared is said in a line that stays, wherever standard error goes.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _Reporter(bars)


class _Reporter:
    """Shows progress as bars, and notes as lines that stay."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Show how far a step is; an earlier step's bar goes."""
        if step not in self.tasks:
            for task in self.tasks.values():
                self.bars.update(task, visible=False)
            self.tasks[step] = self.bars.add_task(step, total=total)
        self.bars.update(self.tasks[step], completed=done, total=total)

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Print a note, with the option that changes it."""
        option = "" if argument is None else f" (option: --{argument})"
        self.bars.console.print(Text.assemble(("note: ", "bold"), text, option), soft_wrap=True)


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it stands."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def plain_table(*numbers: str, caption: str | None = None) -> Table:
    """A table without lines, with some columns of numbers."""
    table = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        caption=caption,
        caption_justify="left",
        caption_style="dim",
    )
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def show_tables(tables: Sequence[tables.Table]) -> Callable[[Console], None]:
    """What prints some tables."""

    def show(console: Console) -> None:
        for table in tables:
            console.print(table.as_rich())

    return show


def checks_table(checks: Sequence[dict[str, Any]]) -> Table:
    """Before and after, one row a prompt: answers beside probabilities."""
    table = plain_table(caption="p: of the target; for neighbours, of the answer before")
    table.add_column("")
    table.add_column("prompt", min_width=24, overflow="fold")
    for name in ("before", "after"):
        table.add_column(name, overflow="fold")
        table.add_column("p", justify="right", no_wrap=True)
    table.add_column("")
    for check in checks:
        before, after = (
            "" if check[name] is None else f"{check[name]:.3f}" for name in ("p_before", "p_after")
        )
        held = Text("ok", style="green") if check["held"] else Text("no", style="bold red")
        cells = (check["role"], check["prompt"], check["before"], before, check["after"], after)
        table.add_row(*(Text(visible(cell)) for cell in cells), held)
    return table


def line(console: Console, first: str, rest: str, style: str = "") -> None:
    """Two texts in a line of whatever length; the first is bold, or the second has a style."""
    console.print(
        Text.assemble((visible(first), "" if style else "bold"), " ", (visible(rest), style)),
        soft_wrap=True,
    )


def in_workspace(workspace: Path | None) -> str:
    """The option of a command to type that says which workspace."""
    return "" if workspace is None or workspace == Path() else f" -w {shlex.quote(str(workspace))}"


# ---- pictures -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """The files that one --out names: pictures, of an average also curves, and the numbers beside them."""

    pictures: list[Path]
    curves: list[Path]
    record: Path
    table: Path


def output(out: str | None, *, curves: bool = False, inputs: Sequence[Path] = ()) -> Output | None:
    """What --out names, if anything; raises InputError where that cannot be written, or is somebody else's file."""
    if out is None:
        return None
    from ..show.plots.drawing import check_path

    path = Path(out)
    is_hidden = (
        path.name.startswith(".") and not path.suffix
    )  # ".png", "..": a suffix without a name
    if not path.name or is_hidden or out.endswith(("/", os.sep)) or path.is_dir():
        example = Path(*([path] if path.is_dir() else []), "trace")
        raise InputError(
            f"--out {out!r} names no file; expected a file name, such as {example} or {example}.png"
        )
    # The 2 in "v1.2" is no suffix.
    suffix = "" if path.suffix[1:].isdigit() else path.suffix
    stem = path.name.removesuffix(suffix)
    endings = [suffix] if suffix else [".png", ".svg"]
    files = Output(
        pictures=[path.with_name(stem + ending) for ending in endings],
        curves=[path.with_name(f"{stem}-curves{ending}") for ending in endings] if curves else [],
        record=path.with_name(f"{stem}.json"),
        table=path.with_name(f"{stem}.csv"),
    )
    for picture in (*files.pictures, *files.curves):
        check_path(picture)
    for file in (*files.pictures, *files.curves, files.record, files.table):
        if file.is_dir():
            raise InputError(
                f"--out {out!r} would write {file}, which is a folder; choose another name"
            )
        if any(file.exists() and given.exists() and file.samefile(given) for given in inputs):
            raise InputError(
                f"--out {out!r} would write {file}, which is the file of facts itself; choose another name"
            )
    ours = _is_record(files.record)
    for file in (files.record, files.table):
        if file.exists() and not ours:
            raise InputError(
                f"--out {out!r} would replace {file}, which is no record of an earlier run; choose another name"
            )
    return files


def _is_record(path: Path) -> bool:
    """Whether a file is numbers that this program wrote beside a picture."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("factsmith") in _RECORDS


def save(
    files: Output | None,
    command: str,
    found: Any,
    draw: Callable[[Path], object],
    draw_curves: Callable[[Path], object] | None = None,
) -> list[Path]:
    """The pictures, and their numbers beside them as JSON (marked as ours) and CSV; what was written."""
    if files is None:
        return []
    for picture in files.pictures:
        draw(picture)
    write_file(files.record, (_json({"factsmith": command, **found.to_dict()}) + "\n").encode())
    rows = found.rows()
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(files.table, text.getvalue().encode())
    if draw_curves is not None:
        for picture in files.curves:
            draw_curves(picture)
    return [*files.pictures, files.record, files.table, *files.curves]


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """{"steps": 40, "clamp": 1.5} from ["steps=40", "clamp=1.5"]; "none" is None, what is no number stays text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(f"--set takes NAME=VALUE, such as steps=40; got {pair!r}")
        found[name.strip()] = read_value(value.strip())
    return found


def read_value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return (
        int(number)
        if "e" in text.lower() and number.is_integer() and abs(number) < 2**53
        else number
    )  # 1e3 counts, as 1000 does
