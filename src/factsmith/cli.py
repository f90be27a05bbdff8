"""The command line: parse, call, print; every decision is made in the library.

    factsmith init atlas my-workspace
    factsmith patch -w my-workspace --subject "Danielle Darrieux" --prompt "The mother tongue of {} is" --target English
    factsmith log -w my-workspace

Answers go to standard output (one JSON document with --json), progress, warnings and errors to standard error. Exit codes: 0 done,
2 the input cannot be used, 3 the model cannot be used, 4 numbers went wrong, 5 the workspace or its records, 1 anything else, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .errors import FactsmithError, InputError, NumericsError
from .fact import Fact, FactFile
from .ledger import Ledger, Revision

if TYPE_CHECKING:  # torch and transformers take seconds to import: commands that need a model import them, `--help` does not
    from .demo import Step
    from .model.load import LanguageModel
    from .workbench import Proposal, Verification, Workbench

app = typer.Typer(
    name="factsmith",
    help="Read, locate, patch and keep the facts in a transformer's feed-forward memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Kind(str, enum.Enum):
    """What `trace` restores."""

    state = "state"
    mlp = "mlp"
    attention = "attention"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Where = Annotated[
    Path | None, typer.Option("--workspace", "-w", metavar="DIR", help="The workspace; by default the current folder, if it is one.")
]
Device = Annotated[str | None, typer.Option(help="Where to run the model, such as cuda or cpu.", show_default="cpu")]
Reference = Annotated[str, typer.Argument(metavar="ID", help="A revision: its id or the first digits of it, or `latest`.")]
ModelAnd = typer.Argument(metavar="[MODEL] PROMPT", help="A bundled model, a folder or a hub id (left out: the workspace's), and the text.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code; errors of ours are one block on standard error, never a traceback."""
    try:
        for argument in sys.argv[1:] if arguments is None else arguments:
            if any("\udc80" <= c <= "\udcff" for c in argument):  # how Python marks bytes it could not decode
                raise InputError(f"the argument {argument!r} is not in UTF-8; write it in the terminal's own encoding")
        app(arguments, prog_name="factsmith")
    except FactsmithError as error:
        _complain("error", str(error))
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == 130:
            _complain("interrupted", "stopped before it was done; `factsmith log` lists what is recorded")
        raise
    except Exception as error:
        if os.environ.get("FACTSMITH_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error}; this is a fault in factsmith: please report it with what FACTSMITH_TRACEBACK=1 prints"
        _complain("unexpected error", text)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"factsmith {importlib.metadata.version('factsmith')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model, a folder, or a hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The workspace to make.")] = Path(),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: a folder that records a model's patches.

    The model's own files are never changed.

    \b
    Example:
      factsmith init atlas my-workspace
    """
    with _progress() as tell:
        lm = _load(model, device, None, tell)
    from .workbench import create

    with create(lm, folder) as ledger:
        made = {"workspace": str(folder.resolve()), "model": ledger.model, "dtype": ledger.dtype, "fingerprint": ledger.fingerprint}

    def show(console: Console) -> None:
        _line(console, f"workspace {made['workspace']};", f"model {ledger.model} ({ledger.dtype}), fingerprint {ledger.fingerprint[:10]}")
        _line(console, "next:", f'factsmith patch{_at(folder)} --subject S --prompt "... {{}} ..." --target T')

    _print(made, show, as_json)


@app.command()
def ask(
    words: Annotated[list[str], ModelAnd],
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest next tokens to list.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How far to continue the text.")] = 8,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask a model to continue a text, with the patches of the workspace if there is one.

    \b
    Examples:
      factsmith ask atlas "The mother tongue of Danielle Darrieux is"
      factsmith ask -w my-workspace "The mother tongue of Danielle Darrieux is"
    """
    model, prompt = _model_and_prompt(words)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, bench):
        answer = lm.answer([prompt], max_new_tokens=max_new_tokens)[0]
        likely = lm.next_tokens(prompt, top)
        revision = None if bench is None else bench.ledger.current
    found = {
        "prompt": prompt,
        "answer": answer,
        "next_tokens": [{"token": token, "probability": p} for token, p in likely],
        "model": lm.name,
        "revision": revision,
    }

    def show(console: Console) -> None:
        _line(console, prompt, answer, style="bold")
        for token, p in likely:
            _line(console, f"  {p:7.2%}", repr(token))

    _print(found, show, as_json)


