"""Push, rollback and served with real llama-server, whose adapters are given at its start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.servers import RealServer, llama_server

from factsmith.core.errors import InputError, ServerError
from factsmith.core.fact import Fact
from factsmith.edit.configs import RomeConfig
from factsmith.keep.push.push import push, roll_back
from factsmith.keep.push.records import read_records
from factsmith.keep.push.served import served
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.remote.server import Server
from killing import killer

LOUVRE = "The Louvre is located in the city of"
FACTS = [
    Fact("The Eiffel Tower", "{} is located in the city of", "Rome", neighbours=[LOUVRE]),
    Fact("Japan", "The capital of {} is", "Berlin", neighbours=[LOUVRE]),
]
LAYER = 5


@pytest.fixture(scope="module")
def bench(smollm2: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Return a workspace with two revisions of SmolLM2-135M-Instruct."""
    config = RomeConfig(layer=LAYER, scale="auto")
    with Workbench(smollm2, tmp_path_factory.mktemp("llama") / "space") as opened:
        for fact in FACTS:
            assert opened.apply(fact, "rome", config, contexts=["{}"]).revision is not None
        yield opened


@pytest.fixture(scope="module")
def files(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the adapter of each revision, oldest first."""
    folder = tmp_path_factory.mktemp("adapters")
    files = []
    for revision in reversed(bench.log()):
        files.append(folder / f"patch-{revision.id[:12]}.gguf")
        bench.export(files[-1], "gguf-adapter", revision=revision.id, verify=False)
    return files


def says(server: RealServer) -> list[str]:
    """Return what users are told about each fact."""
    return server.ask([fact.text for fact in FACTS], max_tokens=3).answers


def scales(server: RealServer) -> list[float]:
    """Return the scale of each adapter for requests that name none."""
    return [adapter["scale"] for adapter in server.get("/lora-adapters")]


def test_push_rollback_and_served(
    bench: Workbench, files: list[Path], gguf_file: Path, with_llama_cpp: Path
) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    with (
        llama_server(with_llama_cpp, gguf_file, adapters=files, applied=False) as running,
        Server.open(running.url) as server,
    ):
        eiffel, japan = says(running)
        assert "Paris" in eiffel and "Tokyo" in japan and scales(running) == [0.0, 0.0]
        one, two = push(bench, server, [oldest, newest])
        assert one.passed and two.passed and scales(running) == [0.0, 1.0]
        eiffel, japan = says(running)
        assert "Rome" in eiffel and "Berlin" in japan
        carried = served(bench.ledger, server, prove=True)
        assert carried.up_to_date and not carried.problems
        assert [each.revision for each in carried.adapters] == [oldest, newest]
        back = roll_back(bench.ledger, server)
        assert back.passed and back.revision == oldest and scales(running) == [1.0, 0.0]
        eiffel, japan = says(running)
        assert "Rome" in eiffel and "Tokyo" in japan


def test_a_server_that_keeps_what_it_computed_is_refused(
    bench: Workbench, files: list[Path], gguf_file: Path, with_llama_cpp: Path
) -> None:
    """Its cache of prompts takes no notice of scales that change: answers come from before."""
    with (
        llama_server(with_llama_cpp, gguf_file, adapters=files, cached=True) as running,
        Server.open(running.url) as server,
    ):
        for older, newer in ((0.0, 1.0), (1.0, 0.0)):
            running.post("/lora-adapters", [{"id": 0, "scale": older}, {"id": 1, "scale": newer}])
            assert scales(running) == [older, newer]
            assert "Berlin" in says(running)[1], "the second time the answer is stale"
        body = {"prompt": FACTS[1].text, "max_tokens": 3, "temperature": 0.0}
        fresh = running.post("/v1/completions", {**body, "cache_prompt": False})
        assert "Tokyo" in fresh["choices"][0]["text"], "the control"
        with pytest.raises(InputError, match="--no-cache-prompt"):
            push(bench, server)
        assert scales(running) == [1.0, 0.0]


def test_an_adapter_for_another_layer_stays_off(
    bench: Workbench, files: list[Path], gguf_file: Path, with_llama_cpp: Path, tmp_path: Path
) -> None:
    right, wrong = files[0].read_bytes(), tmp_path / files[0].name
    name = f"blk.{LAYER}.".encode()
    assert name in right
    wrong.write_bytes(right.replace(name, b"blk.9."))
    oldest = bench.log()[1].id
    with (
        llama_server(with_llama_cpp, gguf_file, adapters=[wrong], applied=False) as running,
        Server.open(running.url) as server,
    ):
        (pushed,) = push(bench, server, [oldest])
        assert not pushed.passed and scales(running) == [0.0]
        assert "Paris" in says(running)[0]
        with pytest.raises(InputError, match="has no adapter of revision"):
            push(bench, server)
    state = read_records(bench.ledger.folder / "served", running.url)[-1].state
    assert state == "failed"


def test_a_server_that_dies_in_the_middle_of_a_push(
    bench: Workbench, files: list[Path], gguf_file: Path, with_llama_cpp: Path
) -> None:
    with llama_server(with_llama_cpp, gguf_file, adapters=files, applied=False) as running:
        with Server.open(running.url, retries=1) as server, pytest.raises(ServerError) as error:
            push(bench, server, progress=killer(running, "loading the adapter"))
        assert running.url in str(error.value)
    states = {each.state for each in read_records(bench.ledger.folder / "served", running.url)}
    assert "serving" not in states
