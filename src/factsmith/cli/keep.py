"""Keep: workspaces, their history, and taking patches back."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import DamagedError, FactsmithError, NumericsError, WorkspaceError
from ..core.files import check_writable
from ..core.tables import Table, counted
from ..keep.ledger import Ledger
from ..keep.revision import Revision, Unrecorded
from ..keep.summary import (
    integrity_text,
    log_table,
    revision_tables,
    status_tables,
    unrecorded_lines,
)
from ..patch.verification import Verification
from . import completing
from .models import load_model, opened_workspace, read_moments
from .options import Device, Json, Message, MomentsAgain, Where
from .printing import complain, complain_of, print_result, suggested
from .waiting import progress

Reference = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        autocompletion=completing.revisions,
        help="A revision: its id, the first digits of it, or `latest`.",
    ),
]


def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=completing.models,
            help="A bundled model, a folder, a GGUF file, or a hub id.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="The folder of the new workspace.")
    ] = Path(),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a workspace: a folder that records the patches of one model.

    The files of the model never change.

    \b
    Example:
      factsmith init atlas my-workspace
    """
    check_writable(folder)
    if (folder / "ledger.db").exists():
        raise WorkspaceError(
            f"{folder} is a workspace already. Use it with `-w {shlex.quote(str(folder))}`, or "
            "choose another folder."
        )
    from ..keep.database import check_no_patches

    check_no_patches(folder)
    with progress() as tell:
        lm = load_model(model, device, None, tell)
        tell("computing the fingerprint", 0, None)
        from ..keep.bench import create

        ledger = create(lm, folder)
    with ledger:
        result: dict[str, Any] = {
            "workspace": str(folder.resolve()),
            "model": ledger.model,
            "dtype": ledger.dtype,
            "fingerprint": ledger.fingerprint,
        }
    made = f"model {ledger.model} ({ledger.dtype}), fingerprint {ledger.fingerprint[:10]}"
    patch = suggested("patch", folder, '--subject S --prompt "... {} ..." --target T')
    lines = [(f"workspace {result['workspace']};", made), ("next:", patch)]
    if lm.gguf is not None:
        n_bytes = sum(each.numel() * each.element_size() for each in lm.module.parameters())
        result |= {"gguf": lm.gguf.to_dict(), "model_bytes": n_bytes}
        size = f"{n_bytes / 10**6:,.0f} MB in {ledger.dtype}"
        lines.insert(1, ("dequantised", f"{lm.gguf} to {size}"))
    print_result(result, [], as_json, lines)


def log(workspace: Where = None, as_json: Json = False) -> None:
    """List the revisions of a workspace, newest first.

    An arrow marks the revision that the model carries.

    \b
    Example:
      factsmith log -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revisions, current, patches = ledger.log(), ledger.current, ledger.unrecorded()
    result = {
        "current": current,
        "revisions": [revision.to_dict() for revision in revisions],
        "unrecorded": [patch.to_dict() for patch in patches],
    }
    lines = _unrecorded(patches, workspace)
    print_result(result, [log_table(revisions, current, ledger)], as_json, lines)


def show(reference: Reference, workspace: Where = None, as_json: Json = False) -> None:
    """Show one revision: its facts, settings and proof.

    `factsmith log` lists the revisions.

    \b
    Example:
      factsmith show latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        revision = ledger.show(reference)
    print_result(revision.to_dict(), revision_tables(revision), as_json)


