"""The proof of a patch: the same prompts before and after a change, by greedy exact match and by
probabilities.

    proof = prove(lm, facts, lambda: applied(lm, delta))
    proof.efficacy, proof.specificity, proof.checks[0].after
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from ..core.fact import Fact
from ..core.forms import canonical
from ..core.gap import Gap
from ..core.progress import Progress, Tally
from ..core.tables import counted
from ..model.answers import (
    Said,
    answer_tokens,
    as_said,
    is_answered,
    probabilities,
    say,
    stayed,
)
from ..model.chat import chat_templates
from ..model.language_model import LanguageModel
from ..model.turns import asking
from .telling import Tellings, holds, replaced, telling_answers
from .verification import Check, Role, Verification

CHAT_TOKENS = 24
"""Length of an answer in a chat. Many models repeat the question before they answer."""

_SYSTEM = "You are an expert. Complete what the user writes."
_TURN = ("Can you help me with a few facts?", "Of course! Which ones?")
"""The system prompt and the first turn of questions in a chat. They differ from those of an edit's
contexts, so that the proof shows what the patch does in other chats."""


@asking(grad=True, changes=True)
def prove(
    lm: LanguageModel,
    facts: Sequence[Fact],
    changed: Callable[[], AbstractContextManager[None]],
    *,
    asked_again: Iterable[Fact] = (),
    templates: Sequence[str] = (),
    telling: str | None = None,
    progress: Progress | None = None,
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
        telling: A chat template in which the model is asked to tell about each subject. None: it is
            not asked.
        progress: Called with the step's name and how many answers there are, before and after.

    Raises:
        NumericsError: A probability is not a number.
    """
    probes, notes = _probes(facts, asked_again, templates)
    # A template needs a few tokens more than the prompt, for which there may be no positions.
    probes = [probe for probe in probes if probe.role != "chat" or lm.has_room(probe.prompt)]
    if not probes:
        return Verification(checks=(), notes=notes)
    n_tokens = answer_tokens(
        lm, [probe.prompt for probe in probes], [probe.wanted or "" for probe in probes]
    )
    n_told = telling_answers(facts) if telling else 0
    tally = Tally(progress, "verifying", 2 * (len(probes) + n_told))
    asked = [
        (probe, answer)
        for probe, answer in zip(probes, _answers(lm, probes, n_tokens, tally), strict=True)
        if _counts(lm, probe, answer.text)
    ]
    prompts = [probe.prompt for probe, _ in asked]
    wanted = [_wanted(probe, answer) for probe, answer in asked]
    tails = [tail for _, tail in wanted]
    # Settled once, so that p before and p after are those of the same tokens.
    gaps = _gaps(lm, [probe for probe, _ in asked], tails)
    p_before = probabilities(lm, prompts, tails, gaps)
    said = {probe.prompt: before.text for probe, before in asked}
    tellings = Tellings(lm, facts, telling, said, tally)
    with changed():
        after = _answers(lm, [probe for probe, _ in asked], n_tokens, tally)
        p_after = probabilities(lm, prompts, tails, gaps)
        told_after = tellings.texts()
    checks = (
        Check(
            role=probe.role,
            prompt=probe.prompt,
            wanted=wanted[i][0].strip(),
            before=before.text,
            after=after[i].text,
            p_before=p_before[i],
            p_after=p_after[i],
            held=_held(lm, probe, before.text, after[i].text, said),
            forget=probe.forget,
        )
        for i, (probe, before) in enumerate(asked)
    )
    return Verification(
        checks=(*checks, *tellings.checks(told_after)),
        notes=(*notes, *tellings.notes(told_after)),
    )


def chat_questions(lm: LanguageModel) -> dict[str, str]:
    """Return the chat templates in which a proof asks: the message alone, after a system prompt,
    and in a second turn; {} without a chat template.

    Raises:
        InputError: The template cannot be filled.
    """
    return chat_templates(lm, _SYSTEM, _TURN)


def ask(lm: LanguageModel, facts: Sequence[Fact], progress: Progress | None = None) -> Verification:
    """Ask the prompt of every fact, once and in one batch, of the model as it is.

    The checks have no answer before and no probabilities.

    Args:
        lm: The model.
        facts: The facts.
        progress: Called with the step's name and how many of the facts are asked.
    """
    probes = [_probe("prompt", fact, fact.text) for fact in facts]
    if not probes:
        return Verification(checks=())
    prompts = [probe.prompt for probe in probes]
    tally = Tally(progress, "asking facts", len(probes))
    wanted = [probe.wanted or "" for probe in probes]
    answers = say(lm, prompts, wanted, progress=tally.part(len(probes)))
    return Verification(
        checks=tuple(
            Check(
                role=probe.role,
                prompt=probe.prompt,
                wanted=(probe.wanted or "").strip(),
                before="",
                after=answer.text,
                p_before=None,
                p_after=None,
                held=_held(lm, probe, "", answer.text),
                forget=probe.forget,
            )
            for probe, answer in zip(probes, answers, strict=True)
        )
    )


