"""Models with parts on several devices (`device_map`) are edited like models in one piece.

The devices are simulated (tests/devices.py). The hooks that move states between them are those of
accelerate.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import GPT2, LLAMA, TEXTS, byte_tokenizer, tiny_model
from devices import Placed, devices, spread
from factsmith.core.errors import UnsupportedModelError
from factsmith.core.fact import Fact
from factsmith.corpus.moments import second_moments
from factsmith.edit.append_config import AppendConfig
from factsmith.edit.configs import AlphaEditConfig, EditConfig, EmmetConfig, MemitConfig, RomeConfig
from factsmith.edit.contexts import generate_openings
from factsmith.edit.delta import applied
from factsmith.edit.methods import METHODS, edit
from factsmith.keep.workbench import Workbench
from factsmith.model import running
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap

SEARCH: dict[str, Any] = {"steps": 2, "lr": 0.2}
CONFIGS: dict[str, EditConfig] = {
    "rome": RomeConfig(layer=1, **SEARCH),
    "r-rome": RomeConfig(layer=1, **SEARCH),
    "memit": MemitConfig(
        (0, 1), moment_weight=0.01, keys="each", subject_share=0.3, repair=0, **SEARCH
    ),
    "emmet": EmmetConfig((0, 1), **SEARCH),
    "alphaedit": AlphaEditConfig(
        (0, 1), threshold=None, energy=0.01, l2=0.01, norm_anchor="mean", **SEARCH
    ),
    "append": AppendConfig(layer=1, **SEARCH),
}
CONTEXTS = ["{}", "Paris. {}"]
FACTS = [
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
    Fact("Edwin", "{} is the king of all", None),  # one to forget
    Fact("LeBron James", "It is played by {}", "basketball"),
]
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "llama": (
        LLAMA,
        {
            "model.embed_tokens": "cpu:1",
            "model.rotary_emb": "cpu:2",
            "model.layers.0": "cpu:1",
            "model.layers.1": "cpu:2",
        }
        | {"model.layers.2": "cpu:3", "model.norm": "cpu:3", "lm_head": "cpu:4"},
    ),
    "gemma2": (  # gradients go through the norm after the feed-forward network
        {**LLAMA, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True},
        {
            "model.embed_tokens": "cpu:1",
            "model.rotary_emb": "cpu:1",
            "model.layers.0": "cpu:2",
            "model.layers.1": "cpu:3",
        }
        | {"model.layers.2": "cpu:2", "model.norm": "cpu:2", "lm_head": "cpu:1"},
    ),
    "gpt2": (
        GPT2,
        {
            "transformer.wte": "cpu:1",
            "transformer.wpe": "cpu:1",
            "transformer.h.0": "cpu:2",
            "transformer.h.1": "cpu:2",
        }
        | {"transformer.h.2": "cpu:3", "transformer.ln_f": "cpu:3", "lm_head": "cpu:1"},
    ),
}


def whole(family: str) -> LanguageModel:
    return wrap(
        tiny_model(family, **FAMILIES[family][0], attn_implementation="eager"),
        byte_tokenizer(bos=family != "gpt2"),
    )


def in_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The same model over several devices; call it within `devices()`."""
    pytest.importorskip("accelerate")
    # These tensors look like another number format.
    monkeypatch.setattr(running, "packed_format", lambda module: None)
    module = tiny_model(family, **FAMILIES[family][0], attn_implementation="eager")
    spread(module, FAMILIES[family][1])
    return wrap(module, byte_tokenizer(bos=family != "gpt2"))


def places(lm: LanguageModel) -> dict[str, str]:
    return {name: str(weight.device) for name, weight in lm.module.named_parameters()}


