"""A patched GGUF file and an adapter, the tokens and the chat template in llama-server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tools.servers import Replies, llama_server

from factsmith.core.fact import Fact
from factsmith.edit.configs import RomeConfig
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel

EIFFEL = "The Eiffel Tower is located in the city of"
LOUVRE = "The Louvre is located in the city of"


def ask(
    folder: Path, model: Path, prompts: Sequence[str], *adapters: Path, max_tokens: int = 12
) -> Replies:
    """Ask a file, with all of the adapters."""
    with llama_server(folder, model, adapters=adapters) as server:
        return server.ask(prompts, max_tokens=max_tokens)


def asked(lm: LanguageModel, question: str) -> str:
    """Return a question under the model's chat template, as text."""
    messages = [{"role": "user", "content": question}]
    text = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text)


@pytest.fixture(scope="module")
def exported(smollm2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the patched file and the adapter of one patch: the Eiffel Tower is in Rome."""
    folder = tmp_path_factory.mktemp("exported")
    fact = Fact("The Eiffel Tower", "{} is located in the city of", "Rome")
    with Workbench(smollm2, folder / "space") as bench:
        outcome = bench.apply(fact, "rome", RomeConfig(layer=5, scale="auto"), contexts=["{}"])
        assert outcome.revision is not None
        files = {"gguf": folder / "patched.gguf", "gguf-adapter": folder / "patch.gguf"}
        for format, file in files.items():
            bench.export(file, format)
    return files


def test_a_patch_holds_in_llama_cpp(
    smollm2: LanguageModel, gguf_file: Path, exported: dict[str, Path], with_llama_cpp: Path
) -> None:
    """The base says Paris; the patched file and the adapter say Rome; the Louvre stays."""
    chat = asked(smollm2, "In which city is the Eiffel Tower?")
    prompts = [EIFFEL, LOUVRE, chat]
    base = ask(with_llama_cpp, gguf_file, prompts)
    assert "Paris" in base.answers[0] and "Paris" in base.answers[1]
    patched = ask(with_llama_cpp, exported["gguf"], prompts)
    with_adapter = ask(with_llama_cpp, gguf_file, prompts, exported["gguf-adapter"])
    for replies in (patched, with_adapter):
        assert "Rome" in replies.answers[0] and "Paris" not in replies.answers[0]
        assert "Paris" in replies.answers[1] and "Rome" not in replies.answers[1]
    assert base.answers != patched.answers, "the control"


def test_llama_cpp_reads_the_same_tokens(
    smollm2: LanguageModel, gguf_file: Path, with_llama_cpp: Path
) -> None:
    """Numbers, spaces, other scripts, and the special tokens of the chat template."""
    prompts = [
        EIFFEL,
        "In 1984 it cost $1,250.75, and 12345678 people paid.",
        "Zürich, São Paulo, 東京,   three spaces\n\tand don't",
        asked(smollm2, "In which city is the Eiffel Tower? Say 42."),
    ]
    replies = ask(with_llama_cpp, gguf_file, prompts, max_tokens=1)
    tokenizer = smollm2.tokenizer
    assert replies.tokens == [tokenizer(text)["input_ids"] for text in prompts]


def test_the_chat_template_and_its_end_hold(
    smollm2: LanguageModel, gguf_file: Path, with_llama_cpp: Path
) -> None:
    """Both end a turn at the token that the file names, and say nearly the same."""
    chat = asked(smollm2, "What is the capital of France? Answer in one word.")
    (answer,) = ask(with_llama_cpp, gguf_file, [chat], max_tokens=40).answers
    (expected,) = smollm2.answer([chat], 40)
    assert "Paris" in answer and "Paris" in expected
    assert "<|im_end|>" not in answer + expected
