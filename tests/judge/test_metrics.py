"""Every measure against values computed by hand, published tables, or another way to compute it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from factsmith.core.errors import InputError, NumericsError
from factsmith.judge.metrics import (
    alias_match,
    bootstrap_interval,
    exact_match,
    harmonic_mean,
    kl_divergence,
    ngram_entropy,
    perplexity,
    reference_consistency,
    relative_norm,
)

# ── answers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shares", "score"),
    # Rows of the papers: success (efficacy, paraphrase, neighbourhood) and Score in per cent,
    # each rounded by up to 0.05.
    [
        ((100, 96.4, 75.4), 89.2),
        ((99.9, 99.1, 78.9), 91.5),
        ((98.9, 88.6, 73.7), 85.8),
        ((97.2, 82.2, 70.8), 82.0),
        ((99.5, 92.8, 71.4), 86.2),
    ],
)
def test_the_score_is_the_published_one(shares: tuple[float, ...], score: float) -> None:
    assert 100 * harmonic_mean([share / 100 for share in shares]) == pytest.approx(score, abs=0.1)
    assert np.mean(shares) != pytest.approx(
        score, abs=0.1
    )  # control: the arithmetic mean is another number


def test_the_harmonic_mean_by_hand() -> None:
    assert harmonic_mean([0.5, 1.0, 1.0]) == 0.75
    assert harmonic_mean([0.0, 1.0]) == 0.0
    assert harmonic_mean(iter([0.25])) == 0.25


@pytest.mark.parametrize(
    ("answer", "wanted", "held"),
    [
        ("French.", "French", True),
        ("French, of course", " French ", True),
        ("\n  French\nGerman", "French", True),  # the first line with something on it
        ("German\nFrench", "French", False),
        ("Frenchman", "French", False),
        ("french", "French", False),
        ("the French", "French", False),
        ("", "French", False),
        ("日本語です", "日本語", True),
    ],
)
def test_exact_match(answer: str, wanted: str, held: bool) -> None:
    assert exact_match(answer, wanted) is held


def test_any_alias_may_hit() -> None:
    aliases = ["United Kingdom", "UK"]
    assert alias_match("UK, since 1707", aliases) and not alias_match("Ukraine", aliases)


# ── generated text ────────────────────────────────────────────────────────────────────────────────


def test_ngram_entropy_by_hand() -> None:
    """a b c a b: bigrams ab twice, bc, ca: 1.5 bits; trigrams abc, bca, cab: log2 3 bits."""
    by_hand = (2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2
    assert ngram_entropy("a b c a b") == pytest.approx(by_hand)
    assert ngram_entropy([[5, 6, 7, 5, 6]]) == pytest.approx(by_hand)  # tokens
    assert ngram_entropy(["x x x x x", "a b c a b"]) == pytest.approx(
        by_hand / 2
    )  # the mean over texts; repetition is 0
    assert ngram_entropy("a, b, a") == pytest.approx(
        ngram_entropy([["a", ",", "b", ",", "a"]])
    )  # a mark is a word of its own
    assert ngram_entropy("one two") == 0.0 and ngram_entropy([""]) == 0.0


def test_repeating_costs_entropy() -> None:
    draw = np.random.default_rng(0)
    varied = draw.integers(1000, size=100).tolist()
    assert (
        ngram_entropy([varied])
        > 6
        > ngram_entropy([varied[:5] * 20])
        > ngram_entropy([varied[:1] * 100])
        == 0
    )


def test_reference_consistency_by_hand() -> None:
    """Of "red cat" and "red dog": idf(red) = ln(3/3) + 1, idf(cat) = idf(dog) = ln(3/2) + 1."""
    rare = math.log(3 / 2) + 1
    assert reference_consistency(["Red cat"], ["red dog"]) == pytest.approx(1 / (1 + rare**2))
    assert reference_consistency(["a red cat"], ["red dog"]) == pytest.approx(
        1 / (1 + rare**2)
    )  # words of one letter do not count
    # Counts: (red 2, cat 1) against (red 1, dog 1).
    expected = 2 / (math.sqrt(4 + rare**2) * math.sqrt(1 + rare**2))
    assert reference_consistency(["red red cat"], ["red dog"]) == pytest.approx(expected)


def test_reference_consistency_with_a_corpus() -> None:
    """Of three documents two hold "red", one "cat", none "dog", which does not count then."""
    corpus = ["red sky", "red cat", "sky"]
    red, cat = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    consistency = reference_consistency(["red cat"], ["red dog"], corpus=corpus)
    assert consistency == pytest.approx(red / math.hypot(red, cat))
    assert reference_consistency(["red"], ["cat"], corpus=corpus) == 0.0
    assert reference_consistency(["dog"], ["dog"], corpus=corpus) == 0.0  # no word that counts
    assert reference_consistency(["red cat", "sky"], ["sky cat red"]) == pytest.approx(
        1.0
    )  # joined; order is nothing


# ── drift ─────────────────────────────────────────────────────────────────────────────────────────


def test_kl_divergence_by_hand() -> None:
    p, q = (
        torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log(),
        torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log(),
    )
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p[0], q[0]) == pytest.approx(first, rel=1e-6)
    assert kl_divergence(p, q) == pytest.approx((first + math.log(2)) / 2, rel=1e-6)
    assert kl_divergence(q[1], p[1]) == math.inf  # p[1] rules out what q[1] allows
    assert kl_divergence(p, p) == 0.0
    assert kl_divergence(p.numpy().tolist(), q.numpy()) == pytest.approx(
        (first + math.log(2)) / 2, rel=1e-6
    )


def test_kl_divergence_of_many_rows_is_torchs_own() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(200, 33).log_softmax(-1), torch.randn(200, 33).log_softmax(-1)
    assert kl_divergence(p, q) == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)), rel=1e-5
    )
    assert kl_divergence(p, q) != pytest.approx(
        kl_divergence(q, p), rel=1e-3
    )  # control: the sides are not the same


def test_perplexity_of_a_fair_die() -> None:
    assert perplexity(5 * math.log(6), 5) == pytest.approx(6)
    assert perplexity(math.log(2) + math.log(8), 2) == pytest.approx(4)  # sqrt(2 · 8)
    assert perplexity(1000.0, 1) == math.inf


def test_relative_norm_by_hand() -> None:
    assert relative_norm([[3.0, 4.0]], [[0.0, 10.0]]) == 0.5
    assert (
        relative_norm(
            torch.full((8, 8), 1e4, dtype=torch.float16),
            torch.full((8, 8), 2e4, dtype=torch.float16),
        )
        == 0.5
    )  # in float64


# ── how sure ──────────────────────────────────────────────────────────────────────────────────────


def _binomial_quantile(n: int, share: float, q: float) -> int:
    """The smallest k with P(hits of n ≤ k) ≥ q."""
    below = 0.0
    for k in range(n + 1):
        below += math.comb(n, k) * share**k * (1 - share) ** (n - k)
        if below >= q:
            return k
    return n


@pytest.mark.parametrize(("n", "hits"), [(40, 30), (200, 20), (12, 6)])
def test_the_interval_of_a_share_is_the_binomial_one(n: int, hits: int) -> None:
    """The resampled number of hits is binomial, so its quantiles are known without resampling."""
    low, high = bootstrap_interval([True] * hits + [False] * (n - hits), resamples=20_000)
    assert abs(low * n - _binomial_quantile(n, hits / n, 0.025)) <= 1
    assert abs(high * n - _binomial_quantile(n, hits / n, 0.975)) <= 1


def test_the_interval_of_numbers_is_that_of_all_resamples() -> None:
    values = [0.1, 0.5, 0.9, 2.0]
    every = [np.mean(chosen) for chosen in itertools.product(values, repeat=4)]
    interval = bootstrap_interval(values, level=0.8, resamples=40_000, seed=3)
    assert interval == pytest.approx(np.quantile(every, [0.1, 0.9]), abs=0.03)


def test_records_are_drawn_whole() -> None:
    """Ten answers of one record that stand and fall together tell no more than one answer."""
    draw = np.random.default_rng(1)
    records = draw.random(50) < 0.6
    repeated, owners = np.repeat(records, 10), np.repeat(np.arange(50), 10)
    grouped = bootstrap_interval(repeated, groups=owners.tolist())
    assert grouped == bootstrap_interval(records)
    alone = bootstrap_interval(repeated)
    assert alone[1] - alone[0] < 0.5 * (
        grouped[1] - grouped[0]
    )  # control: taken one by one they look far surer


def test_groups_of_different_sizes() -> None:
    """Two groups (1, 1) and (0): of four draws the mean is 1 once, 2/3 twice and 0 once."""
    interval = bootstrap_interval([1, 1, 0], groups=["a", "a", "b"], level=0.3, resamples=4000)
    assert interval == pytest.approx((2 / 3, 2 / 3))
    assert bootstrap_interval([1, 1, 0], groups=["a", "a", "b"]) == (0.0, 1.0)


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(0).random(300)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values.tolist(), seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    wide = bootstrap_interval(values, level=0.999)
    assert wide[0] < low and high < wide[1]
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: harmonic_mean([]), "at least one share"),
        (lambda: harmonic_mean([0.5, None]), "None"),
        (lambda: harmonic_mean([0.5, -0.1]), "at least 0"),
        (lambda: harmonic_mean([math.nan]), "nan"),
        (lambda: harmonic_mean(0.5), "0.5"),
        (lambda: exact_match(None, "a"), "it must be text"),
        (lambda: alias_match("a", []), "at least one right answer"),
        (lambda: alias_match("a", "a"), "list of right answers"),  # one text is no list of answers
        (lambda: ngram_entropy([]), "at least one text"),
        (lambda: ngram_entropy([3]), "a list of tokens, or a string"),
        (lambda: reference_consistency(["a"], []), "at least one of each"),
        (lambda: reference_consistency("a", ["b"]), "list of texts"),
        (lambda: kl_divergence(torch.randn(2, 9), torch.randn(2, 9)), "log_softmax"),  # logits
        (lambda: kl_divergence(torch.zeros(2, 1), torch.zeros(3, 1)), "one shape"),
        (lambda: kl_divergence("a", "b"), "array of numbers"),
        (lambda: kl_divergence([], []), "give .n, vocab."),
        (lambda: kl_divergence(None, None), "array of numbers"),
        (lambda: relative_norm(torch.tensor([3 + 4j]), torch.tensor([10.0])), "complex"),
        (lambda: relative_norm("a", [1.0]), "array of numbers"),
        (lambda: ngram_entropy([[[1], [2], [1]]]), "no token"),
        (lambda: bootstrap_interval([1.0], groups=5), "groups"),
        (lambda: bootstrap_interval([1.0], groups=[[1]]), "group of each value"),
        (lambda: perplexity(1.0, 0), "n_tokens"),
        (lambda: relative_norm([1.0], [1.0, 2.0]), "one shape"),
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0, None]), "finite number"),
        (lambda: bootstrap_interval([1.0, math.nan]), "finite number"),
        (lambda: bootstrap_interval([1.0], groups=[1, 2]), "2 groups for 1"),
        (lambda: bootstrap_interval([1.0], level=1.0), "above 0 and below 1"),
        (lambda: bootstrap_interval([1.0], resamples=0), "at least 1"),
        (lambda: bootstrap_interval([1.0], seed=-1), "seed"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: perplexity(math.nan, 2),
        lambda: kl_divergence([[math.nan, -1.0]], [[-0.7, -0.7]]),
        lambda: relative_norm([1.0], [0.0]),
        lambda: relative_norm([math.inf], [1.0]),
    ],
)
def test_what_is_not_a_number_is_an_error_of_numerics(call: Callable[[], Any]) -> None:
    with pytest.raises(NumericsError):
        call()


def test_arrays_of_tokens_count_as_lists() -> None:
    ids = [1, 2, 1, 2, 1, 2, 3]
    assert (
        ngram_entropy([torch.tensor(ids)])
        == ngram_entropy([ids])
        == ngram_entropy([np.array(ids)])
        > 0
    )


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("Sa\u0303o Paulo.", "São Paulo", True),
        ("New\u00a0York", "New York", True),
        ("New  York", "New York", True),
        ("1,000", "1", False),
        ("5.7", "5", False),
        ("5. Then", "5", True),
        ("1, 2", "1", True),
        ("हिन्दी", "हिन्द", False),
        ("हिन्दी है", "हिन्दी", True),
        ("東京です", "東京", True),
    ],
)
def test_words_end_where_readers_end_them(answer: str, wanted: str, right: bool) -> None:
    assert exact_match(answer, wanted) == right
