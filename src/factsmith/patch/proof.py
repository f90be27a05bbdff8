"""The proof of a patch: the same prompts before and after a change, by greedy exact match and by
probabilities.

    proof = prove(lm, facts, lambda: applied(lm, delta))
    proof.efficacy, proof.specificity, proof.checks[0].after
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from ..core.fact import Fact
from ..core.gap import Gap
from ..model.answers import answer_tokens, as_said, begins_with, probabilities
from ..model.language_model import LanguageModel
from .verification import Check, Role, Verification


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
    # Settled once, so that p before and p after are those of the same tokens.
    gaps = lm.gaps(prompts, wanted, [probe.gap for probe, _ in asked])
    p_before = probabilities(lm, prompts, wanted, gaps)
    with changed():
        after = lm.answer(prompts, max_new_tokens=n_tokens)
        p_after = probabilities(lm, prompts, wanted, gaps)
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


def ask(lm: LanguageModel, facts: Sequence[Fact]) -> Verification:
    """Ask the prompt of every fact, once and in one batch, of the model as it is.

    The checks have no answer before and no probabilities.

    Args:
        lm: The model.
        facts: The facts.
    """
    probes = [_probe("prompt", fact, fact.text) for fact in facts]
    if not probes:
        return Verification(checks=())
    prompts = [probe.prompt for probe in probes]
    n_tokens = answer_tokens(lm, prompts, [probe.wanted or "" for probe in probes])
    answers = lm.answer(prompts, max_new_tokens=n_tokens)
    return Verification(
        checks=tuple(
            Check(
                role=probe.role,
                prompt=probe.prompt,
                wanted=(probe.wanted or "").strip(),
                before="",
                after=answer,
                p_before=None,
                p_after=None,
                held=begins_with(answer, probe.wanted or "") != probe.forget,
                forget=probe.forget,
            )
            for probe, answer in zip(probes, answers, strict=True)
        )
    )


def held_before(check: Check) -> bool:
    """Return whether the answer before the change was already as wanted."""
    return begins_with(check.before, check.wanted) != check.forget


class _Probe(NamedTuple):
    """One prompt to ask before and after.

    wanted: None means what is said before. forget: it must not be said any more. gap: what stands
    between the prompt and what is wanted.
    """

    role: Role
    prompt: str
    wanted: str | None
    forget: bool = False
    gap: Gap = "auto"


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
    gap = fact.gap if prompt == fact.text else "auto"
    return _Probe(role, prompt, wanted, forget=fact.target is None, gap=gap)


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