def revert(
    reference: Reference,
    facts: Annotated[
        list[int] | None,
        typer.Option(
            "--fact",
            metavar="N",
            min=1,
            help="Only this fact, by its number in `factsmith show`. May be repeated.",
            show_default="all",
        ),
    ] = None,
    moments: MomentsAgain = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on when a fact that should stay would be lost.")
    ] = False,
    message: Message = "",
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Take a patch back, or some of its facts, or undo a revert.

    This is recorded. Later patches that were solved on top of it are solved again. Every fact that
    stays is asked; patches in other layers whose facts would be lost are solved again, too.

    \b
    Examples:
      factsmith revert latest -w my-workspace
      factsmith revert 0a8b3c83c6 --fact 2 -w my-workspace
    """
    chosen = None if facts is None else [number - 1 for number in facts]
    folder = workspace or Path()
    with progress() as tell:
        given = read_moments(moments, tell)
        from ..keep.again import revert_in_ledger

        revision = revert_in_ledger(folder, reference, chosen, message=message)
    if revision is None:
        try:
            with progress() as tell, opened_workspace(workspace, device, tell) as bench:
                revision = bench.revert(
                    reference, chosen, moments=given, force=force, message=message, progress=tell
                )
        except DamagedError as error:  # perhaps of the very patch that goes
            revision = revert_in_ledger(folder, reference, chosen, message=message, ask=False)
            if revision is None:
                raise
            complain("warning", f"the facts that stay were not asked: {error}")
    with Ledger(folder) as ledger:
        active = len(ledger.active())
    done = f"recorded as {revision.id[:10]}; {counted(active, 'patch', 'es')} in effect"
    if again := revision.report.get("solved_again"):
        done += f"; {counted(len(again), 'patch', 'es')} solved again"
    lines = [(f"reverted {str(revision.reverts)[:10]};", done), *_asked_lines(revision)]
    for fact in revision.facts:
        lines.append(("see:", suggested("ask", workspace, shlex.quote(fact.text))))
    print_result({**revision.to_dict(), "active": active}, [], as_json, lines)


def _asked_lines(revision: Revision) -> list[tuple[str, str]]:
    """Return what a revert asked, and what it lost."""
    report = revision.report
    if not report.get("asked"):
        return []
    failed = Verification.from_dict(report).failed("prompt")
    n_asked, lost = report["asked"], report["lost"]
    what = "all hold" if not failed else f"{n_asked - len(failed):,} hold"
    if unlost := len(failed) - len(lost):
        what += f", {unlost:,} did not hold before either"
    lines = [("asked", f"{counted(n_asked, 'fact')} in effect: {what}")]
    return lines + [("lost:", words) for words in lost]


def diff(
    before: Annotated[
        str,
        typer.Argument(
            metavar="A",
            autocompletion=completing.any_revisions,
            help="A revision: an id, `base` or `latest`.",
        ),
    ],
    after: Annotated[
        str,
        typer.Argument(
            metavar="[B]", autocompletion=completing.any_revisions, help="Another revision."
        ),
    ] = "latest",
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare two revisions: their facts, answers and weights.

    If only one is given, it is compared with the latest.

    \b
    Example:
      factsmith diff base latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        for reference in (before, after):
            ledger.resolve(reference)
    with progress() as tell, opened_workspace(workspace, device, tell) as bench:
        difference = bench.diff(before, after, progress=tell)
    print_result(difference.to_dict(), difference.tables(), as_json)


def verify(workspace: Where = None, device: Device = None, as_json: Json = False) -> None:
    """Check records, checksums and weights, and ask every fact again.

    The model's fingerprint is compared, too. The weights are built again from the base and the
    records, and compared bit for bit. A fact that did not hold when it was kept, because a gate let
    it pass or it was forced, is no failure.

    \b
    Example:
      factsmith verify -w my-workspace
    """
    with progress() as tell, opened_workspace(workspace, device, tell) as bench:
        tell("checking files and weights", 0, None)
        integrity = bench.rebuild()
        proof = bench.verify(progress=tell)
        asked = bench.compared(proof)
    lost = (*asked.lost, *asked.unknown)
    result = {
        "integrity": integrity.to_dict(),
        "verification": proof.to_dict(),
        "lost": len(lost),
        "accepted": len(asked.accepted),
    }
    is_loose = len(integrity.orphans) > len(integrity.unrecorded)
    loose = f"; `{suggested('gc', workspace)}` deletes what is no patch" if is_loose else ""
    title = f"{integrity_text(integrity)}{loose}; weights as recorded"
    tables = [Table(title, {})]
    if proof.checks:
        tables += [Table(asked.in_words, {}), *proof.tables()]
    print_result(result, tables, as_json, _unrecorded(integrity.unrecorded, workspace))
    if lost:
        text = f"{counted(len(lost), 'fact')} in effect that the model does not say"
        complain_of(NumericsError, text, NumericsError.exit_code)
        raise typer.Exit(NumericsError.exit_code)


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    patches: Annotated[
        bool, typer.Option("--patches", help="Also delete patches that no revision names.")
    ] = False,
    workspace: Where = None,
    as_json: Json = False,
) -> None:
    """Delete files that no revision names.

    An export that was killed leaves such files, and so does a commit. Whatever is in the log stays,
    and so does a delta that can be read as a patch: its record may have been lost.

    \b
    Examples:
      factsmith gc -w my-workspace
      factsmith gc --patches --dry-run
    """
    with Ledger(workspace or Path()) as ledger:
        names = ledger.gc(dry_run=dry_run, patches=patches)
        kept = () if patches else ledger.unrecorded()
    first = "would delete" if dry_run else "deleted"
    nothing = "nothing" if kept else "nothing: all files are in use"
    rest = f"{len(names):,} that no revision names" if names else nothing
    lines = [(first, rest), *(("        ", name) for name in names)]
    result = {
        "deleted": list(names),
        "dry_run": dry_run,
        "kept": [patch.to_dict() for patch in kept],
    }
    print_result(result, [], as_json, [*lines, *_unrecorded(kept, workspace)])


def recover(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    give_up: Annotated[
        bool, typer.Option("--give-up", help="Go on without the revisions that are missing.")
    ] = False,
    patches: Annotated[
        bool,
        typer.Option("--patches", help="Commit deltas that lost their record, if they fit."),
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Put back revisions that ledger.db has lost.

    A copy of ledger.db without ledger.db-wal lacks the newest revisions, and one that somebody
    deleted is missing, too. Their records are also in
    the folder `records`, so they come back with the ids that they had. With --patches the model is
    loaded, and deltas without any record are committed if they were made on just its weights.

    \b
    Examples:
      factsmith recover -w my-workspace
      factsmith recover --give-up -w my-workspace
    """
    from ..keep import recovery

    folder = workspace or Path()
    done = recovery.recover(folder, give_up=give_up, dry_run=dry_run)
    result = done.to_dict()
    lines: list[tuple[str, str]] = []
    if done.left:
        lines.append(("next:", f"`{suggested('recover', workspace, '--give-up')}`"))
    elif patches and not dry_run:
        from ..keep.recommit import recover_patches

        with progress() as tell, opened_workspace(workspace, device, tell) as bench:
            revisions = recover_patches(bench)
        result["committed"] = [revision.to_dict() for revision in revisions]
        lines = [("committed", f"{each.id[:10]} {each.message}") for each in revisions]
    print_result(result, done.tables(), as_json, lines)
    if done.left:
        text = "some revisions are missing; put the files back from a copy, or go on without them"
        complain_of(WorkspaceError, text, WorkspaceError.exit_code)
        raise typer.Exit(WorkspaceError.exit_code)


