"""Fixtures for the tests of exports: saved and loaded tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from exports import saved_model
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a saved model of each family."""
    place = tmp_path_factory.mktemp("models")
    return {family: saved_model(family, place / family) for family in ("gpt2", "llama")}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    """A loaded model, of each family in turn."""
    return load(folders[request.param])
