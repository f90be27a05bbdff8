"""The loop over a corpus, with an accumulator that is easy to check by hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import TEXTS
from factsmith.core.artefact import Checkpoint
from factsmith.core.errors import InputError
from factsmith.corpus import text as corpus_text
from factsmith.corpus.accumulator import Accumulator, State, Swept, TextBatch
from factsmith.corpus.moment_sums import MomentSums
from factsmith.corpus.passes import Unit
from factsmith.corpus.scan import Bank, Coefficients, Site
from factsmith.corpus.sweep import Corpus, corpus_digest, sweep
from factsmith.model.language_model import LanguageModel

MANY = [f"{text} {n}" for n in range(12) for text in TEXTS]
MADE_FROM = {"format": "a test", "fingerprint": "none"}


class Killed(BaseException):
    """Stands for a signal."""


class Totals:
    """The sum of every neuron's coefficients in one layer."""

    site: Site = "coefficients"
    least_part = 1

    def __init__(self, layer: int, name: str) -> None:
        self.layer, self.name = layer, name
        self.total: Tensor = torch.zeros(1, dtype=torch.float64)
        self.n_batches = 0
        self.before: list[weakref.ref[Coefficients]] = []

    def maker(self) -> Callable[[], Totals]:
        return partial(Totals, self.layer, self.name)

    def add(self, batch: TextBatch, coefficients: Mapping[Bank, Coefficients]) -> None:
        assert all(read() is None for read in self.before), "two batches are held at once"
        self.before = [weakref.ref(read) for read in coefficients.values()]
        self.total = self.total + coefficients[self.layer,].m.double().sum(0)
        self.n_batches += 1

    def merge(self, other: Totals) -> None:
        self.total = self.total + other.total

    def state(self) -> State:
        return {self.name: self.total}, {}

    def restore(self, tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
        self.total = tensors[self.name]

    def result(self, swept: Swept) -> Tensor:
        return self.total / swept.n_tokens


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of seven pieces, and a checkpoint whenever one may be written."""
    monkeypatch.setattr(corpus_text, "WINDOW", 7)
    monkeypatch.setattr("factsmith.core.artefact._SECONDS", 0.0)
    monkeypatch.setattr("factsmith.core.artefact.time.monotonic", lambda: 0.0)


def corpus(texts: list[str] = MANY, *, halves: bool = False) -> Corpus:
    return Corpus(texts, batch_tokens=100, halves=halves)


def test_one_pass_serves_several_accumulators(tiny_lm: LanguageModel) -> None:
    low, high = Totals(0, "low"), Totals(2, "high")
    accumulators: list[Accumulator] = [low, high]
    done: list[int] = []
    swept = sweep(tiny_lm, corpus(), [0, 2], accumulators, progress=done.append)
    ids = [tiny_lm.tokenizer(text)["input_ids"] for text in MANY]
    assert (swept.n_texts, swept.n_tokens) == (len(MANY), sum(map(len, ids)))
    assert done == sorted(done) and done[-1] == swept.n_tokens and len(done) == low.n_batches
    for sums in (low, high):
        every = torch.cat([tiny_lm.coefficients(text, [sums.layer])[0] for text in MANY])
        torch.testing.assert_close(sums.result(swept), every.double().mean(0), rtol=1e-4, atol=1e-6)
    assert (low.total - high.total).abs().max() > 1e-3
    assert swept.digest == corpus_digest(tiny_lm, MANY) != corpus_digest(tiny_lm, MANY[1:])
    assert corpus_digest(tiny_lm, MANY, 50) != swept.digest


def test_batches_say_where_they_are_from(tiny_gpt2: LanguageModel) -> None:
    plain, halved = (list(corpus(halves=halves).batches(tiny_gpt2)) for halves in (False, True))
    for batches in (plain, halved):
        assert [batch.number for batch in batches] == list(range(1, len(batches) + 1))
        ends = [batch.window for batch in batches if batch.ends_window]
        assert ends == list(range(1, -(-len(MANY) // 7) + 1))
        numbers = sorted(piece.number for batch in batches for piece in batch.pieces)
        assert numbers == list(range(len(MANY)))
        assert batches[-1].digest == corpus_digest(tiny_gpt2, MANY)
    assert {batch.half for batch in plain} == {0} and {batch.half for batch in halved} == {0, 1}
    half_of = {piece.text: batch.half for batch in halved for piece in batch.pieces}
    again = corpus(MANY[::-1], halves=True).batches(tiny_gpt2)
    assert all(half_of[piece.text] == batch.half for batch in again for piece in batch.pieces)


@pytest.mark.parametrize("unit", ["batch", "window"])
def test_a_killed_sweep_goes_on_where_it_stood(
    tiny_gpt2: LanguageModel, tmp_path: Path, unit: Unit
) -> None:
    file = tmp_path / "partial"
    straight = Totals(1, "all")
    swept = sweep(tiny_gpt2, corpus(), [1], [straight])

    def killed(done: int) -> None:
        if done > swept.n_tokens // 2:
            raise Killed

    first = Totals(1, "all")
    with pytest.raises(Killed):
        sweep(
            tiny_gpt2,
            corpus(),
            [1],
            [first],
            checkpoint=Checkpoint(file, MADE_FROM),
            unit=unit,
            progress=killed,
        )
    for texts in (MANY[::-1], MANY[:3], []):
        with pytest.raises(InputError, match="other texts"):
            sweep(
                tiny_gpt2,
                corpus(texts),
                [1],
                [Totals(1, "all")],
                checkpoint=Checkpoint(file, MADE_FROM),
                unit=unit,
            )
    done: list[int] = []
    second = Totals(1, "all")
    again = sweep(
        tiny_gpt2,
        corpus(),
        [1],
        [second],
        checkpoint=Checkpoint(file, MADE_FROM),
        unit=unit,
        progress=done.append,
    )
    assert again == swept and torch.equal(second.total, straight.total)
    lost = first.n_batches + second.n_batches - straight.n_batches
    # A batch that is in the checkpoint is not run again. With windows, the begun one is.
    assert lost == 0 if unit == "batch" else 0 < lost < 7
    assert done[0] > swept.n_tokens // 3 and file.is_file()


def test_a_corpus_without_text(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="no text"):
        sweep(tiny_gpt2, corpus([]), [1], [Totals(1, "all")])
    with pytest.raises(InputError, match="batch_tokens is 0"):
        Corpus(MANY, batch_tokens=0)
    with pytest.raises(InputError, match="max_tokens"):
        Corpus(MANY, max_tokens=0)
    with pytest.raises(InputError, match="texts are 5"):
        Corpus(5)  # type: ignore[arg-type]


def test_sums_of_two_parts_merge_into_the_sum_of_all(tiny_lm: LanguageModel) -> None:
    sizes = {layer: tiny_lm.ffn[layer].d_ff for layer in (0, 2)}
    whole, first, rest = MomentSums(sizes), MomentSums(sizes), MomentSums(sizes)
    swept = sweep(tiny_lm, corpus(halves=True), [0, 2], [whole])
    sweep(tiny_lm, corpus(MANY[:20], halves=True), [0, 2], [first])
    sweep(tiny_lm, corpus(MANY[20:], halves=True), [0, 2], [rest])
    first.merge(rest)
    assert first.counts == whole.counts
    merged = first.result(swept)
    for layer, expected in whole.result(swept).items():
        torch.testing.assert_close(merged[layer].mean, expected.mean, rtol=1e-5, atol=1e-7)
        assert merged[layer].n_tokens == expected.n_tokens == swept.n_tokens
        assert merged[layer].split_half == pytest.approx(expected.split_half, rel=1e-4)
        assert merged[layer].excess == pytest.approx(expected.excess, rel=1e-3)
