"""Push, rollback and served with real vLLM: what goes well, and what goes wrong.

The bundled atlas-llama is the base model, served in bfloat16.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tools.servers import BLOCK, RealServer, vllm

from commands import Done, Run
from factsmith import atlas, cli
from factsmith.core.errors import ServerError
from factsmith.core.fact import Fact
from factsmith.keep.export.record import Export
from factsmith.keep.ledger import Ledger
from factsmith.keep.push.names import parsed
from factsmith.keep.push.place import AdapterPlace
from factsmith.keep.push.push import push
from factsmith.keep.push.records import read_records
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from factsmith.remote.server import Server
from killing import killer

EIFFEL = "The Eiffel Tower is located in the city of"
LOUVRE = "The Louvre is located in the city of"
FIAT = "The maker of Fiat 127 is"
FACTS = [
    (Fact("Eiffel Tower", "The {} is located in the city of", "Rome", neighbours=[LOUVRE]), "rome"),
    (Fact("Fiat 127", "The maker of {} is", "Toyota", neighbours=[LOUVRE]), "memit"),
    (Fact("Danielle Darrieux", "The mother tongue of {} is", "English"), "memit"),
]
LAYERS = ("layers.0.", "layers.1.")
"""Layers that MEMIT patches."""


@pytest.fixture(scope="module")
def server(with_vllm: Path) -> Iterator[RealServer]:
    """Return vLLM with the base model."""
    with vllm(with_vllm, atlas.folder("atlas-llama"), adapters=8, rank=8) as running:
        yield running


@pytest.fixture(autouse=True)
def no_adapters_left(server: RealServer) -> Iterator[None]:
    """Unload every adapter after each test."""
    yield
    for name in server.models()[1:]:
        server.post("/v1/unload_lora_adapter", {"lora_name": name})


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with three revisions."""
    space = tmp_path_factory.mktemp("patched") / "space"
    with Workbench(load("atlas-llama"), space) as bench:
        for fact, method in FACTS:
            assert bench.apply(fact, method).revision is not None
    return space


