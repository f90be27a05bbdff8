"""Corrupt the subject of a prompt, so that the model loses the answer.

    corruption = Corruption("noise", samples=10, seed=1)
    prompt = TracedPrompt.read(lm, "The capital of {} is", "France")
    inputs = corruption.inputs(lm, prompt)     # the token ids and the noise of the corrupted runs

The noise is that of Meng et al. 2022, section 2.1 (arXiv 2202.05262): normal noise on the input
embeddings of the subject's tokens, three times as wide as these embeddings spread. A replacement is
another subject that has as many tokens in the prompt and leaves the other tokens unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .. import atlas
from ..core.checks import check_count, check_items, check_number, check_seed, check_text
from ..core.errors import InputError
from ..core.fact import Fact
from ..core.gap import before_gap
from ..core.settled import as_numbers
from ..core.slots import Filled
from ..core.tables import counted
from ..model.language_model import LanguageModel
from ..model.subject import fact_prompt, read_prompt, token_span
from ..model.tokens import encode
from ..model.turns import asking
from .kinds import CorruptionKind, check_choice


@dataclass(frozen=True)
class TracedPrompt:
    """A prompt, and the tokens of its subject.

    Attributes:
        text: The whole text.
        subject: The part of the text to corrupt, as the text writes it.
        start: The character of the text where the subject begins.
        ids: Token ids of the text.
        offsets: The characters [start, stop) of each token.
        span: Token columns [start, stop) of the subject.
    """

    text: str
    subject: str
    start: int
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    span: tuple[int, int]

    @classmethod
    def read(
        cls, lm: LanguageModel, prompt: str, subject: str, *, occurrence: int | None = None
    ) -> TracedPrompt:
        """Tokenize a prompt and find its subject.

        Args:
            lm: The model.
            prompt: A text that has the subject, or a template with one `{}` in its place.
            subject: The subject.
            occurrence: Which occurrence of the subject in a text is meant, counted from 1. None:
                the only one, or the only one that is a whole word.

        Raises:
            InputError: when one of the two is not text.
            SubjectError: when the subject is empty, is not in the text, or is there several times
                and `occurrence` does not say which one is meant.
        """
        return cls._of(lm, read_prompt(prompt, subject, occurrence=occurrence))

    @classmethod
    def of_fact(cls, lm: LanguageModel, fact: Fact) -> TracedPrompt:
        """Tokenize a fact's prompt. Its slot says where the subject is.

        Raises:
            SubjectError: when the subject has no token.
        """
        return cls._of(lm, fact_prompt(fact))

    @classmethod
    def _of(cls, lm: LanguageModel, prompt: Filled) -> TracedPrompt:
        text = before_gap(prompt.text)
        ids, offsets = encode(lm, text)
        span = token_span(offsets, prompt)
        subject = text[prompt.start : prompt.stop]
        return cls(text, subject, prompt.start, tuple(ids), tuple(offsets), span)

    @property
    def subject_ids(self) -> tuple[int, ...]:
        """The token ids of the subject."""
        start, stop = self.span
        return self.ids[start:stop]

    def with_subject(self, lm: LanguageModel, other: str) -> list[int] | None:
        """Return the token ids with another subject in place.

        None if that leaves the text unchanged, or changes more than the subject's tokens.
        """
        start, stop = self.span
        ids = list(self.ids)
        rest = self.text[self.start + len(self.subject) :]
        changed, _ = encode(lm, f"{self.text[: self.start]}{other}{rest}")
        fits = (
            len(changed) == len(ids)
            and changed[:start] == ids[:start]
            and changed[stop:] == ids[stop:]
        )
        return changed if fits and changed != ids else None

    @property
    def place(self) -> str:
        """The subject's place in words, for messages."""
        tokens = counted(len(self.subject_ids), "token")
        return f"the {tokens} of {self.subject!r} in {self.text!r}"


