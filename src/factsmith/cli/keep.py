"""Keep: make a workspace, read its log, take patches back, and say where it stands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..core.errors import NumericsError
from ..core.tables import counted, visible
from ..keep.ledger import Ledger
from ..keep.revision import Revision
from .common import (
    Device,
    Json,
    Where,
    checks_table,
    in_workspace,
    line,
    load_model,
    opened,
    print_result,
    progress,
    show_tables,
)

if TYPE_CHECKING:
    from ..patch.proof import Verification


Reference = Annotated[
    str,
    typer.Argument(metavar="ID", help="A revision: its id or the first digits of it, or `latest`."),
]


def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bundled model, a folder, or a hub id.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="The workspace to make.")
    ] = Path(),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: a folder that records a model's patches.

    The model's own files are never changed.

    \b
    Example:
      factsmith init atlas my-workspace
    """
    with progress() as tell:
        lm = load_model(model, device, None, tell)
    from ..keep.bench import create

    with create(lm, folder) as ledger:
        made = {
            "workspace": str(folder.resolve()),
            "model": ledger.model,
            "dtype": ledger.dtype,
            "fingerprint": ledger.fingerprint,
        }

    def show(console: Console) -> None:
        line(
            console,
            f"workspace {made['workspace']};",
            f"model {ledger.model} ({ledger.dtype}), fingerprint {ledger.fingerprint[:10]}",
        )
        line(
            console,
            "next:",
            f'factsmith patch{in_workspace(folder)} --subject S --prompt "... {{}} ..." --target T',
        )

    print_result(made, show, as_json)


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
        line(
            console,
            f"{mark} base",
            f"      {ledger.created[:16].replace('T', ' ')}            {ledger.model}",
        )

    print_result(found, show, as_json)


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
            "kind": f"{revision.kind}, {revision.state}"
            + (f" by {revision.reverted_by[:10]}" if revision.reverted_by else ""),
            "reverts": revision.reverts,
            "message": revision.message,
            "method": f"{revision.method}, layer {', '.join(map(str, revision.layers))}",
            "settings": ", ".join(
                f"{name}={value}"
                for name, value in revision.config.items()
                if not isinstance(value, (list, dict))
            ),
            "delta": revision.delta and f"{revision.delta[:10]}, {revision.delta_bytes:,} bytes",
            "moments": revision.moments and revision.moments[:10],
            "forced": revision.report.get("forced")
            and "; ".join(revision.report.get("conflicts") or ["though a gate failed"]),
        }
        for name, value in rows.items():
            if value:
                line(console, f"{name:9}", value)
        for number, fact in enumerate(revision.facts, 1):
            gone = (
                revision.kind == "patch"
                and revision.state == "active"
                and not any(fact is kept for kept in revision.in_effect)
            )
            line(console, f"fact {number:<4}", f"{fact}{' (taken out)' if gone else ''}")
        for patch, change in revision.changes.items():
            line(
                console,
                "then     ",
                f"{patch[:10]} {'out of effect' if change.delta is None else f'carried as {change.delta[:10]}'}",
            )
        checks = revision.report.get("checks") or []
        if checks:
            console.print(checks_table(checks))

    print_result(revision.to_dict(), render, as_json)


