"""Single neurons are erased and rewritten exactly as the paper's formulas say."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import BERT, GPT2, LLAMA, byte_tokenizer, masking_tokenizer, tiny_model
from factsmith.core.errors import InputError, LayerError, UnsupportedModelError
from factsmith.edit.delta import Delta, applied
from factsmith.edit.neurons import erase, rewrite
from factsmith.keep.workbench import Workbench
from factsmith.model.intervene import intervene
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

PROMPT = "The mother tongue of Danielle Darrieux is"
NEURONS = [(0, 3), (0, 40), (2, 7)]


def column(module: Any, layer: int, neuron: int) -> Tensor:
    """A neuron's value, (d_model,), found in the module by its names; writable."""
    blocks = module.model.layers if hasattr(module, "model") else module.transformer.h
    mlp = blocks[layer].mlp
    weight = (
        mlp.down_proj.weight[:, neuron] if hasattr(mlp, "down_proj") else mlp.c_proj.weight[neuron]
    )
    assert isinstance(weight, Tensor)
    return weight.detach()


def logits(module: Any, lm: LanguageModel, prompt: str = PROMPT) -> Tensor:
    with torch.no_grad():
        out = module(input_ids=torch.tensor([lm.prompt_ids(prompt)])).logits
    assert isinstance(out, Tensor)
    return out


def digest(lm: LanguageModel) -> str:
    state = lm.module.state_dict()
    return hashlib.sha256(
        b"".join(
            t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in state.values()
        )
    ).hexdigest()


def unembedding(lm: LanguageModel) -> Tensor:
    """Rows (vocabulary, d_model), named for each of the tiny models."""
    rows: Tensor = lm.module.lm_head.weight.detach()
    return rows


def test_erased_neurons_write_nothing(tiny_lm: LanguageModel) -> None:
    """It equals columns that are set to zero, and coefficients that are suppressed in a pass."""
    other = copy.deepcopy(tiny_lm.module)
    for layer, neuron in NEURONS:
        column(other, layer, neuron).zero_()
    before = digest(tiny_lm)
    with intervene(tiny_lm, NEURONS, 0):
        suppressed = logits(tiny_lm.module, tiny_lm)
    with applied(tiny_lm, erase(tiny_lm, NEURONS)):
        assert torch.equal(logits(tiny_lm.module, tiny_lm), logits(other, tiny_lm))
        torch.testing.assert_close(logits(tiny_lm.module, tiny_lm), suppressed)
        touched = digest(tiny_lm)
    assert digest(tiny_lm) == before != touched
    # The control: other neurons give another model.
    with applied(tiny_lm, erase(tiny_lm, [(0, 4), (0, 41), (2, 8)])):
        assert not torch.allclose(
            logits(tiny_lm.module, tiny_lm), logits(other, tiny_lm), atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_erased_values_are_zero_to_the_last_bit_and_the_others_unchanged(
    family: str, dtype: torch.dtype
) -> None:
    module = tiny_model(family, **(GPT2 if family == "gpt2" else LLAMA)).to(dtype)
    lm = wrap(module, byte_tokenizer())
    erased = [(layer, i) for layer in range(3) for i in range(0, 48, 5)]
    before = [lm.ffn[layer].weight().clone() for layer in range(3)]
    delta = erase(lm, iter(erased))
    assert all(torch.count_nonzero(column(module, layer, i)) for layer, i in erased)
    with applied(lm, delta):
        for layer, i in erased:
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert column(module, layer, i).abs().view(bits).count_nonzero() == 0
        kept = [i for i in range(lm.ffn[0].d_ff) if (0, i) not in erased]
        assert all(
            torch.equal(lm.ffn[layer].weight()[:, kept], before[layer][:, kept])
            for layer in range(3)
        )
    assert delta.rank == 10 and delta.facts == () and delta.v_star.shape == (0, 32)
    assert delta.k_star[1].shape == (0, lm.ffn[1].d_ff)


def test_order_and_repeats_do_not_matter(tiny_gpt2: LanguageModel) -> None:
    delta, again = erase(tiny_gpt2, NEURONS), erase(tiny_gpt2, [*reversed(NEURONS), *NEURONS])
    assert delta.config == again.config == {"neurons": [[0, 3], [0, 40], [2, 7]]}
    assert all(torch.equal(delta.dense(layer), again.dense(layer)) for layer in (0, 2))


def test_rewrite_is_the_formula_of_the_paper(tiny_lm: LanguageModel) -> None:
    """Each value loses its own length of the old answer's direction.

    It gains eight times its length of the new answer's direction.
    """
    old, new = (
        tiny_lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0]
        for word in ("French", "English")
    )
    assert old != new
    rows = unembedding(tiny_lm)
    wanted = {}
    for layer, i in NEURONS:
        value = column(tiny_lm.module, layer, i).clone()
        wanted[layer, i] = (
            value
            - value.norm() / rows[old].norm() * rows[old]
            + 8 * value.norm() / rows[new].norm() * rows[new]
        )
    before = digest(tiny_lm)
    untouched = column(tiny_lm.module, 2, 8).clone()
    with applied(tiny_lm, rewrite(tiny_lm, NEURONS, "French", "English")):
        for (layer, i), value in wanted.items():
            torch.testing.assert_close(
                column(tiny_lm.module, layer, i), value, rtol=1e-5, atol=1e-5
            )
        assert torch.equal(column(tiny_lm.module, 2, 8), untouched)
    assert digest(tiny_lm) == before
    with applied(tiny_lm, rewrite(tiny_lm, NEURONS, "English", "French")):  # the control
        assert not torch.allclose(column(tiny_lm.module, 0, 3), wanted[0, 3], atol=1e-2)