@dataclass(frozen=True, eq=False)
class CorruptedInputs:
    """The inputs of the corrupted runs of one prompt.

    Attributes:
        sequences: Token ids of each corrupted run.
        embed: Changes the input embeddings (1 + samples, T, d_model) of all runs, the clean run
            first. None: the embeddings stay.
        noise: Standard deviation of the noise; 0 without noise.
        replacements: The subject of each corrupted run; empty for noise.
    """

    sequences: list[list[int]]
    embed: Callable[[Tensor], Tensor] | None = None
    noise: float = 0.0
    replacements: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Corruption:
    """How to corrupt the subject of a prompt.

    Attributes:
        kind: "noise" adds noise to the subject's input embeddings. "replace" puts another subject
            with as many tokens in its place.
        samples: Number of corrupted runs. A given tensor, or given replacements, decide it instead.
        scale: Standard deviation of the noise. With `tensor`: a factor for the tensor. None: three
            times the standard deviation of the entries of the subject's embeddings; a given tensor
            is used unchanged.
        tensor: (samples, n_subject_tokens, d_model) noise to add. None: drawn by `seed`.
        replacements: Other subjects, one for each corrupted run. None: drawn by `seed` from the
            atlas's subjects that fit.
        seed: Seed of numpy's RandomState, whose randn(samples, n_subject_tokens, d_model) is the
            noise.

    Raises:
        InputError: when a value is not accepted, or the values contradict each other. The messages
            use the argument names of `causal_trace`.
    """

    kind: CorruptionKind = "noise"
    samples: int = 10
    scale: float | None = None
    tensor: Tensor | np.ndarray[Any, Any] | None = None
    replacements: Sequence[str] | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        check_choice(self.kind, "corruption", get_args(CorruptionKind))
        samples = check_count(self.samples, "samples", "the number of corrupted runs")
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.scale is not None:
            scale = check_number(
                self.scale,
                "noise",
                above=0,
                also="None for three standard deviations of the subject's embeddings",
            )
            object.__setattr__(self, "scale", scale)
        if self.kind == "replace" and (self.scale is not None or self.tensor is not None):
            raise InputError(
                "noise is given, and corruption is 'replace'. Other subjects replace the noise: "
                "leave the noise out, or give corruption='noise'.",
                argument="noise",
            )
        if self.kind == "noise" and self.replacements is not None:
            raise InputError(
                "replacements are given, and corruption is 'noise'. "
                "Give corruption='replace' with them, or leave them out.",
                argument="replacements",
            )

    @property
    def drawn_by(self) -> int | None:
        """The seed, or None if the noise or the replacements were given."""
        is_given = self.tensor is not None or self.replacements is not None
        return None if is_given else self.seed

    def inputs(self, lm: LanguageModel, prompt: TracedPrompt) -> CorruptedInputs:
        """Return the inputs of the corrupted runs of a prompt.

        Raises:
            InputError: when the tensor does not fit the prompt, or a replacement does not fit, or
                too few of the atlas's subjects fit.
        """
        if self.kind == "replace":
            others = (
                _given_subjects(lm, prompt, self.replacements)
                if self.replacements is not None
                else _drawn_subjects(lm, prompt, self.samples, self.seed)
            )
            return CorruptedInputs(list(others.values()), replacements=tuple(others))
        added, noise = self._noise(lm, prompt.subject_ids)
        sequences = [list(prompt.ids)] * len(added)
        return CorruptedInputs(sequences, embed=_adding(added, prompt.span), noise=noise)

    def _noise(self, lm: LanguageModel, subject_ids: Sequence[int]) -> tuple[Tensor, float]:
        """The noise (samples, n_subject_tokens, d_model), and its standard deviation."""
        shape = _embedded(lm, subject_ids).shape
        if self.tensor is None:
            scale = self.scale if self.scale is not None else noise_scale(lm, subject_ids)
            drawn = np.random.RandomState(self.seed).randn(self.samples, *shape)
            return torch.from_numpy(drawn * scale).float().to(lm.device), scale
        given = _check_noise(self.tensor, tuple(shape), lm.device)
        if self.scale is not None:
            return given * self.scale, self.scale
        return given, float(given.std())


