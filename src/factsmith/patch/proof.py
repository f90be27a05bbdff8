"""The proof of a patch: the same prompts before and after a change, by greedy exact match and by
probabilities.

proof = prove(lm, facts, lambda: applied(lm, delta))
proof.efficacy, proof.specificity, proof.checks[0].after
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from ..core.fact import Fact
from ..core.tables import Shown, Table
from ..model.answers import answer_tokens, as_said, begins_with, probabilities
from ..model.language_model import LanguageModel

Role: TypeAlias = Literal["prompt", "chat", "paraphrase", "neighbour", "earlier"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One prompt, asked before and after.

    Attributes:
        role: "prompt" or "paraphrase" of a fact that was written, its prompt in a "chat" template,
            a "neighbour" whose answer must stay, or the prompt of an "earlier" patch that must
            still hold.
        prompt: The whole text.
        wanted: What the answer must begin with afterwards; what it must not begin with, if the fact
            was to be forgotten.
        before: The greedy answer before.
        after: The greedy answer after.
        p_before: p(wanted) before. None: there is nothing to want, since the model ended the text
            at once.
        p_after: p(wanted) after.
        held: Whether `after` begins with `wanted`, by exact match; for a fact to be forgotten,
            whether it does not.
        forget: Whether the fact was to be forgotten.
    """

    role: Role
    prompt: str
    wanted: str
    before: str
    after: str
    p_before: float | None
    p_after: float | None
    held: bool
    forget: bool = False

    @property
    def held_before(self) -> bool:
        """Whether the answer before was already as wanted."""
        return begins_with(self.before, self.wanted) != self.forget

    @property
    def in_words(self) -> str:
        """What was answered after the prompt, and what was wanted: for messages about a check that
        failed.
        """
        if self.forget:
            return f"{self.prompt!r} is still answered {self.after!r}"
        return f"{self.prompt!r} is answered {self.after!r}, not {self.wanted!r}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Shown):
    """The proof of a patch: every check, and the shares of those that held."""

    checks: tuple[Check, ...]

    @property
    def efficacy(self) -> float | None:
        """Share of the written prompts that are answered with the target.

        None: nothing was asked.
        """
        return self._share("prompt")

    @property
    def chat(self) -> float | None:
        """The same, with the prompts in a chat template."""
        return self._share("chat")

    @property
    def generalization(self) -> float | None:
        """The same for paraphrases."""
        return self._share("paraphrase")

    @property
    def specificity(self) -> float | None:
        """Share of the neighbours whose answer stayed."""
        return self._share("neighbour")

    @property
    def retention(self) -> float | None:
        """Share of the earlier patches that still hold."""
        return self._share("earlier")

    @property
    def shares(self) -> dict[str, float]:
        """{"efficacy": 1.0, ...} of everything that was asked."""
        every = {name: getattr(self, name) for name in _SHARES}
        return {name: share for name, share in every.items() if share is not None}

    def failed(self, *roles: Role) -> list[Check]:
        """The checks of these roles that did not hold; of all roles, if none is named."""
        return [
            check for check in self.checks if not check.held and (not roles or check.role in roles)
        ]

    def tables(self) -> list[Table]:
        """The shares, and every check, failed ones first; of very many checks only those that
        failed.
        """
        title = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
        legend = "p: of the target; for neighbours, of the answer before"
        failed = self.failed()
        if len(self.checks) > _MANY:
            title += f"; {len(failed)} of {len(self.checks):,} checks failed"
            if not failed:
                return [Table(title, {})]
            more = f"; the first {_MANY} of those that failed" if len(failed) > _MANY else ""
            return [
                Table(title, _COLUMNS, [_row(check) for check in failed[:_MANY]], legend + more)
            ]
        ordered = sorted(self.checks, key=lambda check: check.held)
        return [
            Table(
                title or "nothing was asked", _COLUMNS, [_row(check) for check in ordered], legend
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the shares included."""
        shares = {name: getattr(self, name) for name in _SHARES}
        return {**shares, "checks": [dict(vars(check)) for check in self.checks]}

    def _share(self, role: Role) -> float | None:
        held = [check.held for check in self.checks if check.role == role]
        return sum(held) / len(held) if held else None


_MANY = 40
"""More checks than this are shown as shares and failures only."""
_SHARES = ("efficacy", "chat", "generalization", "specificity", "retention")
_COLUMNS = {
    "": "<",
    "prompt": "<",
    "before": "<",
    "p before": ">",
    "after": "<",
    "p after": ">",
    "held": "ok",
}


def prove(
    lm: LanguageModel,
    facts: Sequence[Fact],
    changed: Callable[[], AbstractContextManager[None]],
    *,
    asked_again: Iterable[Fact] = (),
    templates: Sequence[str] = (),
) -> Verification:
    """Ask everything about some facts, once of the model as it is and once inside `changed()`.

    Args:
        lm: The model.
        facts: The facts that were written, with their paraphrases and neighbours.
        changed: Opens a block in which the model carries the change.
        asked_again: Facts written before, whose prompts must still hold. Those that do not hold now
            are left out.
        templates: Chat templates with `{}` for the prompt, in which the facts' prompts are asked as
            well.

    Raises:
        NumericsError: A probability is not a number.
    """
    probes = _probes(facts, asked_again, templates)
    if not probes:
        return Verification(checks=())
    n_tokens = answer_tokens(
        lm, [probe.prompt for probe in probes], [probe.wanted or "" for probe in probes]
    )
    said = lm.answer([probe.prompt for probe in probes], max_new_tokens=n_tokens)
    asked = [
        (probe, answer)
        for probe, answer in zip(probes, said, strict=True)
        if _counts(probe, answer)
    ]
    prompts = [probe.prompt for probe, _ in asked]
    wanted = [_wanted(probe, answer) for probe, answer in asked]
    p_before = probabilities(lm, prompts, wanted)
    with changed():
        after = lm.answer(prompts, max_new_tokens=n_tokens)
        p_after = probabilities(lm, prompts, wanted)
    return Verification(
        checks=tuple(
            Check(
                role=probe.role,
                prompt=probe.prompt,
                wanted=wanted[i].strip(),
                before=before,
                after=after[i],
                p_before=p_before[i],
                p_after=p_after[i],
                held=begins_with(after[i], wanted[i]) != probe.forget
                if wanted[i].strip()
                else after[i] == before,
                forget=probe.forget,
            )
            for i, (probe, before) in enumerate(asked)
        )
    )


class _Probe(NamedTuple):
    """One prompt to ask before and after.

    wanted: None means what is said before. forget: it must not be said any more.
    """

    role: Role
    prompt: str
    wanted: str | None
    forget: bool = False


def _probes(
    facts: Sequence[Fact], asked_again: Iterable[Fact], templates: Sequence[str]
) -> list[_Probe]:
    """Everything to ask.

    What is written now is not asked again as a neighbour or an earlier fact.
    """
    probes: list[_Probe] = []
    written = {fact.text for fact in facts}
    for fact in facts:
        probes.append(_probe("prompt", fact, fact.text))
        probes += [
            _probe("chat", fact, template.replace("{}", fact.text)) for template in templates
        ]
        probes += [_probe("paraphrase", fact, text) for text in fact.paraphrase_texts]
        near = [probe for probe in fact.neighbours if probe.prompt not in written]
        probes += [_Probe("neighbour", probe.prompt, probe.expected) for probe in near]
    return probes + [
        _probe("earlier", fact, fact.text) for fact in asked_again if fact.text not in written
    ]


def _probe(role: Role, fact: Fact, prompt: str) -> _Probe:
    wanted = fact.target_true if fact.target is None else fact.target
    return _Probe(role, prompt, wanted, forget=fact.target is None)


def _counts(probe: _Probe, answer: str) -> bool:
    """Whether a probe is asked: an earlier fact that does not hold now cannot be lost."""
    return probe.role != "earlier" or begins_with(answer, probe.wanted or "") != probe.forget


def _wanted(probe: _Probe, answer: str) -> str:
    """What is wanted afterwards.

    A neighbour must stay as it is, even where it never was what the fact file expects.
    """
    if probe.wanted is not None and probe.role != "neighbour":
        return probe.wanted
    return as_said(answer, probe.wanted)


def _row(check: Check) -> tuple[str, ...]:
    before, after = ("" if p is None else f"{p:.3f}" for p in (check.p_before, check.p_after))
    verdict = "ok" if check.held else "no"
    return (check.role, check.prompt, check.before, before, check.after, after, verdict)
