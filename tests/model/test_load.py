"""Loading, asking, and the errors a newcomer meets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers.utils import logging

from conftest import LLAMA, byte_tokenizer, shared_dir, tiny_model
from factsmith.core.errors import (
    InputError,
    ModelError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
)
from factsmith.model.decoding import half_character
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.model.tokens import encode, target_ids

PROMPTS = [
    "The mother tongue of Danielle Darrieux is",
    "Paris",
    "LeBron James plays the",
    "Edwin of Northumbria, that was created in Birmingham, is a king of",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", **LLAMA).save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


def plain_greedy(lm: LanguageModel, prompt: str, n_tokens: int) -> list[int]:
    ids = encode(lm.tokenizer, prompt)[0]
    new: list[int] = []
    while len(new) < n_tokens:
        new.append(int(lm.module(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == lm.tokenizer.eos_token_id:
            return new[:-1]
        if "\n" in lm.tokenizer.decode(new).lstrip():
            break
    return new


def test_answers_in_a_batch_equal_each_prompt_alone(tiny_lm: LanguageModel) -> None:
    answers = tiny_lm.answer(PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = plain_greedy(tiny_lm, prompt, 6)
        text = tiny_lm.tokenizer.decode(ids, skip_special_tokens=True)
        half = half_character(tiny_lm.tokenizer, ids)
        assert answer == text[: len(text) - half].strip().split("\n")[0].strip()
    assert len(set(answers)) > 1


def test_log_prob_equals_the_plain_sum_over_target_tokens(tiny_lm: LanguageModel) -> None:
    targets = ["French", " the capital of France", "basketball", "Northumbria"]
    got, mean = (
        tiny_lm.log_prob(PROMPTS, targets),
        tiny_lm.log_prob(PROMPTS, targets, per_token=True),
    )
    assert got.shape == (4,)
    for i, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        head, tail = (
            encode(tiny_lm.tokenizer, prompt)[0],
            target_ids(tiny_lm.tokenizer, prompt, target),
        )
        logits = tiny_lm.module(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(head) - 1 + j, token]) for j, token in enumerate(tail))
        assert float(got[i]) == pytest.approx(expected, abs=1e-4)
        assert float(mean[i]) == pytest.approx(expected / len(tail), abs=1e-4)
    assert (tiny_lm.log_prob(PROMPTS, targets[::-1]) - got).abs().min() > 1e-3


def test_next_tokens_are_the_softmax_of_the_models_logits(tiny_lm: LanguageModel) -> None:
    top = tiny_lm.next_tokens("Paris is the capital of", k=5)
    logits = tiny_lm.module(
        input_ids=torch.tensor([encode(tiny_lm.tokenizer, "Paris is the capital of")[0]])
    ).logits[0, -1]
    expected = logits.softmax(-1).topk(5)
    assert [p for _, p in top] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [t for t, _ in top] == [tiny_lm.tokenizer.decode([i]) for i in expected.indices.tolist()]


def test_generation_stops_at_the_models_last_position(tiny_gpt2: LanguageModel) -> None:
    prompt = next(p for n in range(200) if len(encode(tiny_gpt2.tokenizer, p := "a" * n)[0]) == 62)
    (new,) = tiny_gpt2.continue_greedily([encode(tiny_gpt2.tokenizer, prompt)[0]], 20)
    assert len(new) <= 3
    with pytest.raises(InputError, match="positions for 64"):
        tiny_gpt2.answer([prompt + "aaa bbb ccc"])


BAD_QUESTIONS: list[Callable[[LanguageModel], object]] = [
    lambda lm: lm.answer([]),
    lambda lm: lm.answer("Paris"),
    lambda lm: lm.log_prob(["a"], []),
    lambda lm: lm.log_prob("a", "b"),
    lambda lm: lm.says(["a"], []),
    lambda lm: lm.next_tokens(""),
]


@pytest.mark.parametrize("ask", BAD_QUESTIONS)
def test_bad_questions_are_refused(
    tiny_gpt2: LanguageModel, ask: Callable[[LanguageModel], object]
) -> None:
    with pytest.raises(InputError):
        ask(tiny_gpt2)


def test_only_a_language_model_can_be_wrapped() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear"):
        wrap(torch.nn.Linear(2, 2), byte_tokenizer())


def test_the_golden_model_says_what_it_was_taught() -> None:
    golden = shared_dir() / "golden"
    lm = load(golden / "facts-gpt2")
    trace = json.loads((golden / "causal_trace.json").read_text())
    assert lm.dtype == torch.float32 and lm.n_layers == 8 and lm.d_model == 192
    assert lm.next_tokens(trace["prompt"], 1)[0][0] == trace["answer"]
    assert lm.answer([trace["prompt"]])[0].startswith(trace["answer"].strip())


def test_says_is_what_a_plain_pass_finds_likeliest() -> None:
    golden = shared_dir() / "golden"
    lm = load(golden / "facts-gpt2")
    requests = json.loads((golden / "rome.json").read_text())["requests"]
    prompts = [r["prompt"].replace("{}", r["subject"]) for r in requests]
    answers = lm.answer(prompts, max_new_tokens=3)
    pairs = [
        (prompt, text)
        for prompt in prompts
        for text in {*(a.split(".")[0] for a in answers if a.split(".")[0]), "qx Paris"}
    ]
    expected = []
    for prompt, text in pairs:
        head, tail = encode(lm.tokenizer, prompt)[0], target_ids(lm.tokenizer, prompt, text)
        likeliest = lm.module(input_ids=torch.tensor([head + tail])).logits[0].argmax(-1).tolist()
        expected.append(likeliest[len(head) - 1 : -1] == tail)
    assert lm.says(*(list(column) for column in zip(*pairs, strict=True))) == expected
    assert sum(expected) >= len(prompts) > 1 and not all(expected)


def test_loading_twice_gives_the_same_fingerprint_and_any_write_another(saved: Path) -> None:
    lm, again = load(saved), load(saved)
    assert lm.fingerprint == again.fingerprint
    assert len(lm.fingerprint) == 64
    before, weight = lm.fingerprint, lm.ffn[1].weight()
    kept = weight.clone()
    weight[0, 0] += 1
    assert lm.fingerprint != before
    weight.copy_(kept)
    assert lm.fingerprint == before
    lm.module.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)  # goes round the version counter
    assert lm.fingerprint != before


def test_wrap_and_load_agree(saved: Path) -> None:
    lm = load(saved)
    wrapped = wrap(tiny_model("llama", **LLAMA).train(), byte_tokenizer(bos=True))
    assert wrapped.fingerprint == lm.fingerprint
    assert not wrapped.module.training
    assert not any(p.requires_grad for p in wrapped.module.parameters())
    assert wrapped.next_tokens("Paris", 3) == lm.next_tokens("Paris", 3)


def test_dtype_is_an_argument(saved: Path) -> None:
    half = load(saved, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.fingerprint != load(saved).fingerprint


def test_loading_leaves_transformers_notices_as_they_were(saved: Path) -> None:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(saved)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize(
    "name", ["nope", "./nowhere", "/nowhere/at/all", "owner/there-is-no-such-model"]
)
def test_unknown_names_are_answered_with_what_there_is(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="bundled") as error:
        load(name)
    assert repr(name) in str(error.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_damaged_folders_are_refused_in_words(saved: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    folder = copy("truncated")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load(folder)
    folder = copy("lacking")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of its weights"):
        load(folder)
    folder = copy("without-tokenizer")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer"):
        load(folder)
    folder = copy("other-kind")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="neither a causal nor a masked"):
        load(folder)
    folder = copy("bad-json")
    (folder / "config.json").write_text("{oops")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(folder)


def test_a_device_that_is_not_there(saved: Path) -> None:
    with pytest.raises(InputError, match="device"):
        load(saved, device="zork")


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "torchao", "quant_type": "int8_weight_only"},
]


@pytest.mark.parametrize("quantisation", QUANTISED, ids=lambda q: "-".join(map(str, q.values())))
def test_a_quantised_checkpoint_is_refused_with_advice(
    saved: Path, tmp_path: Path, quantisation: dict[str, object]
) -> None:
    """Whether or not the library that could unpack it is installed."""
    folder = Path(shutil.copytree(saved, tmp_path / "quantised"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    with pytest.raises(
        UnsupportedModelError,
        match=rf"is quantised \({quantisation['quant_method']}\).*in 16 or 32 bits",
    ):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).n_layers == 3, "the control"


def _in_int8(module: Any) -> None:
    for layer in module.model.layers:
        layer.mlp.down_proj.weight = torch.nn.Parameter(
            layer.mlp.down_proj.weight.data.to(torch.int8), requires_grad=False
        )


def _in_float8(module: Any) -> None:
    for layer in module.model.layers:
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data.to(torch.float8_e4m3fn)


def _in_four_bits(module: Any) -> None:
    """As GPTQ keeps them: whole numbers that hold eight weights each, in a buffer."""

    class Packed(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.register_buffer(
                "qweight",
                torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32),
            )

    for layer in module.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)


def _in_a_format_of_its_own(module: Any) -> None:
    """As torchao keeps them: a tensor that says float32 and is not."""
    for layer in module.model.layers:
        weight = layer.mlp.down_proj.weight.data
        layer.mlp.down_proj.weight = torch.nn.Parameter(
            TwoTensor(weight, weight), requires_grad=False
        )


def _marked(module: Any) -> None:
    """As transformers marks what it quantised."""
    module.is_quantized, module.quantization_method = True, "bitsandbytes"


@pytest.mark.parametrize(
    "quantise", [_in_int8, _in_float8, _in_four_bits, _in_a_format_of_its_own, _marked]
)
def test_a_quantised_module_is_refused_with_advice(quantise: Callable[[Any], None]) -> None:
    module = tiny_model("llama", **LLAMA)
    wrap(module, byte_tokenizer(bos=True))  # the control
    quantise(module)
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM is quantised \(.*in 16 or 32 bits"
    ):
        wrap(module, byte_tokenizer(bos=True))


def test_a_dequantised_module_is_a_plain_one() -> None:
    module = tiny_model("llama", **LLAMA)
    module.is_quantized = False  # what transformers' dequantize leaves
    assert wrap(module, byte_tokenizer(bos=True)).n_layers == 3
