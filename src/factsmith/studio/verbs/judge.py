"""The room Judge: campaigns that judge methods, and what they have judged so far.

A campaign runs for minutes, in a worker of its own and on a model of its own, so the workbench
stays free. Its rows are in the folder `studio/judged/NAME` of the workspace. A campaign that was
cancelled goes on when the same one is started again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from ...core.errors import InputError
from ...core.files import check_writable, make_folder
from ...core.progress import Progress, note, tell
from ...core.tables import Table, counted
from ...judge.campaign import Campaign, Judged
from ...judge.evaluation import Evaluation
from ...judge.layouts import LAYOUTS
from ...judge.rows import BASE
from ...judge.schedule import Schedule
from ...judge.suites import load_suite
from ...patch.editors import check_methods, editors
from ...show.charts.judging import share_chart
from ...show.pages.page import check_page
from ...show.reports.page import report_markdown, report_page
from ...show.reports.record import Report
from ...show.reports.tables import run_tables
from ..arguments import Arguments
from ..desk import Desk, Place
from ..facts import quoted, shell
from ..names import checked_name, inside
from ..verb import Answer, Verb
from .ledger import NoArguments

JudgedMethod = Literal["rome", "r-rome", "memit", "emmet", "alphaedit", "append", "ft-l", "lora"]

PAGE, TEXT = "report.html", "report.md"
"""The files of a report."""

_SUITES = (".json", ".jsonl", ".csv", ".tsv")


class EvaluateArguments(Arguments):
    """What to judge."""

    name: str = Field(
        default="first",
        title="Name",
        description="The name of the campaign. Its results are kept under this name. Start it "
        "again with the same name, and it goes on where it stopped.",
    )
    model: str = Field(
        default="",
        title="Model",
        description="The model to judge, without patches. Empty: the workspace's.",
        json_schema_extra={"widget": "model", "advanced": True},
    )
    suite: str = Field(
        default="atlas",
        title="Suite",
        description="The questions: atlas, or the name of a file in the workspace's folder "
        "studio/suites, with its layout before it if it needs one (zsre-rome:FILE).",
    )
    methods: tuple[JudgedMethod, ...] = Field(
        default=("rome", "memit"),
        title="Methods",
        description="The methods to compare: rome, r-rome, memit, emmet, alphaedit, append, ft-l "
        "or lora.",
        json_schema_extra={"suggestions": list(get_args(JudgedMethod))},
    )
    sizes: tuple[int, ...] = Field(
        default=(1,),
        title="Records at a time",
        description="How many records one edit writes. A record is a fact with its questions. "
        "Several sizes are judged one after the other.",
    )
    limit: int | None = Field(
        default=20,
        ge=1,
        title="Records",
        description="How many records to judge, drawn at random. Empty: 20.",
    )
    sequence: bool = Field(
        default=False,
        title="In sequence",
        description="Write each batch on top of those before it, and see what is left of the "
        "first.",
        json_schema_extra={"advanced": True},
    )
    known_only: bool = Field(
        default=True,
        title="Known records only",
        description="Leave out records whose old object the model does not say.",
        json_schema_extra={"advanced": True},
    )
    drift_tokens: int = Field(
        default=500,
        ge=0,
        le=100_000,
        title="Drift tokens",
        description="How much text drift is measured on.",
        json_schema_extra={"advanced": True},
    )
    continued: int = Field(
        default=10,
        ge=0,
        le=10_000,
        title="Continued",
        description="For how many records the model goes on writing, to see if it can.",
        json_schema_extra={"advanced": True},
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=2**32 - 1,
        title="Seed",
        description="Seed of everything that is drawn.",
        json_schema_extra={"advanced": True},
    )


class ReportArguments(Arguments):
    """One campaign."""

    name: str = Field(title="Name", description="The name of the campaign.")


# ── what runs ─────────────────────────────────────────────────────────────────────────────────────


def _evaluate(desk: Desk, arguments: EvaluateArguments, progress: Progress) -> Answer:
    folder = inside(judged_folder(desk.folder), arguments.name, "name")
    suite = suite_of(desk.folder, arguments.suite)
    if arguments.model and arguments.model not in desk.models:
        raise InputError(
            f"model is {arguments.model!r}; this studio reads {', '.join(desk.models)}",
            argument="model",
        )
    check_methods(arguments.methods)
    check_writable(folder)
    if folder.is_dir():
        check_page(folder / PAGE)
    note(progress, "The rows can be read while they arrive: Judge, Campaigns.")
    tell(progress, "reading the suite", 0, None)
    records = load_suite(suite, limit=arguments.limit, seed=arguments.seed)
    campaign = Campaign(
        desk.load(arguments.model, lambda *step: tell(progress, *step)),  # no stage of its own
        records,
        arguments.methods,
        arguments.sizes,
        folder,
        editors=editors,
        schedule=Schedule(
            sequence=arguments.sequence,
            drift_tokens=arguments.drift_tokens,
            continued=arguments.continued,
            seed=arguments.seed,
        ),
        known_only=arguments.known_only,
    )
    judged = _run(campaign, arguments.name, progress)
    tell(progress, "writing the report", 0, None)
    report = Report(
        runs=judged.evaluations,
        suite=judged.suite,
        seed=arguments.seed,
        left_out=judged.left_out,
        version=importlib.metadata.version("factsmith"),
    )
    make_folder(folder)
    report_page(report, folder / PAGE)
    report_markdown(report, folder / TEXT)
    return Answer(
        {**report.to_dict(), "out": [str(folder / PAGE), str(folder / TEXT)]},
        report.tables(),
        [share_chart(run) for run in report.runs],
        view={"name": arguments.name, "failures": report.failures()[:20]},
    )


def _run(campaign: Campaign, name: str, progress: Progress) -> Judged:
    """Run a campaign; an error about its folder is one about its name."""
    try:
        return campaign.run(progress=progress)
    except InputError as error:
        if error.argument != "folder":
            raise
        text = str(error).replace(str(campaign.folder), name)
        raise InputError(
            text.replace("choose another folder", "choose another name"), argument="name"
        ) from None


def _judged(desk: Desk, arguments: NoArguments, progress: Progress) -> Answer:
    folder = judged_folder(desk.folder)
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    campaigns = [one for name in names if (one := _campaign(folder / name)) is not None]
    rows = [
        (one["name"], ", ".join(one["methods"]), f"{one['edits']:,}", "yes" if one["page"] else "")
        for one in campaigns
    ]
    columns = {"campaign": "<", "methods": "<", "edits judged": ">", "report": "<"}
    return Answer(
        {"campaigns": campaigns},
        [Table(counted(len(rows), "campaign"), columns, rows)],
        view={
            "campaigns": campaigns,
            "links": [f"/judge/report?name={one['name']}" for one in campaigns],
            "suites": suites(desk.folder),
        },
    )


def _report(desk: Desk, arguments: ReportArguments, progress: Progress) -> Answer:
    folder = inside(judged_folder(desk.folder), arguments.name, "name")
    campaign = _campaign(folder)
    if campaign is None:
        raise InputError(
            f"name is {arguments.name!r}: no such campaign was judged here; start one, or choose "
            "one from the list",
            argument="name",
        )
    runs = [Evaluation.load(path.parent) for path in sorted(folder.glob("s*-*/rows.jsonl"))]
    parts = [_part(run) for run in runs]
    tables = [Table("how far each method is", _PART, [row for part in parts for row in part])]
    finished = [part for run in runs if len((part := run.finished()).editors) > 1]
    for run in finished:
        tables += run_tables(run)
    done = bool(runs) and not any(run.unfinished for run in runs) and campaign["page"]
    return Answer(
        {"name": arguments.name, "finished": done, "runs": [run.to_dict() for run in runs]},
        tables,
        [share_chart(run) for run in finished],
        notes=[] if done else ["Rows are still missing. Start the campaign again to go on."],
        view={**campaign, "finished": done},
    )


_PART = {"run": "<", "method": "<", "edits": ">", "of": ">"}


def _part(run: Evaluation) -> list[tuple[str, ...]]:
    """Return how far each editor of a run is."""
    rows: list[tuple[str, ...]] = []
    for editor in run.editors:
        edits = run.unfinished.get(editor, run.units)
        name = "the model before" if editor == BASE else editor
        rows.append((run.pace, name, f"{edits:,}", f"{run.units:,}"))
    return rows


def _campaign(folder: Path) -> dict[str, Any] | None:
    """Return what a folder has judged; None where it is the folder of no campaign."""
    if not folder.is_dir() or folder.is_symlink():
        return None
    runs = sorted(folder.glob("s*-*/rows.jsonl"))
    settings: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = dict(json.loads((folder / "judged.json").read_text("utf-8")).get("settings", {}))
    if not runs and not (folder / "judged.json").is_file():
        return None
    return {
        "name": folder.name,
        "methods": sorted(settings),
        "edits": sum(_edits(run) for run in runs),
        "page": (folder / PAGE).is_file(),
    }


def _edits(rows: Path) -> int:
    """Count the finished edits in a file of rows."""
    with contextlib.suppress(OSError), rows.open("rb") as file:
        return sum(line.startswith(b'{"ends"') for line in file)
    return 0


# ── known folders ─────────────────────────────────────────────────────────────────────────────────


def judged_folder(workspace: Path) -> Path:
    """Return the folder of all campaigns of a workspace."""
    return workspace / "studio" / "judged"


def suites(workspace: Path) -> list[str]:
    """Return the names of the suites that may be chosen."""
    folder = workspace / "studio" / "suites"
    files = folder.iterdir() if folder.is_dir() else ()
    return ["atlas", *sorted(file.name for file in files if file.suffix.lower() in _SUITES)]


def suite_of(workspace: Path, name: str) -> str:
    """Return a suite as `load_suite` takes it, from its name in a form.

    Raises:
        InputError: when it is neither bundled nor a file in the folder of suites.
    """
    if name == "atlas":
        return name
    layout, colon, file = name.partition(":")
    if not (colon and layout in LAYOUTS):
        layout, file = "", name
    try:
        path = inside(workspace / "studio" / "suites", file, "suite")
    except InputError:
        path = None
    if path is None or path.suffix.lower() not in _SUITES or not path.is_file():
        raise InputError(
            f"suite is {name[:80]!r}; give atlas, or the name of a file ({', '.join(_SUITES)}) in "
            f"{workspace / 'studio' / 'suites'}",
            argument="suite",
        )
    return f"{layout}:{path}" if layout else str(path)


# ── the same as code and as a command ─────────────────────────────────────────────────────────────


def _evaluate_in_python(arguments: EvaluateArguments, place: Place) -> str:
    workspace = Path(place.workspace)
    folder = judged_folder(workspace) / checked_name(arguments.name, "name")
    suite = suite_of(workspace, arguments.suite)
    schedule = {
        "sequence": arguments.sequence,
        "drift_tokens": arguments.drift_tokens,
        "continued": arguments.continued,
        "seed": arguments.seed,
    }
    return (
        "import json\n\nimport factsmith as fs\n"
        "from factsmith.judge.campaign import Campaign\n"
        "from factsmith.judge.schedule import Schedule\n\n"
        f"suite = fs.load_suite({quoted(suite)}, limit={arguments.limit}, seed={arguments.seed})\n"
        "campaign = Campaign(\n"
        f"    fs.load({quoted(arguments.model or place.model)}),\n"
        "    suite,\n"
        f"    {_listed(arguments.methods)},\n"
        f"    {list(arguments.sizes)},\n"
        f"    {quoted(str(folder))},\n"
        "    editors=fs.editors,\n"
        f"    schedule=Schedule({', '.join(f'{k}={v!r}' for k, v in schedule.items())}),\n"
        f"    known_only={arguments.known_only},\n"
        ")\n"
        "judged = campaign.run()\n"
        "report = fs.Report(\n"
        "    runs=judged.evaluations,\n"
        "    suite=judged.suite,\n"
        f"    seed={arguments.seed},\n"
        "    left_out=judged.left_out,\n"
        "    version=fs.__version__,\n"
        ")\n"
        "print(json.dumps(report.to_dict()))\n"
    )


def _listed(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(quoted, texts))}]"


def _evaluate_command(arguments: EvaluateArguments, place: Place) -> list[str]:
    workspace = Path(place.workspace)
    defaults = EvaluateArguments()
    words = ["--suite", suite_of(workspace, arguments.suite)]
    words += ["--methods", ",".join(arguments.methods)]
    words += ["--sizes", ",".join(map(str, arguments.sizes))]
    words += [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    words += ["--sequence"] if arguments.sequence else []
    words += [] if arguments.known_only else ["--all"]
    for name in ("drift_tokens", "continued", "seed"):
        if (value := getattr(arguments, name)) != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    folder = judged_folder(workspace) / checked_name(arguments.name, "name")
    return [shell("evaluate", arguments.model or place.model, *words, "--out", str(folder))]


def _report_in_python(arguments: ReportArguments, place: Place) -> str:
    folder = judged_folder(Path(place.workspace)) / checked_name(arguments.name, "name")
    return (
        "import json\nfrom pathlib import Path\n\nimport factsmith as fs\n\n"
        f"folder = Path({quoted(str(folder))})\n"
        'files = sorted(folder.glob("s*-*/rows.jsonl"))\n'
        "runs = [fs.Evaluation.load(rows.parent) for rows in files]\n"
        "print(json.dumps([run.to_dict() for run in runs]))\n"
    )


EVALUATE = Verb(
    "evaluate",
    "New campaign",
    "Judge editing methods on a benchmark: write its facts, ask its questions, and take the edits "
    "back.",
    EvaluateArguments,
    _evaluate,
    _evaluate_in_python,
    _evaluate_command,
    kind="write",
    worker="campaign",
    template="answers/evaluate.html",
    button="Start",
    options=lambda desk: {"suite": suites(desk.folder)},
    cached=False,
)
JUDGED = Verb(
    "judged",
    "Campaigns",
    "List the campaigns of this workspace, with their results.",
    NoArguments,
    _judged,
    lambda arguments, place: (
        "import json\nfrom pathlib import Path\n\n"
        f"folder = Path({quoted(str(judged_folder(Path(place.workspace))))})\n"
        "print(json.dumps(sorted(each.name for each in folder.glob('*'))))\n"
    ),
    lambda arguments, place: [],
    kind="instant",
    template="answers/judged.html",
    needs_form=False,
)
REPORT = Verb(
    "report",
    "Report",
    "Read the results of a campaign, also while it runs.",
    ReportArguments,
    _report,
    _report_in_python,
    lambda arguments, place: [
        f"less {judged_folder(Path(place.workspace)) / checked_name(arguments.name, 'name') / TEXT}"
    ],
    kind="instant",
    template="answers/report.html",
    button="Read",
)

JUDGING = (JUDGED, EVALUATE, REPORT)
