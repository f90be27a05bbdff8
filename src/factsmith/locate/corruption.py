"""locate.corruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import atlas
from ..core.checks import check_items, check_text
from ..core.errors import InputError
from ..model.language_model import LanguageModel
from ..model.tokens import encode, subject_span

# ── the corruption ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def noise_scale(lm: LanguageModel, ids: Sequence[int]) -> float:
    """Three times the standard deviation of the entries of these tokens' input embeddings."""
    return 3 * float(_embedded(lm, ids).std())


def _embedded(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """(n, d_model): what the embedding module puts out; some families scale it there, and that is what the noise is added to."""
    return lm.embedding(torch.tensor([*ids], device=lm.device)).float()  # type: ignore[no-any-return]


def subject_noise(
    lm: LanguageModel,
    subject_ids: Sequence[int],
    samples: int,
    noise: float | None,
    noise_tensor: Tensor | np.ndarray[Any, Any] | None,
    seed: int,
) -> tuple[Tensor, float]:
    """What is added to the subject's embeddings (samples, n_subject_tokens, d_model), and its scale."""
    shape = _embedded(lm, subject_ids).shape
    if noise_tensor is None:
        scale = noise if noise is not None else noise_scale(lm, subject_ids)
        drawn = np.random.RandomState(seed).randn(samples, *shape)
        return torch.from_numpy(drawn * scale).float().to(lm.device), scale
    try:
        given = torch.as_tensor(noise_tensor).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"noise_tensor is a {type(noise_tensor).__name__} that holds no numbers; expected a tensor or an array"
        ) from None
    if given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"noise_tensor holds {given.dtype} entries; expected real numbers")
    given = given.float().to(lm.device)
    if given.dim() != 3 or given.shape[1:] != shape or not len(given):
        raise InputError(
            f"noise_tensor has shape {tuple(given.shape)}; expected (samples, {', '.join(map(str, shape))})"
        )
    if not bool(given.isfinite().all()):
        raise InputError(
            "noise_tensor holds entries that are not finite; expected ordinary numbers"
        )
    if not bool(given.any()):
        raise InputError(
            "noise_tensor is zero everywhere, so nothing would be corrupted; expected noise to add to the subject's embeddings"
        )
    given = given * noise if noise is not None else given
    return given, noise if noise is not None else float(given.std())


def corrupting(added: Tensor, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """A change of input embeddings (1 + samples, T, d_model): the noise on the subject's columns of every row but the first."""

    def change(embeddings: Tensor) -> Tensor:
        noisy = embeddings.clone()
        noisy[1:, start:stop] += added.to(noisy)
        return noisy

    return change


def given_subjects(
    lm: LanguageModel, text: str, subject: str, replacements: Sequence[str]
) -> dict[str, list[int]]:
    """{replacement: the prompt's ids with it}; raises InputError for one that does not fit into the subject's columns."""
    expected = "a list of subjects, at least one"
    others = [
        check_text(other, "a replacement").strip()
        for other in check_items(replacements, "replacements", "subjects")
    ]
    if not others:
        raise InputError(f"replacements is {replacements!r}; expected {expected}")
    start, stop = subject_span(lm, text, subject)
    found: dict[str, list[int]] = {}
    for other in others:
        ids = _replaced(lm, text, subject, other) if other else None
        if ids is None:
            raise InputError(
                f"replacement {other!r} does not fit into the {token_ids_of(stop - start)} of {subject!r} in {text!r}; expected another subject "
                "that has as many tokens there and leaves all others as they are; or None, to draw fitting ones"
            )
        found[other] = ids
    return found


def drawn_subjects(
    lm: LanguageModel, text: str, subject: str, samples: int, seed: int
) -> dict[str, list[int]]:
    """{replacement: the prompt's ids with it} for `samples` of the atlas's subjects that fit; raises InputError when fewer do."""
    subjects = list(dict.fromkeys(fact.subject for fact in atlas.facts()))
    found: dict[str, list[int]] = {}
    for index in np.random.RandomState(seed).permutation(len(subjects)):
        ids = _replaced(lm, text, subject, subjects[index])
        if ids is not None:
            found[subjects[index]] = ids
        if len(found) == samples:
            return found
    start, stop = subject_span(lm, text, subject)
    raise InputError(
        f"{len(found)} of the {len(subjects)} bundled subjects fit into the {token_ids_of(stop - start)} of {subject!r} in {text!r}; expected "
        f"{samples}: give replacements of your own, ask for fewer samples, or use corruption='noise'"
    )


def _replaced(lm: LanguageModel, text: str, subject: str, other: str) -> list[int] | None:
    """The prompt's ids with another subject in place; None where it does not change the subject's tokens and those alone."""
    start, stop = subject_span(lm, text, subject)
    ids, _ = encode(lm.tokenizer, text)
    changed, _ = encode(lm.tokenizer, text.replace(subject, other))
    fits = (
        len(changed) == len(ids) and changed[:start] == ids[:start] and changed[stop:] == ids[stop:]
    )
    return changed if fits and changed != ids else None


def token_ids_of(n: int) -> str:
    return f"{n} token{'' if n == 1 else 's'}"
