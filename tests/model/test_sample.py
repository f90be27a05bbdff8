from __future__ import annotations

import copy

import pytest
import torch

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.sample import own_text, sample


def test_sampling_follows_the_models_distribution(tiny_lm: LanguageModel) -> None:
    """First tokens, counted, against the model's own probabilities after the start token."""
    start = tiny_lm.tokenizer.bos_token_id
    with torch.no_grad():
        logits = tiny_lm.module(input_ids=torch.tensor([[start]])).logits[0, -1].float()
    logits[tiny_lm.tokenizer.all_special_ids] = -torch.inf
    expected = logits.softmax(-1)
    counted = (
        torch.bincount(torch.tensor(sample(tiny_lm, 2000, 1))[:, 0], minlength=len(expected)) / 2000
    )
    assert (counted - expected).abs().sum() / 2 < 0.15, "total variation"
    assert (counted - expected.roll(1)).abs().sum() / 2 > 0.3, "a control"
    top = {int(i) for i in expected.topk(3).indices}
    assert {ids[0] for ids in sample(tiny_lm, 200, 1, top_k=3)} == top


def test_seed_decides_and_the_global_state_does_not(tiny_lm: LanguageModel) -> None:
    first = sample(tiny_lm, 3, 6, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert sample(tiny_lm, 3, 6, seed=1) == first != sample(tiny_lm, 3, 6, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not {i for ids in first for i in ids} & set(tiny_lm.tokenizer.all_special_ids)


def test_own_text(tiny_lm: LanguageModel) -> None:
    done: list[int] = []
    texts = own_text(tiny_lm, 300, seed=3, progress=done.append)
    assert texts == own_text(tiny_lm, 300, seed=3) != own_text(tiny_lm, 300, seed=4)
    assert 300 <= done[-1] < 600 and len(texts) >= 5 and all(texts)


def test_own_text_repeats_and_is_the_models(tiny_gpt2: LanguageModel) -> None:
    texts = own_text(tiny_gpt2, 200, seed=3)
    assert texts == own_text(tiny_gpt2, 200, seed=3) != own_text(tiny_gpt2, 200, seed=4)
    assert sum(len(tiny_gpt2.prompt_ids(text)) for text in texts) > 150
    # top_k=1 is greedy decoding, which the model's own logits give without any sampling
    (ids,) = sample(tiny_gpt2, 1, 6, top_k=1)
    row = [tiny_gpt2.tokenizer.bos_token_id]
    for token in ids:
        logits = tiny_gpt2.module(torch.tensor([row])).logits[0, -1]
        logits[tiny_gpt2.tokenizer.all_special_ids] = -torch.inf
        assert int(logits.argmax()) == token
        row.append(token)


def test_without_a_start_token() -> None:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.bos_token = tokenizer.eos_token = None
    lm = wrap(tiny_model("gpt2", **GPT2), tokenizer)
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        sample(lm, 1, 1)
