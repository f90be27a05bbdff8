"""A push to llama.cpp proves an adapter that is there, and switches it on for everybody."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import factsmith as fs
from factsmith import atlas
from factsmith.keep.push.llama_cpp import LlamaCarrier
from factsmith.keep.push.push import check_push, push, roll_back
from factsmith.keep.push.records import read_records, write_record
from factsmith.keep.push.served import served
from factsmith.keep.workbench import Workbench
from factsmith.remote.server import Server
from model_server import Factors, ModelServer

LYON = "Lyon is a city in the country of"
SCALES = "/lora-adapters"


@pytest.fixture
def files(bench: Workbench, tmp_path: Path) -> list[Path]:
    """An adapter of each revision, oldest first, and one of somebody else."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    files = []
    for revision in reversed(bench.log()):
        files.append(folder / f"patch-{revision.id[:12]}.gguf")
        bench.export(files[-1], "gguf-adapter", revision=revision.id, verify=False)
    files.append(folder / "theirs.gguf")
    without_task(files[0], files[-1])
    return files


def without_task(file: Path, copy: Path) -> None:
    """Copy the adapter as other programs write it: without the field that names a revision."""
    copy.write_bytes(file.read_bytes().replace(b"factsmith:", b"elsewhere:"))


@contextlib.contextmanager
def serving(files: list[Path]) -> Iterator[tuple[ModelServer, Server]]:
    """Start a server like llama.cpp with adapters that are off."""
    with (
        ModelServer(atlas.folder("atlas-llama"), "llama.cpp", adapters=files) as running,
        Server.open(running.url, retries=0) as server,
    ):
        yield running, server


def said(server: Server, text: str) -> str:
    """Return what a user is told, who names no adapter."""
    body = {"prompt": text, "max_tokens": 4, "temperature": 0.0}
    return str(server.client.post("/v1/completions", body)["choices"][0]["text"]).strip()


def test_a_push_switches_the_adapter_on(bench: Workbench, files: list[Path]) -> None:
    with serving(files) as (running, server):
        running.scales[2] = 0.25
        assert said(server, LYON) == "France."
        (pushed,) = push(bench, server)
        assert pushed.passed and pushed.model == "base-model"
        assert running.scales == [0.0, 1.0, 0.25], "the other adapter keeps its scale"
        assert said(server, LYON) == "Italy."
        proof = running.called("/v1/completions")[3:-4]  # two looks for a cache, and `said`
        assert len(proof) == 2 and all("lora" in body for body in proof)
        assert not any("lora" in body for body in running.called("/v1/completions")[-4:])
        (oldest,) = push(bench, server, [bench.log()[1].id])
        assert oldest.passed and running.scales == [1.0, 0.0, 0.25]
        now = served(bench.ledger, server, prove=True)
        assert [each.standing for each in now.adapters] == [
            "1 revision behind",
            "checked out",
            "not by factsmith",
        ]
        assert [each.is_on for each in now.adapters] == [True, False, True]
        assert not now.up_to_date and not now.problems
        proofs = [each.proof is not None and each.proof.passed for each in now.adapters]
        assert proofs == [True, True, False], "the one that is off is asked in its own requests"
        assert running.scales == [1.0, 0.0, 0.25]


def test_rollback(bench: Workbench, files: list[Path]) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    with serving(files) as (running, server):
        push(bench, server, [oldest, newest])
        back = roll_back(bench.ledger, server)
        assert back.passed and back.revision == oldest and running.scales == [1.0, 0.0, 0.0]
        back = roll_back(bench.ledger, server)
        assert back.passed and running.scales == [0.0, 0.0, 0.0]
        assert said(server, LYON) == "France."


