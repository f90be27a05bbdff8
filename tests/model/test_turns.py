"""Several threads and one model: each gets right answers, and none waits forever."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from editing import CONTEXTS, FACTS, SEARCH, full_rank_moments
from factsmith.core.errors import ModelError
from factsmith.edit.configs import MemitConfig
from factsmith.edit.delta import applied
from factsmith.edit.methods import memit
from factsmith.edit.neurons import erase
from factsmith.locate.causal import causal_trace
from factsmith.locate.neurons import knowledge_neurons
from factsmith.model import trace, turns
from factsmith.model.intervene import intervene
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.products import replacing_factors
from factsmith.model.trace import hook_count, recording, replacing, standing_in
from factsmith.model.turns import turn

PROMPTS = TEXTS[0].split(". ")
NEURONS = [(1, i) for i in range(100)]
SOON = 20.0
"""Seconds after which a thread that should end has not."""


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs in a thread each, and return their results or errors."""
    results: list[Any] = [None] * len(jobs)

    def run(place: int, job: Callable[[], Any]) -> None:
        try:
            results[place] = job()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive(), "a thread waits forever"
    return results


def log_prob(lm: LanguageModel) -> float:
    return float(lm.log_prob(PROMPTS[:1], ["French"]))


def many_asks(lm: LanguageModel, prompt: str, rounds: int = 15) -> set[str]:
    return {str((lm.answer([prompt], 4), lm.next_tokens(prompt, 2))) for _ in range(rounds)}


def test_four_threads_get_the_answers_of_one(lm: LanguageModel) -> None:
    expected = [many_asks(lm, prompt, 1) for prompt in TEXTS]
    answers = together(*(lambda p=prompt: many_asks(lm, p) for prompt in TEXTS))
    assert answers == expected and hook_count(lm.module.modules()) == 0


