"""Judge: edits by what benchmarks ask, with the model as it was beside them; and what a patch does to everything else."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import FingerprintError, InputError, NumericsError
from ..files import check_writable
from ..tables import counted
from .common import (
    LARGEST_SEED,
    Device,
    Json,
    Model,
    Paragraphs,
    Where,
    complain,
    line,
    load_model,
    need_model,
    opened,
    print_result,
    progress,
    show_tables,
)

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of samples, contexts and whatever else is drawn.")]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a folder, or a hub id.")],
    suite: Annotated[str, typer.Option(metavar="SUITE", help="atlas; a file of records; or KIND:FILE, such as zsre-rome:FILE.")] = "atlas",
    methods: Annotated[str, typer.Option(metavar="A,B", help="Some of rome, r-rome, memit, emmet, alphaedit, ft-l, lora.")] = "rome,memit",
    sizes: Annotated[str, typer.Option(metavar="N,M", help="How many records are written at a time.")] = "1",
    sequence: Annotated[
        bool, typer.Option("--sequence", help="Write each batch upon those before it, and see what is left of the first.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="A sample of so many records.", show_default="all")] = None,
    known: Annotated[bool, typer.Option("--known/--all", help="Leave out records whose old object the model does not say.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a malformed record, instead of leaving it out.")] = False,
    texts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Plain text for second moments; may be repeated.", show_default="those kept, or the model's own"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep all rows there, to go on with after a kill, and write report.html, report.md.")
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
    names, numbers = _names(methods), _numbers(sizes)
    corpus = Paragraphs(texts) if texts else None
    if out is not None:
        _check_out(out)
    with progress() as tell:
        lm = load_model(model, device, None, tell)
        from ..editing import editors, usable
        from ..judge import evaluate as runner
        from ..judge.suites import load_suite
        from ..report import Report, report_markdown, report_page

        tell(f"reading {Path(suite).name}", 0, None)
        found = load_suite(suite, limit=limit, seed=seed, malformed="fatal" if strict else "skip")
        records, left = usable(lm, found.records, known_only=known)
        for why, count in left.items():
            complain("warning", f"{counted(count, 'record')} of {len(found.records):,} left out: {why}")
        if found.skipped:
            complain("warning", f"{counted(len(found.skipped), 'malformed record')} left out, the first: {found.skipped[0]}")
        if not records:
            raise InputError(f"none of {counted(len(found.records), 'record')} can be judged; try another --suite, or --all")
        moments = None if out is None else out / "moments"
        writers = editors(lm, names, texts=corpus, folder=moments, seed=seed, progress=tell)

        def judged(size: int) -> runner.Evaluation:
            def told(what: str, done: int, total: int | None) -> None:
                tell(f"{what}, {size:,} at a time", done, total)

            folder = None if out is None else out / f"{'sequence' if sequence else 'size'}-{size}"
            return runner.evaluate(lm, records, writers, size=size, sequence=sequence, folder=folder, progress=told)

        runs = [judged(size) for size in numbers]
        report = Report(runs=runs, suite=found, seed=seed, left_out=left, version=importlib.metadata.version("factsmith"))
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
        Path | None, typer.Option(metavar="DIR", help="A saved delta; without one the workspace's patches, all of them.")
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
        typer.Option(metavar="FILE", help="Plain text to compare on; may be repeated.", show_default="the model's own"),
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

        options: dict[str, Any] = {"texts": corpus, "max_tokens": max_tokens, "n_facts": facts, "seed": seed, "progress": tell}
        if delta is None and bench is not None:
            found = bench.drift(**options)
        elif delta is None:
            raise InputError("nothing to judge; name a saved delta with --delta, or a workspace with --workspace")
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
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 10**9 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise InputError(f"--sizes are numbers of records, each once, such as 1,100; got {sizes!r}")
    return [int(part) for part in parts]


def _limits(pairs: list[str]) -> dict[str, float]:
    """{"kl_text": 0.05} from ["kl_text=0.05"]."""
    from ..judge.drift import LIMITS

    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise InputError(f"--limit takes NAME=VALUE, such as kl_text=0.05; got {pair!r}") from None
        if name.strip() not in LIMITS or not found[name.strip()] >= 0:
            raise InputError(f"--limit takes a number of at least 0 for one of {', '.join(LIMITS)}; got {pair!r}")
    return found


def _check_out(out: Path) -> None:
    """Before the work, not after it: raises InputError or WorkspaceError where the report cannot be written."""
    from ..pages import check_page

    check_writable(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r} is a file; name a folder")
    if out.is_dir():
        check_page(out / "report.html")
        if (out / "report.md").exists() and not (out / "report.html").exists():
            raise InputError(f"{out / 'report.md'} is there already, and no report of factsmith's; choose another folder")
