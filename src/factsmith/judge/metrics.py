"""Measures of an edit: numbers and answers in, numbers out. No model is asked.

    harmonic_mean([efficacy, paraphrase, neighbourhood])      # the Score (S)
    alias_match("French, of course", ["French"])              # True
    bootstrap_interval(hits, groups=record_of_each)           # the 95 % interval of their mean

Shares are in [0, 1]; papers print them times 100. What is measured of one question, success,
magnitude and tokens, is documented in `rows.Row`. References to code are to kmeng01/memit at
80426fd (experiments/) and zjunlp/EasyEdit at 14cea82.

A new measure of one question is a function here and a field of `rows.Row`. `summary.py` averages
the fields.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.checks import check_count, check_items, check_number, check_seed, check_text
from ..core.errors import InputError, NumericsError
from ..core.settled import as_numbers
from ..model.answers import begins_with, n_lines

# ── answers ───────────────────────────────────────────────────────────────────────────────────────


def exact_match(answer: str, wanted: str) -> bool:
    """Return whether a greedy answer begins with a text, in whole words and in the same case.

    "French." begins with "French", "Frenchman" does not, and "2,137" does not begin with "2". As
    many lines count as the text has, from the first line with something in it on; the rest of the
    answer is not judged. Generation ends at EOS or at a line break (`LanguageModel.answer`), as in
    WILD, Yang et al. 2025, arXiv 2502.11177; EasyEdit evaluate_utils.py:104-175.
    """
    lines = [line for line in check_text(answer, "the answer").splitlines() if line.strip()]
    wanted = check_text(wanted, "wanted")
    return begins_with("\n".join(lines[: n_lines(wanted)]), wanted)


def alias_match(answer: str, answers: Iterable[str]) -> bool:
    """Return whether an answer begins with one of several right answers, as `exact_match` counts
    it.

    Raises:
        InputError: when there is no right answer.
    """
    listed = check_items(answers, "answers", "right answers: the object and its aliases")
    if not listed:
        raise InputError("answers is empty; give at least one right answer", argument="answers")
    return any(exact_match(answer, wanted) for wanted in listed)


def harmonic_mean(values: Iterable[float]) -> float:
    """Return the harmonic mean n / Σ(1/v), and 0 if a value is 0.

    It is the Score (S) of ES, PS and NS (memit summarize.py:138-150).

    Raises:
        InputError: when there is no value, or a value is None, negative or not finite.
    """
    listed = [
        check_number(value, "a value", least=0) for value in check_items(values, "values", "shares")
    ]
    if not listed:
        raise InputError(
            "values is empty; give at least one share, and leave out a measure without any value",
            argument="values",
        )
    return 0.0 if min(listed) == 0 else len(listed) / sum(1 / value for value in listed)


# ── generated text ────────────────────────────────────────────────────────────────────────────────


def ngram_entropy(texts: str | Iterable[str | Sequence[Hashable]]) -> float:
    """Return the generation entropy (GE, "fluency") in bits: how little texts repeat themselves.

    It is (2/3 · H₂ + 4/3 · H₃) / 2, the mean over texts. Hₙ is the entropy of a text's n-grams, and
    0 for a text without any. The papers print it times 100. They split by nltk's tokenizer, which
    takes English contractions apart. Zhang et al. 2018 (arXiv 1809.05972); memit
    py/eval_utils_counterfact.py.

    Args:
        texts: Strings, which are split into words and single punctuation marks, or sequences of
            tokens. One string is one text.

    Raises:
        InputError: when there is no text.
    """
    listed = (
        [texts] if isinstance(texts, str) else check_items(texts, "texts", "texts", also="one text")
    )
    if not listed:
        raise InputError("texts is empty; give at least one text", argument="texts")
    entropies = []
    for text in listed:
        tokens = _tokens(text)
        entropies.append((2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2)
    return sum(entropies) / len(entropies)


def reference_consistency(
    generated: Iterable[str], references: Iterable[str], *, corpus: Iterable[str] | None = None
) -> float:
    """Return the reference score (RS, "consistency") in [0, 1] of generated texts.

    It is the cosine of two tf-idf vectors: one of all generated texts joined, one of all references
    joined. tf is a word's count. idf(w) = ln((1 + n) / (1 + n_w)) + 1 over n documents, of which
    n_w hold w. This is scikit-learn's TfidfVectorizer with its defaults (words of two characters or
    more, in lower case), as ROME's published code uses it; there it is fitted on Wikipedia
    snippets. memit py/eval_utils_counterfact.py; Meng et al. 2022, section 3.3.

    Args:
        generated: Texts that the model wrote about the subject.
        references: Texts about other subjects that have the new object.
        corpus: Documents that say how rare a word is, and which words count. None: the generated
            texts and the references, each a document.

    Returns:
        The cosine. 0 if one side has no word that counts.

    Raises:
        InputError: when a side has no text.
    """
    sides = [
        [check_text(text, "a text") for text in check_items(side, name, "texts")]
        for name, side in (("generated", generated), ("references", references))
    ]
    if not all(sides):
        raise InputError(
            f"there are {len(sides[0])} generated and {len(sides[1])} reference texts; "
            "give at least one of each"
        )
    documents = (
        sides[0] + sides[1]
        if corpus is None
        else check_items(corpus, "corpus", "texts", also="None")
    )
    holders = Counter(
        word for document in documents for word in set(_words(check_text(document, "a document")))
    )
    idf = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in holders.items()}
    ours, theirs = (
        {word: n * idf[word] for word, n in Counter(_words(" ".join(side))).items() if word in idf}
        for side in sides
    )
    length = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
    if not length:
        return 0.0
    return min(1.0, sum(value * theirs.get(word, 0.0) for word, value in ours.items()) / length)


# ── drift ─────────────────────────────────────────────────────────────────────────────────────────


def kl_divergence(log_p: Any, log_q: Any) -> float:
    """Return the mean of `divergences`: how far q is from p, in nats."""
    return float(divergences(log_p, log_q).mean())


def divergences(log_p: Any, log_q: Any) -> Tensor:
    """Return KL(p ‖ q) = Σ p (log p − log q) of each row in nats.

    Args:
        log_p: (n, vocab) or (vocab,) log-probabilities in nats, before the edit.
        log_q: The same after the edit.

    Returns:
        (n,) float64 on the CPU, computed in float64. Infinite if q rules out something that p
        allows.

    Raises:
        InputError: when the shapes differ, or a row is no distribution (logits, for example).
        NumericsError: when a number is NaN.
    """
    ps, qs = _rows(log_p, "log_p"), _rows(log_q, "log_q")
    if ps.shape != qs.shape or not ps.numel():
        raise InputError(
            f"log_p has shape {tuple(ps.shape)} and log_q has {tuple(qs.shape)}; "
            "give two of one shape (n, vocab) that are not empty"
        )
    parts = []
    # A vocabulary is wide, so only a few rows at a time become float64.
    for p, q in zip(torch.split(ps, 64), torch.split(qs, 64), strict=True):
        p, q = p.double(), q.double().to(p.device)
        _check_distributions(p, "log_p")
        _check_distributions(q, "log_q")
        parts.append(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0).cpu())
    return torch.cat(parts)


def perplexity(nats: float, n_tokens: int) -> float:
    """Return exp of the mean negative log-probability of a text's tokens.

    Args:
        nats: Sum of the negative log-probabilities.
        n_tokens: Number of tokens.

    Returns:
        The perplexity. Infinite if it is larger than a float.

    Raises:
        InputError: when there is no token.
        NumericsError: when `nats` is NaN.
    """
    mean = nats / check_count(n_tokens, "n_tokens", "the number of tokens of the text")
    if math.isnan(mean):
        raise NumericsError("nats is NaN: the model does not compute finite states")
    return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf


def relative_norm(delta: Any, weight: Any) -> float:
    """Return ‖ΔW‖ / ‖W‖ (Frobenius): the size of a change relative to the weight.

    It grows before a model collapses under edits in sequence: Gupta et al. 2024 (arXiv 2401.07453).

    Raises:
        InputError: when the shapes differ.
        NumericsError: when the ratio is not finite.
    """
    change, whole = _real(delta, "delta"), _real(weight, "weight")
    if change.shape != whole.shape:
        raise InputError(
            f"delta has shape {tuple(change.shape)} and weight has {tuple(whole.shape)}; "
            "give two of one shape"
        )
    lengths = [float(torch.linalg.vector_norm(part.double())) for part in (change, whole)]
    if not all(map(math.isfinite, lengths)) or lengths[1] == 0:
        raise NumericsError(
            f"‖ΔW‖ / ‖W‖ has no value: ‖ΔW‖ is {lengths[0]:g} and ‖W‖ is {lengths[1]:g}"
        )
    return lengths[0] / lengths[1]


# ── intervals ─────────────────────────────────────────────────────────────────────────────────────


def bootstrap_interval(
    values: Any,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: (n,) numbers.
        groups: (n,) the group of each value, such as the id of its record. Whole groups are drawn
            with replacement, because the questions of a record are right or wrong together. None:
            every value is a group.
        level: Share of the resampled means inside the interval.
        resamples: Number of means.
        seed: Seed of the draws.

    Returns:
        The lower and the upper end.

    Raises:
        InputError: when there is no value, a value is not finite, or `groups` has another length.
    """
    level = check_number(level, "level", "the share of means inside the interval", above=0, below=1)
    resamples = check_count(resamples, "resamples", "the number of means to draw")
    draw = np.random.default_rng(check_seed(seed))
    numbers = _numbers(values)
    if groups is None:
        sums, sizes = numbers, np.ones_like(numbers)
    else:
        group_of = _group_numbers(groups, len(numbers))
        sums = np.asarray(np.bincount(group_of, numbers), dtype=np.float64)
        sizes = np.bincount(group_of).astype(float)
    n = len(sums)
    means = []
    at_once = max(1, 2_000_000 // n)  # all draws of 10,000 records at once would fill the memory
    for start in range(0, resamples, at_once):
        chosen = draw.integers(n, size=(min(at_once, resamples - start), n))
        means.append(sums[chosen].sum(1) / sizes[chosen].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _numbers(values: Any) -> NDArray[np.float64]:
    """Return values as (n,) finite numbers; True and False count as 1 and 0."""
    listed = _numpy(values) if _is_array(values) else check_items(values, "values", "numbers")
    measured = np.asarray(listed, dtype=object)
    if measured.ndim != 1 or not len(measured):
        raise InputError(
            f"values has shape {measured.shape}; give (n,) numbers, at least one", argument="values"
        )
    plain = [float(value) if isinstance(value, (bool, np.bool_)) else value for value in measured]
    return np.array([check_number(value, "a value") for value in plain])


def _group_numbers(groups: Sequence[Hashable], n_values: int) -> NDArray[np.int64]:
    """Return the group of each value as a number, counted in order of first appearance."""
    listed = check_items(groups, "groups", "names or numbers, one for each value", also="None")
    if len(listed) != n_values or not all(isinstance(group, Hashable) for group in listed):
        raise InputError(
            f"there are {len(listed)} groups for {n_values} values; "
            "give the group of each value, a name or a number",
            argument="groups",
        )
    order: dict[Hashable, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in listed])


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────


def _is_array(values: object) -> bool:
    return isinstance(values, (np.ndarray, Tensor))


def _numpy(values: Any) -> NDArray[Any]:
    """Return an array, or a tensor on any device and of any dtype, as an array."""
    if isinstance(values, Tensor):
        tensor = values.detach()
        return (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
    return np.asarray(values)


def _real(values: Any, name: str) -> Tensor:
    """Return an array of real numbers as a tensor."""
    try:
        tensor = as_numbers(values)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} is a {type(values).__name__}; give an array of numbers", argument=name
        ) from None
    if tensor.is_complex():
        raise InputError(f"{name} holds complex numbers; give real ones", argument=name)
    return tensor


