"""What exports hold, against sums and singular values computed densely; what is refused; and that the model is as before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import BERT, GPT2, LLAMA, VOCAB, byte_tokenizer, masking_tokenizer, tiny_model
from exports import heard_from, names, replace_read_back, saved_model, some_delta, two_deltas
from factsmith import atlas
from factsmith.core.errors import (
    InputError,
    LayerError,
    ModelError,
    NumericsError,
    UnsupportedModelError,
)
from factsmith.edit.delta import Delta
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.keep.export.folder import read_patch
from factsmith.keep.export.formats import export
from factsmith.keep.export.patch import export_patch
from factsmith.keep.export.readback import Heard, Job
from factsmith.keep.export.record import Export
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: saved_model(family, place / family) for family in ("gpt2", "llama")}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    return load(folders[request.param])


def dense_sum(deltas: list[Delta], layer: int) -> np.ndarray[Any, Any]:
    """Σ leftᵢ rightᵢ of a layer, (d_model, d_ff), in float64 and without the library."""
    return sum(
        d.layers[layer][0].double().numpy() @ d.layers[layer][1].double().numpy()
        for d in deltas
        if layer in d.layers
    )  # type: ignore[return-value]


def product(folder: Path, layer: int) -> np.ndarray[Any, Any]:
    """BA of a layer from an adapter's file, (d_model, d_ff) in float64."""
    tensors = {
        name: x
        for name, x in load_file(folder / "adapter_model.safetensors").items()
        if f".{layer}." in name
    }
    (b,) = (x for name, x in tensors.items() if name.endswith("lora_B.weight"))
    (a,) = (x for name, x in tensors.items() if name.endswith("lora_A.weight"))
    return b.double().numpy() @ a.double().numpy()


