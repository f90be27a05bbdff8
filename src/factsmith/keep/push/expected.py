"""What a revision's answers should be, on any server: the proof of its facts as plain records.

expected = expect(bench, revision.id)           # asked of the model in memory
expected.probes[0].wanted, expected.probes[0].before
Expected.from_dict(expected.to_dict())          # kept with a push: a rollback needs no model
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import DamagedError, InputError
from ...core.gap import before_gap
from ...core.progress import Progress
from ...model.answers import answer_tokens, n_lines
from ...patch.proof import prove
from ...patch.verification import Check, Role
from ..bench import LedgerBench
from ..carried import newest_facts
from ..export.dtypes import dtype_name

ROLES: tuple[Role, ...] = ("prompt", "paraphrase", "neighbour")
"""What a server is asked."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt, and how the workspace's model answers it.

    Attributes:
        role: "prompt" or "paraphrase" of a fact, or a "neighbour" whose answer must stay.
        prompt: The whole text.
        wanted: What the answer must begin with; what it must not, if the fact is forgotten. For a
            neighbour: what the base model answers.
        tail: `wanted` with the space that comes before it, if one does: the text whose probability
            is compared. "": nothing is compared.
        forget: Whether the fact is to be forgotten.
        before: The greedy answer of the base model.
        after: The greedy answer of the patched model.
        log_before: ln p(tail) of the base model. None: not known.
        log_after: ln p(tail) of the patched model.
        held: Whether the patched model answers as wanted.
        lines: How many lines an answer has at most.
    """

    role: Role
    prompt: str
    wanted: str
    tail: str
    forget: bool
    before: str
    after: str
    log_before: float | None
    log_after: float | None
    held: bool
    lines: int = 1


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The proof of a revision, as a server should give it.

    Attributes:
        revision: The id of the revision.
        fingerprint: The fingerprint of the base model.
        dtype: The dtype in which the workspace's model computes.
        n_facts: How many facts are in effect.
        n_tokens: The most tokens of an answer.
        probes: What is asked.
    """

    revision: str
    fingerprint: str
    dtype: str
    n_facts: int
    n_tokens: int
    probes: tuple[Probe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**vars(self), "probes": [dict(vars(probe)) for probe in self.probes]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Expected:
        """Return what `to_dict` gave.

        Raises:
            DamagedError: when it is not that.
        """
        try:
            probes = tuple(Probe(**probe) for probe in fields["probes"])
            expected = cls(**{**fields, "probes": probes})
        except (KeyError, TypeError) as error:
            raise DamagedError(f"the proof that was kept with a push is damaged: {error}") from None
        records: tuple[Expected | Probe, ...] = (expected, *probes)
        for record in records:
            for field in dataclasses.fields(record):
                value, kind = getattr(record, field.name), str(field.type)
                if kind in _KINDS and not isinstance(value, _KINDS[kind]):
                    raise DamagedError(
                        f"the proof that was kept with a push is damaged: {field.name} is "
                        f"{value!r:.40}"
                    )
        return expected


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float | None": (float, int, type(None)),
}


def expect(bench: LedgerBench, reference: str, progress: Progress | None = None) -> Expected:
    """Ask the facts in effect at a revision of the base model and of the patched one, in memory.

    Args:
        bench: The workspace with its model. Model and checkout are unchanged afterwards.
        reference: The revision: an id, a unique prefix, or "latest".
        progress: Called with the step's name and how many answers there are.

    Raises:
        InputError: when no fact is in effect there.
        RevisionError: when there is no such revision.
        DamagedError: when the files of a delta are not whole.
    """
    lm = bench.lm
    deltas = list(bench.deltas_at(reference).values())
    facts = newest_facts(deltas)
    if not facts:
        raise InputError(
            f"revision {reference!r} has no fact in effect, so nothing could be proved in a "
            "server; `factsmith log` lists the revisions",
            argument="revisions",
        )
    with bench.on_base():
        proof = prove(lm, facts, lambda: bench.carrying_exactly(deltas), progress=progress)
        asked = [check for check in proof.checks if check.role in ROLES]
        of_facts = {fact.text: fact.gap for fact in facts}
        gaps = lm.gaps(
            [check.prompt for check in asked],
            [check.wanted for check in asked],
            [of_facts.get(check.prompt, "auto") for check in asked],
        )
        n_tokens = answer_tokens(
            lm, [check.prompt for check in asked], [check.wanted for check in asked]
        )
    probes = (_probe(check, gap == "space") for check, gap in zip(asked, gaps, strict=True))
    return Expected(
        revision=bench.ledger.resolve(reference),
        fingerprint=bench.ledger.fingerprint,
        dtype=dtype_name(lm.dtype),
        n_facts=len(facts),
        n_tokens=n_tokens,
        probes=tuple(probes),
    )


def _probe(check: Check, spaced: bool) -> Probe:
    wanted = check.wanted.strip()
    tail = f" {wanted}" if spaced and wanted else wanted
    return Probe(
        role=check.role,
        prompt=before_gap(check.prompt),
        wanted=check.wanted,
        tail=tail,
        forget=check.forget,
        before=check.before,
        after=check.after,
        log_before=_log(check.p_before),
        log_after=_log(check.p_after),
        held=check.held,
        lines=n_lines(check.wanted),
    )


def _log(p: float | None) -> float | None:
    """Return ln p; None where nothing is known, or p is too small for a float."""
    return math.log(p) if p else None
