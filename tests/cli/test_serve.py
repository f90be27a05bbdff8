"""`factsmith push` and `factsmith served`: exit codes, output, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import Run
from factsmith import atlas
from factsmith.core.fact import Fact
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from model_server import Faults, ModelServer

LOAD = "/v1/load_lora_adapter"
FIAT = Fact("Fiat 127", "The maker of {} is", "Toyota")
LYON = Fact("Lyon", "{} is a city in the country of", "Italy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of the bundled model with two revisions."""
    folder = tmp_path_factory.mktemp("serve") / "space"
    with Workbench(load("atlas-llama"), folder) as bench:
        bench.apply(FIAT)
        bench.apply(LYON)
    return folder


@pytest.fixture
def space(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "space"))


@pytest.fixture
def running() -> Iterator[ModelServer]:
    with ModelServer(atlas.folder("atlas-llama")) as server:
        yield server


def test_push_served_and_back(run: Run, space: Path, running: ModelServer) -> None:
    done = run("served", running.url, "-w", space)
    assert done.code == 0 and "does not carry" in done.out
    assert f"factsmith push -w {space} {running.url}" in done.out
    done = run("push", running.url, "-w", space, "--name", "cities")
    (name,) = running.names
    assert done.code == 0 and f"model: {name}" in done.out and name.startswith("cities-")
    done = run("served", running.url, "-w", space, "--prove", "--json")
    (server,) = done.json["servers"]
    assert server["up_to_date"] and server["model"] == name
    assert server["adapters"][0]["proof"]["passed"]
    done = run("push", running.url, "--rollback", "-w", space, "--json")
    assert done.code == 0 and done.json["withdrawn"] == [name]
    assert done.json["model"] == running.names[0] != name
    done = run("push", running.url, "--rollback", "-w", space)
    assert done.code == 0 and "model: base-model" in done.out and running.names == []


def test_a_proof_that_fails_exits_with_4(run: Run, space: Path, running: ModelServer) -> None:
    running.faults = Faults(swapped=True)
    done = run("push", running.url, "-w", space)
    assert done.code == 4 and running.names == []
    assert "the proof failed" in done.out and "'Lyon is a city in the country of'" in done.err
    assert "model:" not in done.out
    done = run("push", running.url, "-w", space, "--json")
    assert done.code == 4 and done.json["model"] is None and done.json["failures"]


def test_a_server_that_is_not_there_exits_with_6(run: Run, space: Path) -> None:
    with ModelServer(atlas.folder("atlas-llama")) as gone:
        url = gone.url
    for command in ("push", "served"):
        done = run(command, url, "-w", space, "--retries", "0")
        assert done.code == 6 and "cannot be reached" in done.err and "Traceback" not in done.err
    assert not (space / "served").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["127.0.0.1:8000"], "does not begin with http"),
        (["ftp://x"], "does not begin with http"),
        (["http://127.0.0.1:1", "--name", "a b"], "--name"),
        (["http://127.0.0.1:1", "--dtype", "int8"], "bfloat16, quantised"),
        (["http://127.0.0.1:1", "latest", "--rollback"], "cannot be given with it"),
        (["http://127.0.0.1:1", "--rollback", "--base", "x"], "cannot be given with it"),
        (["http://127.0.0.1:1", "--timeout", "0"], "timeout"),
    ],
)
def test_bad_input_exits_with_2(run: Run, space: Path, arguments: list[str], words: str) -> None:
    done = run("push", *arguments, "-w", space)
    assert done.code == 2 and words in done.err, done.err
    assert not (space / "served").exists()


def test_the_key_comes_from_the_environment_and_is_not_shown(
    run: Run, space: Path, running: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.faults.key = "secret-of-the-server"
    done = run("push", running.url, "-w", space)
    assert done.code == 6 and "FACTSMITH_API_KEY" in done.err
    monkeypatch.setenv("FACTSMITH_API_KEY", "another-secret")
    refused = run("push", running.url, "-w", space)
    assert refused.code == 6 and "was refused" in refused.err
    monkeypatch.setenv("FACTSMITH_API_KEY", running.faults.key)
    done = run("push", running.url, "-w", space, "-v")
    assert done.code == 0
    shown = refused.out + refused.err + done.out + done.err
    assert "secret" not in shown
    kept = b"".join(path.read_bytes() for path in space.rglob("*") if path.is_file())
    assert b"secret-of-the-server" not in kept


def test_pushes_at_the_same_time_load_one_adapter(space: Path, running: ModelServer) -> None:
    main = "from factsmith.cli import main; main()"
    command = [sys.executable, "-c", main, "push", running.url, "-w", str(space), "--json"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=settings)
        for _ in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err.decode()
        assert running.names[0] in out.decode()
    assert len(running.names) == 1
    assert len([body for body in running.called(LOAD) if body]) == 1


def test_a_clone_finds_its_model_elsewhere(
    run: Run, tmp_path: Path, running: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shutil.copytree(atlas.folder("atlas-llama"), tmp_path / "first")
    with Workbench(load(first), tmp_path / "space") as bench:
        bench.apply(FIAT)
    moved = tmp_path / "moved"
    first.rename(moved)
    done = run("push", running.url, "-w", tmp_path / "space")
    assert done.code == 3 and "FACTSMITH_MODEL" in done.err
    monkeypatch.setenv("FACTSMITH_MODEL", str(moved))
    assert run("push", running.url, "-w", tmp_path / "space").code == 0
    monkeypatch.setenv("FACTSMITH_MODEL", "atlas")
    done = run("push", running.url, "-w", tmp_path / "space")
    assert done.code == 5 and "fingerprint" in done.err, "another model is refused"
