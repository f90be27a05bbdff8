"""Prepare a question for tracing or attribution: fill the prompts, and choose the answer to follow.

    prompts = fill_prompts(["The currency of {} is the"], "Bulgaria")
    answer = answer_to_follow(lm, prompts, None)
    answer.target                      # "lev": what the model itself says
    answer.warnings                    # prompts that the model answers otherwise

A trace or an attribution follows the probability of one answer. It says little about an answer that
the model does not give. So the model's own answer is the default, and another one must be forced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import InputError, UnsupportedModelError
from ..core.forms import occurrences
from ..core.gap import gap_notes, goes_on
from ..core.slots import fill_all, literal
from ..model.answers import first_phrase, say
from ..model.language_model import LanguageModel, joined_notes
from ..model.subject import count_prompt_slots


@dataclass(frozen=True)
class OwnAnswer:
    """What a model says first after a prompt.

    Attributes:
        text: The first phrase of the model's continuation.
        probability: p(text). None: the text is not an answer of whole words. The continuation
            begins with a punctuation mark, or in the middle of a word.
    """

    text: str
    probability: float | None


@dataclass(frozen=True)
class FollowedAnswer:
    """The answer that a trace or an attribution follows.

    Attributes:
        text: The answer, or the model's own continuation of which the first token is followed.
        whole: Whether the whole text is followed, and not only its first token.
        warnings: Sentences for the reader of the result: where the model answers otherwise.
    """

    text: str
    whole: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def target(self) -> str | None:
        """The `target` of a trace. None: the model's own most likely next token."""
        return self.text if self.whole else None


def fill_prompts(
    prompts: Sequence[str], subject: str | None, *, single_slot: bool = False
) -> list[str]:
    """Put the subject into the slots of some prompts.

    Args:
        prompts: Texts that have the subject, or templates with `{}` in its place. For the two
            characters `{}` themselves, write `{{}}`.
        subject: The subject. None: the prompts have no slots.
        single_slot: Refuse a prompt with several slots.

    Raises:
        InputError: when a prompt is empty, has an open slot or too many slots, or does not have
            the subject.
    """
    if subject is not None and not subject.strip():
        raise InputError("subject is empty. Give a part of the prompt.", argument="subject")
    texts = []
    for prompt in prompts:
        if not prompt.strip():
            raise InputError("a prompt is empty. Give a text that the model can continue.")
        n_slots = count_prompt_slots(prompt, subject or "")
        if single_slot and n_slots > 1:
            raise InputError(
                f"{prompt!r} has {n_slots} slots {{}}. Give one, in the subject's place, or write "
                "the subject into the prompt. Write {{}} for each {} that is no slot."
            )
        if n_slots and subject is None:
            raise InputError(
                f"{prompt!r} has a slot {{}}, and no subject was given. Give the subject, or write "
                "it into the prompt. Write {{}} for a {} that is no slot.",
                argument="subject",
            )
        if subject is not None and not n_slots and not occurrences(prompt, subject.strip()):
            raise InputError(
                f"subject {subject!r} is not in {prompt!r}, and the prompt has no slot {{}}. Write "
                "the subject as the prompt has it, or put {} in its place in the prompt.",
                argument="subject",
            )
        texts.append(fill_all(prompt, (subject or "").strip()) if n_slots else literal(prompt))
    return texts


def prompt_warnings(prompts: Sequence[str]) -> tuple[str, ...]:
    """Return a warning for each prompt that ends in a space."""
    return gap_notes(prompts)


def own_answer(lm: LanguageModel, prompt: str) -> OwnAnswer:
    """Return what the model itself says first after a prompt, and how likely it is.

    Raises:
        UnsupportedModelError: when the model fills gaps, and does not continue a text.
    """
    said = say(lm, [prompt], [""])[0]
    text = first_phrase(said.text)
    # Where the model goes on in the middle of a word, or says the text with other tokens, it does
    # not say the text as a target.
    tail = lm.question(prompt, text)[2] if text and not goes_on(prompt, text) else []
    if not tail or tuple(tail) != said.ids[: len(tail)]:
        return OwnAnswer(text, None)
    return OwnAnswer(text, math.exp(float(lm.log_prob([prompt], [text])[0])))


def answer_to_follow(
    lm: LanguageModel,
    prompts: Sequence[str],
    target: str | None,
    *,
    force: bool = False,
    whole_words: bool = False,
) -> FollowedAnswer:
    """Choose the answer to follow after some prompts.

    Args:
        lm: The model.
        prompts: One prompt, or several phrasings of one fact.
        target: The answer to follow. None: the model's own answer to the first prompt.
        force: Follow the target even if the model says it after no prompt.
        whole_words: The answer must consist of whole words. Otherwise the first token is followed
            where the model's own answer does not.

    Raises:
        InputError: when the model says the target after no prompt and it is not forced, or its own
            answer does not consist of whole words and has to.
    """
    if target is not None:
        warnings = _refused(lm, prompts, target, len(prompts), force)
        warnings = (*warnings, *joined_notes(lm, prompts, [target] * len(prompts)))
        return FollowedAnswer(target, warnings=warnings)
    answer = own_answer(lm, prompts[0])
    if answer.probability is not None:
        warnings = _refused(lm, prompts[1:], answer.text, len(prompts), force)
        return FollowedAnswer(answer.text, warnings=warnings)
    problem = (
        f"the model continues {prompts[0]!r} with {answer.text!r}, "
        "which is not an answer of whole words"
    )
    if whole_words:
        raise InputError(
            f"{problem}. End the prompt where an answer begins, or give a target and force it.",
            argument="target",
        )
    warnings = (f"{problem}: its first token is followed",)
    return FollowedAnswer(answer.text, whole=False, warnings=warnings)


def _refused(
    lm: LanguageModel, prompts: Sequence[str], target: str, n_prompts: int, force: bool
) -> tuple[str, ...]:
    """A warning for each prompt that the model answers otherwise.

    Raises an InputError if these are all of the `n_prompts` and the target is not forced.
    """
    says = lm.says(prompts, [target] * len(prompts), by_tokens=True) if prompts else []
    wrong = [prompt for prompt, is_said in zip(prompts, says, strict=True) if not is_said]
    if len(wrong) == n_prompts and not force:
        raise InputError(
            f"{_other_answer(lm, wrong[0], target)}. Leave the target out to follow the model's "
            "own answer, or force the target.",
            argument="force",
        )
    return tuple(_other_answer(lm, prompt, target) for prompt in wrong)


def _other_answer(lm: LanguageModel, prompt: str, target: str) -> str:
    """What the model says to a prompt that it does not answer with the target."""
    try:
        answer = own_answer(lm, prompt)
    except UnsupportedModelError:  # a masked language model has no continuation to show
        return f"the model does not answer {prompt!r} with {target.strip()!r}"
    likely = "" if answer.probability is None else f" (p = {answer.probability:.3f})"
    return f"the model answers {prompt!r} with {answer.text!r}{likely}, not {target.strip()!r}"