@app.command()
def trace(
    words: Annotated[list[str], ModelAnd],
    subject: Annotated[str, typer.Option(help="The part of the text to corrupt.")],
    target: Annotated[str | None, typer.Option(help="The answer to follow.", show_default="the model's own")] = None,
    kind: Annotated[Kind, typer.Option(help="What to restore: the whole state, or what one part adds.")] = Kind.state,
    window: Annotated[int, typer.Option(help="Neighbouring layers restored together, for mlp and attention.")] = 10,
    samples: Annotated[int, typer.Option(help="Corrupted runs to average.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the heat map: .png, .svg or .pdf.")] = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find where a fact lives: causal tracing of one text, as a heat map of tokens and layers.

    \b
    Example:
      factsmith trace atlas "The mother tongue of Danielle Darrieux is" --subject "Danielle Darrieux" --out trace.png
    """
    from .locate.causal import causal_trace
    from .plot import check_path, heat_map, text_heat_map

    if out is not None:
        check_path(out)  # before the work, not after it
    model, prompt = _model_and_prompt(words)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, _):
        found = causal_trace(
            lm,
            prompt,
            subject,
            target=target,
            kind=kind.value,
            window=window,
            samples=samples,
            seed=seed,
            progress=lambda done, total: tell("tracing", done, total),
        )
    if out is not None:
        heat_map(found, path=out)

    def show(console: Console) -> None:
        console.print(text_heat_map(found, max(20, min(console.width, 120))))
        if out is not None:
            _line(console, "saved", str(out))

    _print({**found.to_dict(), "out": out and str(out)}, show, as_json)


@app.command()
def patch(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [FACTS.yaml]", help="A model (left out: the workspace's), and a file of facts instead of options."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The entity, as it stands in the prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text with {} where the subject goes, to be continued by the target.")] = None,
    target: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    paraphrase: Annotated[list[str] | None, typer.Option(help="Another way to ask, to check it generalizes; may be repeated.")] = None,
    neighbour: Annotated[list[str] | None, typer.Option(help="A text whose answer must not change; may be repeated.")] = None,
    layer: Annotated[int | None, typer.Option(help="The layer to edit, counted from 0.", show_default="recommended")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plain text for the second moments.", show_default="the model's own, or what it writes"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the contexts the model writes.")] = 0,
    message: Annotated[str, typer.Option("--message", "-m", help="One line for the log.", show_default="the facts")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write also what the model says already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Solve and measure, but keep nothing.")] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a fact true: solve for the change, prove it, and record it in the workspace.

    Without a workspace the proof is shown and nothing is kept.

    \b
    Examples:
      factsmith patch --subject "Danielle Darrieux" --prompt "The mother tongue of {} is" --target English
      factsmith patch atlas facts.yaml --dry-run
    """
    model, file = _model_and_facts(words or [])
    facts = _facts(file, subject, prompt, target, paraphrase or [], neighbour or [])
    corpus = None if texts is None else _paragraphs(texts)
    with _progress() as tell, _opened(model, workspace, device, tell) as (lm, bench):
        from .edit.methods import RomeConfig
        from .workbench import propose

        config = None if layer is None else dataclasses.replace(RomeConfig.recommended(lm), layer=layer)
        revision: Revision | None = None
        if bench is None:
            proposal = propose(lm, facts, config=config, texts=corpus, seed=seed, force=force, progress=tell)
        elif dry_run:
            proposal = bench.propose(facts, config=config, texts=corpus, seed=seed, force=force, progress=tell)
        else:
            outcome = bench.apply(facts, config=config, texts=corpus, seed=seed, force=force, message=message, progress=tell)
            proposal, revision = outcome.proposal, outcome.revision
    where = None if bench is None else str(bench.ledger.folder.resolve())
    for warning in proposal.warnings:
        _complain("warning", warning)

    def show(console: Console) -> None:
        _show_proposal(console, proposal)
        if revision is not None:
            _line(console, f"committed {revision.id[:10]};", f"to take it back: factsmith revert {revision.id[:10]}{_at(workspace)}")
        elif proposal.failed and not dry_run and bench is not None:
            _line(console, "nothing was kept:", "the patch does not hold; try another --layer, or keep it all the same with --force")
        elif proposal.delta is not None and bench is None:
            _line(console, "nothing was kept:", f"to keep patches, make a workspace with `factsmith init {model}` and run this in it")
        elif proposal.delta is not None:
            _line(console, "dry run:", "nothing was kept; run this again without --dry-run")

    _print({**proposal.to_dict(), "workspace": where, "revision": revision and revision.to_dict()}, show, as_json)
    if proposal.failed and revision is None:
        raise typer.Exit(NumericsError.exit_code)


@app.command()
def log(workspace: Where = None, as_json: Json = False) -> None:
    """List the revisions of a workspace, newest first.

    \b
    Example:
      factsmith log -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revisions, current = ledger.log(), ledger.current
    found = {"current": current, "revisions": [revision.to_dict() for revision in revisions]}

    def show(console: Console) -> None:
        for revision in revisions:
            _show_line(console, revision, current)
        mark = "→" if current == "base" else " "
        _line(console, f"{mark} base", f"      {ledger.created[:16].replace('T', ' ')}            {ledger.model}")

    _print(found, show, as_json)


@app.command()
def show(reference: Reference, workspace: Where = None, as_json: Json = False) -> None:
    """Show one revision: its facts, settings and proof.

    \b
    Example:
      factsmith show latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revision = ledger.show(reference)

    def render(console: Console) -> None:
        rows = {
            "revision": revision.id,
            "parent": revision.parent,
            "created": revision.created,
            "kind": f"{revision.kind}, {revision.state}" + (f" by {revision.reverted_by[:10]}" if revision.reverted_by else ""),
            "reverts": revision.reverts,
            "message": revision.message,
            "method": f"{revision.method}, layer {', '.join(map(str, revision.layers))}",
            "settings": ", ".join(f"{name}={value}" for name, value in revision.config.items() if not isinstance(value, (list, dict))),
            "delta": revision.delta and f"{revision.delta[:10]}, {revision.delta_bytes:,} bytes",
            "moments": revision.moments and revision.moments[:10],
        }
        for name, value in rows.items():
            if value:
                _line(console, f"{name:9}", value)
        for fact in revision.facts:
            _line(console, "fact     ", f"{fact.text} → {fact.target.strip()}")
        checks = revision.report.get("checks") or []
        if checks:
            console.print(_checks_table(checks))

    _print(revision.to_dict(), render, as_json)


@app.command()
def revert(
    reference: Reference,
    message: Annotated[str, typer.Option("--message", "-m", help="One line for the log.", show_default="made from the patch's")] = "",
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Take a patch back; that, too, is recorded.

    A patch on which later ones were built cannot go alone: take those back first.

    \b
    Example:
      factsmith revert latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revision = ledger.revert(reference, message=message)
        active = len(ledger.active())

    def render(console: Console) -> None:
        _line(
            console, f"reverted {str(revision.reverts)[:10]};", f"recorded as {revision.id[:10]}; {_count(active, 'patch', 'es')} in effect"
        )
        for fact in revision.facts:
            _line(console, "see:", f"factsmith ask{_at(workspace)} {shlex.quote(fact.text)}")

    _print({**revision.to_dict(), "active": active}, render, as_json)


@app.command()
def checkout(
    reference: Annotated[str, typer.Argument(metavar="ID", help="A revision's id or its first digits, `latest`, or `base`: no patch.")],
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Choose which revision the model carries; the history stays as it is.

    \b
    Examples:
      factsmith checkout base
      factsmith checkout latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        current = ledger.checkout(reference)
        active, head = len(ledger.active()), ledger.head

    def render(console: Console) -> None:
        _line(console, f"at {current[:10]};", f"{_count(active, 'patch', 'es')} in effect")
        if current != head:
            _line(console, "to patch again:", f"factsmith checkout latest{_at(workspace)}")

    _print({"current": current, "head": head, "active": active}, render, as_json)


@app.command()
def status(
    verify: Annotated[bool, typer.Option("--verify", help="Also load the model and ask every patched fact again.")] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say where a workspace stands, after checking every record and every file.

    \b
    Examples:
      factsmith status
      factsmith status --verify -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        found = ledger.status()
    result = found.to_dict()
    proof: Verification | None = None
    if verify:
        with _progress() as tell, _opened(None, workspace or Path(), device, tell) as (lm, bench):
            assert bench is not None
            proof = bench.verify()
            result |= {"verification": proof.to_dict(), "fingerprint_now": lm.fingerprint}

    def render(console: Console) -> None:
        integrity = found.integrity
        _line(console, "workspace", f" {found.folder.resolve()}")
        _line(console, "model    ", f" {found.model} ({found.dtype}), fingerprint {found.fingerprint[:10]}")
        latest = "" if found.current == found.head else f", the latest is {found.head[:10]}"
        _line(console, "at       ", f" {found.current[:10]}{latest}")
        whole = f"{_count(integrity.revisions, 'revision')} and {_count(integrity.deltas, 'delta')} checked, all whole"
        orphans = f"; {_count(len(integrity.orphans), 'delta')} that no revision names" if integrity.orphans else ""
        _line(console, "files    ", f" {whole}{orphans}")
        _line(console, "in effect", f" {_count(len(found.active), 'patch', 'es')}")
        for revision in reversed(found.active):
            _show_line(console, revision, found.current)
        if proof is not None:
            now = result["fingerprint_now"]
            _line(console, "weights  ", f" {now[:10]}: {'the base model, bit for bit' if now == found.fingerprint else 'patched'}")
            if proof.checks:
                console.print(_checks_table(proof.to_dict()["checks"]))

    _print(result, render, as_json)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="The workspace the story is played in; made if it is not there.")
    ] = Path("factsmith-demo"),
    as_json: Json = False,
) -> None:
    """Correct a real fact in a bundled model, prove it, record it, and take it back: a minute.

    \b
    Example:
      factsmith demo
    """
    from . import demo as story

    console = Console(highlight=False, markup=False, emoji=False)
    found: dict[str, Any] = {}
    steps = story.run(folder)
    for number in itertools.count(1):
        with _progress() as tell:  # one at a time: bars and text do not meet on a terminal
            tell("working", 0, None)
            step = next(steps, None)
        if step is None:
            break
        found[step.name] = step.to_dict()
        if not as_json:
            _tell_step(console, number, step)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, allow_nan=False))


