"""Triggers of a corpus that is cut into parts, compared with those of the corpus in one piece."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pytest
import torch

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.core.executor import Executor, Local, running_on
from factsmith.corpus import passes
from factsmith.corpus import text as corpus
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read import trigger_scan as module
from factsmith.read.strongest import LAST, Strongest
from factsmith.read.trigger_scan import TriggerRun, find_triggers
from factsmith.read.triggers import SIGNS, Triggers

Part = TypeVar("Part")
Result = TypeVar("Result")


def sent(result: Any, lm: LanguageModel) -> tuple[Any, int]:
    """Return something pickled and unpickled, and its size without the model."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> str | None:
            return "lm" if thing is lm else None

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, name: str) -> LanguageModel:
            return lm

    file = io.BytesIO()
    Pickler(file).dump(result)
    return Unpickler(io.BytesIO(file.getvalue())).load(), len(file.getvalue())


class Pickling:
    """Runs parts one after another, and pickles what goes out and comes back."""

    cuts = True

    def __init__(self, lm: LanguageModel, part_tokens: int) -> None:
        self.lm, self.part_tokens, self.n_parts = lm, part_tokens, 0

    def map(
        self,
        task: Callable[[Part], Result],
        parts: Iterable[Part],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Result]:
        for part in parts:
            self.n_parts += 1
            yield sent(sent(task, self.lm)[0](sent(part, self.lm)[0]), self.lm)[0]


def on(executor: Executor, lm: LanguageModel, texts: list[str], top: int) -> Triggers:
    with running_on(executor):
        return find_triggers(lm, texts, [0, 2], top=top, batch_tokens=90)


def same(one: Triggers, other: Triggers) -> bool:
    """Return whether triggers are equal; sums of float64 may differ in their last bits."""
    if (one.texts, one.n_texts, one.n_tokens) != (other.texts, other.n_texts, other.n_tokens):
        return False
    return all(
        torch.equal(a.coefficients[sign], b.coefficients[sign])
        and torch.equal(a.texts[sign], b.texts[sign])
        and torch.equal(a.positions[sign], b.positions[sign])
        and torch.equal(a.fired, b.fired)
        and torch.allclose(a.mean_square, b.mean_square, rtol=1e-12, atol=0)
        for sign in SIGNS
        for a, b in ((one.banks[bank], other.banks[bank]) for bank in one.banks)
    )


@pytest.fixture(scope="module")
def small_lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def test_triggers_do_not_depend_on_how_a_corpus_is_cut(
    small_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    words = " ".join(TEXTS).split()
    n_parts = []
    for _ in range(30):
        monkeypatch.setattr(corpus, "WINDOW", draw.choice([1, 2, 5]))
        monkeypatch.setattr(module, "_KEPT", draw.choice([0, 50, 10_000]))
        stock = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(8)]
        texts = draw.choices(stock, k=draw.randint(1, 30))  # texts repeat, so coefficients tie
        top = draw.choice([1, 3, 20])
        whole = on(Local(), small_lm, texts, top)
        pickling = Pickling(small_lm, draw.choice([1, 60, 300, 10**6]))
        assert same(on(pickling, small_lm, texts, top), whole)
        n_parts.append(pickling.n_parts)
    assert max(n_parts) > 8 and 1 in n_parts


@pytest.mark.parametrize("fault", ["numbers", "order", "twice"])
def test_parts_that_are_merged_wrongly_are_noticed(
    small_lm: LanguageModel, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "WINDOW", 3)
    texts = [*TEXTS, "Paris", *TEXTS, "Paris is in France"]
    whole = on(Local(), small_lm, texts, 3)
    merge = Strongest.merge

    def wrong(best: Strongest, other: Strongest, n_texts: int) -> None:
        merge(best, other, n_texts + 1 if fault == "numbers" and n_texts else n_texts)
        if fault == "twice":
            best.fired += other.fired

    monkeypatch.setattr(Strongest, "merge", wrong)
    if fault == "order":
        numbered = passes._Parts._numbered
        monkeypatch.setattr(
            passes._Parts, "_numbered", lambda parts, part: numbered(parts, part[::-1])[:1]
        )
    try:
        assert not same(on(Pickling(small_lm, 1), small_lm, texts, 3), whole)
    except KeyError:
        assert fault == "numbers", "a neuron refers to a text that is not there"


def test_a_part_is_sent_without_texts_and_rows_that_nobody_needs(
    small_lm: LanguageModel,
) -> None:
    texts = [f"{text} {n}" for n in range(30) for text in TEXTS]
    run = passes.Pass(small_lm, (0, 2), None, (TriggerRun(small_lm, [0, 2], 2).maker(),))
    pieces = list(corpus.pieces(small_lm, texts))
    batch = passes.TextBatch(pieces, 1, 1, True, 0, "")
    (many,) = run([batch])
    back, size = sent(many, small_lm)
    assert {piece.number for piece in back.texts.values()} == set(back.numbers().tolist())
    assert len(back.texts) < len(texts), "control: most texts are no neuron's strongest"
    (few,) = passes.Pass(small_lm, (0, 2), None, (TriggerRun(small_lm, [0, 2], 100).maker(),))(
        [passes.TextBatch(pieces[:2], 1, 1, True, 0, "")]
    )
    back, size = sent(few, small_lm)
    whole = 2 * 2 * 100 * 12 * small_lm.ffn[0].d_ff
    assert size < whole / 10, "two texts fill two rows of a hundred"
    for bank, best in few.best.items():
        for sign in SIGNS:
            assert torch.equal(back.best[bank].keys[sign], best.keys[sign])
            filled = best.keys[sign] != 0
            assert torch.equal(back.best[bank].places[sign][filled], best.places[sign][filled])
    empty, _ = sent(TriggerRun(small_lm, [0], 3), small_lm)
    assert empty.texts == {} and empty.best[0,].keys["top"].shape == (3, small_lm.ffn[0].d_ff)


def test_more_texts_than_can_be_numbered_are_refused(small_lm: LanguageModel) -> None:
    first, second = TriggerRun(small_lm, [0], 1), TriggerRun(small_lm, [0], 1)
    first.n_texts, second.n_texts = LAST - 1, 1
    first.merge(second)
    with pytest.raises(InputError, match="more than 2,147,483,647 texts"):
        first.merge(second)
