"""One chromium and one studio for each module, on a workspace and with a cache of its own.

Playwright has an event loop in the main thread while it is open. Tests of other modules that run
coroutines need that thread, so no browser stays open after its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.browser import NAMES, Studio, browser_path, chromium, studio

from browsing import Visitor


@pytest.fixture(scope="module")
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
    """Return a studio on the module's workspace, without any index of the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTSMITH_CACHE", str(workspace.parent / "cache"))
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
