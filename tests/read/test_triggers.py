"""The record of triggers: what it says about a trigger, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import LLAMA, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import DamagedError, FingerprintError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.read.trigger_scan import find_triggers
from factsmith.read.triggers import SIGNS, Trigger, Triggers

CORPUS = [*TEXTS, *[" ".join(text.split()[n:]) for n in range(1, 9) for text in TEXTS], "Paris"]


def test_a_trigger_knows_its_token_and_the_next() -> None:
    lm = wrap(tiny_model("llama", **LLAMA).double(), byte_tokenizer(bos=True))
    result = find_triggers(lm, CORPUS, [1], top=3)
    ends = 0
    for i in range(48):
        for column, trigger in enumerate(result.of((1, i))):
            ids = lm.prompt_ids(trigger.text)
            assert ids[trigger.position] == trigger.token == int(result.tokens((1,))[i, column])
            assert trigger.position > 0, "BOS is no trigger"
            following = ids[trigger.position + 1] if trigger.position + 1 < len(ids) else None
            assert trigger.next_token == following and int(result.next_tokens((1,))[i, column]) == (
                -1 if following is None else following
            )
            assert trigger.prefix == trigger.text[: trigger.stop] and trigger.start < trigger.stop
            ends += following is None
    assert ends, "some fire at the end of a text"


def test_triggers_are_kept_and_read_without_the_model(
    tmp_path: Path, tiny_llama: LanguageModel, tiny_gpt2: LanguageModel
) -> None:
    texts = ["Zürich lies in São Paulo? ", *CORPUS]
    result = find_triggers(tiny_llama, texts, top=4, folder=tmp_path)
    read = Triggers.load(tmp_path)
    for neuron in ((0, 3), (2, 47)):
        for sign in SIGNS:
            assert read.of(neuron, sign=sign) == result.of(neuron, sign=sign) != []
    assert (read.model, read.corpus, read.n_texts) == (result.model, result.corpus, len(texts))
    assert isinstance(read.of((0, 3))[0], Trigger) and len(read.of((0, 3), k=2)) == 2
    Triggers.load(tmp_path, tiny_llama)
    with pytest.raises(FingerprintError, match="scan the corpus"):
        Triggers.load(tmp_path, tiny_gpt2)
    file = tmp_path / "triggers.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DamagedError):
            Triggers.load(folder)
