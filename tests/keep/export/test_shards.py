"""A checkpoint of a model on disk has the tensors of one that a model in memory writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
from factsmith.core.errors import NumericsError, UnsupportedModelError
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta, applied
from factsmith.keep.export import shards
from factsmith.keep.export.checkpoint import export_checkpoint
from factsmith.model.appended import AppendedRows
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.model.streamed import streamed_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module = tiny_model("gpt2", **GPT2 | {"n_layer": 4}).to(torch.bfloat16)
    module.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def delta_of(lm: LanguageModel, appended: dict[int, AppendedRows] | None = None) -> Delta:
    torch.manual_seed(1)
    width = lm.ffn[1].d_ff
    layers = {x: (torch.randn(lm.d_model, 1), torch.randn(1, width)) for x in (1, 2)}
    return Delta(
        layers=layers,
        k_star={x: torch.zeros(1, width) for x in layers},
        v_star=torch.zeros(1, lm.d_model),
        facts=(Fact("Paris", "{} is in", "Rome"),),
        method="memit",
        config={},
        fingerprint=lm.fingerprint,
        appended=appended or {},
    )


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_the_tensors_are_those_of_a_model_in_memory(folder: Path, tmp_path: Path) -> None:
    plain, lm = load(folder, dtype="auto"), load(folder, dtype="auto", device="disk")
    delta = delta_of(plain)
    export_checkpoint(plain, delta, tmp_path / "plain", verify=False)
    steps: list[str] = []
    streamed = streamed_of(lm.module)
    assert streamed is not None
    streamed.most_bytes = 0
    export_checkpoint(
        lm, delta, tmp_path / "disk", progress=lambda step, done, total: steps.append(step)
    )
    written_matrix = delta.dense(next(iter(delta.layers))).nbytes
    assert streamed.most_bytes <= 2 * max(streamed.layer_bytes) + written_matrix
    assert "writing edited matrices" in steps
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 2
    expected, written, base = (
        tensors_in(x) for x in (tmp_path / "plain", tmp_path / "disk", folder)
    )
    assert expected.keys() == written.keys() == base.keys()
    assert all(torch.equal(expected[name], written[name]) for name in expected)
    changed = [name for name in base if not torch.equal(base[name], written[name])]
    assert len(changed) == 2  # the control: the two edited matrices, and nothing more
    with applied(plain, delta):
        fingerprint = plain.fingerprint
    exported = load(tmp_path / "disk", dtype="auto")
    assert exported.fingerprint == fingerprint != plain.fingerprint
    assert exported.answer(TEXTS[:1])
    streamed.check_files()  # the model's own files are as before


def test_what_cannot_be_written_in_place_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = load(folder, dtype="float32", device="disk")
    with pytest.raises(UnsupportedModelError, match=r"on disk in bfloat16.*would be in float32"):
        export_checkpoint(wide, delta_of(wide), tmp_path / "out")
    lm = load(folder, dtype="auto", device="disk")
    rows = AppendedRows(
        values=torch.ones(1, lm.d_model),
        facts=(0,),
        keys=torch.ones(1, lm.d_model),
        biases=torch.zeros(1),
    )
    with pytest.raises(UnsupportedModelError, match="append neurons"):
        export_checkpoint(lm, delta_of(lm, {1: rows}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_lies_is_noticed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(folder, dtype="auto", device="disk")
    monkeypatch.setattr(shards, "_overwrite", lambda *_: None)
    with pytest.raises(NumericsError, match="is not the one that was written"):
        export_checkpoint(lm, delta_of(lm), tmp_path / "out")
    assert not (tmp_path / "out").exists()
