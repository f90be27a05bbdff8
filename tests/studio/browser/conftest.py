"""One chromium for a run; one studio for each module, on a workspace of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.browser import NAMES, Studio, browser_path, chromium, studio

from browsing import Visitor


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return chromium, driven by playwright."""
    pytest.importorskip("playwright.sync_api", reason="install it: pip install playwright")
    if browser_path() is None:
        pytest.skip(f"no browser on the path; looked for {', '.join(NAMES)}")
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the module's workspace; studio makes it."""
    return tmp_path_factory.mktemp("browser") / "workspace"


@pytest.fixture(scope="module")
def running(browser: Any, workspace: Path) -> Iterator[Studio]:
    """Return a studio on the module's workspace."""
    with studio(workspace) as started:
        yield started


@pytest.fixture(scope="module")
def entered(browser: Any, running: Studio) -> Visitor:
    """Return somebody who has followed the link."""
    return Visitor(browser, running)


@pytest.fixture
def visitor(entered: Visitor) -> Iterator[Visitor]:
    """Return a visitor whose pages must do nothing wrong during the test."""
    yield entered
    problems = entered.problems
    entered.close()
    assert problems == []
