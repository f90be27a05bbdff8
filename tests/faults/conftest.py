"""A ledger and a model for the fault tests, and one run of killed workbenches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factsmith.keep.ledger import Ledger
from faults.processes import KILLS, run_apart
from faults.spaces import FINGERPRINT, commit


@pytest.fixture(scope="session")
def with_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Kill workbenches, then let several work at once, in one process since torch loads slowly."""
    folder = tmp_path_factory.mktemp("benches")
    return folder, run_apart("workbenches", str(folder), "1", str(KILLS["workbench"]), "8", "3")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger with three patches. The second was solved on the first, the third independently."""
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as made:
        for text, layers in (("one", (1,)), ("two", (1, 2)), ("three", (0,))):
            commit(made, text, layers)
        yield made


@pytest.fixture(scope="module")
def lm() -> Any:
    """A tiny random model."""
    from conftest import GPT2, byte_tokenizer, tiny_model
    from factsmith.model.load import wrap

    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
