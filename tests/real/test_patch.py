"""A real model is patched without a layer or a text, proved, and taken back bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from factsmith.core.fact import Fact
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel

FACT = Fact(
    "Eiffel Tower",
    "The {} is located in the city of",
    "Rome",
    paraphrases=["The {} can be visited in the city of"],
    neighbours=["The Louvre is located in the city of"],
)
OTHER = "The Louvre is located in the city of"


def test_a_fact_is_written_and_taken_back(smollm2: LanguageModel, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in smollm2.module.state_dict().items()}
    assert "Paris" in smollm2.answer([FACT.text])[0]
    with Workbench(smollm2, tmp_path / "space") as bench:
        outcome = bench.apply(FACT)
        assert outcome.revision is not None and outcome.verification is not None
        assert outcome.verification.efficacy == 1.0
        fact, other = smollm2.answer([FACT.text, OTHER])
        assert fact.startswith("Rome") and "Paris" in other
        assert not all(
            torch.equal(tensor, base[name]) for name, tensor in smollm2.module.state_dict().items()
        )
        bench.revert(outcome.revision.id)
        assert "Paris" in smollm2.answer([FACT.text])[0]
    assert all(
        torch.equal(tensor, base[name]) for name, tensor in smollm2.module.state_dict().items()
    )