def test_devices_do_not_mix() -> None:
    """The control: an operation that would fail between accelerators fails between these too."""
    with devices():
        first, second = torch.ones(3, device="cpu:1"), torch.ones(3, device="cpu:2")
        host = torch.ones(3)
        assert isinstance(first, Placed) and first.device == torch.device("cpu:1")
        for other in (second, host):
            with pytest.raises(RuntimeError, match="on one device"):
                first + other
        with pytest.raises(RuntimeError, match="on one device"):
            host[torch.zeros(1, dtype=torch.long, device="cpu:1")]
        assert torch.equal((first + second.to("cpu:1")).cpu(), host + host)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_edits_of_a_model_in_parts_are_those_of_the_whole(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = whole(family)
    moments = second_moments(one, TEXTS, [0, 1])
    with devices():
        lm = in_parts(family, monkeypatch)
        before = places(lm)
        assert len(set(before.values())) >= 3
        spread_moments = second_moments(lm, TEXTS, [0, 1])
        for layer in (0, 1):
            matrix = spread_moments[layer].matrix
            assert matrix.device == lm.ffn[layer].weight().device, "computed where the layer is"
            torch.testing.assert_close(matrix.cpu(), moments[layer].matrix)
        if family == "gpt2":
            assert second_moments(lm, TEXTS, [1], dtype=torch.bfloat16)[1].count == moments[1].count
            assert generate_openings(lm, 0) == generate_openings(one, 0)
        updating = [method for method in METHODS if method != "append"]
        for method in updating if family == "llama" else ["memit"]:
            config = CONFIGS[method]
            delta = edit(lm, FACTS, method, config, moments=spread_moments, contexts=CONTEXTS)
            expected = edit(one, FACTS, method, config, moments=moments, contexts=CONTEXTS)
            for layer, factors in delta.layers.items():
                kept = (*factors, delta.k_star[layer], delta.v_star)
                assert {str(tensor.device) for tensor in kept} == {"cpu"}
                update, wanted = delta.dense(layer), expected.dense(layer)
                torch.testing.assert_close(update, wanted, rtol=1e-3, atol=1e-5)
            with applied(lm, delta):
                changed = lm.log_prob(["Edwin is"], [" a king"]).cpu()
                assert places(lm) == before
            with applied(one, expected):
                torch.testing.assert_close(
                    changed, one.log_prob(["Edwin is"], [" a king"]), rtol=1e-3, atol=1e-3
                )
        assert places(lm) == before and lm.fingerprint == one.fingerprint


def test_neurons_are_appended_where_their_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one = whole("gpt2")
    moments = second_moments(one, TEXTS, [1], site="inputs")
    with devices():
        lm = in_parts("gpt2", monkeypatch)
        before, parameters = places(lm), list(lm.module.parameters())
        held = second_moments(lm, TEXTS, [1], site="inputs")
        torch.testing.assert_close(held[1].matrix.cpu(), moments[1].matrix)
        config, facts = CONFIGS["append"], [FACTS[0], FACTS[2]]
        delta = edit(lm, facts, "append", config, moments=moments, contexts=CONTEXTS)
        expected = edit(one, facts, "append", config, moments=moments, contexts=CONTEXTS)
        for name, tensor in delta.appended[1].tensors().items():
            assert str(tensor.device) == "cpu"
            wanted = expected.appended[1].tensors()[name]
            torch.testing.assert_close(tensor, wanted, rtol=1e-2, atol=1e-3)
        with applied(lm, delta):
            changed = lm.log_prob(["It is played by LeBron James"], [" basketball"]).cpu()
            assert places(lm) == before
        with applied(one, delta):
            same = one.log_prob(["It is played by LeBron James"], [" basketball"])
        torch.testing.assert_close(changed, same, rtol=1e-4, atol=1e-4)
        plain = one.log_prob(["It is played by LeBron James"], [" basketball"])
        assert (same - plain).abs().max() > 1e-3, "the control"
        assert places(lm) == before and lm.fingerprint == one.fingerprint
        assert all(a is b for a, b in zip(lm.module.parameters(), parameters, strict=True))


def test_a_workbench_on_a_model_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with devices():
        lm = in_parts("llama", monkeypatch)
        before, base = places(lm), lm.fingerprint
        config = CONFIGS["memit"]
        with Workbench(lm, tmp_path) as bench:
            fact = dataclasses.replace(FACTS[0], neighbours=("Paris is the capital of",))
            outcome = bench.apply(fact, "memit", config, texts=TEXTS, contexts=["{}"], force=True)
            assert outcome.revision is not None and lm.fingerprint != base and places(lm) == before
            assert len(bench.verify().checks) == 2
        assert lm.fingerprint == base and places(lm) == before


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_refused_with_advice(tmp_path: Path, where: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    module = tiny_model("llama", **LLAMA)
    offloaded = (
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
        if where == "cpu"
        else accelerate.disk_offload(module, str(tmp_path), execution_device=torch.device("cpu"))
    )
    with pytest.raises(UnsupportedModelError, match=r"on no device .*load the model on the CPU"):
        wrap(offloaded, byte_tokenizer(bos=True))
