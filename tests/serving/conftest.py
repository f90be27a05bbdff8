"""Tests that start real servers on the loopback address.

`tools/serving.sh FOLDER` makes the servers, and FACTSMITH_SERVING names the folder (".serving" if
it is not set). Without it these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.servers import missing, serving_folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serving)


def folder_with(name: str) -> Path:
    """Return the folder of the servers; skip the test if it lacks this one."""
    folder = serving_folder()
    reason = missing(folder, name)
    if reason is not None:
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def with_vllm() -> Path:
    """Return the folder of the servers, which has vLLM."""
    return folder_with("vllm")


@pytest.fixture(scope="session")
def with_llama_cpp() -> Path:
    """Return the folder of the servers, which has llama-server."""
    return folder_with("llama-server")
