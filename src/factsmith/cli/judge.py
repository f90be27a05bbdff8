"""Judge: edits, and what servers say, by the questions of benchmarks."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError, ServerError
from ..core.files import check_writable
from ..core.pairs import read_value
from ..core.progress import Progress
from ..core.tables import Table
from ..corpus.own import texts_of
from ..remote.client import is_url
from . import completing
from .engine import engine, on_workers
from .loading import loading
from .models import load_model
from .options import Device, Json, Seed
from .printing import complain, flag_of, print_result
from .waiting import during, progress

if TYPE_CHECKING:
    from ..judge.ability import HarnessTasks
    from ..judge.campaign import Judged
    from ..model.language_model import LanguageModel

# ── options ───────────────────────────────────────────────────────────────────────────────────────

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completing.models,
        help="A bundled model, a folder, a GGUF file, or a hub id; or the URL of a server.",
    ),
]

ServedNames = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A model of the server; may be repeated.",
        show_default="its base model and all adapters",
    ),
]

SuiteName = Annotated[
    str,
    typer.Option(
        metavar="SUITE",
        autocompletion=completing.suites,
        help="atlas; a file of records; or KIND:FILE, such as zsre-rome:FILE.",
    ),
]

Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="NAME=FIELD",
        help="Where a file of another layout holds a part of its records: subject=entity, "
        "prompt=question, target=answer.new, paraphrases=others, and so on; may be repeated.",
    ),
]

Methods = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        autocompletion=completing.judged,
        help="Some of rome, r-rome, memit, emmet, alphaedit, append, ft-l, lora; or your own, as "
        "module:function or file.py:function.",
    ),
]

Sizes = Annotated[str, typer.Option(metavar="N,M", help="How many records are written at a time.")]

Sequenced = Annotated[
    bool,
    typer.Option(
        "--sequence",
        help="Write each batch on top of those before it, and see what is left of the first.",
    ),
]

Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Judge only so many, drawn at random.", show_default="all"),
]

KnownOnly = Annotated[
    bool,
    typer.Option(
        "--known/--all", help="Leave out records whose old object the model does not say."
    ),
]

Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at a malformed record, instead of leaving it out.")
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.NAME=VALUE",
        help="A setting, such as memit.steps=40 or rome.layer=5; may be repeated.",
    ),
]

Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="The settings published for a model of this shape, layers included."
    ),
]

JudgeTexts = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Plain text for second moments, and to measure drift on; may be repeated. The word "
        "own asks for text that the model writes.",
        show_default="kept moments, or bundled text; for drift the model's own",
    ),
]

DriftTokens = Annotated[
    int, typer.Option("--drift-tokens", min=0, help="How much text drift is measured on.")
]

Continued = Annotated[
    int,
    typer.Option(min=0, help="For how many records the model goes on writing, to see if it can."),
]

Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Tasks of lm-evaluation-harness, before any edit and after the last one.",
        show_default="none",
    ),
]

TasksFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Tasks of your own, a YAML file each.")
]

TasksLimit = Annotated[int | None, typer.Option(min=1, help="Examples a task.", show_default="all")]

JudgeFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Keep all rows there, so that a killed run can go on, and write the report as "
        "report.html and report.md.",
    ),
]


_NEED_WEIGHTS = (
    "methods",
    "sizes",
    "sequence",
    "setting",
    "paper",
    "texts",
    "drift_tokens",
    "continued",
    "tasks",
    "tasks_folder",
    "tasks_limit",
    "device",
    "ray",
    "workers",
)
"""Parameters of `evaluate` that do not go with the URL of a server."""


# ── commands ──────────────────────────────────────────────────────────────────────────────────────


@on_workers
def evaluate(  # house: Typer reads one parameter for each option
    context: typer.Context,
    model: ModelName,
    suite: SuiteName = "atlas",
    models: ServedNames = None,
    field: Fields = None,
    methods: Methods = "rome,memit",
    sizes: Sizes = "1",
    sequence: Sequenced = False,
    limit: Limit = None,
    known_only: KnownOnly = True,
    strict: Strict = False,
    setting: Settings = None,
    paper: Paper = False,
    texts: JudgeTexts = None,
    drift_tokens: DriftTokens = 500,
    continued: Continued = 10,
    tasks: Tasks = None,
    tasks_folder: TasksFolder = None,
    tasks_limit: TasksLimit = None,
    folder: JudgeFolder = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Judge editing methods by the questions of a benchmark.

    Facts are written, the questions are asked, and the edits are taken back.

    \b
    Examples:
      factsmith evaluate atlas --limit 20
      factsmith evaluate atlas --methods rome,memit,ft-l \\
          --sizes 1,100 --limit 300 --out judged
      factsmith evaluate MODEL --suite FILE --methods memit \\
          --sizes 100 --sequence --out judged
      factsmith evaluate MODEL --suite FILE --field prompt=question \\
          --field target=answer --methods my_method.py:write
      factsmith evaluate http://127.0.0.1:8000 --suite FILE
    """
    fields = _fields(field or [])
    reading: dict[str, Any] = {"malformed": "fatal" if strict else "skip", "fields": fields}
    reading |= {"limit": limit, "seed": seed}
    if is_url(model):
        _refuse_for_servers(context)
        _evaluate_served(model, models, suite, reading, known_only, folder, as_json)
        return
    if models:
        raise InputError(
            f"--model names a model of a server, and MODEL is {model!r}; give the server's URL"
        )
    names, numbers, changes = _names(methods), _numbers(sizes), _by_method(setting or [])
    task_names = _task_names(tasks, tasks_folder, tasks_limit)
    corpus = texts_of(texts)
    if folder is not None:
        _check_folder(folder)
    with progress() as tell:
        tell("checking the arguments", 0, None)
        from ..judge.suites import load_suite
        from ..patch.editors import check_methods, configured, editors

        check_methods(names, changes)
        harness = _harness(task_names, tasks_folder, tasks_limit, seed)
        records = load_suite(suite, **reading)
        lm = load_model(model, device, None, tell)
        from ..judge.campaign import Campaign
        from ..judge.schedule import Schedule

        config = configured(lm, names, changes, paper=paper)

        def make_editors(lm: LanguageModel, methods: Sequence[str], /, **options: Any) -> Any:
            options["progress"] = tell  # the editors' notes are no warnings
            return editors(lm, methods, config=config, **options)

        campaign = Campaign(
            lm,
            records,
            names,
            numbers,
            folder,
            editors=make_editors,
            schedule=Schedule(
                sequence=sequence, drift_tokens=drift_tokens, continued=continued, seed=seed
            ),
            known_only=known_only,
            texts=corpus,
            probe=None if harness is None else harness.on(lm),
        )
        with engine(tell), _saying_where_it_stopped(folder):
            judged = campaign.run(progress=_Warnings(tell))
        result, tables, saved = _reported(judged, seed, folder, tell)
    print_result(result, tables, as_json, saved=saved)


