"""A delta as a value, its folder, and the weights that it is put into."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from factsmith.core.errors import (
    DamagedError,
    InputError,
    LayerError,
    NumericsError,
    WorkspaceError,
)
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta, applied, patched, read_weights, write_weights
from factsmith.model.language_model import LanguageModel
from workbenches import some_rows

FACT = Fact(
    "Danielle Darrieux",
    "The mother tongue of {} is",
    "English",
    target_true="French",
    paraphrases=("{} speaks",),
)


def make_delta(
    lm: LanguageModel,
    layers: tuple[int, ...] = (1,),
    *,
    rank: int = 1,
    size: float = 0.1,
    seed: int = 0,
) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    d_ff = lm.ffn[0].d_ff
    return Delta(
        layers={
            layer: (
                size * torch.randn(lm.d_model, rank, generator=draw),
                torch.randn(rank, d_ff, generator=draw),
            )
            for layer in layers
        },
        k_star={layer: torch.randn(1, d_ff, generator=draw) for layer in layers},
        v_star=torch.randn(1, lm.d_model, generator=draw),
        facts=(FACT,),
        method="rome",
        config={"layer": layers[0], "lr": 0.5, "contexts": ["{}", "São Paulo. {}"]},
        fingerprint=lm.fingerprint,
        convergence=({"steps": 3, "loss": 0.125},),
    )


def hashes(lm: LanguageModel) -> dict[str, str]:
    state = lm.module.state_dict()
    return {
        name: hashlib.sha256(
            t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, t in state.items()
    }


def test_applied_adds_the_dense_update_and_restores_every_bit(tiny_lm: LanguageModel) -> None:
    before, weights = hashes(tiny_lm), tiny_lm.ffn[1].weight().clone()
    delta = make_delta(tiny_lm)
    left, right = delta.layers[1]
    with applied(tiny_lm, delta):
        inside = hashes(tiny_lm)
        torch.testing.assert_close(
            tiny_lm.ffn[1].weight(), weights + torch.einsum("dr,rf->df", left, right)
        )
    changed = [name for name in before if before[name] != inside[name]]
    assert len(changed) == 1, "exactly one matrix changes"
    assert hashes(tiny_lm) == before


def test_subtraction_would_not_restore(tiny_lm: LanguageModel) -> None:
    """The control: why the base is kept."""
    weights, update = tiny_lm.ffn[1].weight().clone(), make_delta(tiny_lm).dense(1)
    assert not torch.equal((weights + update) - update, weights)


def test_applied_restores_after_an_exception_and_an_interrupt(tiny_lm: LanguageModel) -> None:
    before = hashes(tiny_lm)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), applied(tiny_lm, make_delta(tiny_lm, (0, 2))):
            assert hashes(tiny_lm) != before
            raise error
        assert hashes(tiny_lm) == before


def test_nested_and_listed_deltas(tiny_lm: LanguageModel) -> None:
    before = hashes(tiny_lm)
    first, second = make_delta(tiny_lm, (0, 1), seed=1), make_delta(tiny_lm, (1,), rank=3, seed=2)
    base = tiny_lm.ffn[1].weight().clone()
    with applied(tiny_lm, first):
        middle = hashes(tiny_lm)
        with applied(tiny_lm, second):
            torch.testing.assert_close(
                tiny_lm.ffn[1].weight(), base + first.dense(1) + second.dense(1)
            )
            nested = tiny_lm.ffn[1].weight().clone()
        assert hashes(tiny_lm) == middle
    with applied(tiny_lm, [first, second]):
        torch.testing.assert_close(tiny_lm.ffn[1].weight(), nested)
    assert hashes(tiny_lm) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_once(
    tiny_lm: LanguageModel, dtype: torch.dtype
) -> None:
    base = {1: tiny_lm.ffn[1].weight().to(dtype)}
    deltas = [make_delta(tiny_lm, size=2e-3, seed=s) for s in range(8)]
    new = patched(base, deltas)[1]
    exact = base[1].double() + sum(d.dense(1).double() for d in deltas)
    assert new.dtype == dtype
    assert (new.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()
    twice = base[1]
    for delta in deltas:
        twice = twice + delta.dense(1).to(dtype)
    assert (new.double() - exact).norm() < 0.7 * (twice.double() - exact).norm(), (
        "adding in half precision loses more"
    )


def test_a_refused_write_changes_nothing(tiny_lm: LanguageModel) -> None:
    before = hashes(tiny_lm)
    good = read_weights(tiny_lm, [0])[0] + 1
    bad = {
        NumericsError: {0: good, 1: torch.full_like(good, float("nan"))},
        InputError: {0: good, 1: good[:, 1:]},
        LayerError: {0: good, 3: good},
    }
    for error, weights in bad.items():
        with pytest.raises(error):
            write_weights(tiny_lm, weights)
        assert hashes(tiny_lm) == before
    with (
        pytest.raises(NumericsError, match="nothing was written"),
        applied(tiny_lm, make_delta(tiny_lm, size=1e38)),
    ):
        pass
    with pytest.raises(LayerError, match="layer 7"), applied(tiny_lm, make_delta(tiny_lm, (7,))):
        pass
    assert hashes(tiny_lm) == before


def test_another_models_delta_is_refused(
    tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    with (
        pytest.raises(InputError, match="made for another model"),
        applied(tiny_llama, make_delta(tiny_gpt2)),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"v_star": torch.zeros(2, 32)}, InputError),
        ({"v_star": torch.zeros(1, 31)}, InputError),
        ({"v_star": torch.zeros(32)}, InputError),
        ({"layers": {}}, InputError),
        ({"k_star": {0: torch.zeros(1, 128)}}, InputError),
        ({"k_star": {1: torch.zeros(1, 127)}}, InputError),
        ({"layers": {1: (torch.zeros(32, 2), torch.zeros(1, 128))}}, InputError),
        ({"layers": {1: (torch.zeros(32, 1).double(), torch.zeros(1, 128))}}, InputError),
        ({"layers": {1: (torch.full((32, 1), float("inf")), torch.zeros(1, 128))}}, NumericsError),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tiny_gpt2: LanguageModel, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        dataclasses.replace(make_delta(tiny_gpt2), **change)


def test_dense_and_size(tiny_gpt2: LanguageModel) -> None:
    delta = make_delta(tiny_gpt2, (0, 2), rank=2)
    assert delta.dense(2).shape == (32, 128) and torch.linalg.matrix_rank(delta.dense(2)) == 2
    assert delta.rank == 2 and delta.n_bytes == 2 * 2 * (32 + 128) * 4
    with pytest.raises(LayerError, match=r"does not touch layer 1; it has \[0, 2\]"):
        delta.dense(1)


def test_save_and_load(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    delta = make_delta(tiny_lm, (0, 2), rank=2)
    folder = tmp_path / "edits" / "first"
    delta.save(folder)
    delta.save(folder)  # again is fine
    assert sorted(p.name for p in folder.iterdir()) == ["delta.safetensors", "edit.json"]
    back = Delta.load(folder)
    for layer in (0, 2):
        assert all(
            torch.equal(a, b) for a, b in zip(back.layers[layer], delta.layers[layer], strict=True)
        )
        assert torch.equal(back.k_star[layer], delta.k_star[layer])
    assert torch.equal(back.v_star, delta.v_star)
    assert (back.facts, back.method, back.config, back.fingerprint) == (
        delta.facts,
        "rome",
        delta.config,
        tiny_lm.fingerprint,
    )
    assert back.convergence == delta.convergence


def test_damage_is_found(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    make_delta(tiny_gpt2).save(tmp_path)
    record, tensors = tmp_path / "edit.json", tmp_path / "delta.safetensors"
    text, raw = record.read_text(), tensors.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(DamagedError, match=words):
            Delta.load(tmp_path)
        record.write_text(text)
        tensors.write_bytes(raw)
        Delta.load(tmp_path)

    tensors.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused("checksum")
    tensors.write_bytes(raw[:100])
    refused("checksum")
    record.write_text(text.replace("English", "Finnish"))
    refused("checksum")
    record.write_text(text[:50])
    refused("not the record")
    record.write_text("[1]")
    refused("not the record")
    tensors.unlink()
    refused(r"delta\.safetensors")
    record.unlink()
    refused(r"edit\.json")
    with pytest.raises(DamagedError, match="No such file"):
        Delta.load(tmp_path / "nowhere")

    # Correct checksums around tensors that do not fit: they are checked like any others.
    named = load_file(tensors)
    named["left.1"] = named["left.1"].repeat(2, 1)
    save_file(named, tensors)
    forged = json.loads(text) | {"tensors_sha256": hashlib.sha256(tensors.read_bytes()).hexdigest()}
    forged.pop("sha256")
    digest = hashlib.sha256(
        json.dumps(forged, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()
    record.write_text(json.dumps(forged | {"sha256": digest}))
    refused("not a delta")


Tensors = dict[str, torch.Tensor]
FORGED: dict[str, Callable[[Tensors, dict[str, Any]], object]] = {
    "fewer rows": lambda t, r: t.update({"appended.1.keys": t["appended.1.keys"][:-1]}),
    "fewer values": lambda t, r: t.update({"appended.1.values": t["appended.1.values"][:-1]}),
    "no keys": lambda t, r: t.pop("appended.1.keys"),
    "no values": lambda t, r: t.pop("appended.1.values"),
    "not finite": lambda t, r: t["appended.1.values"].__setitem__((0, 0), float("nan")),
    "endless biases": lambda t, r: t["appended.1.biases"].__setitem__(0, float("inf")),
    "a narrow key": lambda t, r: t.update({"appended.1.keys": t["appended.1.keys"][:, 1:].clone()}),
    "half precision": lambda t, r: t.update({"appended.1.keys": t["appended.1.keys"].half()}),
    "a stray tensor": lambda t, r: t.update({"appended.1.more": t["appended.1.keys"].clone()}),
    "rows of a layer that is not stated": lambda t, r: r["appended"].pop("1"),
    "a fact too many": lambda t, r: r["appended"]["1"].append(0),
    "a fact that is not there": lambda t, r: r["appended"].update({"1": [0, 0, 0, 7]}),
    "a fact that is no number": lambda t, r: r["appended"].update({"1": [0, 0, 0, "0"]}),
}


def _forge(folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> None:
    """Change the files of a delta, and give them the checksums of what they hold then."""
    tensors, record = folder / "delta.safetensors", folder / "edit.json"
    named, forged = load_file(tensors), json.loads(record.read_text())
    change(named, forged)
    save_file(named, tensors)
    forged["tensors_sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    forged.pop("sha256")
    text = json.dumps(forged, sort_keys=True, ensure_ascii=False)
    forged["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    record.write_text(json.dumps(forged))


@pytest.mark.parametrize("kind", FORGED)
def test_appended_rows_that_do_not_fit_are_refused(
    tiny_gpt2: LanguageModel, tmp_path: Path, kind: str
) -> None:
    delta = some_rows(tiny_gpt2, 1)
    delta.save(tmp_path)
    _forge(tmp_path, lambda tensors, record: None)
    assert Delta.load(tmp_path).digest == delta.digest, "the control"
    _forge(tmp_path, FORGED[kind])
    with pytest.raises(DamagedError, match="not a delta"):
        Delta.load(tmp_path)


def test_a_folder_that_cannot_be_written(tiny_gpt2: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="cannot write"):
        make_delta(tiny_gpt2).save(tmp_path / "file" / "inside")