def test_many_neurons_share_what_four_would_change(tiny_lm: LanguageModel) -> None:
    """Eight change each value half as much. Factors that are given are used as they are."""
    four, eight = [(0, i) for i in range(4)], [(0, i) for i in range(8)]
    few, many = (rewrite(tiny_lm, neurons, "French", "English") for neurons in (four, eight))
    torch.testing.assert_close(many.dense(0)[:, :4], few.dense(0)[:, :4] / 2)
    assert (few.config["remove"], few.config["add"]) == (1, 8)
    assert (many.config["remove"], many.config["add"]) == (0.5, 4)
    given = rewrite(tiny_lm, eight, "French", "English", remove=1, add=8)
    torch.testing.assert_close(given.dense(0)[:, :4], few.dense(0)[:, :4])


def test_rewrite_with_a_prompt_follows_the_sign_of_each_coefficient(tiny_lm: LanguageModel) -> None:
    d_ff = tiny_lm.ffn[2].d_ff
    every = [(2, i) for i in range(d_ff)]
    coefficients = tiny_lm.coefficients(PROMPT, [2])[0, -1]
    assert 0 < (coefficients < 0).sum() < d_ff
    plain, signed = (
        rewrite(tiny_lm, every, "French", "English", prompt=p).dense(2) for p in (None, PROMPT)
    )
    assert torch.equal(signed, torch.where(coefficients < 0, -plain, plain))
    # Every neuron now pushes the answer in the same direction at that token, so their sum is
    # larger.
    new = tiny_lm.tokenizer(" English", add_special_tokens=False)["input_ids"][0]
    push = unembedding(tiny_lm)[new] @ torch.stack(
        [plain @ coefficients, signed @ coefficients], dim=1
    )
    assert push[1] > push[0].abs() and push[1] > 0


def test_rewrite_takes_the_first_token_in_which_the_targets_differ(
    tiny_gpt2: LanguageModel,
) -> None:
    def ids(text: str) -> list[int]:
        return list(tiny_gpt2.tokenizer(text, add_special_tokens=False)["input_ids"])

    rows, value = unembedding(tiny_gpt2), column(tiny_gpt2.module, 1, 5)
    unit = rows / rows.norm(dim=1, keepdim=True)
    shared = [a == b for a, b in zip(ids(" Paris x"), ids(" Paris zy"), strict=False)].index(False)
    assert shared > 0
    update = rewrite(tiny_gpt2, [(1, 5)], "Paris x", "Paris zy", remove=2, add=3).dense(1)[:, 5]
    wanted = value.norm() * (3 * unit[ids(" Paris zy")[shared]] - 2 * unit[ids(" Paris x")[shared]])
    torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-6)
    # One target begins with the other: only the longer one has a token there.
    longer = ids(" Paris x")
    assert longer[: len(ids(" Paris"))] == ids(" Paris")
    update = rewrite(tiny_gpt2, [(1, 5)], "Paris", "Paris x").dense(1)[:, 5]
    torch.testing.assert_close(
        update, 8 * value.norm() * unit[longer[len(ids(" Paris"))]], rtol=1e-5, atol=1e-6
    )


