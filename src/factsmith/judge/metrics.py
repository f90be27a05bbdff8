"""What the literature measures of an edit: numbers and answers in, numbers out; no model is asked here.

success(log_new, log_true)                         # efficacy (ES), paraphrase success (PS)
success(log_true, log_new)                         # neighbourhood success (NS): the sides change places
harmonic_mean([efficacy, paraphrase, neighbourhood])       # Score (S)
bootstrap_interval(hits, groups=record_of_each)    # 95 % interval of their mean

Shares are in [0, 1]; the papers print them times 100. References to code are to kmeng01/memit at 80426fd (experiments/) and
zjunlp/EasyEdit at 14cea82.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.checks import check_count, check_items, check_number, check_seed, check_text
from ..core.errors import InputError, NumericsError
from ..model.answers import begins_with

# ── two candidates compared ─────────────────────────────────────────────────────────────────────────────────────────────


def success(log_wanted: Any, log_other: Any) -> float:
    """Share of questions to which the wanted candidate is strictly likelier than the other (COUNTERFACT's ES, PS and NS).

    log_wanted, log_other  (n,) mean log-probability a token, in nats: length-normalised, so that a longer candidate is not the less likely
                           for its length. For ES and PS the new object against the true one, for NS the true one against the new one

    Raises InputError for none or for lists of different lengths, NumericsError for NaN.
    Meng et al. 2022 (ROME, arXiv 2202.05262), section 3.3; memit py/eval_utils_counterfact.py:148-181, summarize.py:51-90.
    """
    wanted, other = _candidates(log_wanted, log_other)
    return float(np.mean(wanted > other))


def magnitude(log_wanted: Any, log_other: Any) -> float:
    """Mean of p(wanted) − p(other), in [−1, 1] (COUNTERFACT's EM, PM and NM); a probability is exp of the mean a token.

    Arguments, errors and source as for `success`.
    """
    wanted, other = _candidates(log_wanted, log_other)
    return float(np.mean(np.exp(wanted) - np.exp(other)))


def harmonic_mean(values: Iterable[float]) -> float:
    """The harmonic mean n / Σ(1/v), 0 where any is 0: the Score (S) of ES, PS and NS (memit summarize.py:138-150).

    Raises InputError for none, for None, and for anything negative or not finite.
    """
    listed = [
        check_number(value, "a value", least=0) for value in check_items(values, "values", "shares")
    ]
    if not listed:
        raise InputError("values is empty: it must be a list of at least one share")
    return 0.0 if min(listed) == 0 else len(listed) / sum(1 / value for value in listed)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_accuracy(predicted_ids: Any, wanted_ids: Any) -> float:
    """Share of an answer's tokens that are the likeliest after the *right* tokens before them: teacher forcing, zsRE's measure.

    predicted_ids, wanted_ids  (n_tokens,) argmax at every place where a token of the answer is due, and that token

    It gives away the answer's length and its beginning: Yang et al. 2025 (QAEdit, arXiv 2502.11177) find 96.8 % by it where free
    generation gives 38.5 %; report it beside `exact_match`, never alone. Raises InputError for none or for different lengths.
    Mitchell et al. 2022 (MEND, arXiv 2110.11309); memit py/eval_utils_zsre.py:52-65.
    """
    predicted, wanted = (
        _integers(predicted_ids, "predicted_ids"),
        _integers(wanted_ids, "wanted_ids"),
    )
    if predicted.shape != wanted.shape or not wanted.size:
        raise InputError(
            f"got {predicted.size} predicted and {wanted.size} wanted tokens; expected as many of each, at least one"
        )
    return float(np.mean(predicted == wanted))


def exact_match(answer: str, wanted: str) -> bool:
    """Whether a greedy answer begins with what is wanted, as whole words and in the same case: "French." does, "Frenchman" does not.

    Of the answer counts its first line with something on it; generation ends at EOS or a line break anyway (`LanguageModel.answer`), as in
    WILD, Yang et al. 2025, arXiv 2502.11177; EasyEdit evaluate_utils.py:104-175. What it goes on to say is not judged.
    """
    first = next(
        (line for line in check_text(answer, "the answer").splitlines() if line.strip()), ""
    )
    return begins_with(first, check_text(wanted, "what is wanted"))


def alias_match(answer: str, answers: Iterable[str]) -> bool:
    """`exact_match` with any of several right answers: the object and its aliases. Raises InputError when there are none."""
    listed = check_items(answers, "answers", "right answers: the object and its aliases")
    if not listed:
        raise InputError("answers is empty; expected at least one right answer to look for")
    return any(exact_match(answer, wanted) for wanted in listed)


def multi_hop_hit(answers_of_questions: Iterable[str], aliases: Iterable[str]) -> bool:
    """Whether any question of a multi-hop case is answered right: MQuAKE asks each case in three ways.

    Zhong et al. 2023 (MQuAKE, arXiv 2305.14795), section 4.1. Raises InputError when there is no answer or no alias.
    """
    said = check_items(
        answers_of_questions, "answers_of_questions", "answers, one for each question of the case"
    )
    if not said:
        raise InputError(
            "answers_of_questions is empty; expected what was said to each question of a case"
        )
    aliases = check_items(aliases, "aliases", "right answers")
    return any(alias_match(answer, aliases) for answer in said)


# ── generated text ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ngram_entropy(texts: str | Iterable[str | Sequence[Hashable]]) -> float:
    """Generation entropy (GE, "fluency") in bits: how little texts repeat themselves, (2/3 · H₂ + 4/3 · H₃) / 2, the mean over texts.

    texts  strings (split into words and single punctuation marks), or sequences of tokens; one string is one text

    Hₙ is the entropy of a text's n-grams, 0 for a text with none. The papers print it times 100; they split by nltk's tokenizer, which
    takes English contractions apart. Raises InputError for no text.
    Zhang et al. 2018 (arXiv 1809.05972); memit py/eval_utils_counterfact.py.
    """
    listed = (
        [texts] if isinstance(texts, str) else check_items(texts, "texts", "texts", also="one text")
    )
    if not listed:
        raise InputError("texts is empty; expected at least one text")
    entropies = []
    for text in listed:
        if isinstance(text, str):
            tokens = re.findall(r"\w+|[^\w\s]", text)
        else:  # elements of an array are no tokens: each is an object of its own
            tokens = (
                _numpy(text).tolist()
                if _is_array(text)
                else check_items(text, "a text", "tokens", also="a string")
            )
        if not isinstance(tokens, list) or not all(isinstance(token, Hashable) for token in tokens):
            raise InputError(
                "a text holds what is no token; expected a string, or a list of strings or token ids"
            )
        entropies.append((2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2)
    return sum(entropies) / len(entropies)


def reference_consistency(
    generated: Iterable[str], references: Iterable[str], *, corpus: Iterable[str] | None = None
) -> float:
    """Reference score (RS, "consistency") in [0, 1]: cosine of the tf-idf vectors of all generated and of all reference texts.

    generated   what the model writes about the subject, joined into one document
    references  texts about other entities that have the new object, likewise
    corpus      documents that say how rare a word is, and which words count; None: the generated and reference texts, each a document

    tf is a word's count, idf(w) = ln((1 + n) / (1 + n_w)) + 1 over n documents of which n_w hold w: scikit-learn's TfidfVectorizer with
    its defaults (words of two characters or more, in lower case), as ROME's published code uses it, fitted there on Wikipedia snippets.
    0 where either side has no word that counts. Raises InputError when there is no text on a side.
    memit py/eval_utils_counterfact.py; Meng et al. 2022, section 3.3.
    """
    sides = [
        [check_text(text, "a text") for text in check_items(side, name, "texts")]
        for name, side in (("generated", generated), ("references", references))
    ]
    if not all(sides):
        raise InputError(
            f"got {len(sides[0])} generated and {len(sides[1])} reference texts; expected at least one of each"
        )
    documents = (
        sides[0] + sides[1]
        if corpus is None
        else check_items(corpus, "corpus", "texts", also="None")
    )
    holding = Counter(
        word for document in documents for word in set(_words(check_text(document, "a document")))
    )
    idf = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in holding.items()}
    ours, theirs = (
        {word: n * idf[word] for word, n in Counter(_words(" ".join(side))).items() if word in idf}
        for side in sides
    )
    length = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
    return (
        min(1.0, sum(value * theirs.get(word, 0.0) for word, value in ours.items()) / length)
        if length
        else 0.0
    )


# ── drift ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kl_divergence(log_p: Any, log_q: Any) -> float:
    """The mean of `divergences`: how far q has moved from p."""
    return float(divergences(log_p, log_q).mean())


def divergences(log_p: Any, log_q: Any) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) of each row in nats, (n,) float64 on the CPU; infinite where q rules out what p allows.

    log_p, log_q  (n, vocab) or (vocab,) log-probabilities in nats, before and after; computed in float64

    Raises InputError for different shapes or rows that are no distributions (logits, say), NumericsError for NaN.
    """
    ps, qs = _rows(log_p, "log_p"), _rows(log_q, "log_q")
    if ps.shape != qs.shape or not ps.numel():
        raise InputError(
            f"log_p has shape {tuple(ps.shape)}, log_q {tuple(qs.shape)}; expected two of one shape (n, vocab), not empty"
        )
    found = []
    for p, q in zip(
        torch.split(ps, 64), torch.split(qs, 64), strict=True
    ):  # a vocabulary is wide: float64 for a few rows at a time
        p, q = p.double(), q.double().to(p.device)
        for name, rows in (("log_p", p), ("log_q", q)):
            sums = rows.exp().sum(-1)
            if torch.isnan(sums).any():
                raise NumericsError(f"{name} holds NaN; the model does not compute finite states")
            if (off := float((sums - 1).abs().max())) > 0.02:
                raise InputError(
                    f"a row of {name} adds up to 1 ± {off:.3g} as probabilities; expected log-probabilities: use log_softmax"
                )
        found.append(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0).cpu())
    return torch.cat(found)


def perplexity(log_probs: Any) -> float:
    """exp of the mean negative log-probability of tokens: (n_tokens,) in nats. Raises InputError for none, NumericsError for NaN."""
    logs = _log_probs(log_probs, "log_probs")
    with np.errstate(over="ignore"):  # infinite where it is larger than a float
        return float(np.exp(-np.mean(logs)))


def relative_norm(delta: Any, weight: Any) -> float:
    """‖ΔW‖ / ‖W‖ (Frobenius): how large a change of a weight is beside it; what grows before a model collapses under edits in sequence.

    Gupta et al. 2024 (arXiv 2401.07453). Raises InputError for different shapes, NumericsError where it is not finite.
    """
    change, whole = _real(delta, "delta"), _real(weight, "weight")
    if change.shape != whole.shape:
        raise InputError(
            f"delta has shape {tuple(change.shape)}, weight {tuple(whole.shape)}; expected one shape"
        )
    lengths = [float(torch.linalg.vector_norm(part.double())) for part in (change, whole)]
    if not all(map(math.isfinite, lengths)) or lengths[1] == 0:
        raise NumericsError(
            f"‖ΔW‖ is {lengths[0]:g} and ‖W‖ is {lengths[1]:g}; their ratio says nothing"
        )
    return lengths[0] / lengths[1]


# ── how sure ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bootstrap_interval(
    values: Any,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of values (n,), the same for the same seed.

    groups     (n,) what each value belongs to, such as the id of its record: whole groups are drawn with replacement, since the questions
               of a record stand or fall together. None: every value is a group of its own
    level      share of the resampled means inside the interval
    resamples  how many means

    Efron 1979. Raises InputError for no value, for one that is not finite, or groups of another length.
    """
    measured = np.asarray(
        check_items(values, "values", "numbers") if not _is_array(values) else _numpy(values),
        dtype=object,
    )
    if measured.ndim != 1 or not len(measured):
        raise InputError(f"values have shape {measured.shape}; expected (n,), at least one number")
    level = check_number(level, "level", "the share of means inside the interval", above=0, below=1)
    resamples = check_count(resamples, "resamples", "the number of means to draw")
    draw = np.random.default_rng(check_seed(seed))
    plain = [float(value) if isinstance(value, (bool, np.bool_)) else value for value in measured]
    numbers = np.array([check_number(value, "a value") for value in plain])
    if groups is None:
        sums, sizes = numbers, np.ones_like(numbers)
    else:
        groups = check_items(groups, "groups", "groups, one for each value", also="None")
        if len(groups) != len(numbers) or not all(isinstance(group, Hashable) for group in groups):
            raise InputError(
                f"got {len(groups)} groups for {len(numbers)} values; expected the group of each value, a name or a number"
            )
        order: dict[Hashable, int] = {}
        number = np.array([order.setdefault(group, len(order)) for group in groups])
        sums, sizes = np.bincount(number, numbers), np.bincount(number).astype(float)
    n = len(sums)
    means = []
    for start in range(
        0, resamples, at_once := max(1, 2_000_000 // n)
    ):  # a matrix of draws for 10,000 records would fill the memory
        chosen = draw.integers(n, size=(min(at_once, resamples - start), n))
        means.append(sums[chosen].sum(1) / sizes[chosen].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ── what is given ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_array(values: object) -> bool:
    return isinstance(values, (np.ndarray, Tensor))


def _numpy(values: Any) -> NDArray[Any]:
    """An array of what may be a tensor, on any device and of any dtype."""
    if isinstance(values, Tensor):
        return (
            (values.detach().double() if values.is_floating_point() else values.detach())
            .cpu()
            .numpy()
        )
    return np.asarray(values)


def _log_probs(values: Any, name: str) -> NDArray[np.float64]:
    """Log-probabilities as (n,) float64; a single number is one."""
    try:
        given = np.atleast_1d(_numpy(values))
        if np.iscomplexobj(given):
            raise TypeError
        logs = given.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} are no numbers; expected log-probabilities in nats, (n,)"
        ) from None
    if logs.ndim != 1 or not len(logs):
        raise InputError(
            f"{name} have shape {logs.shape}; expected (n,), at least one log-probability"
        )
    if np.isnan(logs).any():
        raise NumericsError(f"{name} hold NaN; the model does not compute finite states")
    if logs.max() > 1e-3:
        raise InputError(
            f"{name} hold {logs.max():.4g}; expected log-probabilities in nats, at most 0"
        )
    return logs


def _candidates(log_wanted: Any, log_other: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wanted, other = _log_probs(log_wanted, "log_wanted"), _log_probs(log_other, "log_other")
    if len(wanted) != len(other):
        raise InputError(
            f"got {len(wanted)} wanted and {len(other)} other candidates; expected one of each a question"
        )
    return wanted, other


def _integers(values: Any, name: str) -> NDArray[np.int64]:
    try:
        ids = _numpy(values)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} are no list of token ids, (n_tokens,)") from None
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise InputError(
            f"{name} have shape {ids.shape} and dtype {ids.dtype}; expected token ids, (n_tokens,)"
        )
    return ids.astype(np.int64)


def _real(values: Any, name: str) -> Tensor:
    """An array of real numbers."""
    try:
        tensor = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{name} is a {type(values).__name__} and no array of numbers; expected one of the shape that is described"
        ) from None
    if tensor.is_complex():
        raise InputError(f"{name} holds complex numbers; expected real ones")
    return tensor


def _rows(values: Any, name: str) -> Tensor:
    rows = _real(values, name)
    if rows.ndim not in (1, 2) or not rows.numel():
        raise InputError(f"{name} has shape {tuple(rows.shape)}; expected (n, vocab) or (vocab,)")
    return rows.reshape(-1, rows.shape[-1])


def _entropy(tokens: Sequence[Hashable], n: int) -> float:
    """Entropy in bits of the n-grams of a text; 0 when it has none."""
    counts = Counter(zip(*(tokens[at:] for at in range(n)), strict=False)).values()
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts)


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())
