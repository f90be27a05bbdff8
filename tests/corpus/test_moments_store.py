from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factsmith.core.errors import InputError
from factsmith.corpus.moments import SecondMoment
from factsmith.corpus.moments_store import find_moments
from factsmith.model.language_model import LanguageModel


def test_second_moments_of_another_model_are_passed_over(
    tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    foreign = SecondMoment.from_matrix(
        torch.eye(tiny_gpt2.ffn[1].d_ff), count=7, fingerprint="00" * 32
    )
    foreign.save(tmp_path / "layer1.safetensors")
    found = find_moments(tiny_gpt2, [1], folder=tmp_path)
    assert found[1].count != 7 and found[1].fingerprint == tiny_gpt2.fingerprint


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), "many"])
def test_a_number_of_tokens_that_cannot_be_is_refused(
    tiny_gpt2: LanguageModel, wrong: object
) -> None:
    with pytest.raises(InputError, match="max_tokens"):
        find_moments(tiny_gpt2, [1], texts=["The name of the place is Paris."], max_tokens=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_tokens"):
        find_moments(tiny_gpt2, [1], max_tokens=wrong)  # type: ignore[arg-type]