@asking()
def noise_scale(lm: LanguageModel, ids: Sequence[int]) -> float:
    """Return three times the standard deviation of the entries of these tokens' embeddings."""
    return 3 * float(_embedded(lm, ids).std())


def _embedded(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """(n, d_model): the output of the embedding module.

    Some families scale it, and the noise is added after that.
    """
    embedded: Tensor = lm.embedding(torch.tensor([*ids], device=lm.device))
    return embedded.float()


def _check_noise(
    tensor: Tensor | np.ndarray[Any, Any], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """The given noise as float32 on the model's device."""
    try:
        given = as_numbers(tensor)
    except (TypeError, ValueError, RuntimeError):
        raise _noise_error(f"is a {type(tensor).__name__} that holds no numbers") from None
    if given.is_complex() or given.dtype == torch.bool:
        raise _noise_error(f"holds entries of {given.dtype}")
    given = given.float().to(device)
    if given.dim() != 3 or given.shape[1:] != shape or not len(given):
        expected = f"(samples, {', '.join(map(str, shape))})"
        raise _noise_error(f"has shape {tuple(given.shape)}; expected {expected}")
    if not bool(given.isfinite().all()):
        raise _noise_error("holds entries that are not finite")
    if not bool(given.any()):
        raise _noise_error("is zero everywhere, so it corrupts nothing")
    return given


def _noise_error(problem: str) -> InputError:
    return InputError(
        f"noise_tensor {problem}. Give a tensor or an array of finite real numbers, with one slice "
        "for each corrupted run.",
        argument="noise_tensor",
    )


def _adding(added: Tensor, span: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Add noise (samples, n, d_model) to the subject's columns of every row except the first."""
    start, stop = span

    def change(embeddings: Tensor) -> Tensor:
        noisy = embeddings.clone()
        noisy[1:, start:stop] += added.to(noisy)
        return noisy

    return change


def _given_subjects(
    lm: LanguageModel, prompt: TracedPrompt, replacements: Sequence[str]
) -> Mapping[str, list[int]]:
    """{replacement: the prompt's token ids with it}."""
    others = [
        check_text(other, "a replacement").strip()
        for other in check_items(replacements, "replacements", "subjects")
    ]
    if not others:
        raise InputError(
            "replacements is empty. Give a list of subjects, at least one, or None to draw them.",
            argument="replacements",
        )
    fitting: dict[str, list[int]] = {}
    for other in others:
        ids = prompt.with_subject(lm, other) if other else None
        if ids is None:
            raise InputError(
                f"replacement {other!r} does not fit into {prompt.place}. Give another subject "
                "that has as many tokens and leaves the other tokens unchanged, or None to draw "
                "subjects that fit.",
                argument="replacements",
            )
        fitting[other] = ids
    return fitting


def _drawn_subjects(
    lm: LanguageModel, prompt: TracedPrompt, samples: int, seed: int
) -> Mapping[str, list[int]]:
    """{replacement: the prompt's token ids with it} for some of the atlas's subjects that fit."""
    subjects = list(dict.fromkeys(fact.subject for fact in atlas.facts()))
    fitting: dict[str, list[int]] = {}
    for index in np.random.RandomState(seed).permutation(len(subjects)):
        ids = prompt.with_subject(lm, subjects[index])
        if ids is not None:
            fitting[subjects[index]] = ids
        if len(fitting) == samples:
            return fitting
    raise InputError(
        f"{len(fitting)} of the {len(subjects)} bundled subjects fit into {prompt.place}, and "
        f"samples is {samples}. Give replacements of your own, ask for fewer samples, or give "
        "corruption='noise'.",
        argument="replacements",
    )