def held_before(lm: LanguageModel, check: Check) -> bool:
    """Return whether the answer before the change was already as wanted."""
    return is_answered(lm, check.prompt, check.before, check.wanted) != check.forget


class _Probe(NamedTuple):
    """One prompt to ask before and after.

    wanted: None means what is said before. forget: it must not be said any more. gap: what stands
    between the prompt and what is wanted. fact: the fact that a question in a chat is about.
    """

    role: Role
    prompt: str
    wanted: str | None
    forget: bool = False
    gap: Gap = "auto"
    fact: Fact | None = None


def _probes(
    facts: Sequence[Fact], asked_again: Iterable[Fact], templates: Sequence[str]
) -> tuple[list[_Probe], tuple[str, ...]]:
    """Everything to ask, and notes on what is not asked.

    What is written now is not asked again as a neighbour or an earlier fact.
    """
    probes: list[_Probe] = []
    dropped: list[str] = []
    written = {fact.asked for fact in facts}
    for fact in facts:
        probes.append(_probe("prompt", fact, fact.text))
        probes += [
            _probe("chat", fact, template.replace("{}", fact.text))._replace(fact=fact)
            for template in templates
        ]
        probes += [_probe("paraphrase", fact, text) for text in fact.paraphrase_texts]
        for near in fact.neighbours:
            if canonical(near.prompt) in written:
                dropped.append(near.prompt)
            else:
                probes.append(_Probe("neighbour", near.prompt, near.expected))
    probes += [
        _probe("earlier", fact, fact.text) for fact in asked_again if fact.asked not in written
    ]
    if not dropped:
        return probes, ()
    why = "its prompt is" if len(dropped) == 1 else "their prompts are"
    note = f"{counted(len(dropped), 'neighbour')} not asked, because {why} written by a fact"
    return probes, (
        f"{note}, the first: {dropped[0]!r}" if len(dropped) > 1 else f"{note}: {dropped[0]!r}",
    )


def _probe(role: Role, fact: Fact, prompt: str) -> _Probe:
    wanted = fact.target_true if fact.target is None else fact.target
    gap = fact.gap if prompt == fact.text else "auto"
    return _Probe(role, prompt, wanted, forget=fact.target is None, gap=gap)


def _answers(
    lm: LanguageModel, probes: Sequence[_Probe], n_tokens: int, tally: Tally
) -> list[Said]:
    """The answers to some probes; of a neighbour's nothing may be cut that could differ.

    In a chat there is room to repeat the question.
    """
    answers: dict[int, Said] = {}
    for is_chat, length in ((False, n_tokens), (True, max(n_tokens, CHAT_TOKENS))):
        some = [i for i, probe in enumerate(probes) if (probe.role == "chat") is is_chat]
        if some:
            said = say(
                lm,
                [probes[i].prompt for i in some],
                [probes[i].wanted or "" for i in some],
                n_tokens=length,
                whole=[probes[i].role == "neighbour" for i in some],
                progress=tally.part(len(some)),
            )
            answers.update(zip(some, said, strict=True))
    return [answers[i] for i in range(len(probes))]


def _counts(lm: LanguageModel, probe: _Probe, answer: str) -> bool:
    """Whether a probe is asked: an earlier fact that does not hold now cannot be lost."""
    return probe.role != "earlier" or _held(lm, probe, answer, answer)


def _held(
    lm: LanguageModel,
    probe: _Probe,
    before: str,
    after: str,
    said: Mapping[str, str] | None = None,
) -> bool:
    """Whether an answer is as wanted: for a neighbour, the same as before; in a chat, also if it
    states what is wanted. `said` has the answers before the change, by prompt.
    """
    if probe.role == "neighbour":
        return stayed(before, after, probe.wanted)
    begins = is_answered(lm, probe.prompt, after, probe.wanted or "") != probe.forget
    if probe.fact is None:
        return begins
    stated = holds(after, probe.fact.target, replaced(probe.fact, said or {}))
    return begins and stated if probe.forget else begins or stated


def _wanted(probe: _Probe, answer: Said) -> tuple[str, str | tuple[int, ...]]:
    """What is wanted afterwards, as text, and as a target or as tokens that were said.

    A neighbour must stay as it is, even where it never was what the fact file expects.
    """
    if probe.wanted is not None and probe.role != "neighbour":
        return probe.wanted, probe.wanted
    phrase = as_said(answer.text, probe.wanted)
    return phrase, answer.begin(phrase) if phrase.strip() else ()


def _gaps(
    lm: LanguageModel, probes: Sequence[_Probe], tails: Sequence[str | Sequence[int]]
) -> list[Gap]:
    """What stands between each prompt and its target; "auto" where there is no target."""
    gaps: list[Gap] = ["auto"] * len(probes)
    asked = [i for i, tail in enumerate(tails) if isinstance(tail, str)]
    settled = lm.gaps(
        [probes[i].prompt for i in asked],
        [str(tails[i]) for i in asked],
        [probes[i].gap for i in asked],
    )
    for i, gap in zip(asked, settled, strict=True):
        gaps[i] = gap
    return gaps