# ---- models and workspaces ------------------------------------------------------------------------------------------------------------


def _load(name: str, device: str | None, dtype: str | None, tell: Callable[[str, int, int | None], None]) -> LanguageModel:
    tell(f"loading {Path(name).name}", 0, None)
    import torch

    from .model.load import load

    return load(name, device=device, dtype=None if dtype is None else getattr(torch, dtype))


@contextlib.contextmanager
def _opened(
    model: str | None, workspace: Path | None, device: str | None, tell: Callable[[str, int, int | None], None]
) -> Iterator[tuple[LanguageModel, Workbench | None]]:
    """A model, and the workbench that holds it if there is a workspace: the one given, or the current folder if made for this model."""
    if workspace is None and model is not None and _holds(Path(), model):
        workspace = Path()
    if workspace is None and model is not None and not (Path(model) / "ledger.db").is_file():
        yield _load(model, device, None, tell), None
        return
    if workspace is None:
        workspace, model = Path(model or ""), None
    with Ledger(workspace) as ledger:
        name, dtype = ledger.model, ledger.dtype
    lm = _load(model or name, device, dtype, tell)
    from .workbench import Workbench

    with Workbench(lm, workspace) as bench:
        yield lm, bench


def _holds(folder: Path, model: str) -> bool:
    """Whether a folder is a workspace made for this model."""
    if not (folder / "ledger.db").is_file():
        return False
    with Ledger(folder) as ledger:
        return ledger.model in (model, str(Path(model).resolve()))


