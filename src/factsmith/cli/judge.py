"""Judge: edits by the questions of benchmarks, and what a patch does to everything else."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..core.checks import check_number
from ..core.errors import InputError, NumericsError
from ..core.files import check_writable
from ..core.progress import Progress
from ..core.tables import visible
from ..corpus.own import texts_of
from ..keep.ledger import Ledger
from . import completing
from .models import load_model, need_model, opened, workspace_of
from .options import Device, Json, Model, Seed, Where, read_value
from .printing import complain, complain_of, print_result
from .waiting import during, progress

if TYPE_CHECKING:
    from ..judge.ability import HarnessTasks
    from ..model.language_model import LanguageModel

# ── options ───────────────────────────────────────────────────────────────────────────────────────

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completing.models,
        help="A bundled model, a folder, a GGUF file, or a hub id.",
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

SavedDelta = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A saved delta; without one all patches of the workspace."),
]

DriftLimits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Exit with code 4 if this measure is larger: kl_text, kl_text_worst, kl_facts, "
        "changed_share or perplexity. May be repeated.",
    ),
]

DriftTexts = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Plain text to compare on; may be repeated.",
        show_default="the model's own",
    ),
]


# ── commands ──────────────────────────────────────────────────────────────────────────────────────


def evaluate(  # house: Typer reads one parameter for each option
    model: ModelName,
    suite: SuiteName = "atlas",
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
    """
    fields = _fields(field or [])
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
        options: dict[str, Any] = {"malformed": "fatal" if strict else "skip", "fields": fields}
        records = load_suite(suite, limit=limit, seed=seed, **options)
        lm = load_model(model, device, None, tell)
        from ..judge.campaign import Campaign
        from ..judge.schedule import Schedule
        from ..show.reports.record import Report

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
        with _saying_where_it_stopped(folder):
            judged = campaign.run(progress=_Warnings(tell))
        report = Report(
            runs=judged.evaluations,
            suite=judged.suite,
            seed=seed,
            left_out=judged.left_out,
            version=importlib.metadata.version("factsmith"),
        )
        saved = None if folder is None else _write_report(report, folder, tell)
        result = report.to_dict()
    print_result(result, report.tables(), as_json, saved=saved)


def drift(  # house: Typer reads one parameter for each option
    model: Model = None,
    delta: SavedDelta = None,
    limit: DriftLimits = None,
    texts: DriftTexts = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="How much of it.")] = 2000,
    facts: Annotated[int, typer.Option(min=0, help="How many unrelated facts to ask.")] = 200,
    seed: Seed = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure what a patch does to everything else.

    It is compared on prose and on unrelated facts, against limits.

    \b
    Examples:
      factsmith drift -w my-workspace \\
          --limit kl_text=0.05 --limit changed_share=0.02
      factsmith drift atlas --delta my-delta
    """
    need_model(model, workspace)
    corpus = texts_of(texts)
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(progress())
        tell("checking the arguments", 0, None)
        limits = _limits(limit or [])
        saved = _saved(delta, workspace_of(model, workspace))
        lm, bench = stack.enter_context(opened(model, workspace, device, tell))
        from ..patch.drift import drift_of_saved

        options: dict[str, Any] = {
            "texts": corpus,
            "max_tokens": max_tokens,
            "n_facts": facts,
            "seed": seed,
            "progress": tell,
        }
        if saved is None:
            assert bench is not None  # `_saved` looked
            measured = bench.drift(**options)
        else:
            measured = drift_of_saved(lm, saved, **options)
    broken = measured.exceeded(**limits)
    result = {**measured.to_dict(), "model": lm.name, "exceeded": list(broken)}
    print_result(result, [*measured.tables(), *(_broken(words) for words in broken)], as_json)
    if broken:
        complain_of(NumericsError, "; ".join(broken), NumericsError.exit_code, argument="limit")
        raise typer.Exit(NumericsError.exit_code)


def _saved(folder: Path | None, workspace: Path | None) -> Any:
    """Return the saved delta; None for the patches of the workspace, of which there must be one."""
    if folder is not None:
        from ..patch.drift import saved_change

        return saved_change(folder)
    if workspace is None:
        raise InputError(
            "there is nothing to measure; name a saved delta with --delta, "
            "or a workspace with --workspace"
        )
    with Ledger(workspace) as ledger:
        if not ledger.active():
            raise InputError(
                "the workspace carries no patch, so nothing can have drifted; `factsmith log` "
                "lists the patches"
            )
    return None


def _harness(
    names: list[str], folder: Path | None, limit: int | None, seed: int
) -> HarnessTasks | None:
    """Return the tasks of lm-evaluation-harness; None without any."""
    if not names:
        return None
    from ..judge.ability import find_tasks

    return find_tasks(names, folder, limit=limit, seed=seed)


def _broken(limit: str) -> Text:
    """Return a line about a limit that is broken."""
    return Text.assemble("limit: ", (visible(limit), "bold red"))


# ── progress ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _saying_where_it_stopped(folder: Path | None) -> Iterator[None]:
    """On Ctrl-C, say where the rows are that were judged so far."""
    try:
        yield
    except KeyboardInterrupt:
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


def _limits(pairs: list[str]) -> dict[str, float]:
    """Return {"kl_text": 0.05} for kl_text=0.05."""
    from ..judge.drift import check_limits

    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        name = name.strip()
        if name in limits:
            raise InputError(f"--limit gives {name} twice; leave one out")
        try:
            limits[name] = check_number(float(value), f"the limit of {name}", least=0)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"--limit is {pair!r}; give NAME=VALUE, such as kl_text=0.05"
            ) from None
    return check_limits(limits)
