"""The room Ledger: the history, one revision, two compared, checks and capacity.

`moving` has the verbs that change which patches are in effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from pydantic import Field

from ...core.errors import RevisionError
from ...core.identity import same_model
from ...core.progress import Progress, tell
from ...core.tables import Table, counted
from ...keep.ledger import BASE, LATEST
from ...keep.revision import Revision
from ...keep.summary import integrity_text, log_table, revision_tables, status_tables
from ...model.fingerprint import weight_digests
from ...patch.verification import Verification
from ...show.charts.keeping import norm_bars, proof_chart, use_bars
from ..arguments import Arguments
from ..desk import Desk, Place
from ..facts import program, quoted, shell
from ..verb import Answer, Verb


class NoArguments(Arguments):
    """Nothing to choose."""


class RevisionArguments(Arguments):
    """One revision."""

    revision: str = Field(
        title="Revision",
        description="A revision: its id, the first digits of it, or latest.",
        json_schema_extra={"widget": "revision"},
    )


class DiffArguments(Arguments):
    """Two revisions."""

    before: str = Field(
        default=BASE,
        title="From",
        description="A revision's id, base or latest.",
        json_schema_extra={"widget": "revision"},
    )
    after: str = Field(
        default=LATEST,
        title="To",
        description="Another revision.",
        json_schema_extra={"widget": "revision"},
    )


class CapacityArguments(Arguments):
    """How far to look ahead."""

    next_facts: int = Field(
        default=100,
        ge=0,
        le=1_000_000,
        title="Facts to come",
        description="How many more facts to look ahead.",
    )
    limit: float = Field(
        default=10.0,
        gt=0,
        lt=100,
        title="Limit in per cent",
        description="A model counts as broken when it gives other answers to this share of "
        "unrelated facts.",
    )
    verify: bool = Field(
        default=True,
        title="Ask the stored facts",
        description="Ask the model which of the stored facts it still says.",
        json_schema_extra={"advanced": True},
    )


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """A block whose errors about a revision name the field of the form."""
    try:
        yield
    except RevisionError as error:
        error.argument = error.argument or field
        raise


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def _log(desk: Desk, arguments: NoArguments, progress: Progress) -> Answer:
    with desk.ledger() as ledger:
        revisions, current, patches = ledger.log(), ledger.current, ledger.unrecorded()
        head, table = ledger.head, log_table(revisions, current, ledger)
        about = {"model": ledger.model, "created": ledger.created, "dtype": ledger.dtype}
    result = {
        "current": current,
        "revisions": [revision.to_dict() for revision in revisions],
        "unrecorded": [patch.to_dict() for patch in patches],
    }
    named = Table(
        counted(len(revisions), "revision"),
        dict(zip((" ", "revision", "made", "state", "message"), "<<<<<", strict=True)),
        table.rows,
    )
    return Answer(
        result,
        [named],
        warnings=[f"A patch has no record: {patch}" for patch in patches],
        view={
            **about,
            "current": current,
            "head": head,
            "rows": [_row(revision, current) for revision in revisions],
        },
    )


def _row(revision: Revision, current: str) -> dict[str, Any]:
    """Return a revision as the list shows it."""
    return {
        "id": revision.id,
        "short": revision.id[:10],
        "is_current": revision.id == current,
        "created": revision.created[:16].replace("T", " "),
        "kind": revision.kind,
        "state": revision.state,
        "message": revision.message,
        "n_facts": len(revision.facts),
        "forced": bool(revision.report.get("forced")),
    }


def _show(desk: Desk, arguments: RevisionArguments, progress: Progress) -> Answer:
    with desk.ledger() as ledger, naming("revision"):
        revision = ledger.show(arguments.revision)
        current, head = ledger.current, ledger.head
    in_effect = set(revision.indices_in_effect or ())
    facts = [
        {
            "number": n,
            "text": fact.text,
            "target": fact.target,
            "in_effect": revision.state == "active" and n - 1 in in_effect,
        }
        for n, fact in enumerate(revision.facts, 1)
    ]
    view = {
        "row": _row(revision, current),
        "facts": facts,
        "current": current,
        "is_newest": current == head,
        "can_revert": revision.state == "active",
        "reverted_by": revision.reverted_by,
        "reverts": revision.reverts,
        "parent": revision.parent,
        "ask": "/ask/ask?" + urlencode({"prompt": facts[0]["text"]}) if facts else "",
    }
    proof = Verification.from_dict(revision.report)
    charts = [proof_chart(proof)] if proof.checks else []
    return Answer(revision.to_dict(), revision_tables(revision), charts, view=view)


def _diff(desk: Desk, arguments: DiffArguments, progress: Progress) -> Answer:
    for name in ("before", "after"):
        with naming(name):
            desk.bench.ledger.resolve(getattr(arguments, name))
    difference = desk.bench.diff(arguments.before, arguments.after, progress=progress)
    facts = [dict(vars(fact)) for fact in difference.facts]
    return Answer(
        difference.to_dict(),
        difference.tables(),
        [norm_bars(difference.norms)] if difference.norms else [],
        view={"facts": facts, "before": difference.before, "after": difference.after},
    )


def _status(desk: Desk, arguments: NoArguments, progress: Progress) -> Answer:
    with desk.ledger() as ledger:
        status = ledger.status()
    return Answer(status.to_dict(), status_tables(status))


def _verify(desk: Desk, arguments: NoArguments, progress: Progress) -> Answer:
    bench = desk.bench
    tell(progress, "checking files and weights", 0, None)
    integrity = bench.rebuild()
    proof = bench.verify(progress=progress)
    asked = bench.compared(proof)
    lost = (*asked.lost, *asked.unknown)
    result = {
        "integrity": integrity.to_dict(),
        "verification": proof.to_dict(),
        "lost": len(lost),
        "accepted": len(asked.accepted),
    }
    checked = f"{integrity_text(integrity)}; weights as recorded"
    tables = [Table(checked, {})]
    if proof.checks:
        tables += [Table(asked.in_words, {}), *proof.tables()]
    n_lost = counted(len(lost), "fact")
    return Answer(
        result,
        tables,
        warnings=[f"{n_lost} in effect that the model does not say."] if lost else [],
        failed=bool(lost),
    )


def _weights_now(desk: Desk, arguments: NoArguments, progress: Progress) -> Answer:
    bench = desk.bench
    tell(progress, "hashing the weights", 0, None)
    result: dict[str, Any] = {
        "revision": bench.at,
        "fingerprint": bench.lm.fingerprint,
        "base": bench.base_fingerprint,
        "tensors": weight_digests(bench.lm.module),
    }
    is_base = same_model(result["fingerprint"], bench.base_fingerprint)
    rows = list(result["tensors"].items())
    title = f"fingerprint {result['fingerprint']}: "
    title += "the base model, bit for bit" if is_base else "patched"
    return Answer(result, [Table(title, {"tensor": "<", "sha256": "<"}, rows)])


def _capacity(desk: Desk, arguments: CapacityArguments, progress: Progress) -> Answer:
    full = desk.bench.capacity(
        arguments.next_facts, limit=arguments.limit, ask=arguments.verify, progress=progress
    )
    return Answer(
        full.to_dict(),
        [table for table in full.tables() if table.columns],
        [use_bars(full)] if full.layers else [],
        warnings=[] if full.warning is None else [full.warning],
    )


# ── the same as code and as a command ─────────────────────────────────────────────────────────────


def _reading(place: Place, *lines: str) -> str:
    """Return a program that opens the ledger alone, and prints JSON."""
    body = "\n".join(f"    {line}" for line in lines)
    return (
        "import json\n\nimport factsmith as fs\n\n"
        f"with fs.Ledger({quoted(place.workspace)}) as ledger:\n{body}\n"
    )


def _capacity_words(arguments: CapacityArguments) -> list[str]:
    words = [] if arguments.next_facts == 100 else ["--next", str(arguments.next_facts)]
    words += [] if arguments.limit == 10.0 else ["--limit", f"{arguments.limit:g}"]
    return words + ([] if arguments.verify else ["--no-verify"])


LOG = Verb(
    "log",
    "History",
    "List the revisions of the workspace, the newest first.",
    NoArguments,
    _log,
    lambda arguments, place: _reading(
        place,
        "print(json.dumps({",
        '    "current": ledger.current,',
        '    "revisions": [revision.to_dict() for revision in ledger.log()],',
        '    "unrecorded": [patch.to_dict() for patch in ledger.unrecorded()],',
        "}))",
    ),
    lambda arguments, place: [shell("log", "-w", place.workspace)],
    kind="instant",
    template="answers/log.html",
    needs_form=False,
)
SHOW = Verb(
    "show",
    "Revision",
    "Show one revision: its facts, its settings and its proof.",
    RevisionArguments,
    _show,
    lambda arguments, place: _reading(
        place, f"print(json.dumps(ledger.show({quoted(arguments.revision)}).to_dict()))"
    ),
    lambda arguments, place: [shell("show", arguments.revision, "-w", place.workspace)],
    kind="instant",
    template="answers/show.html",
    button="Show",
)
DIFF = Verb(
    "diff",
    "Compare",
    "Compare two revisions: their facts, the model's answers, and the weights.",
    DiffArguments,
    _diff,
    lambda arguments, place: program(
        place,
        f"difference = bench.diff({quoted(arguments.before)}, {quoted(arguments.after)})",
        "print(json.dumps(difference.to_dict()))",
    ),
    lambda arguments, place: [
        shell("diff", arguments.before, arguments.after, "-w", place.workspace)
    ],
    template="answer.html",
    button="Compare",
    needs_form=False,
)
STATUS = Verb(
    "status",
    "Status",
    "Check the records and files of the workspace, and show which revision is checked out.",
    NoArguments,
    _status,
    lambda arguments, place: _reading(place, "print(json.dumps(ledger.status().to_dict()))"),
    lambda arguments, place: [shell("status", "-w", place.workspace)],
    kind="instant",
    needs_form=False,
)
VERIFY = Verb(
    "verify",
    "Verify",
    "Check records, checksums and weights, and ask every fact again.",
    NoArguments,
    _verify,
    lambda arguments, place: program(
        place,
        "integrity, proof = bench.rebuild(), bench.verify()",
        "asked = bench.compared(proof)",
        "print(json.dumps({",
        '    "integrity": integrity.to_dict(),',
        '    "verification": proof.to_dict(),',
        '    "lost": len(asked.lost) + len(asked.unknown),',
        '    "accepted": len(asked.accepted),',
        "}))",
    ),
    lambda arguments, place: [shell("verify", "-w", place.workspace)],
    button="Verify",
    cached=False,
)
CAPACITY = Verb(
    "capacity",
    "Capacity",
    "See how full the edited layers are, and what more facts cost.",
    CapacityArguments,
    _capacity,
    lambda arguments, place: program(
        place,
        f"full = bench.capacity({arguments.next_facts}, limit={arguments.limit!r}, "
        f"ask={arguments.verify})",
        "print(json.dumps(full.to_dict()))",
    ),
    lambda arguments, place: [
        shell("capacity", *_capacity_words(arguments), "-w", place.workspace)
    ],
    button="Measure",
)
WEIGHTS = Verb(
    "weights",
    "Weights",
    "Compute the SHA-256 of every tensor, and of the whole model.",
    NoArguments,
    _weights_now,
    lambda arguments, place: program(
        place,
        "print(json.dumps({",
        '    "revision": bench.at,',
        '    "fingerprint": bench.lm.fingerprint,',
        '    "base": bench.base_fingerprint,',
        '    "tensors": weight_digests(bench.lm.module),',
        "}))",
        uses="from factsmith.model.fingerprint import weight_digests\n",
    ),
    lambda arguments, place: [],
    button="Hash",
    cached=False,
)
