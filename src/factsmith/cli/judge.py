"""Judge: edits by what benchmarks ask, with the model as it was beside them; and what a patch does to everything else."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..core.errors import DamagedError, FingerprintError, InputError, NumericsError
from ..core.files import check_writable, file_digest, write_file
from ..core.tables import counted
from ..corpus.paragraphs import Paragraphs
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Model,
    Where,
    complain,
    line,
    load_model,
    need_model,
    opened,
    print_result,
    progress,
    read_value,
    show_tables,
)

if TYPE_CHECKING:
    from ..judge.evaluation import Evaluation


Seed = Annotated[
    int,
    typer.Option(min=0, max=LARGEST_SEED, help="Of samples, contexts and whatever else is drawn."),
]


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundled model, a folder, or a hub id.")
    ],
    suite: Annotated[
        str,
        typer.Option(
            metavar="SUITE", help="atlas; a file of records; or KIND:FILE, such as zsre-rome:FILE."
        ),
    ] = "atlas",
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Some of rome, r-rome, memit, emmet, alphaedit, ft-l, lora."
        ),
    ] = "rome,memit",
    sizes: Annotated[
        str, typer.Option(metavar="N,M", help="How many records are written at a time.")
    ] = "1",
    sequence: Annotated[
        bool,
        typer.Option(
            "--sequence",
            help="Write each batch upon those before it, and see what is left of the first.",
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A sample of so many records.", show_default="all")
    ] = None,
    known: Annotated[
        bool,
        typer.Option(
            "--known/--all", help="Leave out records whose old object the model does not say."
        ),
    ] = True,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Stop at a malformed record, instead of leaving it out."),
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.NAME=VALUE",
            help="A setting, such as memit.steps=40 or rome.layer=5; may be repeated.",
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="The settings published for a model of this shape, layers included."
        ),
    ] = False,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text for second moments, and to measure drift on; may be repeated.",
            show_default="moments that are kept, or the model's own text",
        ),
    ] = None,
    drift_tokens: Annotated[
        int, typer.Option("--drift-tokens", min=0, help="How much text drift is measured on.")
    ] = 500,
    continued: Annotated[
        int,
        typer.Option(
            min=0, help="For how many records the model goes on writing, to see if it can."
        ),
    ] = 10,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Tasks of lm-evaluation-harness, before and behind the last edit.",
            show_default="none",
        ),
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tasks of your own, a YAML file each.")
    ] = None,
    tasks_limit: Annotated[
        int | None, typer.Option(min=1, help="Examples a task.", show_default="all")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep all rows there, to go on with after a kill, and write report.html, report.md.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Judge editing methods: write facts, ask what a benchmark asks, take them back; success beside what the model really says.

    \b
    Examples:
      factsmith evaluate atlas --limit 20
      factsmith evaluate atlas --methods rome,memit,alphaedit,ft-l --sizes 1,100 --limit 300 --out judged
      factsmith evaluate path/to/model --suite counterfact.json --methods memit --sizes 100 --sequence --out judged
    """
    names, numbers, changes = _names(methods), _numbers(sizes), _by_method(setting or [])
    wanted = [name for name in map(str.strip, (tasks or "").split(",")) if name]
    if not wanted and (tasks is not None or tasks_folder is not None or tasks_limit is not None):
        raise InputError(
            f"--tasks names tasks of lm-evaluation-harness, such as hellaswag; got {tasks!r}"
        )
    corpus = Paragraphs(texts) if texts else None
    if out is not None:
        _check_out(out)
    with progress() as tell:
        lm = load_model(model, device, None, tell)
        from ..judge import run as runner
        from ..judge.ability import ability
        from ..judge.suites import load_suite
        from ..judge.usable import UNKNOWN, usable
        from ..patch.editors import configured, editors
        from ..show.reports.page import report_markdown, report_page
        from ..show.reports.record import Report

        config = configured(lm, names, changes, paper=paper)
        probe = (
            ability(lm, wanted, folder=tasks_folder, limit=tasks_limit, seed=seed)
            if wanted
            else None
        )
        tell(f"reading {Path(suite).name}", 0, None)
        found = load_suite(suite, limit=limit, seed=seed, malformed="fatal" if strict else "skip")
        records, left = usable(lm, found.records, known_only=known)
        for why, count in left.items():
            complain(
                "warning", f"{counted(count, 'record')} of {len(found.records):,} left out: {why}{'; --all judges them' if why == UNKNOWN else ''}"
            )
        if found.skipped:
            complain(
                "warning", f"malformed: {found.left_out} left out, the first: {found.skipped[0]}"
            )
        if not records:
            raise InputError(
                f"none of {counted(len(found.records), 'record')} can be judged; try another --suite, or --all"
            )
        numbers = _fitting(numbers, len(records))
        compared = None if corpus is None else list(itertools.islice(corpus, drift_tokens))
        made_from = {
            "model": lm.fingerprint,
            "suite": found.digest,
            "layout": found.name,
            "limit": limit,
            "seed": seed,
            "known": known,
            "texts": None if texts is None else [file_digest(file) for file in texts],
            "drift_tokens": drift_tokens,
        }
        if out is not None:  # before moments are computed, which takes longest
            _claim(out, made_from, {})
        moments = None if out is None else out / "moments"
        writers = editors(
            lm, names, config=config, texts=corpus, folder=moments, seed=seed, progress=tell
        )
        if out is not None:
            _claim(
                out,
                made_from,
                {name: str(getattr(write, "description", "")) for name, write in writers.items()},
            )

        def judged(size: int) -> runner.Evaluation:
            def told(what: str, done: int, total: int | None) -> None:
                tell(f"{what}, {size:,} at a time", done, total)

            folder = None if out is None else out / f"{'sequence' if sequence else 'size'}-{size}"
            return runner.evaluate(
                lm,
                records,
                writers,
                size=size,
                sequence=sequence,
                drift_tokens=drift_tokens,
                texts=compared,
                continued=continued,
                probe=probe,
                seed=seed,
                folder=folder,
                progress=told,
            )

        try:
            runs = [judged(size) for size in numbers]
        except KeyboardInterrupt:
            if out is not None:
                complain(
                    "stopped", f"what was judged is in {out}; the same command goes on from there"
                )
            raise
        if out is not None:  # what was judged there before belongs to the same page
            kept = (
                runner.Evaluation.load(file.parent) for file in sorted(out.glob("s*-*/rows.jsonl"))
            )
            runs += [
                run
                for run in kept
                if (run.size, run.sequence) not in {(own.size, own.sequence) for own in runs}
            ]
        runs = [run for each in runs if (run := _finished(each)) is not None]
        for run in runs:
            for editor in run.editors:
                if broken := run.measured(editor).get("broken"):
                    edits = counted(int(broken), "edit")
                    complain(
                        "warning",
                        f"{editor}, {run.pace}: {edits} left a model without finite numbers; what it was asked counts as wrong",
                    )
            for (editor, unit), why in list(run.failed.items())[:1]:
                failures = counted(len(run.failed), "edit")
                complain(
                    "warning",
                    f"{failures}, {run.pace}, could not be made, the first {editor}, edit {unit}: {why}",
                )
        report = Report(
            runs=runs,
            suite=found,
            seed=seed,
            left_out=left,
            version=importlib.metadata.version("factsmith"),
        )
        saved = None if out is None else [out / "report.html", out / "report.md"]
        if saved is not None:
            tell("writing the report", 0, None)
            report_page(report, saved[0])
            report_markdown(report, saved[1])
        result = report.to_dict()
    print_result(result, show_tables(report.tables()), as_json, saved)


