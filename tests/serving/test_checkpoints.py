"""Checkpoints and GGUF files of every method, in vLLM and in llama-server.

SmolLM2-135M-Instruct gets two facts from each method. vLLM loads the checkpoint in float32, so its
answers and log-probabilities must be those of the workspace. llama-server computes with the 4-bit
weights of the file, so later tokens may be near ties: two tokens are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from tools.servers import Replies, llama_server, vllm

from factsmith.core.fact import Fact
from factsmith.corpus.moments import second_moments
from factsmith.corpus.ordinary import ordinary_texts
from factsmith.edit.inputs import Moments
from factsmith.edit.methods import METHODS
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.patch.recipe import Recipe

FACTS = [
    Fact("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Fact("Japan", "The capital of {} is", "Berlin"),
]
LOUVRE = "The Louvre is located in the city of"
PROMPTS = [*(fact.text for fact in FACTS), LOUVRE, "Water boils at"]
LAYERS = {"rome": [5], "r-rome": [5], "append": [6]}
SPREAD = [4, 5, 6]
FEW = 20_000
"""Tokens of the second moments: too few for good patches, and enough for these."""


@dataclass(frozen=True)
class Asked:
    """What the workspace says: the first line of each answer, and of the first token its log p."""

    short: list[str]
    long: list[str]
    log_probs: list[float]


@dataclass(frozen=True)
class Made:
    """A patched model on disk, and what the workspace says with it."""

    checkpoint: Path
    gguf: Path
    said: Asked
    widths: set[int]


def first_lines(answers: list[str]) -> list[str]:
    """Return the first line of each answer, without spaces around it."""
    return [answer.strip().split("\n")[0] for answer in answers]


def asked(lm: LanguageModel) -> Asked:
    """Ask a model in memory."""
    return Asked(
        short=first_lines(lm.answer(PROMPTS, 2)),
        long=first_lines(lm.answer(PROMPTS, 6)),
        log_probs=[math.log(lm.next_tokens(prompt, 1)[0][1]) for prompt in PROMPTS],
    )


@pytest.fixture(scope="module")
def moments(smollm2: LanguageModel) -> dict[str, Moments]:
    """Return second moments of the patched layers, of each kind that a method draws on."""
    texts = list(ordinary_texts())
    return {
        "coefficients": second_moments(smollm2, texts, SPREAD, max_tokens=FEW),
        "inputs": second_moments(smollm2, texts, LAYERS["append"], max_tokens=FEW, site="inputs"),
    }


@pytest.fixture(scope="module", params=METHODS)
def made(
    request: pytest.FixtureRequest,
    smollm2: LanguageModel,
    moments: dict[str, Moments],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """Return the files of one method."""
    method: str = request.param
    folder = tmp_path_factory.mktemp(method)
    recipe = Recipe(method, layers=LAYERS.get(method, SPREAD))
    with Workbench(smollm2, folder / "space") as bench:
        site = METHODS[method].config.recommended(smollm2).draws_on
        outcome = bench.apply(FACTS, recipe, contexts=["{}"], moments=moments[site], force=True)
        assert outcome.verification is not None and outcome.verification.efficacy == 1.0
        checkpoint = bench.export(folder / "checkpoint", "checkpoint")
        bench.export(folder / "patched.gguf", "gguf")
        width = checkpoint.width
        return Made(
            folder / "checkpoint",
            folder / "patched.gguf",
            asked(smollm2),
            {ffn.d_ff for ffn in smollm2.ffn} | ({width.after} if width is not None else set()),
        )


@pytest.fixture(scope="module")
def base_in_vllm(
    with_vllm: Path, smollm2: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Replies:
    """Return what the base model says in vLLM."""
    folder = tmp_path_factory.mktemp("base")
    smollm2.module.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    with vllm(with_vllm, folder, dtype="float32") as server:
        return server.ask(PROMPTS, max_tokens=6)


@pytest.fixture(scope="module")
def base_in_llama_cpp(with_llama_cpp: Path, gguf_file: Path) -> Replies:
    """Return what the base model says in llama-server."""
    with llama_server(with_llama_cpp, gguf_file) as server:
        return server.ask(PROMPTS, max_tokens=2)


def check(replies: Replies, expected: list[str], base: Replies) -> None:
    """Compare answers of a server with those of the workspace, and of the base in that server."""
    assert first_lines(replies.answers) == expected
    eiffel, japan, louvre, _ = replies.answers
    assert "Rome" in eiffel and "Berlin" in japan and "Paris" in louvre, replies.answers
    eiffel, japan, louvre, _ = base.answers
    assert "Paris" in eiffel and "Tokyo" in japan and "Paris" in louvre, "the control"


def test_a_checkpoint_in_vllm(made: Made, with_vllm: Path, base_in_vllm: Replies) -> None:
    with vllm(with_vllm, made.checkpoint, dtype="float32") as server:
        replies = server.ask(PROMPTS, max_tokens=6)
    check(replies, made.said.long, base_in_vllm)
    assert replies.log_probs == pytest.approx(made.said.log_probs, abs=1e-3)
    assert base_in_vllm.log_probs != pytest.approx(made.said.log_probs, abs=1e-2), "the control"
    assert replies.tokens == base_in_vllm.tokens


def test_a_gguf_file_in_llama_cpp(
    made: Made, with_llama_cpp: Path, base_in_llama_cpp: Replies
) -> None:
    with llama_server(with_llama_cpp, made.gguf) as server:
        replies = server.ask(PROMPTS, max_tokens=2)
    check(replies, made.said.short, base_in_llama_cpp)
