"""Checkpoints hold the patched weights, and the model in memory does not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exports import (
    names,
    some_delta,
    two_deltas,
)
from factsmith.core.errors import (
    NumericsError,
)
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_checkpoint_is_the_patched_model(
    lm: LanguageModel, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    deltas, base = two_deltas(lm), {name: x.clone() for name, x in lm.module.state_dict().items()}
    fingerprint, config = lm.fingerprint, lm.config.to_dict()
    made = export_checkpoint(lm, deltas, tmp_path / "out", dtype=dtype, verify=False)
    assert lm.fingerprint == fingerprint and lm.config.to_dict() == config
    assert all(torch.equal(x, base[name]) for name, x in lm.module.state_dict().items()), (
        "the model is unchanged"
    )
    stored = load_file(tmp_path / "out/model.safetensors")
    wanted = dtype or torch.float32
    conv = "gpt2" in lm.name
    assert ("lm_head.weight" in stored) != conv, "tied weights are written once, all others too"
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
        NumericsError, match=r"mlp.* has numbers too large for float16. Write it in bfloat16"
    ):
        export_checkpoint(lm, big, tmp_path / "out", dtype=torch.float16, verify=False)
    assert names(tmp_path) == []
    export_checkpoint(lm, big, tmp_path / "out", dtype=torch.bfloat16, verify=False)