def drift(
    model: Model = None,
    delta: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A saved delta; without one the workspace's patches, all of them."
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Exit code 4 above it: kl_text, kl_text_worst, kl_facts, changed_share or perplexity; may be repeated.",
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text to compare on; may be repeated.",
            show_default="the model's own",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="How much of it.")] = 2000,
    facts: Annotated[int, typer.Option(min=0, help="How many unrelated facts to ask.")] = 200,
    seed: Seed = 0,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tell what a patch does to everything else: prose, unrelated facts; in seconds, against limits.

    \b
    Examples:
      factsmith drift -w my-workspace --limit kl_text=0.05 --limit changed_share=0.02
      factsmith drift atlas --delta my-delta
    """
    limits = _limits(limit or [])
    need_model(model, workspace)
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        from ..edit.delta import Delta, applied
        from ..judge.drift import drift as measure

        options: dict[str, Any] = {
            "texts": corpus,
            "max_tokens": max_tokens,
            "n_facts": facts,
            "seed": seed,
            "progress": tell,
        }
        if delta is None and bench is not None:
            found = bench.drift(**options)
        elif delta is None:
            raise InputError(
                "nothing to judge; name a saved delta with --delta, or a workspace with --workspace"
            )
        else:
            loaded = Delta.load(delta)
            if loaded.fingerprint != lm.fingerprint:
                raise FingerprintError(
                    f"{delta} was made on a model with fingerprint {loaded.fingerprint[:12]}; {lm.name} has {lm.fingerprint[:12]} now: "
                    "name the model it was made on; if it stands on other patches, judge their workspace, without --delta: --workspace"
                )
            subjects = [fact.subject for fact in loaded.facts]
            found = measure(lm, lambda: applied(lm, loaded), without=subjects, **options)
    broken = found.exceeded(**limits)

    def show(console: Console) -> None:
        show_tables(found.tables())(console)
        for one in broken:
            line(console, "limit:", one, style="bold red")

    print_result({**found.to_dict(), "model": lm.name, "exceeded": list(broken)}, show, as_json)
    if broken:
        raise typer.Exit(NumericsError.exit_code)


def _names(methods: str) -> list[str]:
    return [name.strip() for name in methods.split(",") if name.strip()]


def _numbers(sizes: str) -> list[int]:
    """[1, 100] from "1,100"; raises InputError for what are no whole numbers above 0, each once."""
    parts = [part.strip() for part in sizes.split(",")]
    if not all(
        part.isascii() and part.isdigit() and 0 < int(part) <= 10**9 for part in parts
    ) or len(set(map(int, parts))) < len(parts):
        raise InputError(f"--sizes are numbers of records, each once, such as 1,100; got {sizes!r}")
    return [int(part) for part in parts]


def _fitting(sizes: list[int], n_records: int) -> list[int]:
    """Sizes of at most as many records as there are, each once."""
    for size in sizes:
        if size > n_records:
            complain(
                "warning",
                f"--sizes {size}: there are {counted(n_records, 'record')} to write, so {n_records:,} are written at a time",
            )
    return list(dict.fromkeys(min(size, n_records) for size in sizes))


def _finished(run: Evaluation) -> Evaluation | None:
    """A run without the editors that were stopped, which is said; None where no editor is left."""
    for editor, there in run.unfinished.items():
        complain(
            "warning",
            f"{editor}, {run.pace}: {there:,} of {run.units:,} edits are there; run it again to finish it",
        )
    found = run.finished()
    if len(run.editors) == 1 and not run.unfinished:
        complain("warning", f"{run.pace}: no method was judged to the end of an edit; run it again")
    return found if len(found.editors) > 1 else None


def _by_method(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """{"memit": {"steps": 40, "layers": (3, 4)}} from ["memit.steps=40", "memit.layers=3,4"]."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        method, dot, setting = name.strip().partition(".")
        if not (dot and method and setting and value.strip()):
            raise InputError(f"--set takes METHOD.NAME=VALUE, such as memit.steps=40; got {pair!r}")
        parts = [read_value(part.strip()) for part in value.split(",")]
        if setting in found.get(method, {}):
            raise InputError(f"--set gives {method}.{setting} twice; leave one out")
        found.setdefault(method, {})[setting] = parts[0] if len(parts) == 1 else tuple(parts)
    return found


