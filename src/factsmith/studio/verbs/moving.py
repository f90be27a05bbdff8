"""The room Ledger: the verbs that change which patches are in effect."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...core.errors import InputError
from ...core.identity import same_model
from ...core.progress import Progress
from ...core.tables import Table, counted
from ...patch.verification import Verification
from ..arguments import Arguments
from ..desk import Desk, Place
from ..facts import program, quoted, shell
from ..verb import Answer, Verb
from .ledger import RevisionArguments, naming


class CheckoutArguments(Arguments):
    """The revision that the model is to carry."""

    revision: str = Field(
        title="Revision",
        description="A revision's id, latest, or base for no patch.",
        json_schema_extra={"widget": "revision"},
    )


class RevertArguments(RevisionArguments):
    """What to take back."""

    facts: tuple[int, ...] = Field(
        default=(),
        title="Facts",
        description="Only these facts, by their numbers from 1. Empty: all of them.",
        json_schema_extra={"advanced": True},
    )
    message: str = Field(default="", title="Message", description="One line for the log.")
    force: bool = Field(
        default=False,
        title="Force",
        description="Revert even if a fact that should stay is lost.",
        json_schema_extra={"advanced": True},
    )


def _checkout(desk: Desk, arguments: CheckoutArguments, progress: Progress) -> Answer:
    bench = desk.bench
    before = bench.lm.fingerprint
    with naming("revision"):
        current = bench.checkout(arguments.revision)
    active, head = bench.ledger.active(), bench.ledger.head
    result: dict[str, Any] = {"current": current, "head": head, "active": len(active)}
    notes = [f"At {current[:10]}: {counted(len(active), 'patch', 'es')} in effect."]
    asked = bench.asked
    lost = [] if asked is None else [check.in_words for check in asked.lost]
    if asked is not None and any(revision.in_effect for revision in active):
        result |= {"asked": len(asked.proof.checks), "lost": lost}
        notes.append(f"{asked.in_words}.")
    if current != head:
        notes.append("To patch again, check out the latest revision.")
    tables = [] if asked is None or not asked.proof.checks else asked.proof.tables()
    return Answer(
        result,
        tables,
        notes=notes,
        warnings=[f"Lost: {words}" for words in lost],
        view={"current": current, "head": head, **_weights(desk, before)},
    )


def _revert(desk: Desk, arguments: RevertArguments, progress: Progress) -> Answer:
    bench = desk.bench
    with naming("revision"):
        patch = bench.show(arguments.revision)
    numbers = [index + 1 for index in patch.indices_in_effect or ()]
    if arguments.facts and not set(arguments.facts) <= set(numbers):
        raise InputError(
            f"facts is {list(arguments.facts)}; the facts of {patch.id[:10]} in effect are "
            f"{', '.join(map(str, numbers)) or 'none'}. They are numbered from 1.",
            argument="facts",
        )
    before = bench.lm.fingerprint
    chosen = [number - 1 for number in arguments.facts] if arguments.facts else None
    with naming("revision"):
        revision = bench.revert(
            arguments.revision,
            chosen,
            force=arguments.force,
            message=arguments.message,
            progress=progress,
        )
    active = len(bench.ledger.active())
    done = f"Reverted {str(revision.reverts)[:10]}; recorded as {revision.id[:10]}. "
    done += f"{counted(active, 'patch', 'es')} in effect."
    if again := revision.report.get("solved_again"):
        done += f" {counted(len(again), 'patch', 'es')} solved again."
    proof = Verification.from_dict(revision.report)
    answers = bench.lm.answer([fact.text for fact in revision.facts]) if revision.facts else []
    said = [
        (fact.text, answer.strip()) for fact, answer in zip(revision.facts, answers, strict=True)
    ]
    tables = [Table("what the model says now", {"prompt": "<", "answer": "<"}, said)]
    return Answer(
        {**revision.to_dict(), "active": active},
        [*tables, *(proof.tables() if proof.checks else [])],
        notes=[done],
        warnings=[f"Lost: {words}" for words in revision.report.get("lost") or ()],
        view={"revision": revision.to_dict(), **_weights(desk, before)},
    )


def _weights(desk: Desk, before: str) -> dict[str, Any]:
    """Return the fingerprints of the weights before and after, and of the base."""
    after, base = desk.bench.lm.fingerprint, desk.bench.base_fingerprint
    return {"before": before, "after": after, "base": base, "is_base": same_model(after, base)}


def _revert_words(arguments: RevertArguments) -> list[str]:
    words = [word for number in arguments.facts for word in ("--fact", str(number))]
    words += ["-m", arguments.message] if arguments.message else []
    return words + (["--force"] if arguments.force else [])


def _revert_in_python(arguments: RevertArguments, place: Place) -> str:
    more = f", facts={[n - 1 for n in arguments.facts]}" if arguments.facts else ""
    more += f", message={quoted(arguments.message)}" if arguments.message else ""
    more += ", force=True" if arguments.force else ""
    return program(
        place,
        f"revision = bench.revert({quoted(arguments.revision)}{more})",
        "print(json.dumps(revision.to_dict()))",
    )


CHECKOUT = Verb(
    "checkout",
    "Check out",
    "Give the model the weights of a revision. The history stays as it is.",
    CheckoutArguments,
    _checkout,
    lambda arguments, place: program(
        place, f"print(json.dumps(bench.checkout({quoted(arguments.revision)})))"
    ),
    lambda arguments, place: [shell("checkout", arguments.revision, "-w", place.workspace)],
    kind="write",
    template="answers/moved.html",
    button="Check out",
)
REVERT = Verb(
    "revert",
    "Revert",
    "Take back a patch or some of its facts, or undo a revert. The ledger records it.",
    RevertArguments,
    _revert,
    _revert_in_python,
    lambda arguments, place: [
        shell("revert", arguments.revision, *_revert_words(arguments), "-w", place.workspace)
    ],
    kind="write",
    template="answers/moved.html",
    button="Revert",
)