def _evaluate_served(
    url: str,
    models: list[str] | None,
    suite: str,
    reading: dict[str, Any],
    known_only: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Judge the models of a server; `reading` says how the suite is read."""
    if folder is not None:
        _check_folder(folder)
    with progress() as tell:
        tell("checking the arguments", 0, None)
        from ..judge.served import ServedRun
        from ..judge.suites import load_suite
        from ..remote.server import Server

        records = load_suite(suite, **reading)
        limit, seed = reading["limit"], reading["seed"]
        warn = _Warnings(tell)
        with Server.open(url, progress=tell) as server, _saying_where_it_stopped(folder):
            judged = ServedRun.of(server, models, warn).campaign(
                records, folder, known_only=known_only, seed=seed, limit=limit, progress=warn
            )
        result, tables, saved = _reported(judged, seed, folder, tell)
    print_result(result, tables, as_json, saved=saved)


def _refuse_for_servers(context: typer.Context) -> None:
    """Raise an InputError if an option was given that needs the weights of a model."""
    given = [
        flag_of(name)
        for name in _NEED_WEIGHTS
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    given += [flag_of(name) for name, value in vars(loading.get()).items() if value]
    if given:
        raise InputError(
            f"{', '.join(map(str, given))}: a server keeps its weights, and this needs them. Leave "
            "it out, or name the model itself instead of a URL."
        )


def _reported(
    judged: Judged, seed: int, folder: Path | None, tell: Progress
) -> tuple[dict[str, Any], list[Table], list[Path] | None]:
    """Return the report as fields and as tables, and the paths of its files, if it has a folder."""
    from ..show.reports.record import Report

    report = Report(
        runs=judged.evaluations,
        suite=judged.suite,
        seed=seed,
        left_out=judged.left_out,
        version=importlib.metadata.version("factsmith"),
    )
    saved = None if folder is None else _write_report(report, folder, tell)
    return report.to_dict(), report.tables(), saved


def _harness(
    names: list[str], folder: Path | None, limit: int | None, seed: int
) -> HarnessTasks | None:
    """Return the tasks of lm-evaluation-harness; None without any."""
    if not names:
        return None
    from ..judge.ability import find_tasks

    return find_tasks(names, folder, limit=limit, seed=seed)


# ── progress ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _saying_where_it_stopped(folder: Path | None) -> Iterator[None]:
    """On Ctrl-C, or if a server is gone, say where the rows are that were judged so far."""
    try:
        yield
    except (KeyboardInterrupt, ServerError):
        if folder is not None:
            complain(
                "stopped", f"what was judged is in {folder}; the same command goes on from there"
            )
        raise


class _Warnings:
    """Progress whose notes are warnings that stay on standard error."""

    def __init__(self, tell: Progress) -> None:
        self.tell = tell

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Show how far a step is."""
        self.tell(step, done, total)

    def note(self, text: str, *, argument: str | None = None) -> None:
        """Print a warning."""
        option = "; --all judges them" if argument == "known_only" else ""
        complain("warning", f"{text}{option}")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def _check_folder(folder: Path) -> None:
    """Check, before the work, that the report can be written into a folder."""
    with during("starting"):
        from ..show.pages.page import check_page

    check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {str(folder)!r} is a file; name a folder")
    page, text = folder / "report.html", folder / "report.md"
    if folder.is_dir():
        check_page(page)
        if text.exists() and not page.exists():
            raise InputError(
                f"{text} exists and is no report of factsmith; choose another folder with --out"
            )


def _write_report(report: Any, folder: Path, tell: Progress) -> list[Path]:
    """Write report.html and report.md, and return their paths."""
    from ..show.reports.page import report_markdown, report_page

    tell("writing the report", 0, None)
    page, text = folder / "report.html", folder / "report.md"
    report_page(report, page)
    report_markdown(report, text)
    return [page, text]


# ── parsing ───────────────────────────────────────────────────────────────────────────────────────


def _names(words: str) -> list[str]:
    return [name.strip() for name in words.split(",") if name.strip()]


def _fields(pairs: list[str]) -> dict[str, str] | None:
    """Return {"target": "answer.new"} for target=answer.new; None if nothing was given."""
    fields: dict[str, str] = {}
    for pair in pairs:
        name, _, path = (part.strip() for part in pair.partition("="))
        if not name or not path:
            raise InputError(f"--field is {pair!r}; give NAME=FIELD, such as prompt=question")
        if name in fields:
            raise InputError(f"--field gives {name} twice; leave one out")
        fields[name] = path
    return fields or None


def _numbers(sizes: str) -> list[int]:
    """Return [1, 100] for "1,100"."""
    parts = [part.strip() for part in sizes.split(",")]
    are_counts = all(part.isascii() and part.isdigit() and 0 < int(part) <= 10**9 for part in parts)
    if not are_counts or len({int(part) for part in parts}) < len(parts):
        raise InputError(f"--sizes is {sizes!r}; give numbers of records, each once, such as 1,100")
    return [int(part) for part in parts]


def _task_names(tasks: str | None, folder: Path | None, limit: int | None) -> list[str]:
    """Return the names of tasks; there must be one if any option about tasks is given."""
    names = _names(tasks or "")
    if not names and (tasks is not None or folder is not None or limit is not None):
        raise InputError(
            f"--tasks is {tasks!r}; name tasks of lm-evaluation-harness, such as hellaswag"
        )
    return names


def _by_method(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """Return {"memit": {"steps": 40, "layers": (3, 4)}} for memit.steps=40 and memit.layers=3,4."""
    settings: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        method, dot, setting = name.strip().partition(".")
        if not (dot and method and setting and value.strip()):
            raise InputError(f"--set is {pair!r}; give METHOD.NAME=VALUE, such as memit.steps=40")
        of_method = settings.setdefault(method, {})
        if setting in of_method:
            raise InputError(f"--set gives {method}.{setting} twice; leave one out")
        values = tuple(read_value(part.strip()) for part in value.split(","))
        of_method[setting] = values[0] if len(values) == 1 else values
    return settings