def test_save_load_commit_and_revert(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    before = digest(tiny_lm)
    with Workbench(tiny_lm, tmp_path / "workspace") as bench:
        first = bench.commit(erase(tiny_lm, NEURONS), message="erase three")
        # Made on the erased model.
        delta = rewrite(tiny_lm, [(1, 2)], "French", "English", prompt=PROMPT)
        delta.save(tmp_path / "delta")
        back = Delta.load(tmp_path / "delta")
        assert torch.equal(back.dense(1), delta.dense(1)) and back.config == delta.config
        assert back.k_star[1].shape == delta.k_star[1].shape
        second = bench.commit(back, message="rewrite one")
        carried = digest(tiny_lm)
        assert all(
            torch.count_nonzero(column(tiny_lm.module, layer, i)) == 0 for layer, i in NEURONS
        )
        assert [r.method for r in bench.log()] == ["rewrite", "erase"]
        assert bench.show(first.id).config == {"neurons": [[0, 3], [0, 40], [2, 7]]}
        assert bench.verify().checks == ()
    assert digest(tiny_lm) == before
    with Workbench(tiny_lm, tmp_path / "workspace") as bench:
        assert digest(tiny_lm) == carried != before
        bench.revert(second.id)
        bench.revert(first.id)
        assert digest(tiny_lm) == before


def test_masked_language_models() -> None:
    lm = wrap(tiny_model("bert", masked=True, **BERT), masking_tokenizer())
    prompt, other = "The mother tongue of Danielle is [MASK].", copy.deepcopy(lm.module)
    for layer, i in NEURONS:
        other.bert.encoder.layer[layer].output.dense.weight.data[:, i] = 0
    with applied(lm, erase(lm, NEURONS)):
        assert torch.equal(logits(lm.module, lm, prompt), logits(other, lm, prompt))
    ids, (mask,), (old,) = lm.question(prompt, "is")
    (new,) = lm.question(prompt, "the")[2]
    rows, values = lm.module.cls.predictions.decoder.weight.detach(), lm.ffn[1].values
    unit = rows / rows.norm(dim=1, keepdim=True)
    push = values.norm(dim=1, keepdim=True) * (8 * unit[new] - unit[old])  # (d_ff, d_model)
    signs = lm.coefficients(prompt, [1])[0, mask].sign()
    assert signs.min() == -1 and signs.max() == 1 and ids[mask] == lm.tokenizer.mask_token_id
    every = [(1, i) for i in range(lm.ffn[1].d_ff)]
    torch.testing.assert_close(rewrite(lm, every, "is", "the", remove=1, add=8).dense(1), push.T)
    torch.testing.assert_close(
        rewrite(lm, every, "is", "the", prompt=prompt, remove=1, add=8).dense(1),
        (signs[:, None] * push).T,
    )
    with pytest.raises(InputError, match="mask"):
        rewrite(lm, NEURONS, "is", "the", prompt="The mother tongue of Danielle is")


@pytest.mark.parametrize(
    "neurons",
    [
        [(3, 0)],
        [(-1, 0)],
        [(0, 128)],
        [(0, -1)],
        [(0, 1, 2)],
        [(0,)],
        [3],
        ["ab"],
        [(0, 1.5)],
        [(0, 1), (0, 999)],
    ],
)
def test_neurons_that_do_not_exist_are_refused(tiny_gpt2: LanguageModel, neurons: Any) -> None:
    for make in (
        lambda: erase(tiny_gpt2, neurons),
        lambda: rewrite(tiny_gpt2, neurons, "French", "English"),
    ):
        with pytest.raises(LayerError):
            make()


def test_other_bad_input(tiny_gpt2: LanguageModel) -> None:
    with pytest.raises(InputError, match="no neuron was given"):
        erase(tiny_gpt2, [])
    with pytest.raises(InputError, match="both 'French'"):
        rewrite(tiny_gpt2, NEURONS, "French", " French")
    with pytest.raises(InputError, match="target is empty"):
        rewrite(tiny_gpt2, NEURONS, "French", " ")
    with pytest.raises(InputError, match="neurons is 3"):
        erase(tiny_gpt2, 3)  # type: ignore[arg-type]
    for bad in (float("nan"), "x", True):
        with pytest.raises(InputError, match=r"add is .*: it must be a finite number"):
            rewrite(tiny_gpt2, NEURONS, "French", "English", add=bad)  # type: ignore[arg-type]
    for targets in ((None, "English"), ("French", 3)):
        with pytest.raises(InputError, match=r"target is (None|3): it must be text"):
            rewrite(tiny_gpt2, NEURONS, *targets)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the prompt is 3"):
        rewrite(tiny_gpt2, NEURONS, "French", "English", prompt=3)  # type: ignore[arg-type]


def test_experts_and_heads_without_a_matrix_are_refused(
    tiny_gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    lm = wrap(tiny_model("mixtral", **config), byte_tokenizer(bos=True))
    with pytest.raises(UnsupportedModelError, match="experts are not edited yet"):
        erase(lm, [(1, 2, 3)])
    monkeypatch.setattr(tiny_gpt2.module, "get_output_embeddings", lambda: None)
    with pytest.raises(UnsupportedModelError, match="no unembedding"):
        rewrite(tiny_gpt2, NEURONS, "French", "English")
