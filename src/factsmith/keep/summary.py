"""A workspace as tables: its log, one revision, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.identity import same_model
from ..core.tables import Table, counted
from ..patch.verification import Verification
from .base_file import read_base_file
from .ledger import BASE, Ledger
from .revision import Integrity, Revision, Status, Unrecorded


def log_table(revisions: Sequence[Revision], current: str, ledger: Ledger | None = None) -> Table:
    """Return the history, newest first, an arrow at the revision that is checked out.

    Args:
        revisions: The revisions.
        current: The id of the one that is checked out, or "base".
        ledger: Adds a row for the base model, of this ledger.
    """
    rows = [_log_row(revision, current) for revision in revisions]
    if ledger is not None:
        mark = "→" if current == BASE else ""
        rows.append((mark, BASE, _minute(ledger.created), "", ledger.model))
    columns = {" ": "<", "  ": "<", "   ": "<", "    ": "<", "     ": "<"}
    return Table("", columns, rows)


def revision_tables(revision: Revision) -> list[Table]:
    """Return one revision: what it is, its facts, what it did to other patches, and its proof."""
    by = f" by {revision.reverted_by[:10]}" if revision.reverted_by else ""
    simple = {k: v for k, v in revision.config.items() if not isinstance(v, (list, dict))}
    layers = f"layer {', '.join(map(str, revision.layers))}"
    fields = {
        "revision": revision.id,
        "parent": revision.parent,
        "created": revision.created,
        "kind": f"{revision.kind}, {revision.state}{by}",
        "reverts": revision.reverts,
        "message": revision.message,
        "method": ", ".join(filter(None, [revision.method, layers, revision.size])),
        "settings": ", ".join(f"{name}={value}" for name, value in simple.items()),
        "delta": revision.delta and f"{revision.delta[:10]}, {revision.delta_bytes:,} bytes",
        "moments": revision.moments and revision.moments[:10],
        "forced": _forced(revision),
    }
    rows = [(name, str(value)) for name, value in fields.items() if value]
    rows += [(f"fact {n}", text) for n, text in enumerate(_fact_texts(revision), 1)]
    for patch, change in revision.changes.items():
        became = "out of effect" if change.delta is None else f"carried as {change.delta[:10]}"
        rows.append(("then", f"{patch[:10]} {became}"))
    proof = Verification.from_dict(revision.report)
    return [Table("", {" ": "<", "  ": "<"}, rows), *(proof.tables() if proof.checks else [])]


def status_tables(status: Status, fingerprint: str | None = None) -> list[Table]:
    """Return where a workspace stands.

    Args:
        status: From `Ledger.status`.
        fingerprint: Of the model as it is now, with the patches. None: the model was not loaded.
    """
    file = read_base_file(status.folder)
    latest = "" if status.current == status.head else f", the latest is {status.head[:10]}"
    rows = [
        ("workspace", str(status.folder.resolve())),
        ("model", f"{status.model} ({status.dtype}), fingerprint {status.fingerprint[:10]}"),
        *([] if file is None else [("made from", str(file))]),
        ("at", f"{status.current[:10]}{latest}"),
        ("files", integrity_text(status.integrity)),
        ("in effect", counted(len(status.active), "patch", "es")),
    ]
    if fingerprint is not None:
        is_base = same_model(fingerprint, status.fingerprint)
        state = "the base model, bit for bit" if is_base else "patched"
        rows.append(("weights", f"{fingerprint[:10]}: {state}"))
    tables = [Table("", {" ": "<", "  ": "<"}, rows)]
    if status.active:
        tables.append(log_table(status.active[::-1], status.current))
    return tables


def integrity_text(integrity: Integrity) -> str:
    """Return what was checked, in words."""
    revisions = counted(integrity.revisions, "revision")
    deltas = counted(integrity.deltas, "delta")
    text = f"{revisions} and {deltas} checked, all whole"
    if integrity.orphans:
        text += f"; {counted(len(integrity.orphans), 'delta')} that no revision names"
    if integrity.unrecorded:
        text += f", {len(integrity.unrecorded):,} of them a patch"
    return text


def unrecorded_lines(
    patches: Sequence[Unrecorded], recover: str, collect: str
) -> list[tuple[str, str]]:
    """Return lines about patches that have no record, and what can be done with them.

    Args:
        patches: From `Ledger.unrecorded`.
        recover: The command that commits them.
        collect: The command that deletes them.
    """
    if not patches:
        return []
    lines = [("without a record:", str(patch)) for patch in patches]
    then = f"`{recover}` commits what fits onto the weights, `{collect}` deletes them"
    return [*lines, ("next:", then)]


def _log_row(revision: Revision, current: str) -> tuple[str, ...]:
    mark = "→" if revision.id == current else ""
    state = revision.state if revision.kind == "patch" else "revert"
    forced = "forced: " if revision.report.get("forced") else ""
    identity = revision.id[:10]
    return (mark, identity, _minute(revision.created), state, f"{forced}{revision.message}")


def _minute(created: str) -> str:
    return created[:16].replace("T", " ")


def _forced(revision: Revision) -> str:
    if not revision.report.get("forced"):
        return ""
    report = revision.report
    lost = [f"though a fact is lost: {words}" for words in report.get("lost") or ()]
    return "; ".join([*(report.get("conflicts") or ()), *lost] or ["though a gate failed"])


def _fact_texts(revision: Revision) -> list[str]:
    """The facts; of a patch in effect those that were taken out are marked."""
    partly = revision.kind == "patch" and revision.state == "active"
    kept = revision.indices_in_effect or ()
    return [
        f"{fact}{' (taken out)' if partly and i not in kept else ''}"
        for i, fact in enumerate(revision.facts)
    ]
