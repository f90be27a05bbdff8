"""Helpers for tests of exports: tiny models on disk, and random changes to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta
from factsmith.keep.export import readback
from factsmith.keep.export.questions import Questions
from factsmith.keep.export.readback import Answers, Job
from factsmith.model.appended import AppendedRows
from factsmith.model.language_model import LanguageModel

SETTINGS = {"gpt2": GPT2, "llama": LLAMA}


def saved_model(family: str, folder: Path) -> Path:
    """Save a tiny random model of a family with its tokenizer, and return the folder."""
    tiny_model(family, **SETTINGS[family]).save_pretrained(folder)
    byte_tokenizer(bos=family == "llama").save_pretrained(folder)
    return folder


def some_delta(
    lm: LanguageModel,
    seed: int,
    layers: Sequence[int] = (1,),
    subjects: Sequence[str] = ("Paris",),
    rank: int = 2,
    scale: float = 0.15,
) -> Delta:
    """Return a random change of some layers, large enough to be seen in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    d_ff, n = lm.ffn[0].d_ff, len(subjects)
    return Delta(
        layers={layer: (draw(lm.d_model, rank), draw(rank, d_ff)) for layer in layers},
        k_star={layer: draw(n, d_ff) for layer in layers},
        v_star=draw(n, lm.d_model),
        facts=tuple(Fact(subject, "The mother tongue of {} is", "English") for subject in subjects),
        method="rome",
        config={"layer": layers[0], "contexts": ["{}"]},
        fingerprint=lm.fingerprint,
        convergence=tuple({"steps": 3, "loss": 0.5} for _ in subjects),
    )


def some_rows(lm: LanguageModel, layer: int, facts: Sequence[int], seed: int = 0) -> AppendedRows:
    """Return random neurons for a layer, one for each entry of `facts`."""
    generator, ffn = torch.Generator().manual_seed(seed), lm.ffn[layer]
    n, d_model = len(facts), ffn.weight().shape[0]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    assert ffn._up is not None
    names = ["gate_keys", "up_keys"] if ffn.is_gated else ["keys"]
    tensors = {name: draw(n, d_model) for name in names}
    if getattr(ffn._up.module, "bias", None) is not None:
        biases = ["gate_biases", "up_biases"] if ffn.is_gated else ["biases"]
        tensors |= {name: draw(n) for name in biases}
    return AppendedRows(values=draw(n, d_model), facts=tuple(facts), **tensors)


def appending(
    lm: LanguageModel,
    seed: int = 0,
    rows: Mapping[int, int] | None = None,
    subjects: Sequence[str] = ("Paris", "Edwin"),
) -> Delta:
    """Return a delta that appends {layer: n} random neurons, large enough to be seen."""
    n = len(subjects)
    return Delta(
        layers={},
        k_star={},
        v_star=torch.zeros(n, lm.d_model),
        facts=tuple(Fact(subject, "The mother tongue of {} is", "English") for subject in subjects),
        method="append",
        config={"contexts": ["{}"]},
        fingerprint=lm.fingerprint,
        appended={
            layer: some_rows(lm, layer, [row % n for row in range(count)], seed + layer)
            for layer, count in (rows or {1: 5}).items()
        },
    )


def two_deltas(lm: LanguageModel) -> list[Delta]:
    """Return two changes: layers 0, 1 and 2 of ranks 2, 5 and 3 in sum; layer 1 changes twice."""
    return [
        some_delta(lm, 1, (0, 1), ("Paris", "Danielle Darrieux")),
        some_delta(lm, 2, (1, 2), ("Edwin", "Zürich"), rank=3),
    ]


def names(folder: Path) -> list[str]:
    """Return the names of all entries of a folder and its subfolders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def answers_of(questions: Questions, **changes: object) -> Answers:
    """Return what a faithful export would answer, with changes."""
    same = Answers(
        tokenized=questions.tokenized,
        picks=[[*picks, 7] for picks in questions.picks],
        logits=questions.patched.clone(),
    )
    return dataclasses.replace(same, **changes)  # type: ignore[arg-type]


def replace_read_back(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[Sequence[Job]], list[Answers]]
) -> None:
    """Let `answer` take the place of the process that reads exports back."""
    monkeypatch.setattr(readback, "read_back", answer)


def dense_sum(deltas: list[Delta], layer: int) -> np.ndarray[Any, Any]:
    """Return Σ leftᵢ rightᵢ of a layer, (d_model, d_ff), in float64 and without the library."""
    return sum(
        d.layers[layer][0].double().numpy() @ d.layers[layer][1].double().numpy()
        for d in deltas
        if layer in d.layers
    )  # type: ignore[return-value]


def product(folder: Path, layer: int) -> np.ndarray[Any, Any]:
    """Return BA of a layer from an adapter's file, (d_model, d_ff) in float64."""
    tensors = {
        name: x
        for name, x in load_file(folder / "adapter_model.safetensors").items()
        if f".{layer}." in name
    }
    (b,) = (x for name, x in tensors.items() if name.endswith("lora_B.weight"))
    (a,) = (x for name, x in tensors.items() if name.endswith("lora_A.weight"))
    return b.double().numpy() @ a.double().numpy()


def off(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return the difference of two matrices, relative to the second."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