@pytest.fixture
def space(patched: Path, tmp_path: Path) -> Path:
    """Return a copy of the workspace, to which nothing was pushed."""
    return Path(shutil.copytree(patched, tmp_path / "space"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def call(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        code = end.value.code
        return Done(code if isinstance(code, int) else 0, out, err)

    return call


def revisions(space: Path) -> list[str]:
    """Return the ids of the revisions, oldest first."""
    with Ledger(space) as ledger:
        return [revision.id for revision in reversed(ledger.log())]


def says(server: RealServer, prompt: str, model: str | None = None) -> str:
    """Return the first words of a server's answer."""
    return server.ask([prompt], model=model, max_tokens=4).answers[0].strip()


def test_push_rollback_and_served(space: Path, server: RealServer, run: Run) -> None:
    """Two revisions, one after the other, and back to the first."""
    first, second, _ = revisions(space)
    one = run("push", server.url, first, "-w", space, "--name", "facts")
    assert one.code == 0, one.err
    name = parsed(one.json["model"])
    assert name is not None and name.alias == "facts" and first.startswith(name.revision)
    assert server.models() == ["base", one.json["model"]]
    assert says(server, EIFFEL, one.json["model"]).startswith("Rome")
    assert says(server, EIFFEL).startswith("Paris"), "the control: the base model stays"
    assert one.json["proof"]["difference"] < 0.1 and one.json["proof"]["same_base"] == 1.0

    two = run("push", server.url, second, "-w", space, "--name", "facts")
    assert says(server, FIAT, two.json["model"]).startswith("Toyota")
    assert says(server, FIAT, one.json["model"]).startswith("Fiat"), "the control"
    lists = run("served", server.url, "-w", space).json["servers"][0]
    assert [each["revision"] for each in lists["adapters"]] == [first, second]
    assert lists["model"] == two.json["model"] and not lists["up_to_date"]

    back = run("push", server.url, "--rollback", "-w", space)
    assert back.code == 0 and back.json["model"] == one.json["model"]
    assert back.json["withdrawn"] == [two.json["model"]]
    assert server.models() == ["base", one.json["model"]]


def test_a_revision_that_is_there_is_not_loaded_again(
    space: Path, server: RealServer, run: Run
) -> None:
    one = run("push", server.url, "-w", space)
    again = run("push", server.url, "-w", space)
    assert again.code == 0 and again.json["again"] and not one.json["again"]
    assert again.json["model"] == one.json["model"] and len(server.models()) == 2
    proved = run("served", server.url, "--prove", "-w", space)
    assert proved.code == 0 and proved.json["servers"][0]["up_to_date"]


def test_a_name_that_is_loaded_again_serves_what_was_computed_before(
    space: Path, server: RealServer, run: Run, tmp_path: Path
) -> None:
    """vLLM keeps what it computed for a prompt by the name and the path of an adapter."""
    first, second, _ = revisions(space)
    prompt = padded(server, FIAT)
    by_hand, models = tmp_path / "by-hand", []
    for revision in (first, second):
        pushed = run("push", server.url, revision, "-w", space).json
        models.append(pushed["model"])
        shutil.rmtree(by_hand, ignore_errors=True)
        shutil.copytree(pushed["path"], by_hand)
        body = {"lora_name": "by-hand", "lora_path": str(by_hand), "load_inplace": True}
        server.post("/v1/load_lora_adapter", body)
        stale = server.ask([prompt], model="by-hand")
    before, after = (server.ask([prompt], model=model) for model in models)
    assert "Fiat" in before.answers[0] and "Toyota" in after.answers[0]
    assert "Fiat" in stale.answers[0], "by hand: the adapter before"
    short = server.ask([FIAT], model="by-hand")
    assert "Toyota" in short.answers[0], "what is not in the cache comes from the new adapter"


def padded(server: RealServer, question: str) -> str:
    """Return a prompt whose tokens fill blocks of the cache, except for the last token."""
    for n in range(4, 40):
        prompt = f"{'the river and ' * n}{LOUVRE} Paris. {question}"
        if len(server.tokens(prompt)) % BLOCK == 1:
            return prompt
    raise AssertionError("no prompt has a length that fits")


def test_a_wrong_base_is_refused_before_anything_is_loaded(
    server: RealServer, run: Run, tmp_path: Path
) -> None:
    """The workspace's model has two layers of the served one exchanged."""
    other = Path(shutil.copytree(atlas.folder("atlas-llama"), tmp_path / "other"))
    exchange(other / "model.safetensors", "layers.1.", "layers.4.")
    with Workbench(load(other), tmp_path / "space") as bench:
        fact = Fact("Eiffel Tower", "The {} is located in the city of", "Rome", neighbours=[LOUVRE])
        assert bench.apply(fact, "rome", force=True).revision is not None
    done = run("push", server.url, "-w", tmp_path / "space")
    assert done.code == 4 and "the server's model is not the workspace's" in done.err
    assert server.models() == ["base"]


def exchange(file: Path, one: str, other: str) -> None:
    """Exchange the tensors of two layers in a file."""
    tensors = load_file(file)
    names = {
        name: name.replace(one, "?").replace(other, one).replace("?", other) for name in tensors
    }
    assert any(old != new for old, new in names.items())
    save_file({new: tensors[old] for old, new in names.items()}, file, {"format": "pt"})


def test_an_adapter_with_exchanged_layers_is_unloaded(
    space: Path, server: RealServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = Workbench.export

    def exchanged(bench: Workbench, folder: Path, format: str, **options: Any) -> Export:
        made = export(bench, folder, format, **options)
        exchange(Path(folder) / "adapter_model.safetensors", *LAYERS)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "export", exchanged)
        done = run("push", server.url, "-w", space)
    assert done.code == 4 and "the proof failed in the server" in done.err, done.err
    assert done.json["model"] is None and server.models() == ["base"]
    assert [each.state for each in read_records(space / "served")] == ["failed"]
    assert run("push", server.url, "-w", space).code == 0, "the control"


def test_eight_pushes_at_once(space: Path, server: RealServer, run: Run) -> None:
    """Eight processes push three revisions under eight names."""
    identities = [revisions(space)[n % 3] for n in range(8)]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "factsmith", "push", server.url, identity),
                *("-w", str(space), "--name", f"user{n}", "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for n, identity in enumerate(identities)
    ]
    ends = [(process, *process.communicate()) for process in processes]
    assert [process.returncode for process, _, _ in ends] == [0] * 8, ends
    lists = run("served", server.url, "--prove", "-w", space)
    (there,) = lists.json["servers"]
    names = {each["name"]: each["revision"] for each in there["adapters"]}
    assert lists.code == 0 and len(names) == 8
    by_alias = {parsed(name).alias: revision for name, revision in names.items()}
    assert by_alias == {f"user{n}": identity for n, identity in enumerate(identities)}


def test_a_server_that_dies_in_the_middle_of_a_push(
    space: Path, server: RealServer, with_vllm: Path, tmp_path: Path
) -> None:
    """The push says so, names nothing, and can be done on another server."""
    place = AdapterPlace(tmp_path / "pushes")
    with (
        vllm(with_vllm, atlas.folder("atlas-llama"), adapters=1) as mortal,
        Workbench(load("atlas-llama"), space) as bench,
    ):
        at = bench.ledger.current
        with (
            Server.open(mortal.url, retries=1) as remote,
            pytest.raises(ServerError) as error,
        ):
            push(bench, remote, place=place, progress=killer(mortal, "loading the adapter"))
        assert mortal.url in str(error.value) and error.value.exit_code == 6
        assert "serving" not in {each.state for each in read_records(tmp_path / "pushes")}
        assert bench.ledger.current == at
        with Server.open(server.url) as remote:
            (pushed,) = push(bench, remote, place=place)
        assert pushed.passed and server.models() == ["base", pushed.model]