def _unrecorded(patches: Sequence[Unrecorded], workspace: Path | None) -> list[tuple[str, str]]:
    """Lines about patches that have no record."""
    recovers = suggested("recover", workspace, "--patches")
    return unrecorded_lines(patches, recovers, suggested("gc", workspace, "--patches"))


def checkout(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            autocompletion=completing.any_revisions,
            help="A revision: its id, the first digits of it, `latest`, or `base` for no patch.",
        ),
    ],
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Choose which revision the model carries.

    The history stays as it is. Then every fact in effect is asked, and those that do not hold are
    named.

    \b
    Examples:
      factsmith checkout base
      factsmith checkout latest -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        current = ledger.checkout(reference)
        active, head = ledger.active(), ledger.head
    lines = [(f"at {current[:10]};", f"{counted(len(active), 'patch', 'es')} in effect")]
    result = {"current": current, "head": head, "active": len(active)}
    if any(revision.in_effect for revision in active):
        try:
            with progress() as tell, opened_workspace(workspace, device, tell) as bench:
                asked = bench.ask_facts(progress=tell)
        except FactsmithError as error:  # the revision is checked out all the same
            complain("warning", f"the facts in effect were not asked: {error}")
        else:
            n_asked, _, how = asked.in_words.partition(" ")
            lines.append((n_asked, how))  # "1", "fact in effect asked, all hold"
            result |= {"asked": len(asked.proof.checks), "lost": [x.in_words for x in asked.lost]}
    if current != head:
        lines.append(("to patch again:", suggested("checkout latest", workspace)))
    print_result(result, [], as_json, lines)


def status(
    verify: Annotated[
        bool, typer.Option("--verify", help="Also load the model and ask every patched fact again.")
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Describe a workspace, after a check of its records and files.

    With --verify the model is loaded, too, and every patched fact is asked.

    \b
    Examples:
      factsmith status
      factsmith status --verify -w my-workspace
    """
    with Ledger(workspace or Path()) as ledger:
        standing = ledger.status()
    result = standing.to_dict()
    lines = _unrecorded(standing.integrity.unrecorded, workspace)
    if not verify:
        print_result(result, status_tables(standing), as_json, lines)
        return
    with progress() as tell, opened_workspace(workspace, device, tell) as bench:
        proof, fingerprint = bench.verify(progress=tell), bench.lm.fingerprint
    result |= {"verification": proof.to_dict(), "fingerprint_now": fingerprint}
    tables = [*status_tables(standing, fingerprint), *(proof.tables() if proof.checks else [])]
    print_result(result, tables, as_json, lines)