def _limits(pairs: list[str]) -> dict[str, float]:
    """{"kl_text": 0.05} from ["kl_text=0.05"]."""
    from ..judge.drift import LIMITS

    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name.strip() in found:
            raise InputError(f"--limit gives {name.strip()} twice; leave one out")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise InputError(
                f"--limit takes NAME=VALUE, such as kl_text=0.05; got {pair!r}"
            ) from None
        if name.strip() not in LIMITS or not 0 <= found[name.strip()] < math.inf:
            raise InputError(
                f"--limit takes a number of at least 0 for one of {', '.join(LIMITS)}; got {pair!r}"
            )
    return found


def _claim(out: Path, made_from: dict[str, Any], settings: dict[str, str]) -> None:
    """Say in the folder what is judged there, and {method: its settings}, beside those of other methods that are there.

    Raises InputError where that is something else, DamagedError where it cannot be read.
    """
    file = out / "judged.json"
    try:
        held = (
            json.loads(file.read_text(encoding="utf-8"))
            if file.is_file()
            else {**made_from, "settings": {}}
        )
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file} cannot be read ({error}); choose another folder") from None
    if not isinstance(held, dict) or not isinstance(there := held.get("settings"), dict):
        raise InputError(
            f"{out} holds what another version judged; choose another folder with --out"
        )
    if different := [name for name, value in made_from.items() if held.get(name) != value]:
        raise InputError(
            f"{out} holds what was judged with another {', '.join(different)}; choose another folder with --out"
        )
    for name, told in settings.items():
        if there.get(name, told) != told:
            own, others = str(there[name]).split("; "), told.split("; ")
            apart = [
                ", ".join(part for part in some if part not in rest)
                for some, rest in ((own, others), (others, own))
            ]
            raise InputError(
                f"{out} holds {name} with other settings: {apart[0]} there, {apart[1]} here; choose another folder with --out"
            )
    if not file.is_file() or not settings.keys() <= there.keys():
        out.mkdir(parents=True, exist_ok=True)
        content = {**made_from, "settings": {**there, **settings}}
        write_file(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _check_out(out: Path) -> None:
    """Before the work, not after it: raises InputError or WorkspaceError where the report cannot be written."""
    from ..show.pages.page import check_page

    check_writable(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r} is a file; name a folder")
    if out.is_dir():
        check_page(out / "report.html")
        if (out / "report.md").exists() and not (out / "report.html").exists():
            raise InputError(
                f"{out / 'report.md'} is there already, and no report of factsmith's; choose another folder"
            )
