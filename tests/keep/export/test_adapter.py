"""Adapters hold the sum of the deltas. Dense sums and singular values are the reference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exports import (
    answers_of,
    dense_sum,
    off,
    product,
    replace_read_back,
    some_delta,
    two_deltas,
)
from factsmith.keep.export.adapter import export_adapter
from factsmith.keep.export.readback import Answers, Job
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load


def test_an_adapter_is_the_sum_of_the_deltas_at_its_exact_rank(
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
    assert config["base_model_name_or_path"] == Path(lm.name).name != lm.name
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
    ) in tensors.items():  # one rank for all layers; unused directions are zero
        assert (
            tensor.shape == ((5, lm.ffn[0].d_ff) if "lora_A" in name else (lm.d_model, 5))
            and tensor.dtype == torch.float32
        )
        rank = [2, 5, 3][next(i for i in range(3) if f".{i}." in name)]
        rest = tensor[rank:] if "lora_A" in name else tensor[:, rank:]
        assert not rest.any() and tensor[:rank].any()


def test_a_smaller_rank_is_the_best_approximation_and_reports_its_error(
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
def test_factors_in_16_bits_report_their_error(
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


def test_a_truncated_adapter_is_compared_with_what_its_files_give(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits differ from the patched model by design. The weights must equal base + BA."""
    lm = load(folders["gpt2"])
    seen: list[Job] = []

    def faithful(jobs: Sequence[Job]) -> list[Answers]:
        seen.extend(jobs)
        return [answers_of(jobs[0].questions, logits=jobs[0].questions.expected)]

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
        logits = lm.module(input_ids=torch.tensor([seen[0].questions.prompt_ids[0]])).logits[0, -1]
    assert torch.allclose(logits, seen[0].questions.expected[0], atol=1e-4)
    assert not torch.allclose(logits, seen[0].questions.patched[0], atol=1e-3)