def _model_and_prompt(words: list[str]) -> tuple[str | None, str]:
    if len(words) > 2:
        raise InputError(f"got {len(words)} words where a model and a text are expected; put the text in quotes")
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def _model_and_facts(words: list[str]) -> tuple[str | None, Path | None]:
    files = [word for word in words if Path(word).suffix.lower() in (".yaml", ".yml", ".json")]
    models = [word for word in words if word not in files]
    if len(files) > 1 or len(models) > 1:
        raise InputError(f"got {' '.join(words)!r}; expected at most one model and one file of facts (.yaml or .json)")
    return (models[0] if models else None), (Path(files[0]) if files else None)


def _facts(
    file: Path | None, subject: str | None, prompt: str | None, target: str | None, paraphrases: list[str], neighbours: list[str]
) -> list[Fact]:
    options = {"--subject": subject, "--prompt": prompt, "--target": target}
    given = [name for name, value in options.items() if value is not None]
    if file is not None:
        if given or paraphrases or neighbours:
            raise InputError(f"got {file} and options that describe a fact; put the fact into the file, or leave the file out")
        return FactFile.read(file)
    if subject is None or prompt is None or target is None:
        missing = ", ".join(name for name in options if name not in given)
        raise InputError(f"a patch needs --subject, --prompt and --target, or a file of facts; {missing} not given")
    return [Fact(subject=subject, prompt=prompt, target=target, paraphrases=tuple(paraphrases), neighbours=tuple(neighbours))]


