"""A workspace of a bundled model with two revisions, and a server that holds the model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.remote.server import Server
from model_server import ModelServer

FACTS = [
    Fact(
        "Danielle Darrieux",
        "The mother tongue of {} is",
        "English",
        paraphrases=("The native language of {} is", "{} speaks"),
        neighbours=("The mother tongue of Léon Blum is",),
    ),
    Fact(
        "Fiat 127",
        "The maker of {} is",
        "Toyota",
        neighbours=("The maker of Nokia Lumia 900 is",),
    ),
]
LATER = Fact("Lyon", "{} is a city in the country of", "Italy")


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """The bundled model of Llama's kind."""
    return load("atlas-llama")


@pytest.fixture(scope="session")
def made(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two revisions; tests work on copies."""
    folder = tmp_path_factory.mktemp("push") / "space"
    with Workbench(model, folder) as bench:
        bench.apply(FACTS, "memit")
        bench.apply(LATER, "rome")
        assert len(bench.log()) == 2
    return folder


@pytest.fixture
def space(made: Path, tmp_path: Path) -> Path:
    """A copy of the workspace."""
    return Path(shutil.copytree(made, tmp_path / "space"))


@pytest.fixture
def bench(model: LanguageModel, space: Path) -> Iterator[Workbench]:
    """The workspace, opened with its model."""
    with Workbench(model, space) as opened:
        yield opened


@pytest.fixture
def ledger(space: Path) -> Iterator[Ledger]:
    """The records of the workspace."""
    with Ledger(space) as opened:
        yield opened


@pytest.fixture
def running() -> Iterator[ModelServer]:
    """A server like vLLM that holds the model."""
    with ModelServer(atlas.folder("atlas-llama")) as server:
        yield server


@pytest.fixture
def server(running: ModelServer) -> Iterator[Server]:
    """The connection to it; a refused request is not sent again."""
    with Server.open(running.url, retries=0) as opened:
        yield opened
