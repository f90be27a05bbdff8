"""Masked language models, asked at their masks. What needs a text to be continued is refused."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import factsmith as fs
from conftest import BERT, VOCAB, blank_tokenizer, masking_tokenizer, tiny_model
from factsmith.core.errors import InputError, ModelError, UnsupportedModelError
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.masked import MaskedLanguageModel
from factsmith.model.replay import record
from factsmith.model.trace import hook_count

DISTIL = {
    "n_layers": 3,
    "dim": 32,
    "hidden_dim": 48,
    "n_heads": 4,
    "vocab_size": VOCAB + 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[dict[str, Any], Any]] = {
    "bert": (BERT, masking_tokenizer),
    "distilbert": (DISTIL, masking_tokenizer),
    "electra": ({**BERT, "embedding_size": 16}, masking_tokenizer),
    "roberta": ({**BERT, "pad_token_id": VOCAB + 2}, blank_tokenizer),
    "camembert": ({**BERT, "pad_token_id": VOCAB + 2}, blank_tokenizer),
    "xlm-roberta": ({**BERT, "pad_token_id": VOCAB + 2}, blank_tokenizer),
    "deberta-v2": (BERT, masking_tokenizer),
}
PROMPT, LONGER = (
    "The mother tongue of Danielle is [MASK].",
    "[MASK] is the mother tongue of Danielle Darrieux, and that is that.",
)


@lru_cache
def model(family: str) -> MaskedLanguageModel:
    config, tokenizer = FAMILIES[family]
    if family in (
        "roberta",
        "camembert",
        "xlm-roberta",
    ):  # they count positions from beyond the padding's id
        config = {**config, "max_position_embeddings": VOCAB + 64}
    lm = wrap(tiny_model(family, masked=True, **config), tokenizer())
    assert isinstance(lm, MaskedLanguageModel)
    return lm


def plain_probabilities(lm: LanguageModel, text: str) -> torch.Tensor:
    """Distributions at the masks by the tokenizer and the model alone: (n_masks, vocab)."""
    ids = lm.tokenizer(text.replace("[MASK]", lm.tokenizer.mask_token), return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        return lm.module(input_ids=ids).logits[ids == lm.tokenizer.mask_token_id].softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_asked_at_the_mask_as_the_plain_model(family: str) -> None:
    lm = model(family)
    assert not lm.is_causal and lm.n_layers == 3 and lm.d_model == 32 and lm.hides_padding
    for text in (PROMPT, LONGER):
        plain = plain_probabilities(lm, text)
        ((word, p), *_) = lm.fill(text, 3)[0]
        assert p == pytest.approx(float(plain[0].max()), rel=1e-5)
        assert word == lm.tokenizer.decode([int(plain[0].argmax())]).strip()
    # Of different lengths in one batch, each as alone.
    ids, columns, wanted = lm.question(PROMPT, "is")
    assert [ids[c] for c in columns] == [lm.tokenizer.mask_token_id] and len(wanted) == 1
    got = lm.log_prob([PROMPT, LONGER], ["is", "is"]).exp()
    wanted_of = [lm.question(text, "is")[2][0] for text in (PROMPT, LONGER)]
    expected = torch.stack(
        [
            plain_probabilities(lm, text)[0, i]
            for text, i in zip((PROMPT, LONGER), wanted_of, strict=True)
        ]
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert (got[0] - got[1]).abs() > 1e-5
    assert hook_count(lm.module.modules()) == 0


def test_a_target_takes_as_many_masks_as_it_has_tokens() -> None:
    lm = model("bert")
    many = lm.tokenizer.tokenize("Christianity Brazil")
    assert len(many) > 1
    with pytest.raises(
        InputError, match=rf"has {len(many)} tokens .* has 1\. Write (\[MASK\] ?){{{len(many)}}}"
    ):
        lm.log_prob([PROMPT], ["Christianity Brazil"])
    text = PROMPT.replace("[MASK]", " ".join(["[MASK]"] * len(many)))
    plain = plain_probabilities(lm, text)
    expected = plain[range(len(many)), lm.tokenizer.convert_tokens_to_ids(many)].log().sum()
    torch.testing.assert_close(
        lm.log_prob([text], ["Christianity Brazil"])[0], expected, rtol=1e-4, atol=1e-5
    )
    assert len(lm.fill(text)) == len(many)


def test_the_target_is_written_as_the_tokenizer_writes_it_in_place() -> None:
    lm = model("roberta")
    _, _, middle = lm.question(
        "The city of <mask>", "Paris" if len(lm.tokenizer.tokenize(" Paris")) == 1 else "is"
    )
    (token,) = lm.tokenizer.convert_ids_to_tokens(middle)
    assert token.startswith("Ġ")  # the mask swallowed the space, the word has it back
    _, _, first = lm.question("[MASK] is a king", "T")
    assert lm.tokenizer.convert_ids_to_tokens(first) == ["T"]


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ("The mother tongue is", "French", "no mask"),
        ("[MASK] is the tongue of [MASK]", "French", "are apart"),
        (PROMPT, " ", "empty"),
        (PROMPT, "Ω", "does not know"),
        ("", "French", "no token"),
    ],
)
def test_bad_questions_are_refused_in_words(prompt: str, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model("bert").log_prob([prompt], [target])


def test_what_needs_a_text_continued_is_refused_in_words() -> None:
    lm = model("bert")
    refused = (
        lambda: lm.answer([PROMPT]),
        lambda: lm.next_tokens(PROMPT),
        lambda: fs.causal_trace(lm, PROMPT, "Danielle"),
        lambda: fs.causal_trace(lm, PROMPT, "Danielle", target="French"),
        lambda: record(lm, lm.batch([PROMPT]), start=2),
        lambda: record(lm, lm.batch([PROMPT])).at(1),
    )
    for call in refused:
        with pytest.raises(
            UnsupportedModelError, match=r"masked language model|reads text from both sides"
        ):
            call()
    assert record(lm, lm.batch([PROMPT])).at(0).start == 0


def test_replay_equals_the_full_pass_with_the_same_change() -> None:
    lm = model("bert")
    batch = lm.align([lm.prompt_ids(PROMPT), lm.prompt_ids(LONGER)], [0, 0])
    replay = record(lm, batch)
    hidden = replay.hidden[1].clone()
    hidden[:, 3] += 0.5
    again = replay.logits(replay.resume(1, hidden))
    handle = lm.module.bert.encoder.layer[0].register_forward_hook(lambda m, a, out: hidden)
    with torch.no_grad():
        plain = lm.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    handle.remove()
    real = batch.attention_mask.bool()
    torch.testing.assert_close(again[real], plain[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_a_saved_model_is_loaded_as_what_it_is(family: str, tmp_path: Path) -> None:
    lm = model(family)
    lm.module.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, MaskedLanguageModel)
    assert torch.equal(again.log_prob([PROMPT], ["is"]), lm.log_prob([PROMPT], ["is"]))
    # The same type saved as a causal model stays one.
    if family == "bert":
        causal = tiny_model("bert", **{**BERT, "is_decoder": True})
        causal.save_pretrained(tmp_path / "causal")
        masking_tokenizer().save_pretrained(tmp_path / "causal")
        loaded = load(tmp_path / "causal")
        assert loaded.is_causal and not isinstance(loaded, MaskedLanguageModel)


def test_a_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match="shorten"):
        model("bert").log_prob(["is " * 80 + "[MASK]"], ["is"])


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="neither a causal nor a masked"):
        load(tmp_path)
