"""The logit lens, against the hidden states that transformers itself returns."""

from __future__ import annotations

import copy

import pytest
import torch

from factsmith.core.errors import InputError
from factsmith.model.language_model import LanguageModel
from factsmith.model.trace import hook_count
from factsmith.read.lens import lens, settled_from, state_name

PROMPT = "The capital of France is"


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def by_transformers(lm: LanguageModel) -> torch.Tensor:
    """Return p of every token after each state: (L + 1, S, vocab)."""
    module = copy.deepcopy(lm.module)  # transformers leaves hooks where it records states
    norm = getattr(module.base_model, "ln_f", None) or module.base_model.norm
    ids = torch.tensor([lm.prompt_ids(PROMPT)])
    with torch.no_grad():
        *below, last = module(input_ids=ids, output_hidden_states=True).hidden_states
        read = [norm(hidden[0]) for hidden in below] + [last[0]]  # the last has its norm already
        logits = torch.stack([module.get_output_embeddings()(each) for each in read])
    return logits.softmax(-1)


def test_every_state_is_read_as_transformers_reads_it(lm: LanguageModel) -> None:
    hooks = hook_count(lm.module.modules())
    read = lens(lm, PROMPT, top=3)
    assert hook_count(lm.module.modules()) == hooks
    p = by_transformers(lm)
    best = p.topk(3)
    assert read.top_ids.shape == (lm.n_layers + 1, len(lm.prompt_ids(PROMPT)), 3)
    assert torch.allclose(read.top_probabilities, best.values, atol=1e-5)
    assert torch.equal(read.top_ids[..., 0], best.indices[..., 0])
    assert read.target_id == int(p[-1, -1].argmax())
    assert torch.allclose(read.probabilities, p[..., read.target_id], atol=1e-5)
    expected = (p > p[..., read.target_id, None]).sum(-1)
    assert torch.equal(read.ranks, expected)
    assert read.likeliest(-1, -1)[0][0] == lm.next_tokens(PROMPT, 1)[0][0]
    assert not torch.allclose(read.probabilities[0], read.probabilities[-1]), "the layers matter"


def test_a_target_is_followed(tiny_gpt2: LanguageModel) -> None:
    first = lens(tiny_gpt2, PROMPT)
    other = lens(tiny_gpt2, PROMPT, target="Brazil")
    assert other.target_id == tiny_gpt2.tokenizer(" Brazil")["input_ids"][0] != first.target_id
    assert torch.equal(first.top_ids, other.top_ids)
    assert not torch.equal(first.ranks, other.ranks)


def test_the_answer_stays_from_its_last_change_on() -> None:
    likeliest = torch.tensor([[7, 1, 5], [8, 2, 5], [7, 3, 5], [8, 3, 5]])
    assert settled_from(likeliest).tolist() == [3, 2, 0]
    assert [state_name(state) for state in (0, 3)] == ["the embedding", "layer 2"]


def test_the_rows_and_the_document_say_the_same(tiny_gpt2: LanguageModel) -> None:
    read = lens(tiny_gpt2, PROMPT, top=2)
    rows, document = read.rows(), read.to_dict()
    assert len(rows) == read.top_ids.shape[0] * read.top_ids.shape[1]
    assert rows[0]["layer"] is None and rows[-1]["layer"] == tiny_gpt2.n_layers - 1
    assert rows[-1]["settled"] and rows[-1]["says"] == read.says[-1][-1]
    last = document["states"][-1][-1]
    assert [each["token"] for each in last["likeliest"]] == [t for t, _ in read.likeliest(-1, -1)]
    assert last["target_probability"] == rows[-1]["target_probability"]
    assert len(read.tables()[0].rows) == tiny_gpt2.n_layers + 1


@pytest.mark.parametrize(("prompt", "top"), [("", 1), (PROMPT, 0)])
def test_what_cannot_be_read_is_refused(tiny_gpt2: LanguageModel, prompt: str, top: int) -> None:
    with pytest.raises(InputError):
        lens(tiny_gpt2, prompt, top=top)
