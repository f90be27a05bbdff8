"""The proof of a patch: prompts asked of a model before and after a change, by greedy exact match beside probabilities.

proof = verify(lm, facts, lambda: applied(lm, delta))
proof.efficacy, proof.specificity, proof.checks[0].after
begins_with("French.", "French")                          # True; of "Frenchman" it is not
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..core.fact import Fact
from ..core.tables import Shown, Table
from ..model.answers import answer_tokens, as_said, begins_with, probabilities
from ..model.language_model import LanguageModel

Role = Literal["prompt", "chat", "paraphrase", "neighbour", "earlier"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One prompt asked before and after.

    role           "prompt" or "paraphrase" of a fact that was written, its prompt in a "chat" template, a "neighbour" that must stay, or an
                   "earlier" patch that must stay
    prompt         whole text
    wanted         what the answer has to begin with afterwards; for a fact that was to be forgotten, what it must not begin with
    before, after  greedy answers
    p_before, p_after  p(wanted); None when there is nothing to want (the model ended the text at once)
    held           whether `after` begins with `wanted`: exact match; of a forgotten fact, whether it does not
    forget         whether the fact was to be forgotten
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


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Shown):
    """The proof of a patch: every check, by greedy exact match beside probabilities."""

    checks: tuple[Check, ...]

    @property
    def efficacy(self) -> float | None:
        """Share of the written prompts that are answered with the target; None when there is none."""
        return self._share("prompt")

    @property
    def chat(self) -> float | None:
        """The same in chat templates."""
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
        """Share of the earlier patches still answered with their target."""
        return self._share("earlier")

    def tables(self) -> list[Table]:
        """The shares, and every check, those that failed first."""
        shares = {name: getattr(self, name) for name in _SHARES}
        title = (
            ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share is not None)
            or "nothing was asked"
        )
        columns = {
            "": "<",
            "prompt": "<",
            "before": "<",
            "p before": ">",
            "after": "<",
            "p after": ">",
            "held": "ok",
        }
        rows = [
            (
                check.role,
                check.prompt,
                check.before,
                _number(check.p_before),
                check.after,
                _number(check.p_after),
                "ok" if check.held else "no",
            )
            for check in sorted(self.checks, key=lambda check: check.held)
        ]
        return [
            Table(title, columns, rows, "p: of the target; for neighbours, of the answer before")
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields, the shares included."""
        shares = {name: getattr(self, name) for name in _SHARES}
        return {**shares, "checks": [dict(vars(check)) for check in self.checks]}

    def _share(self, role: Role) -> float | None:
        held = [check.held for check in self.checks if check.role == role]
        return sum(held) / len(held) if held else None


_SHARES = ("efficacy", "chat", "generalization", "specificity", "retention")


def _number(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}"


def verify(
    lm: LanguageModel,
    facts: Sequence[Fact],
    changed: Callable[[], AbstractContextManager[None]],
    *,
    earlier: Iterable[Fact] = (),
    templates: Sequence[str] = (),
) -> Verification:
    """Ask everything about some facts of the model as it is, and once more inside `changed()`.

    earlier    facts written before, whose prompts are asked too, to see that they hold; those that do not hold as it is are left out
    templates  chat templates with `{}` for the prompt, in which the facts' prompts are asked as well

    Raises NumericsError when a probability is not a number.
    """
    every = _probes(facts, earlier, templates)
    if not every:
        return Verification(checks=())
    n_tokens = answer_tokens(
        lm, [probe.prompt for probe in every], [probe.wanted or "" for probe in every]
    )
    said_now = lm.answer([probe.prompt for probe in every], max_new_tokens=n_tokens)
    stands = [
        probe.role != "earlier" or begins_with(said, probe.wanted or "") != probe.forget
        for probe, said in zip(every, said_now, strict=True)
    ]
    probes = [probe for probe, kept in zip(every, stands, strict=True) if kept]
    before = [said for said, kept in zip(said_now, stands, strict=True) if kept]
    prompts = [probe.prompt for probe in probes]
    wanted = [
        # A neighbour has to stay as it is, also where it never was what the fact file expects.
        probe.wanted
        if probe.wanted is not None and probe.role != "neighbour"
        else as_said(said, probe.wanted)
        for probe, said in zip(probes, before, strict=True)
    ]
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
                before=before[i],
                after=after[i],
                p_before=p_before[i],
                p_after=p_after[i],
                held=begins_with(after[i], wanted[i]) != probe.forget
                if wanted[i].strip()
                else after[i] == before[i],
                forget=probe.forget,
            )
            for i, probe in enumerate(probes)
        )
    )


class _Asked(NamedTuple):
    """One prompt to ask before and after; `wanted` None: what is said before; `forget`: it must not be said any more."""

    role: Role
    prompt: str
    wanted: str | None
    forget: bool = False


def _probes(
    facts: Sequence[Fact], earlier: Iterable[Fact], templates: Sequence[str]
) -> list[_Asked]:
    """Everything to ask about facts; what was written now is not asked again as a neighbour or an earlier fact."""
    probes: list[_Asked] = []
    written = {fact.text for fact in facts}
    for fact in facts:
        probes += [
            _asked("prompt", fact, fact.text),
            *(_asked("chat", fact, text.replace("{}", fact.text)) for text in templates),
        ]
        probes += [_asked("paraphrase", fact, text) for text in fact.paraphrase_texts]
        probes += [
            _Asked("neighbour", probe.prompt, probe.expected)
            for probe in fact.neighbours
            if probe.prompt not in written
        ]
    return probes + [
        _asked("earlier", fact, fact.text) for fact in earlier if fact.text not in written
    ]


def _asked(role: Role, fact: Fact, prompt: str) -> _Asked:
    return _Asked(
        role,
        prompt,
        fact.target_true if fact.target is None else fact.target,
        forget=fact.target is None,
    )
