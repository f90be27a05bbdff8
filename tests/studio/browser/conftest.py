"""One chromium for a run; one studio for each module, on a workspace of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from browsing import ARGUMENTS, NAMES, browser_path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return chromium, driven by playwright."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="install it: pip install playwright"
    )
    path = browser_path()
    if path is None:
        pytest.skip(f"no browser on the path; looked for {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()
