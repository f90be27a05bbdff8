"""A corpus that is cut into parts, compared with the same corpus in one piece."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from conftest import TEXTS
from factsmith.core.artefact import Checkpoint
from factsmith.core.errors import InputError
from factsmith.core.executor import Executor, Local, executor_in_use, running_on
from factsmith.corpus import text as corpus_text
from factsmith.corpus.moment_sums import HalvedSum, MomentSums, Until
from factsmith.corpus.passes import Pass, Reader, in_parts
from factsmith.corpus.scan import scan
from factsmith.corpus.sweep import Corpus, sweep
from factsmith.model.language_model import LanguageModel

MANY = [f"{text} {n}" for n in range(12) for text in TEXTS]
MADE_FROM = {"format": "a test", "fingerprint": "none"}

Part = TypeVar("Part")
Result = TypeVar("Result")


class Killed(BaseException):
    """Stands for a signal."""


class Shuffled:
    """Runs parts a few ahead and in any order, as many machines do; counts what it hands out."""

    cuts = True

    def __init__(self, part_tokens: int, ahead: int, seed: int) -> None:
        self.part_tokens: int | None = part_tokens
        self.ahead, self.draw, self.n_parts = ahead, random.Random(seed), 0
        self.loses = -1

    def map(
        self,
        task: Callable[[Part], Result],
        parts: Iterable[Part],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Result]:
        waiting = iter(parts)
        results: dict[int, Result] = {}
        at = 0
        while True:
            group = [part for _, part in zip(range(self.ahead), waiting, strict=False)]
            order = list(range(len(group)))
            self.draw.shuffle(order)
            for i in order:
                results[at + i] = task(group[i])
            self.n_parts += len(group)
            if not group:
                return
            for _ in group:
                yield results[at] if at != self.loses else results[at - 1]
                at += 1

    def check(self, thing: object, what: str) -> None:
        """Accept anything."""


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of seven pieces, and a checkpoint whenever one may be written."""
    monkeypatch.setattr(corpus_text, "WINDOW", 7)
    monkeypatch.setattr("factsmith.core.artefact._SECONDS", 0.0)
    monkeypatch.setattr("factsmith.core.artefact.time.monotonic", lambda: 0.0)


CORPUS = Corpus(MANY, batch_tokens=100, halves=True)


def sums_on(
    lm: LanguageModel, executor: Executor, until: Until | None = None
) -> tuple[MomentSums, int]:
    """Return the sums of two layers, and how many tokens were read."""
    sums = MomentSums({layer: lm.ffn[layer].d_ff for layer in (0, 2)}, until)
    with running_on(executor):
        swept = sweep(lm, CORPUS, [0, 2], [sums], until=None if until is None else sums)
    return sums, swept.n_tokens


def tensors(sums: MomentSums) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in sums.state()[0].items()}


def test_parts_give_the_same_bits_whoever_does_them_and_nearly_those_of_one_piece(
    tiny_lm: LanguageModel,
) -> None:
    whole, n_tokens = sums_on(tiny_lm, Local())
    alone, _ = sums_on(tiny_lm, Local(cuts=True, part_tokens=150))
    for ahead, seed in ((1, 0), (2, 1), (5, 2)):
        executor = Shuffled(150, ahead, seed)
        shuffled, read = sums_on(tiny_lm, executor)
        assert executor.n_parts > 5 and read == n_tokens
        assert shuffled.counts == alone.counts == whole.counts
        for name, tensor in tensors(shuffled).items():
            assert torch.equal(tensor, tensors(alone)[name])
            scale = tensors(whole)[name].abs().max()
            assert (tensor - tensors(whole)[name]).abs().max() <= 1e-12 * scale
    executor = Shuffled(150, 1, 0)
    executor.loses = 3
    lost, _ = sums_on(tiny_lm, executor)
    assert any(
        (tensor - tensors(whole)[name]).abs().max() > 1e-6 for name, tensor in tensors(lost).items()
    ), "control: an executor that gives one part's sums in the place of another's"