def test_the_control_of_four_threads(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all threads count as one, they see each other's hooks."""
    monkeypatch.setattr(trace, "threading", SimpleNamespace(get_ident=lambda: 1))
    ids, entered, end = torch.tensor([[5, 6, 7]]), threading.Event(), threading.Event()

    def record() -> None:
        with recording({"first": lm.layers[0]}, stop=True):
            entered.set()
            end.wait(SOON)

    def ask() -> Any:
        entered.wait(SOON)
        try:
            return lm.module(input_ids=ids).logits
        finally:
            end.set()

    assert type(together(record, ask)[1]).__name__ == "_Stop"


def test_everything_at_once(lm: LanguageModel) -> None:
    """Traces, neurons, edits, blocks and asks in several threads give what they give alone."""
    moments = full_rank_moments(lm)
    config = MemitConfig(layers=(0, 1), **SEARCH)
    delta = erase(lm, NEURONS)
    base = lm.fingerprint

    def edit() -> Any:
        return memit(lm, FACTS, config, moments=moments, contexts=CONTEXTS).dense(1)

    def inside() -> Any:
        with applied(lm, delta):
            return torch.tensor([log_prob(lm) for _ in range(5)])

    def changed() -> Any:
        with intervene(lm, NEURONS, 3):
            return torch.tensor([log_prob(lm) for _ in range(5)])

    jobs: list[Callable[[], Any]] = [
        edit,
        inside,
        changed,
        lambda: torch.as_tensor(causal_trace(lm, FACTS[0].text, FACTS[0].subject).scores),
        lambda: knowledge_neurons(lm, PROMPTS[:1], "French", steps=4).scores,
        lambda: torch.tensor([log_prob(lm) for _ in range(20)]),
        edit,
        inside,
    ]
    expected = [job() for job in jobs]
    for result, alone in zip(together(*jobs), expected, strict=True):
        assert torch.equal(result, alone), result
    assert lm.fingerprint == base and hook_count(lm.module.modules()) == 0
    assert len({float(each.sum()) for each in expected[1:3]} | {float(expected[5].sum())}) > 2


@pytest.mark.parametrize("way", ["recording", "output", "input", "stand-in", "factors"])
def test_a_block_of_another_thread_is_not_seen(way: str) -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = layer(x)

    def forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ module.weight.T + module.bias

    blocks: dict[str, Callable[[], Any]] = {
        "recording": lambda: recording({"layer": layer}, stop=True),
        "output": lambda: replacing({layer: lambda out: out + 1}),
        "input": lambda: replacing({layer: lambda given: given + 1}, where="input"),
        "stand-in": lambda: standing_in([layer], lambda index, args, kwargs: expected + 1),
        "factors": lambda: replacing_factors(
            {layer: ("weight", forward, lambda left, offset: left + 1)}
        ),
    }
    first, second = threading.Barrier(2), threading.Barrier(2)

    def opens_first() -> Any:
        with blocks[way]():
            first.wait(SOON)
            second.wait(SOON)  # meanwhile the other thread opens its block, and ends it last
            return layer(x)

    def opens_second() -> Any:
        first.wait(SOON)
        before = layer(x)
        with blocks[way]():
            second.wait(SOON)
            seen[0].result(SOON)
            inside = layer(x)
        return before, inside, layer(x)

    seen: list[Future[Any]] = []
    with ThreadPoolExecutor(2) as pool:
        seen.append(pool.submit(opens_first))
        seen.append(pool.submit(opens_second))
    mine = seen[0].result()
    assert mine is None if way == "recording" else not torch.allclose(mine, expected)
    if way == "recording":  # its second call ends the block
        assert seen[1].exception() is not None or seen[1].result() is not None
    else:
        before, inside, after = seen[1].result()
        assert torch.equal(before, expected) and torch.equal(after, expected)
        assert not torch.allclose(inside, expected)
    assert torch.equal(layer(x), expected) and hook_count([layer]) == 0


def test_an_intervention_belongs_to_its_thread(lm: LanguageModel) -> None:
    plain = log_prob(lm)
    with intervene(lm, NEURONS, 3):
        assert together(lambda: log_prob(lm)) == [plain]
        assert log_prob(lm) != plain


def test_passes_of_the_user_in_another_thread_are_left_alone(lm: LanguageModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = lm.module(input_ids=ids).logits
    with recording({"first": lm.layers[0]}, stop=True), intervene(lm, NEURONS, 3):
        (logits,) = together(lambda: lm.module(input_ids=ids).logits)
    assert torch.equal(logits, expected)


def test_other_threads_wait_for_a_block_that_changes_weights(lm: LanguageModel) -> None:
    plain, delta = log_prob(lm), erase(lm, NEURONS)
    with ThreadPoolExecutor(2) as pool:
        with applied(lm, delta):
            inside = log_prob(lm)
            with applied(lm, delta):  # the same thread does not wait for itself
                log_prob(lm)
            asked = [pool.submit(log_prob, lm) for _ in range(2)]
            assert not any(each.done() for each in asked)
            assert log_prob(lm) == inside != plain
        assert [each.result(SOON) for each in asked] == [plain, plain]


def test_a_copy_of_the_context_counts_as_the_thread(lm: LanguageModel) -> None:
    plain, delta = log_prob(lm), erase(lm, NEURONS)

    async def ask() -> tuple[float, list[float]]:
        with applied(lm, delta):
            inside = await asyncio.to_thread(log_prob, lm)
        return inside, await asyncio.gather(*(asyncio.to_thread(log_prob, lm) for _ in range(3)))

    inside, after = asyncio.run(ask())
    assert inside != plain and after == [plain] * 3
    with applied(lm, delta), ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.copy_context().run, log_prob, lm).result(SOON) == inside


def test_a_wait_for_a_block_ends_in_words(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block may wait for the thread that waits for it."""
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    with applied(lm, erase(lm, NEURONS)), ThreadPoolExecutor(1) as pool:
        error = pool.submit(log_prob, lm).exception(SOON)
    assert isinstance(error, ModelError) and "model of its own" in str(error)
    assert log_prob(lm)


def test_work_of_the_library_is_waited_for_without_limit(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    began, plain = threading.Event(), log_prob(lm)

    def work() -> None:
        with turn(lm, changes=True), applied(lm, erase(lm, NEURONS)):
            began.set()
            threading.Event().wait(1)

    def ask() -> float:
        began.wait(SOON)
        return log_prob(lm)

    assert together(work, ask) == [None, plain]


def test_two_that_ask_and_want_to_change_do_not_wait_for_each_other(lm: LanguageModel) -> None:
    both = threading.Barrier(2)

    def ask_and_change() -> None:
        with turn(lm):
            both.wait(SOON)
            with turn(lm, changes=True):
                pass

    results = together(ask_and_change, ask_and_change)
    errors = [each for each in results if each is not None]
    assert len(errors) == 1 and "each waits for the other" in str(errors[0])


def test_models_around_one_module_share_their_turns(lm: LanguageModel) -> None:
    again, plain = wrap(lm.module, byte_tokenizer()), log_prob(lm)
    other = copy.deepcopy(lm)
    with ThreadPoolExecutor(2) as pool:
        with applied(lm, erase(lm, NEURONS)):
            waits, free = pool.submit(log_prob, again), pool.submit(log_prob, other)
            assert free.result(SOON) == plain
            assert not waits.done()
        assert waits.result(SOON) == plain


def test_a_model_can_be_collected() -> None:
    lm: LanguageModel | None = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    assert lm is not None and lm.answer(PROMPTS[:1])
    gone = weakref.ref(lm.module)
    del lm
    gc.collect()
    assert gone() is None


def test_training_mode_comes_back_when_the_last_thread_is_done(lm: LanguageModel) -> None:
    plain = log_prob(lm)
    lm.module.train()
    assert together(*[lambda: {log_prob(lm) for _ in range(10)}] * 4) == [{plain}] * 4
    assert all(part.training for part in lm.module.modules())


@contextmanager
def busy(lm: LanguageModel) -> Iterator[None]:
    """Another thread has a turn that changes weights while the block runs."""
    began, end = threading.Event(), threading.Event()

    def work() -> None:
        with turn(lm, changes=True):
            began.set()
            end.wait(SOON)

    thread = threading.Thread(target=work)
    thread.start()
    began.wait(SOON)
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_ask(lm: LanguageModel) -> None:
    """It has none of its parent's other threads, so it must not wait for them."""
    plain = log_prob(lm)
    with busy(lm), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn about a fork with threads
        child = os.fork()
        if not child:
            threading.Timer(SOON, os._exit, (2,)).start()
            os._exit(int(log_prob(lm) != plain))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_turn_that_a_ctrl_c_tore_ends_by_itself(lm: LanguageModel) -> None:
    held = turn(lm, changes=True)
    held.__enter__()  # an exception between this call and the block leaves it without an end
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(log_prob, lm)
        del held
        assert waits.result(SOON) == log_prob(lm)