def _rows(values: Any, name: str) -> Tensor:
    """Return (n, vocab) or (vocab,) numbers as (n, vocab)."""
    rows = _real(values, name)
    if rows.ndim not in (1, 2) or not rows.numel():
        raise InputError(
            f"{name} has shape {tuple(rows.shape)}; give (n, vocab) or (vocab,)", argument=name
        )
    return rows.reshape(-1, rows.shape[-1])


def _check_distributions(logs: Tensor, name: str) -> None:
    """Raise an error unless the rows of logs (n, vocab) are log-probabilities."""
    sums = logs.exp().sum(-1)
    if torch.isnan(sums).any():
        raise NumericsError(f"{name} holds NaN: the model does not compute finite states")
    if (off := float((sums - 1).abs().max())) > 0.02:
        raise InputError(
            f"the probabilities of a row of {name} add up to 1 ± {off:.3g}; "
            "give log-probabilities, as log_softmax makes them",
            argument=name,
        )


def _tokens(text: Any) -> list[Hashable]:
    """Return the tokens of a text: its words and punctuation marks, or its elements."""
    if isinstance(text, str):
        return list(re.findall(r"\w+|[^\w\s]", text))
    # Elements of an array compare as objects, so an array becomes a list first.
    tokens = (
        _numpy(text).tolist()
        if _is_array(text)
        else check_items(text, "a text", "tokens", also="a string")
    )
    if not isinstance(tokens, list) or not all(isinstance(token, Hashable) for token in tokens):
        raise InputError(
            "a text holds something that is no token; "
            "give a string, or a list of strings or token ids"
        )
    return tokens


def _entropy(tokens: Sequence[Hashable], n: int) -> float:
    """Return the entropy in bits of a text's n-grams, and 0 for a text without any."""
    counts = Counter(zip(*(tokens[at:] for at in range(n)), strict=False)).values()
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts)


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())