def test_the_parts_are_summed_as_by_hand(tiny_gpt2: LanguageModel) -> None:
    sums, _ = sums_on(tiny_gpt2, Local(cuts=True, part_tokens=1))  # every batch is a part
    total = HalvedSum(tiny_gpt2.ffn[2].d_ff)
    for batch in CORPUS.batches(tiny_gpt2):
        part = HalvedSum(total.d_ff)
        part.add(batch.half, scan(tiny_gpt2, [piece.ids for piece in batch.pieces], [2])[2,].m)
        total.merge(part)
    for half in range(2):
        for i, strip in enumerate(total.strips[half]):
            assert torch.equal(strip, tensors(sums)[f"2.{half}.{i}"])


def test_a_sweep_in_parts_ends_where_it_ends_in_one_piece(tiny_gpt2: LanguageModel) -> None:
    d_ff = tiny_gpt2.ffn[0].d_ff
    everything = sum(batch.n_tokens for batch in CORPUS.batches(tiny_gpt2))
    for excess in (0.3, 0.6, 0.9, 1.0):
        until = Until(excess, 2 * d_ff, 3 * d_ff, 20 * d_ff)
        whole, n_tokens = sums_on(tiny_gpt2, Local(), until)
        for ahead in (1, 4):
            parts, read = sums_on(tiny_gpt2, Shuffled(60, ahead, 3), until)
            assert read == n_tokens and parts.counts == whole.counts
    assert n_tokens < everything, "control: the loosest limit ends it early"


def test_a_killed_sweep_in_parts_goes_on_and_may_go_on_in_one_piece(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    straight, n_tokens = sums_on(tiny_gpt2, Local(cuts=True, part_tokens=150))

    def killed(done: int) -> None:
        if done > 500:
            raise Killed

    file = tmp_path / "partial"
    for executor in (Local(cuts=True, part_tokens=150), Local()):
        first = MomentSums({layer: tiny_gpt2.ffn[layer].d_ff for layer in (0, 2)})
        with running_on(Local(cuts=True, part_tokens=150)), pytest.raises(Killed):
            sweep(
                tiny_gpt2,
                CORPUS,
                [0, 2],
                [first],
                checkpoint=Checkpoint(file, MADE_FROM),
                progress=killed,
            )
        assert file.is_file()
        done: list[int] = []
        second = MomentSums({layer: tiny_gpt2.ffn[layer].d_ff for layer in (0, 2)})
        with running_on(executor):
            checkpoint = Checkpoint(file, MADE_FROM)
            swept = sweep(
                tiny_gpt2, CORPUS, [0, 2], [second], checkpoint=checkpoint, progress=done.append
            )
        assert swept.n_tokens == n_tokens == done[-1] and done[0] > 0, "it begins in the middle"
        for name, tensor in tensors(second).items():
            expected = tensors(straight)[name]
            if executor.cuts:
                assert torch.equal(tensor, expected)
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
        checkpoint.remove()


@pytest.mark.parametrize("cuts", [False, True])
def test_texts_that_changed_and_texts_that_are_missing_are_refused(
    tiny_gpt2: LanguageModel, cuts: bool
) -> None:
    run = Pass(tiny_gpt2, (0,), None, ())
    with running_on(Local(cuts=cuts)):
        reader = Reader(CORPUS.batches(tiny_gpt2), "batch", 3, "0" * 64, None)
        with pytest.raises(InputError, match="other texts"):
            list(in_parts(run, reader, [], None, None))
        reader = Reader(iter(()), "batch", 3, "0" * 64, None)
        list(in_parts(run, reader, [], None, None))
        with pytest.raises(InputError, match="other texts"):
            reader.swept()
        reader = Reader(iter(()), "batch", 0, "", None)
        list(in_parts(run, reader, [], None, None))
        with pytest.raises(InputError, match="no text"):
            reader.swept()


def test_what_a_part_cuts_in_turn_stays_in_one_piece() -> None:
    def cuts(part: int) -> bool:
        return executor_in_use().cuts

    with running_on(Local(cuts=True)) as _:
        assert executor_in_use().cuts
        assert list(executor_in_use().map(cuts, [1])) == [False]
    assert not executor_in_use().cuts
