"""A workspace for the tests of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from factsmith.keep.ledger import Ledger
from ledgers import FINGERPRINT


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An open ledger without any revision."""
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as opened:
        yield opened