def revert(
    reference: Reference,
    facts: Annotated[
        list[int] | None,
        typer.Option(
            "--fact",
            metavar="N",
            min=1,
            help="Only this fact, as `show` numbers them; may be repeated.",
            show_default="all",
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Second moments, if patches are solved again.",
            show_default="the workspace's, or the model's",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also when a fact that should stay would be lost.")
    ] = False,
    message: Annotated[
        str,
        typer.Option(
            "--message", "-m", help="One line for the log.", show_default="made from the patch's"
        ),
    ] = "",
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Take a patch back, or some facts of it, or bring back what a revert took; that, too, is recorded.

    Later patches that were solved on top of it are solved again, in closed form, and every fact that stays is asked.

    \b
    Examples:
      factsmith revert latest -w my-workspace
      factsmith revert 0a8b3c83c6 --fact 2 -w my-workspace
    """
    chosen = None if facts is None else [number - 1 for number in facts]
    with Ledger(workspace or Path()) as ledger:
        alone = not any(step.solve for step in ledger.undoing(reference, chosen))
        if alone:  # nothing to compute, so the model need not be loaded
            revision = ledger.revert(reference, facts=chosen, message=message)
            active = len(ledger.active())
    if not alone:
        with progress() as tell, opened(None, workspace, device, tell) as (_, bench):
            from ..corpus.moments_store import load_moments

            assert bench is not None
            given = None if moments is None else load_moments(moments)
            revision = bench.revert(
                reference, chosen, moments=given, force=force, message=message, progress=tell
            )
            active = len(bench.ledger.active())

    def render(console: Console) -> None:
        again = sum(change.delta is not None for change in revision.changes.values())
        solved = f"; {counted(again, 'patch', 'es')} solved again" if revision.report else ""
        line(
            console,
            f"reverted {str(revision.reverts)[:10]};",
            f"recorded as {revision.id[:10]}; {counted(active, 'patch', 'es')} in effect{solved}",
        )
        for fact in revision.facts:
            line(
                console, "see:", f"factsmith ask{in_workspace(workspace)} {shlex.quote(fact.text)}"
            )

    print_result({**revision.to_dict(), "active": active}, render, as_json)


def diff(
    before: Annotated[
        str, typer.Argument(metavar="A", help="A revision: an id, `base` or `latest`.")
    ],
    after: Annotated[str, typer.Argument(metavar="[B]", help="Another.")] = "latest",
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare two revisions: facts, what the model answers at either, and how far the weights are apart.

    \b
    Example:
      factsmith diff base latest -w my-workspace
    """
    with progress() as tell, opened(None, workspace, device, tell) as (_, bench):
        assert bench is not None
        found = bench.diff(before, after)
    print_result(found.to_dict(), show_tables(found.tables()), as_json)


def verify(workspace: Where = None, device: Device = None, as_json: Json = False) -> None:
    """Check everything: records, checksums, the model's fingerprint, the weights built anew, and every fact asked.

    \b
    Example:
      factsmith verify -w my-workspace
    """
    with progress() as tell, opened(None, workspace, device, tell) as (_, bench):
        assert bench is not None
        tell("checking files and weights", 0, None)
        counts = bench.rebuild()
        tell("asking every fact", 0, None)
        proof = bench.verify()
    lost = [check for check in proof.checks if check.role == "prompt" and not check.held]

    def render(console: Console) -> None:
        line(
            console,
            "whole:",
            f"{counted(counts.revisions, 'revision')}, {counted(counts.deltas, 'delta')}, weights as recorded",
        )
        if counts.orphans:
            line(
                console,
                "loose:",
                f"{counted(len(counts.orphans), 'delta')} that nobody names; factsmith gc{in_workspace(workspace)}",
            )
        if proof.checks:
            console.print(checks_table(proof.to_dict()["checks"]))

    print_result(
        {"integrity": counts.to_dict(), "verification": proof.to_dict(), "lost": len(lost)},
        render,
        as_json,
    )
    if lost:
        raise typer.Exit(NumericsError.exit_code)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Delete what no revision names, such as the files of a commit that was killed; whatever is in the log stays.

    \b
    Example:
      factsmith gc -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        gone = ledger.gc(dry_run=dry_run)

    def render(console: Console) -> None:
        what = "would delete" if dry_run else "deleted"
        line(
            console,
            what,
            f"{len(gone):,} that no revision names"
            if gone
            else "nothing: every file is named by a revision",
        )
        for name in gone:
            line(console, "        ", name)

    print_result({"deleted": list(gone), "dry_run": dry_run}, render, as_json)


def checkout(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="A revision's id or its first digits, `latest`, or `base`: no patch."
        ),
    ],
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
        line(console, f"at {current[:10]};", f"{counted(active, 'patch', 'es')} in effect")
        if current != head:
            line(console, "to patch again:", f"factsmith checkout latest{in_workspace(workspace)}")

    print_result({"current": current, "head": head, "active": active}, render, as_json)


def status(
    verify: Annotated[
        bool, typer.Option("--verify", help="Also load the model and ask every patched fact again.")
    ] = False,
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
        with progress() as tell, opened(None, workspace or Path(), device, tell) as (lm, bench):
            assert bench is not None
            proof = bench.verify()
            result |= {"verification": proof.to_dict(), "fingerprint_now": lm.fingerprint}

    def render(console: Console) -> None:
        integrity = found.integrity
        line(console, "workspace", f" {found.folder.resolve()}")
        line(
            console,
            "model    ",
            f" {found.model} ({found.dtype}), fingerprint {found.fingerprint[:10]}",
        )
        latest = "" if found.current == found.head else f", the latest is {found.head[:10]}"
        line(console, "at       ", f" {found.current[:10]}{latest}")
        whole = f"{counted(integrity.revisions, 'revision')} and {counted(integrity.deltas, 'delta')} checked, all whole"
        orphans = (
            f"; {counted(len(integrity.orphans), 'delta')} that no revision names"
            if integrity.orphans
            else ""
        )
        line(console, "files    ", f" {whole}{orphans}")
        line(console, "in effect", f" {counted(len(found.active), 'patch', 'es')}")
        for revision in reversed(found.active):
            _show_line(console, revision, found.current)
        if proof is not None:
            now = result["fingerprint_now"]
            line(
                console,
                "weights  ",
                f" {now[:10]}: {'the base model, bit for bit' if now == found.fingerprint else 'patched'}",
            )
            if proof.checks:
                console.print(checks_table(proof.to_dict()["checks"]))

    print_result(result, render, as_json)


def _show_line(console: Console, revision: Revision, current: str) -> None:
    mark = "→" if revision.id == current else " "
    style = {"active": "", "reverted": "dim strike", "later": "dim"}[revision.state]
    text = Text.assemble(
        (f"{mark} {revision.id[:10]}", "bold yellow"),
        f" {revision.created[:16].replace('T', ' ')} {revision.state if revision.kind == 'patch' else 'revert':8} ",
        ("forced: " if revision.report.get("forced") else "", "bold red"),
        (visible(revision.message), style),
    )
    console.print(text, soft_wrap=True)
