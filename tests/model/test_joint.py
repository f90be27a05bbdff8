"""A target that shares a token with its prompt, as in scripts without spaces between words."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from factsmith.judge.asking import ask
from factsmith.model.language_model import LanguageModel, joined_notes
from factsmith.model.load import wrap
from learned import _train


@cache
def model() -> LanguageModel:
    tokens = ["<|end|>", "ส", "ค", "บ", "ง", "จ", " ", "คบ"]
    tokens += [chr(i) for i in range(0x0E40, 0x0E40 + 80)]  # more, for the dry run
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("ค", "บ")]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast),
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = GPT2LMHeadModel(config)
    # One token is "คบ", two are "คง".
    rows = [fast(text)["input_ids"] for text in ("จสคบง", "จจสคง")]
    # No text becomes these two tokens side by side.
    _train(module.eval(), [*rows, fast.convert_tokens_to_ids([*"งสคบ"])])
    return wrap(module, fast)


@pytest.fixture
def lm() -> LanguageModel:
    lm = model()
    lm.gap_choices.joined = False
    return lm


def test_the_likelier_form_counts_with_one_warning(lm: LanguageModel) -> None:
    prompt, target = "จสค", "บง"
    whole, head = (lm.tokenizer(text)["input_ids"] for text in (prompt + target, prompt))
    assert whole[: len(head)] != head
    with torch.no_grad():
        each = lm.module(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(float(each[i - 1, whole[i]]) for i in range(len(head) - 1, len(whole)))
    with pytest.warns(UserWarning, match="joins the end of 'จสค'"):
        log_p = float(lm.log_prob([prompt], [target])[0])
    assert log_p == pytest.approx(expected, abs=1e-4) and math.exp(log_p) > 0.5
    # No second warning: the tests take warnings for errors.
    assert lm.says([prompt], [target]) == [True]
    per_token = float(lm.log_prob([prompt], [target], per_token=True)[0])
    assert per_token == pytest.approx(expected / 2, abs=1e-4)
    (reply,) = ask(lm, [prompt], [[target, "ง"]])
    assert reply.log_probs[0] == pytest.approx(expected / 2, abs=1e-4) and reply.says[0]
    assert reply.n_tokens[0] == 2
    # Edits and traces keep the prompt's tokens, and say so.
    assert lm.says([prompt], [target], by_tokens=True) == [False]
    assert float(lm.log_prob_tokens([prompt], [target])[0]) < math.log(0.1)
    (note,) = joined_notes(lm, [prompt], [target])
    assert "edits and traces keep" in note and f"p = {math.exp(expected):.2g}" in note


def test_the_prompts_own_tokens_count_where_they_are_likelier(lm: LanguageModel) -> None:
    """The tokens would be joined here too, but the model does not expect it: no warning."""
    prompt, target = "งสค", "บ"
    (apart, joined) = lm.joined_log_probs([prompt], [target])[0]
    assert math.exp(apart) > 0.5 and math.exp(joined) < 0.1
    assert float(lm.log_prob([prompt], [target])[0]) == pytest.approx(apart, abs=1e-6)
    (reply,) = ask(lm, [prompt], [[target]])
    assert reply.log_probs[0] == pytest.approx(apart, abs=1e-4)
    assert lm.says([prompt], [target]) == [True] and joined_notes(lm, [prompt], [target]) == ()


def test_other_pairs_run_no_further_pass_and_do_not_change(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, target = "จจสค", "ง"
    asked = lm.question(prompt, target)
    expected = lm._log_probs([asked])
    passes = []
    run = type(lm).last_hidden

    def count(self: LanguageModel, batch: object) -> object:
        passes.append(batch)
        return run(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lm), "last_hidden", count)
    assert torch.equal(lm.log_prob([prompt], [target]), expected) and len(passes) == 1
    assert lm.says([prompt], [target]) == [True] and len(passes) == 2
    assert joined_notes(lm, [prompt], [target]) == () and len(passes) == 2
    with pytest.warns(UserWarning):
        both = lm.log_prob([prompt, "จสค"], [target, "บง"])
    assert both[0] == pytest.approx(float(expected[0]), abs=1e-6)


def test_a_text_of_one_token_has_no_second_form(lm: LanguageModel) -> None:
    assert lm.joined_log_probs(["ค"], ["บ"]) == {}