def off(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---- adapters -------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_the_sum_of_the_deltas_at_its_own_rank(
    lm: LanguageModel, tmp_path: Path
) -> None:
    deltas = two_deltas(lm)
    made = export_adapter(lm, deltas, tmp_path / "out", verify=False)
    assert [(x.layer, x.rank, x.kept) for x in made.layers] == [
        (0, 2, 2),
        (1, 5, 5),
        (2, 3, 3),
    ] and made.rank == 5
    for layer in range(3):
        dense = dense_sum(deltas, layer)
        assert np.linalg.matrix_rank(dense, rtol=1e-9) == made.layers[layer].rank
        assert off(product(tmp_path / "out", layer), dense) == pytest.approx(
            made.layers[layer].error, rel=0.01
        )
        assert made.layers[layer].error < 2e-7
    config = json.loads((tmp_path / "out/adapter_config.json").read_bytes())
    linear = "down_proj" if "llama" in lm.name else "c_proj"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (
        5,
        5,
        "LORA",
    ) and "rank_pattern" not in config
    assert config["fan_in_fan_out"] == (linear == "c_proj")
    assert config["base_model_name_or_path"] == lm.name and Path(lm.name).is_absolute()
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(config["target_modules"]) == 3 and all(
        name.endswith(f"mlp.{linear}") for name in config["target_modules"]
    )
    assert set(tensors) == {
        f"base_model.model.{n}.lora_{ab}.weight" for n in config["target_modules"] for ab in "AB"
    }
    for (
        name,
        tensor,
    ) in tensors.items():  # one rank for all layers; what a layer does not need is zero
        assert (
            tensor.shape == ((5, lm.ffn[0].d_ff) if "lora_A" in name else (lm.d_model, 5))
            and tensor.dtype == torch.float32
        )
        rank = [2, 5, 3][next(i for i in range(3) if f".{i}." in name)]
        rest = tensor[rank:] if "lora_A" in name else tensor[:, rank:]
        assert not rest.any() and tensor[:rank].any()


def test_a_smaller_rank_is_the_best_there_is_and_its_error_is_said(
    lm: LanguageModel, tmp_path: Path
) -> None:
    deltas = two_deltas(lm)
    made = export_adapter(lm, deltas, tmp_path / "out", rank=3, verify=False)
    assert [(x.rank, x.kept) for x in made.layers] == [(2, 2), (5, 3), (3, 3)] and made.rank == 3
    singular = np.linalg.svd(dense_sum(deltas, 1), compute_uv=False)
    best = np.sqrt((singular[3:] ** 2).sum() / (singular**2).sum())  # Eckart and Young
    assert (
        made.layers[1].error == pytest.approx(best, rel=1e-4)
        and made.layers[1].error > 0.1 > 1e-6 > made.layers[0].error
    )
    assert off(product(tmp_path / "out", 1), dense_sum(deltas, 1)) == pytest.approx(best, rel=1e-4)
    assert "‖Δ−BA‖/‖Δ‖" in repr(made) and f"{best:.1e}" in repr(made)


def test_deltas_that_repeat_or_cancel_one_another_take_no_rank(
    lm: LanguageModel, tmp_path: Path
) -> None:
    one = some_delta(lm, 1, rank=3)
    left, right = one.layers[1]
    against = dataclasses.replace(one, layers={1: (-left[:, :2], right[:2])})
    assert export_adapter(lm, [one, one], tmp_path / "a", verify=False).rank == 3
    assert off(product(tmp_path / "a", 1), 2 * dense_sum([one], 1)) < 2e-7
    made = export_adapter(lm, [one, against], tmp_path / "b", verify=False)
    assert made.rank == 1 and off(product(tmp_path / "b", 1), dense_sum([one, against], 1)) < 1e-6
    nothing = export_adapter(
        lm,
        [one, dataclasses.replace(one, layers={1: (-left, right)})],
        tmp_path / "c",
        verify=False,
    )
    assert nothing.rank == 1 and not product(tmp_path / "c", 1).any()
    wide = [
        some_delta(lm, seed, rank=12) for seed in range(4)
    ]  # more columns than the layer has rows
    assert export_adapter(lm, wide, tmp_path / "d", verify=False).rank == lm.d_model
    assert off(product(tmp_path / "d", 1), dense_sum(wide, 1)) < 5e-7


@pytest.mark.parametrize(("dtype", "within"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_factors_in_16_bits_and_what_that_loses(
    lm: LanguageModel, tmp_path: Path, dtype: torch.dtype, within: float
) -> None:
    deltas = two_deltas(lm)
    made = export_adapter(lm, deltas, tmp_path / "out", dtype=dtype, verify=False)
    assert made.dtype == str(dtype).removeprefix("torch.")
    for layer in made.layers:
        assert within / 10 < layer.error < within
        assert off(
            product(tmp_path / "out", layer.layer), dense_sum(deltas, layer.layer)
        ) == pytest.approx(layer.error, rel=0.01)


def test_where_the_base_model_is(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(source: LanguageModel, name: str, **options: Any) -> str:
        export_adapter(source, some_delta(source, 1), tmp_path / name, verify=False, **options)
        return str(
            json.loads((tmp_path / name / "adapter_config.json").read_bytes())[
                "base_model_name_or_path"
            ]
        )

    assert noted(lm, "a", base="owner/name") == "owner/name"
    assert noted(lm, "b", base="atlas") == str(atlas.folder("atlas"))
    monkeypatch.chdir(Path(lm.name).parent)
    assert noted(lm, "c", base=Path(lm.name).name) == lm.name
    in_memory = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with pytest.raises(InputError, match=r"not loaded from a folder or the hub.*as base"):
        noted(in_memory, "d")
    assert noted(in_memory, "e", base=lm.name) == lm.name


# ---- checkpoints ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_the_patched_model(
    lm: LanguageModel, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    deltas, base = two_deltas(lm), {name: x.clone() for name, x in lm.module.state_dict().items()}
    fingerprint, config = lm.fingerprint, lm.config.to_dict()
    made = export_checkpoint(lm, deltas, tmp_path / "out", dtype=dtype, verify=False)
    assert lm.fingerprint == fingerprint and lm.config.to_dict() == config
    assert all(torch.equal(x, base[name]) for name, x in lm.module.state_dict().items()), (
        "the model is as before"
    )
    stored = load_file(tmp_path / "out/model.safetensors")
    wanted = dtype or torch.float32
    conv = "gpt2" in lm.name
    assert ("lm_head.weight" in stored) != conv, (
        "tied weights are written once, others are all there"
    )
    changed = 0
    for name, tensor in stored.items():
        expected = base[name].clone()
        if name.endswith(("mlp.c_proj.weight", "mlp.down_proj.weight")):
            layer = next(i for i in range(3) if f".{i}." in name)
            for delta in deltas:
                if layer in delta.layers:
                    update = delta.layers[layer][0] @ delta.layers[layer][1]
                    expected, changed = expected + (update.T if conv else update), changed + 1
        assert torch.equal(tensor, expected.to(wanted)), name
    assert changed == 4
    written = json.loads((tmp_path / "out/config.json").read_bytes())
    assert written["dtype"] == str(wanted).removeprefix("torch.") == made.dtype
    assert made.files["model.safetensors"] == pytest.approx(
        made.model_bytes / (2 if dtype else 1), rel=0.1
    )
    again = load(tmp_path / "out", dtype=wanted)
    assert again.prompt_ids("Zürich") == lm.prompt_ids("Zürich") and type(again.module) is type(
        lm.module
    )


def test_numbers_too_large_for_a_dtype(lm: LanguageModel, tmp_path: Path) -> None:
    big = some_delta(lm, 1, scale=300.0)
    with pytest.raises(
        NumericsError, match=r"mlp.* has numbers too large for float16; write it in bfloat16"
    ):
        export_checkpoint(lm, big, tmp_path / "out", dtype=torch.float16, verify=False)
    assert names(tmp_path) == []
    export_checkpoint(lm, big, tmp_path / "out", dtype=torch.bfloat16, verify=False)


# ---- all three ------------------------------------------------------------------------------------------------------------------------


def test_an_export_says_what_it_is(lm: LanguageModel, tmp_path: Path) -> None:
    deltas = two_deltas(lm)
    size = sum(p.numel() * 4 for p in lm.module.parameters())
    for format in ("checkpoint", "adapter", "patch"):
        made = export(lm, deltas, tmp_path / format, format, verify=False)
        assert isinstance(made, Export) and (made.patches, made.facts, made.model_bytes) == (
            2,
            4,
            size,
        )
        assert made.files == {
            name: (tmp_path / format / name).stat().st_size for name in made.files
        }
        assert set(made.files) == {
            name for name in names(tmp_path / format) if (tmp_path / format / name).is_file()
        }
        described = json.loads(json.dumps(made.to_dict()))
        assert described["folder"] == str(tmp_path / format) and described["bytes"] == made.n_bytes
        manifest = json.loads((tmp_path / format / "factsmith.json").read_bytes())
        assert (
            manifest["factsmith"] == format
            and manifest["fingerprint"] == lm.fingerprint
            and manifest["model"] == lm.name
        )
        assert [fact["subject"] for patch in manifest["patches"] for fact in patch["facts"]] == [
            "Paris", "Danielle Darrieux", "Edwin", "Zürich",
        ]  # fmt: skip
        assert ("instead of" in repr(made)) == (format != "checkpoint")
        assert ("not verified" in repr(made)) == (format != "patch") and (
            "bit for bit" in repr(made)
        ) == (format == "patch")


def test_what_is_refused_leaves_nothing(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, out = some_delta(lm, 1), tmp_path / "out"
    too_narrow = dataclasses.replace(
        delta,
        layers={1: (delta.layers[1][0], delta.layers[1][1][:, 1:])},
        k_star={1: delta.k_star[1][:, 1:]},
    )
    too_deep = dataclasses.replace(delta, layers={7: delta.layers[1]}, k_star={7: delta.k_star[1]})
    cases: list[tuple[type[Exception], str, Any]] = [
        (InputError, "no patch to export", lambda: export_patch(lm, [], out)),
        (InputError, "at least one Delta", lambda: export_adapter(lm, ["delta"], out)),  # type: ignore[list-item]
        (InputError, "load it first", lambda: export_adapter("atlas", delta, out)),  # type: ignore[arg-type]
        (InputError, "rank is 0", lambda: export_adapter(lm, delta, out, rank=0)),
        (InputError, "rank is 1.5", lambda: export_adapter(lm, delta, out, rank=1.5)),  # type: ignore[arg-type]
        (
            InputError,
            "expected torch.float32",
            lambda: export_adapter(lm, delta, out, dtype=torch.int8),
        ),
        (
            InputError,
            "expected torch.float32",
            lambda: export_checkpoint(lm, delta, out, dtype="bfloat16"),
        ),  # type: ignore[arg-type]
        (
            InputError,
            "expected checkpoint, adapter or patch",
            lambda: export(lm, delta, out, "gguf"),
        ),
        (InputError, "options of an adapter", lambda: export(lm, delta, out, "checkpoint", rank=3)),
        (InputError, "options of an adapter", lambda: export(lm, delta, out, "patch", base="x")),
        (
            InputError,
            "kept in float32",
            lambda: export(lm, delta, out, "patch", dtype=torch.float16),
        ),
        (InputError, "made for another model", lambda: export_patch(lm, too_narrow, out)),
        (LayerError, "layer 7 does not exist", lambda: export_adapter(lm, [delta, too_deep], out)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
        assert names(tmp_path) == [], words
    monkeypatch.setattr("factsmith.keep.export.adapter.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"read back by peft, which is not installed.*factsmith\[adapter\]"
    ):
        export_adapter(lm, delta, out)
    export_adapter(lm, delta, out, verify=False)  # writing one needs no peft


def test_models_whose_memory_is_no_plain_matrix_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = wrap(
        tiny_model("mixtral", **{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
        byte_tokenizer(bos=True),
    )
    dense = wrap(tiny_model("llama", **LLAMA), byte_tokenizer(bos=True))
    delta = some_delta(dense, 1)
    for call in (export_adapter, export_checkpoint, export_patch):
        with pytest.raises(UnsupportedModelError, match="layer 1 has experts"):
            call(moe, delta, tmp_path / "out")  # type: ignore[operator]
    beside = {
        **LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }
    mixed = wrap(tiny_model("qwen2_moe", **beside), byte_tokenizer(bos=True))
    assert [ffn.n_experts for ffn in mixed.ffn] == [4, 0, 4]
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            NumericsError, match=r"beside layers with experts peft may .*; export a checkpoint"
        ),
    ):
        replace_read_back(
            patch,
            lambda jobs: [heard_from(jobs[0].questions, logits=-jobs[0].questions.patched)],
        )
        export_adapter(mixed, delta, tmp_path / "out", base="owner/name")
    masked = wrap(
        tiny_model("bert", masked=True, **{**BERT, "vocab_size": VOCAB}), masking_tokenizer()
    )
    with pytest.raises(UnsupportedModelError, match="masked language model"):
        export_checkpoint(masked, some_delta(masked, 1), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["logits", "answers", "load"])
def test_an_export_that_reads_back_otherwise_is_not_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    lm = load(folders["gpt2"])
    base = lm.ffn[1].weight().clone()

    def wrong(jobs: list[Job]) -> list[Heard]:
        (job,) = jobs
        assert Path(job.adapter or job.model).is_dir() and not (tmp_path / "out").exists(), (
            "read before it is in its place"
        )
        if fault == "load":
            raise ModelError("it could not be loaded")
        changes = (
            {"logits": job.questions.patched + 1}
            if fault == "logits"
            else {"picks": [[0] * 20 for _ in job.questions.picks]}
        )
        return [heard_from(job.questions, **changes)]

    with monkeypatch.context() as patch:
        replace_read_back(patch, wrong)
        for call in (export_adapter, export_checkpoint):
            with pytest.raises(ModelError if fault == "load" else NumericsError) as caught:
                call(lm, two_deltas(lm), tmp_path / "out")  # type: ignore[operator]
            assert caught.value.exit_code == (3 if fault == "load" else 4) and names(tmp_path) == []
        if fault != "load":
            with pytest.raises(NumericsError, match="a rank of 5 is exact"):
                export_adapter(lm, two_deltas(lm), tmp_path / "out", rank=3)
            with pytest.raises(NumericsError, match="write it in float32"):
                export_checkpoint(lm, two_deltas(lm), tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(lm.ffn[1].weight(), base)
    replace_read_back(monkeypatch, lambda jobs: [heard_from(jobs[0].questions)])
    made = export_adapter(
        lm, two_deltas(lm), tmp_path / "out"
    )  # control: what reads back as it should is kept
    assert (
        made.read_back is not None
        and made.read_back.prompts == 4
        and "verified: answers equal on 4 prompts" in repr(made)
    )
    manifest = json.loads((tmp_path / "out/factsmith.json").read_bytes())
    assert manifest["read_back"]["prompts"] == 4 and manifest["read_back"]["limit"] > 0


def test_a_truncated_adapter_is_held_against_what_its_files_give(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits differ from the patched model's by design: that is said, and what must agree is base + BA."""
    lm = load(folders["gpt2"])
    seen: list[Job] = []

    def faithful(jobs: list[Job]) -> list[Heard]:
        seen.extend(jobs)
        return [heard_from(jobs[0].questions, logits=jobs[0].questions.wanted)]

    replace_read_back(monkeypatch, faithful)
    made = export_adapter(lm, two_deltas(lm), tmp_path / "out", rank=3)
    assert made.read_back is not None and made.read_back.off == 0 < made.read_back.difference
    by_hand = (
        lm.module.transformer.h[1].mlp.c_proj.weight.clone()
        + torch.from_numpy(product(tmp_path / "out", 1).T).float()
    )
    assert not torch.allclose(by_hand, lm.ffn[1].weight().T)
    with torch.no_grad():
        for layer in range(3):
            lm.module.transformer.h[layer].mlp.c_proj.weight += torch.from_numpy(
                product(tmp_path / "out", layer).T
            ).float()
        logits = lm.module(input_ids=torch.tensor([seen[0].questions.heads[0]])).logits[0, -1]
    assert torch.allclose(logits, seen[0].questions.wanted[0], atol=1e-4)
    assert not torch.allclose(logits, seen[0].questions.patched[0], atol=1e-3)


def test_a_workbench_exports_what_it_carries(folders: dict[str, Path], tmp_path: Path) -> None:
    lm = load(folders["gpt2"])
    base = lm.fingerprint
    with Workbench(lm, tmp_path / "space") as bench:
        with pytest.raises(InputError, match="no patch to export"):
            bench.export(tmp_path / "none", "patch")
        first = bench.commit(some_delta(lm, 1), moments="ab" * 32, message="one")
        bench.commit(some_delta(lm, 2), message="two")
        carried = lm.fingerprint
        made = bench.export(tmp_path / "out", "patch")
        assert lm.fingerprint == carried != base, "the model carries what it carried"
        found = read_patch(tmp_path / "out", fingerprint=base)
        assert [s.origin.message for s in found.patches] == ["one", "two"] and made.patches == 2
        assert (
            found.patches[0].origin.revision == first.id
            and found.patches[0].origin.moments == "ab" * 32
        )
        bench.export(tmp_path / "model", verify=False)
        stored = load_file(tmp_path / "model/model.safetensors")
        assert torch.equal(stored["transformer.h.1.mlp.c_proj.weight"].T, lm.ffn[1].weight()), (
            "the very bits that the workspace carries"
        )
        bench.checkout(first.id)
        bench.export(tmp_path / "adapter", "adapter", verify=False)
        assert (
            off(product(tmp_path / "adapter", 1), dense_sum([found.patches[0].delta], 1)) < 2e-7
        ), "at the revision that is checked out"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas", "atlas-llama"])
def test_bundled_models_in_every_format(name: str, tmp_path: Path) -> None:
    """End to end through processes of their own; the adapter of the other bundled model and a checkpoint in 16 bits."""
    pytest.importorskip("peft")
    from factsmith.core.fact import Fact
    from factsmith.corpus.moments_store import find_moments
    from factsmith.edit.configs import RomeConfig
    from factsmith.edit.methods import rome

    lm = load(name)
    config = RomeConfig.recommended(lm)
    moments = find_moments(lm, config.edited or ())
    delta = rome(lm, Fact("Fiat 127", "The maker of {} is", "Toyota"), config, moments=moments)
    for format, options in (("adapter", {}), ("checkpoint", {"dtype": torch.bfloat16})):
        made = export(lm, delta, tmp_path / format, format, **options)  # type: ignore[arg-type]
        assert made.read_back is not None and made.read_back.moved > 10 * made.read_back.difference
    assert made.n_bytes > 100 * export(lm, delta, tmp_path / "patch", "patch").n_bytes
