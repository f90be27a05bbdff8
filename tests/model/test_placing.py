"""How a model is loaded: what is accepted, and what is refused before a weight is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.errors import InputError, ModelError, UnsupportedModelError
from factsmith.model import load as loading
from factsmith.model.load import load, wrap
from factsmith.model.placing import loading_options

PROMPT = "The mother tongue of Danielle Darrieux is"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama model that was saved in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", **LLAMA).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when weights are read."""
    monkeypatch.setattr(loading, "_weights", lambda *_: pytest.fail("the weights were read"))


def test_the_fixture_sees_weights(saved: Path, no_weights: None) -> None:
    with pytest.raises(pytest.fail.Exception):
        load(saved)


DTYPES: dict[Any, torch.dtype] = {
    None: torch.float32,
    "auto": torch.bfloat16,
    "float16": torch.float16,
    "torch.float32": torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_an_object_a_name_or_that_of_the_checkpoint(saved: Path, dtype: Any) -> None:
    lm = load(saved, dtype=dtype)
    assert {p.dtype for p in lm.module.parameters()} == {DTYPES[dtype]}


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int8, torch.float8_e4m3fn, 16, ""])
def test_what_is_no_dtype_is_refused_before_the_weights(
    saved: Path, no_weights: None, dtype: Any
) -> None:
    with pytest.raises(InputError, match="give float32, float16, bfloat16, float64, or auto") as e:
        load(saved, dtype=dtype)
    assert e.value.argument == "dtype"


def test_a_device_map_puts_the_model_where_it_says(saved: Path) -> None:
    plain = load(saved)
    for options in ({"device": "auto"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        lm = load(saved, **options)  # type: ignore[arg-type]
        assert lm.device.type == "cpu" and lm.dtype == torch.float32
        assert lm.next_tokens(PROMPT, 3) == plain.next_tokens(PROMPT, 3)
        assert lm.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("options", "reason", "argument"),
    [
        ({"device": "rubbish"}, "no device of that name", "device"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them", "device_map"),
        ({"device_map": {}}, "path of a part", "device_map"),
        ({"device_map": {1: "cpu"}}, "path of a part", "device_map"),
        ({"device_map": "everywhere"}, "no device of that name", "device_map"),
        ({"device_map": {"": "rubbish"}}, "no device of that name", "device_map"),
        ({"attn_implementation": 2}, "give a name", "attn_implementation"),
        ({"attn_implementation": "warp"}, "none of that name.*eager.* sdpa", "attn_implementation"),
        ({"attn_implementation": "paged|eager"}, "none of that name", "attn_implementation"),
    ],
)
def test_what_is_not_there_is_refused_before_the_weights(
    saved: Path, no_weights: None, options: dict[str, Any], reason: str, argument: str
) -> None:
    with pytest.raises(InputError, match=reason) as error:
        load(saved, **options)
    assert error.value.argument == argument


def test_a_map_without_accelerate_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for options in ({"device": "auto"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        with pytest.raises(InputError, match="pip install accelerate"):
            loading_options(**options)  # type: ignore[arg-type]
    assert loading_options("cpu").device == torch.device("cpu")


def test_attention_is_computed_as_asked_and_is_no_part_of_the_fingerprint(saved: Path) -> None:
    models = {name: load(saved, attn_implementation=name) for name in ("eager", "sdpa")}
    for name, lm in models.items():
        assert lm.config._attn_implementation == name
    eager, sdpa = (lm.log_prob([PROMPT], [" French"]) for lm in models.values())
    assert torch.allclose(eager, sdpa, atol=1e-4)
    assert models["eager"].fingerprint == models["sdpa"].fingerprint


def test_attention_that_a_model_lacks_is_refused_in_words(tmp_path: Path, no_weights: None) -> None:
    tiny_model("gpt2", **GPT2).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"does not support.*give one of eager, sdpa, or leave"):
        load(tmp_path, attn_implementation="flex_attention")


class _Lacking(nn.Module):
    """A part that this processor cannot run in float16."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        if x.dtype == torch.float16:
            raise RuntimeError("\"silu\" not implemented for 'Half'")
        return self.part(x)


def _with_an_act(change: Callable[[nn.Module], nn.Module]) -> Any:
    module = tiny_model("llama", **LLAMA).to(torch.float16)
    for layer in module.model.layers:
        layer.mlp.act_fn = change(layer.mlp.act_fn)
    return module


def test_float16_that_the_processor_cannot_run_is_said() -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot run in torch.float16 on cpu.*float32"):
        wrap(_with_an_act(_Lacking), byte_tokenizer())
    wrap(_with_an_act(lambda act: act), byte_tokenizer())


def test_numbers_too_large_for_float16_are_said() -> None:
    def widened(factor: float) -> Any:
        module = tiny_model("llama", **LLAMA)
        with torch.no_grad():
            module.model.layers[0].mlp.down_proj.weight.mul_(factor)
        wrap(module, byte_tokenizer())
        return module.to(torch.float16)

    with pytest.raises(ModelError, match=r"not finite.*too large for torch.float16.*wider dtype"):
        wrap(widened(1e8), byte_tokenizer())
    wrap(widened(1.5), byte_tokenizer())
