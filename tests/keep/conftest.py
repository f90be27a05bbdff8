"""Fixtures for the tests of workspaces: a ledger, models and workbenches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from factsmith.keep.ledger import Ledger
from ledgers import FINGERPRINT
from workbenches import atlas_bench, bench, eager, lm  # noqa: F401


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An open ledger without any revision."""
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as opened:
        yield opened