def test_rollbacks_end_at_the_base(bench: Workbench, files: list[Path]) -> None:
    newest, oldest = (revision.id for revision in bench.log())
    with serving(files) as (running, server):
        for pushes in ([newest], [oldest, newest, oldest]):
            for revision in pushes:
                push(bench, server, [revision])
            seen = []
            for _ in range(4):
                back = roll_back(
                    bench.ledger, server, opening=lambda: contextlib.nullcontext(bench)
                )
                seen.append(back.revision)
                if back.adapter is None:
                    break
            before = [oldest] if len(pushes) == 1 else [newest, oldest]
            assert seen == [*before, "base"] and running.scales == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [None, "abc", [], 10**400, float("inf")])
def test_scales_that_are_none(bench: Workbench, files: list[Path], value: object) -> None:
    with serving(files) as (running, server):
        running.scales[2] = value  # type: ignore[call-overload]
        with pytest.raises(fs.ServerError, match=r"/lora-adapters gives an adapter"):
            push(bench, server)


def test_a_push_that_was_killed_leaves_what_was_proved(bench: Workbench, files: list[Path]) -> None:
    with serving(files) as (running, server):
        push(bench, server)
        (record,) = read_records(bench.ledger.folder / "served")
        killed = dataclasses.replace(record, name=record.name[:-4] + "aaaa").become("loading")
        write_record(bench.ledger.folder / "served", killed)
        assert served(bench.ledger, server).adapters[1].standing == "checked out"
        assert push(bench, server)[0].again and running.scales == [0.0, 1.0, 0.0]
        write_record(bench.ledger.folder / "served", record.become("failed"))
        assert served(bench.ledger, server).adapters[1].standing == "never proved", "control"


def test_a_wrong_adapter_stays_off(bench: Workbench, files: list[Path]) -> None:
    def exchanged(factors: Factors) -> Factors:
        return {name.replace("layers.0", "layers.3"): pair for name, pair in factors.items()}

    with serving(files) as (running, server):
        right = running.given[1]
        running.given[1] = exchanged(right)
        assert running.given[1].keys() != right.keys()
        (pushed,) = push(bench, server)
        assert not pushed.passed and running.scales == [0.0, 0.0, 0.0]
        assert [each.state for each in read_records(bench.ledger.folder / "served")] == ["failed"]
        running.given[1] = right
        assert push(bench, server)[0].passed, "control"


def test_a_server_that_keeps_prompts_is_refused(
    bench: Workbench, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(files) as (running, server):
        running.faults.caches = True
        with pytest.raises(fs.InputError, match="--no-cache-prompt"):
            check_push(bench.ledger, server)
        # A server that does not say so is known by what users get.
        monkeypatch.setattr(LlamaCarrier, "check", lambda self, revisions: None)
        running.scales = [1.0, 0.0, 0.0]
        assert said(server, LYON) == "France."
        with pytest.raises(fs.ServerError, match="to the proof and not to users"):
            push(bench, server)
        assert running.scales == [1.0, 0.0, 0.0], "as before"
        running.faults.caches = False
        assert push(bench, server)[0].passed and said(server, LYON) == "Italy.", "control"


def test_an_adapter_that_is_not_there(bench: Workbench, files: list[Path]) -> None:
    with serving(files[2:]) as (running, server):
        with pytest.raises(fs.InputError, match="format gguf-adapter") as error:
            push(bench, server)
        assert bench.ledger.current[:12] in str(error.value)
        assert not any(path == SCALES and body for _, path, body in running.calls)
    with (
        serving([]) as (_, server),
        pytest.raises(fs.InputError, match="started without adapters"),
    ):
        check_push(bench.ledger, server)


def test_a_file_is_known_by_its_fields_and_otherwise_by_its_name(
    bench: Workbench, files: list[Path], tmp_path: Path
) -> None:
    renamed, other = tmp_path / "x.gguf", tmp_path / files[1].name
    shutil.copy(files[1], renamed)
    without_task(files[1], other)
    for file in (renamed, other):
        with serving([file]) as (running, server):
            assert push(bench, server)[0].passed and running.scales == [1.0]
    unknown = tmp_path / "y.gguf"
    without_task(files[1], unknown)
    with serving([unknown]) as (_, server), pytest.raises(fs.InputError, match="has no adapter"):
        push(bench, server)
