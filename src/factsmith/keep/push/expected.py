"""What a revision's answers should be, on any server: the proof of its facts as plain records.

expected = expect(bench, revision.id)           # asked of the model in memory
expected.probes[0].wanted, expected.probes[0].before
Expected.from_dict(expected.to_dict())          # kept with a push: a rollback needs no model
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import DamagedError, InputError
from ...core.gap import Gap, before_gap
from ...core.progress import Progress
from ...model.answers import answer_tokens, n_lines
from ...model.language_model import LanguageModel
from ...model.tokens import target_and_joint
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
        numbers = [n for probe in probes for n in (probe.log_before, probe.log_after) if n]
        counts = [expected.n_tokens, *(probe.lines for probe in probes)]
        is_usable = all(map(math.isfinite, numbers)) and min(counts) > 0 and bool(probes)
        if not is_usable or any(probe.role not in ROLES for probe in probes):
            raise DamagedError(
                "the proof that was kept with a push is damaged: it has no questions, or a number "
                "or a role that no proof has"
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
    with bench.on_base():  # again: after a block with other deltas the model has its own
        of_facts = {fact.text: fact.gap for fact in facts}
        gaps = lm.gaps(
            [check.prompt for check in asked],
            [check.wanted for check in asked],
            [of_facts.get(check.prompt, "auto") for check in asked],
        )
        n_tokens = answer_tokens(
            lm, [check.prompt for check in asked], [check.wanted for check in asked]
        )
        before = _logs(lm, asked, gaps)
    with bench.carrying_exactly(deltas):
        after = _logs(lm, asked, gaps)
    probes = (
        _probe(check, gap == "space", *logs)
        for check, gap, *logs in zip(asked, gaps, before, after, strict=True)
    )
    return Expected(
        revision=bench.ledger.resolve(reference),
        fingerprint=bench.ledger.fingerprint,
        dtype=dtype_name(lm.dtype),
        n_facts=len(facts),
        n_tokens=n_tokens,
        probes=tuple(probes),
    )


def _logs(lm: LanguageModel, checks: Sequence[Check], gaps: Sequence[Gap]) -> list[float | None]:
    """Return ln p of what each check wants as a text, as servers compute it.

    None: there is no text, or its tokens may be split from the prompt's in two ways. In memory the
    likelier one counts, and a server knows one.
    """
    asked = [
        i
        for i, (check, gap) in enumerate(zip(checks, gaps, strict=True))
        if check.wanted.strip()
        and target_and_joint(lm, check.prompt, check.wanted, gap=gap)[1] is None
    ]
    logs: list[float | None] = [None] * len(checks)
    if asked:
        values = lm.log_prob(
            [checks[i].prompt for i in asked],
            [checks[i].wanted for i in asked],
            gaps=[gaps[i] for i in asked],
        )
        for i, value in zip(asked, values.tolist(), strict=True):
            logs[i] = value if math.isfinite(value) else None
    return logs


def _probe(check: Check, spaced: bool, before: float | None, after: float | None) -> Probe:
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
        log_before=before,
        log_after=after,
        held=check.held,
        lines=n_lines(check.wanted),
    )