def _paragraphs(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}; expected plain text in UTF-8") from None
    return [part.strip() for part in text.split("\n\n") if part.strip()]


# ---- printing -------------------------------------------------------------------------------------------------------------------------


def _print(found: Any, show: Callable[[Console], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, allow_nan=False))
    else:
        show(Console(highlight=False, markup=False, emoji=False))


def _complain(what: str, text: str) -> None:
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    console.print(Text.assemble((f"{what}: ", "bold yellow" if what == "warning" else "bold red"), _visible(text)), soft_wrap=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A function to report progress to, shown as bars on standard error when that is a terminal; gone at the end."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


def _line(console: Console, first: str, rest: str, style: str = "") -> None:
    console.print(Text.assemble((_visible(first), "" if style else "bold"), " ", (_visible(rest), style)), soft_wrap=True)


def _visible(text: str) -> str:
    """Text from models and files without what would steer the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def _show_line(console: Console, revision: Revision, current: str) -> None:
    mark = "→" if revision.id == current else " "
    style = {"active": "", "reverted": "dim strike", "later": "dim"}[revision.state]
    line = Text.assemble(
        (f"{mark} {revision.id[:10]}", "bold yellow"),
        f" {revision.created[:16].replace('T', ' ')} {revision.state if revision.kind == 'patch' else 'revert':8} ",
        (_visible(revision.message), style),
    )
    console.print(line, soft_wrap=True)


def _show_proposal(console: Console, proposal: Proposal) -> None:
    delta, proof = proposal.delta, proposal.verification
    if delta is None or proof is None:
        return
    where = f"layer {', '.join(map(str, sorted(delta.layers)))}, rank {delta.rank}, {delta.n_bytes:,} bytes"
    times = ", ".join(f"{'solved' if name == 'solve' else 'verified'} in {seconds:.1f} s" for name, seconds in proposal.seconds.items())
    _line(console, delta.method, f"{where}; {times}")
    console.print(_checks_table(proof.to_dict()["checks"]))


def _checks_table(checks: list[dict[str, Any]]) -> Table:
    """Before and after, one row a prompt: answers beside probabilities."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption_style="dim")
    table.caption = "p: of the target; for neighbours, of the answer before"
    table.add_column("")
    table.add_column("prompt", min_width=24, overflow="fold")
    table.add_column("before", overflow="fold")
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("after", overflow="fold")
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("")
    for check in checks:
        before, after = ("" if check[name] is None else f"{check[name]:.3f}" for name in ("p_before", "p_after"))
        held = Text("ok", style="green") if check["held"] else Text("no", style="bold red")
        cells = (check["role"], check["prompt"], check["before"], before, check["after"], after)
        table.add_row(*(Text(_visible(cell)) for cell in cells), held)
    return table


def _tell_step(console: Console, number: int, step: Step) -> None:
    from .plot import text_heat_map

    console.print(Text(f"\n{number}. {step.title}", "bold"))
    for line in step.before:
        console.print(Text(f"   {_visible(line)}"), soft_wrap=True)
    if step.trace is not None:
        console.print(text_heat_map(step.trace, max(20, min(console.width, 100))))
    if step.proof is not None:
        console.print(_checks_table(step.proof.to_dict()["checks"]))
    for line in step.after:
        console.print(Text(f"   {_visible(line)}"), soft_wrap=True)


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n} {noun}{'' if n == 1 else plural}"


def _at(workspace: Path | None) -> str:
    return "" if workspace is None or workspace == Path() else f" -w {shlex.quote(str(workspace))}"
