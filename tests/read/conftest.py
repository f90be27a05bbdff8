"""An index of a tiny model."""

from __future__ import annotations

import pytest

from factsmith.model.language_model import LanguageModel
from factsmith.read.index import Index, build_index
from indices import CORPUS


@pytest.fixture(scope="session")
def index(tiny_gpt2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    build_index(tiny_gpt2, CORPUS, folder, top=6, tokens=8)
    return Index.open(folder, tiny_gpt2)
