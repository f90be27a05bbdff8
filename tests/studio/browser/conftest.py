"""One chromium for a run; one studio for each module, on a workspace of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return chromium, driven by playwright."""
    pytest.importorskip("playwright.sync_api", reason="install it: pip install playwright")
    from tools.browser import NAMES, browser_path, chromium

    if browser_path() is None:
        pytest.skip(f"no browser on the path; looked for {', '.join(NAMES)}")
    with chromium() as started:
        yield started
