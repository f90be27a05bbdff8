"""A fingerprint is of what decides the answers: that changes it, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

import factsmith
from conftest import GPT2, LLAMA, VOCAB, blank_tokenizer, byte_tokenizer, tiny_model
from factsmith.core.errors import FingerprintError
from factsmith.core.identity import same_model
from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.corpus.moments_store import kept_moments, moments_file
from factsmith.keep.bench import create
from factsmith.keep.ledger import Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.fingerprint import weight_digests
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap


def earlier_fingerprint(lm: LanguageModel, without: tuple[str, ...] = ()) -> str:
    """Return what the first version of factsmith called a model, from its description alone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    left_out = "factsmith _name_or_path name_or_path transformers_version dtype torch_dtype"
    left_out += " architectures use_cache"
    config = {
        name: value
        for name, value in lm.module.config.to_dict().items()
        if name not in left_out.split() and name not in without
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(lm.tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", **LLAMA).save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


def fresh(change: Callable[[Any, Any], object] = lambda module, tokenizer: None) -> LanguageModel:
    module, tokenizer = tiny_model("llama", **LLAMA), byte_tokenizer(bos=True)
    change(module, tokenizer)
    return wrap(module, tokenizer)


HARMLESS: dict[str, Callable[[Any, Any], object]] = {
    "pad": lambda m, t: setattr(m.config, "pad_token_id", 3),
    "hidden states": lambda m, t: setattr(m.config, "output_hidden_states", True),
    "cache": lambda m, t: setattr(m.config, "use_cache", False),
    "labels": lambda m, t: setattr(m.config, "id2label", {0: "no", 1: "yes", 2: "perhaps"}),
    "problem": lambda m, t: setattr(m.config, "problem_type", "regression"),
    "a note": lambda m, t: setattr(m.config, "run_name", "third try"),
    "another note": lambda m, t: setattr(m.config, "trained_by", {"name": "me"}),
    "dropout": lambda m, t: setattr(m.config, "attention_dropout", 0.3),
    "initial values": lambda m, t: setattr(m.config, "initializer_range", 0.5),
    "checkpointing": lambda m, t: m.activation_checkpointing_enable(),
    "architectures": lambda m, t: setattr(m.config, "architectures", ["Other"]),
    "what to sample": lambda m, t: setattr(m.generation_config, "temperature", 0.7),
    "padding": lambda m, t: t.backend_tokenizer.enable_padding(length=20),
    "cutting": lambda m, t: t.backend_tokenizer.enable_truncation(8),
    "side": lambda m, t: setattr(t, "padding_side", "left"),
    "template": lambda m, t: setattr(t, "chat_template", "{{ messages }}"),
    "longest": lambda m, t: setattr(t, "model_max_length", 17),
    "pad token": lambda m, t: setattr(t, "pad_token", t.eos_token),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_change_an_answer_does_not_change_the_model(name: str) -> None:
    assert fresh(HARMLESS[name]).fingerprint == fresh().fingerprint


def _another_start(module: Any, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


DECISIVE: dict[str, Callable[[Any, Any], object]] = {
    "end": lambda m, t: setattr(m.generation_config, "eos_token_id", 7),
    "two ends": lambda m, t: setattr(m.generation_config, "eos_token_id", [0, 7]),
    "end of the tokenizer": lambda m, t: setattr(t, "eos_token", "a"),
    "bos": _another_start,
    "normalizer": lambda m, t: setattr(t.backend_tokenizer, "normalizer", _lowercase()),
    "added token": lambda m, t: t.add_tokens(["French"]),
    "spaces": lambda m, t: setattr(t, "clean_up_tokenization_spaces", True),
    "a weight": lambda m, t: m.model.norm.weight.data[0].add_(1),
    "norm": lambda m, t: setattr(m.config, "rms_norm_eps", 1e-3),
    "theta": lambda m, t: m.config.rope_parameters.update(rope_theta=500.0),
    "heads": lambda m, t: setattr(m.config, "num_attention_heads", 2),
    "activation": lambda m, t: setattr(m.config, "hidden_act", "gelu"),
    "tied": lambda m, t: setattr(m.config, "tie_word_embeddings", True),
}


def _lowercase() -> Any:
    from tokenizers import normalizers

    return normalizers.Lowercase()


@pytest.mark.parametrize("name", DECISIVE)
def test_what_changes_an_answer_makes_another_model(name: str) -> None:
    module, tokenizer = tiny_model("llama", **LLAMA), byte_tokenizer(bos=True)
    lm = wrap(module, tokenizer)
    before = lm.fingerprint
    DECISIVE[name](module, tokenizer)
    assert lm.fingerprint != before


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gpt2", "layer_norm_epsilon", 1e-2),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "activation_function", "relu"),
        ("llama", "attention_bias", True),
        ("mistral", "sliding_window", 4),
        ("gemma2", "final_logit_softcapping", 5.0),
        ("gemma2", "query_pre_attn_scalar", 7),
        ("cohere", "logit_scale", 0.5),
        ("granite", "residual_multiplier", 0.5),
        ("mixtral", "num_experts_per_tok", 1),
        ("qwen3_moe", "norm_topk_prob", True),
        ("gpt_neox", "use_parallel_residual", False),
    ],
)
def test_settings_of_many_families_count(family: str, field: str, value: object) -> None:
    from transformers import AutoConfig

    from factsmith.model.settings import answering_settings

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    plain = AutoConfig.for_model(family, **sizes)
    other = AutoConfig.for_model(family, **sizes, **{field: value})
    assert getattr(plain, field) != value
    assert answering_settings(plain) != answering_settings(other)
    # What a class gives by itself is left out, so that a new default makes no other model.
    same = AutoConfig.for_model(family, **sizes, **{field: getattr(plain, field)})
    assert answering_settings(same) == answering_settings(plain)
    assert field not in answering_settings(plain)


def test_an_entry_that_only_the_code_of_the_model_knows_counts() -> None:
    from factsmith.model.settings import _reads

    code = "x = getattr(config, 'secret_scale', 1.0) * self.config.other_scale"
    assert _reads(code, "secret_scale")
    assert _reads(code, "other_scale")
    assert not _reads(code, "run_name")
    assert not _reads(code, "scale")


def test_the_row_that_positions_leave_out_counts() -> None:
    """RoBERTa counts positions from the padding token's id."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "vocab_size": VOCAB + 4,
        "max_position_embeddings": 64,
    }
    first, second = (
        wrap(tiny_model("roberta", masked=True, pad_token_id=pad, **sizes), blank_tokenizer())
        for pad in (0, 2)
    )
    second.module.load_state_dict(first.module.state_dict())
    assert first.fingerprint != second.fingerprint


def test_a_model_loaded_in_inference_mode_has_the_same_fingerprint(saved: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.inference_mode():
        module = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.float32, trust_remote_code=False
        )
    tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
    lm = wrap(module, tokenizer)
    assert lm.fingerprint == load(saved).fingerprint


# ── what earlier versions wrote ───────────────────────────────────────────────────────────────────


def earlier_workspace(folder: Path, lm: LanguageModel, fingerprint: str) -> None:
    Ledger.create(folder, model=lm.name, fingerprint=fingerprint, dtype="float32").close()


def test_a_workspace_of_an_earlier_version_is_opened(tmp_path: Path) -> None:
    lm = fresh()
    earlier = earlier_fingerprint(lm)
    assert earlier != lm.fingerprint
    earlier_workspace(tmp_path / "theirs", lm, earlier)
    with Workbench(lm, tmp_path / "theirs") as bench:
        assert same_model(bench.base_fingerprint, lm.fingerprint)
        assert bench.base_fingerprint == earlier, "the records stay as they are"


def test_a_workspace_of_an_earlier_transformers_is_opened(tmp_path: Path) -> None:
    """Its config had no entry that a later version has added, and the pad token was not set."""
    lm = wrap(tiny_model("gpt_neox", **{**LLAMA, "pad_token_id": None}), byte_tokenizer())
    earlier = earlier_fingerprint(lm, without=("pad_token_id",))
    assert not same_model(earlier, lm.fingerprint)
    earlier_workspace(tmp_path / "theirs", lm, earlier)
    Workbench(lm, tmp_path / "theirs").close()
    assert same_model(earlier, lm.fingerprint)


def test_a_workspace_of_another_model_is_refused(tmp_path: Path) -> None:
    lm = fresh()
    other = wrap(tiny_model("llama", seed=1, **LLAMA), byte_tokenizer(bos=True))
    earlier_workspace(tmp_path / "theirs", other, earlier_fingerprint(other))
    create(other, tmp_path / "now").close()
    for name in ("theirs", "now"):
        with pytest.raises(FingerprintError, match="was made for"):
            Workbench(lm, tmp_path / name)


def test_second_moments_of_an_earlier_version_are_used(tmp_path: Path) -> None:
    lm = fresh()
    matrix = second_moments(lm, ["Paris is in France."], [1], max_tokens=20)[1].matrix
    for layer, fingerprint in ((1, earlier_fingerprint(lm)), (2, "0" * 64)):
        moment = SecondMoment.from_matrix(matrix, count=20, fingerprint=fingerprint, layer=layer)
        moment.save(moments_file(tmp_path, layer))
    kept = kept_moments(lm, [1, 2], tmp_path)
    assert sorted(kept) == [1], "those of another model are passed over"
    kept[1].check(lm, 1)
    with pytest.raises(FingerprintError, match="computed from a model"):
        SecondMoment.load(moments_file(tmp_path, 2), lm)
    lm.module.lm_head.weight.data[0].add_(1)
    with pytest.raises(FingerprintError, match="computed from a model"):
        kept[1].check(lm, 1)


def test_a_gpt2_of_an_earlier_version() -> None:
    lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    assert lm.has_fingerprint(earlier_fingerprint(lm))
    assert lm.has_fingerprint(lm.fingerprint)
    assert not lm.has_fingerprint("")
    assert not lm.has_fingerprint("0" * 64)


def test_a_padding_token_in_the_file_does_not_make_another_model(tmp_path: Path) -> None:
    source = Path(factsmith.__file__).parent / "atlas" / "atlas-llama"
    prints = []
    for changes in ({"pad_token_id": 0}, {"pad_token_id": 5}, {"eos_token_id": 5}):
        folder = tmp_path / "-".join(map(str, changes.items()))
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        if "eos_token_id" in changes:
            generation = json.loads((folder / "generation_config.json").read_text())
            text = json.dumps({**generation, **changes})
            (folder / "generation_config.json").write_text(text)
        prints.append(factsmith.load(folder).fingerprint)
    assert prints[0] == prints[1] == factsmith.load("atlas-llama").fingerprint
    assert prints[2] != prints[0]


def test_outputs_that_a_file_asks_for_do_not_stop_a_model(tmp_path: Path) -> None:
    source = Path(factsmith.__file__).parent / "atlas" / "atlas-llama"
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps({**config, "output_attentions": True, "output_hidden_states": True})
    (folder / "config.json").write_text(text)
    lm = factsmith.load(folder)
    assert lm.answer(["The maker of Fiat 127 is"]) == ["Fiat."]
    assert lm.fingerprint == factsmith.load("atlas-llama").fingerprint


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_a_changed_weight_is_hashed_with_what_comes_after_it_alone(which: str) -> None:
    lm = fresh()
    names = sorted(lm.module.state_dict())
    place = {"first": 0, "middle": len(names) // 2, "last": len(names) - 1}[which]
    before, first = lm.fingerprint, lm._identified()._steps
    weight = lm.module.state_dict()[names[place]]
    original = weight.clone()
    weight.mul_(1.5)
    changed, second = lm.fingerprint, lm._identified()._steps
    kept = [a is b for a, b in zip(first, second, strict=True)]
    assert kept == [True] * place + [False] * (len(names) - place)
    assert changed != before and changed == lm.fresh_fingerprint()
    assert not any(a is b for a, b in zip(second, lm._identified()._steps, strict=True))
    weight.copy_(original)
    assert lm.fingerprint == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digests_are_of_the_bytes_of_each_tensor(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(3, 2).to(dtype)
    before = weight_digests(module)
    assert list(before) == ["bias", "weight"]
    data = bytes(module.weight.detach().untyped_storage())
    assert before["weight"] == hashlib.sha256(data).hexdigest()
    with torch.no_grad():
        module.weight[1, 2] = -module.weight[1, 2]
    after = weight_digests(module)
    assert after["bias"] == before["bias"] and after["weight"] != before["weight"]
