"""A server that holds a real small model says what the model says in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import factsmith as fs
from factsmith import atlas
from factsmith.remote.server import Server
from model_server import Faults, ModelServer

PROMPTS = [
    "The mother tongue of Danielle Darrieux is",
    "The capital of France is",
    "The currency of Bulgaria is the",
    'He said: "',
]
TARGETS = ["French", "Paris", "lev", "Paris"]


@pytest.fixture(scope="module")
def lm() -> fs.LanguageModel:
    return fs.load("atlas-llama")


@pytest.fixture(scope="module", params=["vllm", "llama.cpp"])
def running(request: pytest.FixtureRequest) -> Iterator[ModelServer]:
    with ModelServer(atlas.folder("atlas-llama"), request.param) as server:
        yield server


def test_answers_are_those_of_the_model(lm: fs.LanguageModel, running: ModelServer) -> None:
    with Server.open(running.url) as server:
        assert server.kind == running.kind
        for lines in (1, 2):
            said = server.complete(server.base, PROMPTS, n_tokens=10, lines=lines)
            assert [each.text for each in said] == lm.answer(PROMPTS, 10, lines=lines)
        other = fs.load("atlas").answer(PROMPTS, 10, lines=2)
        assert [each.text for each in said] != other, "control: another model"


def test_log_probabilities_are_those_of_the_model(
    lm: fs.LanguageModel, running: ModelServer
) -> None:
    with Server.open(running.url) as server:
        gaps = server.gaps(server.base, PROMPTS, TARGETS)
        logs = server.log_prob(server.base, PROMPTS, TARGETS, gaps=gaps)
        expected = lm.log_prob(PROMPTS, TARGETS).tolist()
        assert gaps == lm.gaps(PROMPTS, TARGETS) or not server.gives_log_probs
        if server.kind == "llama.cpp":  # it repeats no prompt
            assert logs == [None] * len(PROMPTS)
            return
        assert logs == pytest.approx(expected, abs=1e-3)
        swapped = server.log_prob(server.base, PROMPTS[:2], TARGETS[1::-1])
        assert swapped != pytest.approx(expected[:2], abs=1), "control: other targets"


def test_a_server_without_log_probabilities() -> None:
    faults = Faults(no_log_probs=True)
    with (
        ModelServer(atlas.folder("atlas-llama"), faults=faults) as running,
        Server.open(running.url) as server,
    ):
        assert server.log_prob(server.base, PROMPTS, TARGETS) == [None] * 4
        assert server.gives_log_probs is False
