"""What the tests of exports share: tiny models on disk, and random changes to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from conftest import GPT2, LLAMA, byte_tokenizer, tiny_model
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta
from factsmith.keep.export import adapter, checkpoint
from factsmith.keep.export.readback import Heard, Job, Questions
from factsmith.model.language_model import LanguageModel

SETTINGS = {"gpt2": GPT2, "llama": LLAMA}


def saved_model(family: str, folder: Path) -> Path:
    """A tiny random model of a family with its tokenizer, as a folder."""
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
    """A random change of some layers, large enough to be seen in every dtype."""
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


def two_deltas(lm: LanguageModel) -> list[Delta]:
    """Layers 0, 1 and 2 of ranks 2, 5 and 3 in sum; layer 1 is changed twice."""
    return [
        some_delta(lm, 1, (0, 1), ("Paris", "Danielle Darrieux")),
        some_delta(lm, 2, (1, 2), ("Edwin", "Zürich"), rank=3),
    ]


def names(folder: Path) -> list[str]:
    """Everything in a folder and below."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def heard_from(questions: Questions, **changes: object) -> Heard:
    """What a faithful export would answer, with changes."""
    same = Heard(
        heads=questions.heads,
        picks=[[*picks, 7] for picks in questions.picks],
        logits=questions.patched.clone(),
    )
    return dataclasses.replace(same, **changes)  # type: ignore[arg-type]


def replace_read_back(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[Job]], list[Heard]]
) -> None:
    """Let `answer` take the place of the process that reads exports back."""
    for module in (adapter, checkpoint):
        monkeypatch.setattr(module, "read_back", answer)
