"""Machines of a cluster that die: each machine is a process of its own here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import TEXTS
from factsmith import atlas
from factsmith.cluster import run as cluster_run
from factsmith.cluster.engine import Ray
from factsmith.core.executor import Executor, Local, running_on
from factsmith.corpus import text as corpus_text
from factsmith.corpus.moments import second_moments
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load

pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

MANY = [f"{text} {n}" for n in range(60) for text in TEXTS]
KILLED_AT = 40
"""Texts that are read before a machine dies; about 80 are read in all."""
STORE = 100_000_000
"""Bytes of a machine's object store."""


def machines(*cpus: int) -> Any:
    """Start a cluster: the head, then a machine for each further number of CPUs."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus[0], "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for n in cpus[1:]:
        cluster.add_node(num_cpus=n, object_store_memory=STORE)
    return cluster


def kill(node: Any, *kinds: str) -> None:
    """Kill processes of a machine at once, such as its raylet."""
    for kind in kinds:
        for process in node.all_processes[kind]:
            os.kill(process.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Return a cluster whose two machines with a CPU are not its head."""
    made = machines(0, 1, 1)
    yield made
    made.shutdown()


def moments_on(
    lm: LanguageModel, executor: Executor, texts: Iterable[str] = MANY
) -> list[torch.Tensor]:
    with running_on(executor):
        result = second_moments(lm, texts, [0, 2], max_tokens=4000)
    assert {moment.count for moment in result.values()} == {4000}
    return [moment.matrix for moment in result.values()]


def test_one_two_and_five_workers_and_a_killed_machine_give_the_same_bits(
    cluster: Any, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_run, "STRAGGLER_SECONDS", 2.0)
    monkeypatch.setattr(corpus_text, "WINDOW", 8)  # texts that are read ahead
    expected = moments_on(tiny_llama, Local(cuts=True, part_tokens=200))
    for n in (1, 5):
        with Ray(cluster.address, workers=n, num_cpus=0.4, part_tokens=200) as engine:
            matrices = moments_on(tiny_llama, engine)
        assert all(map(torch.equal, matrices, expected))
    with Ray(cluster.address, workers=2, part_tokens=200) as engine:
        assert engine._pool is not None
        deadline = time.monotonic() + 60
        while engine._pool.n_ready < 2 and time.monotonic() < deadline:
            engine._pool.wait(0.5)
        nodes = {seat.hello.node for seat in engine._pool.seats if seat.hello is not None}
        assert len(nodes) == 2, "each worker is on a machine of its own"
        read: list[str] = []

        def texts() -> Iterator[str]:
            for text in MANY:
                if len(read) == KILLED_AT:  # parts are under way
                    kill(next(iter(cluster.worker_nodes)), "raylet")
                read.append(text)
                yield text

        matrices = moments_on(tiny_llama, engine, texts())
        assert len(read) > KILLED_AT and all(map(torch.equal, matrices, expected))
        again = moments_on(tiny_llama, engine)
        assert all(map(torch.equal, again, expected)), "the other machine does everything"


PROGRAM = """
import sys
import factsmith as fs
from factsmith.core import artefact
from safetensors.torch import save_file

artefact._SECONDS = 0.0  # a checkpoint after each part
address, checkpoint, result = sys.argv[1:]
texts = [line for line in sys.stdin.read().split("|")]
lm = fs.load("atlas")
with fs.Ray(address, workers=2, part_tokens=2000):
    moments = fs.second_moments(
        lm, texts, [0, 3], max_tokens=60_000, checkpoint=checkpoint,
        progress=lambda done: print(done, flush=True),
    )
save_file({str(layer): each.matrix for layer, each in moments.items()}, result)
"""


@pytest.mark.slow
@pytest.mark.skipif("atlas" not in atlas.names(), reason="the bundled model is not built")
def test_after_the_head_died_the_program_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    texts = [f"{text} {n}" for n in range(900) for text in TEXTS]
    files = [str(tmp_path / name) for name in ("partial", "result")]

    def start(address: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(tmp_path / "program.py"), address, *files]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert process.stdin is not None
        process.stdin.write("|".join(texts))
        process.stdin.close()
        return process

    first = machines(2)
    with start(first.address) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if int(line) > 4000:
                break
        kill(first.head_node, "gcs_server", "raylet")
        assert program.wait(60) != 0
    first.shutdown()
    assert not (tmp_path / "result").exists() and (tmp_path / "partial").is_file()

    second = machines(2)
    with start(second.address) as program:
        assert program.stdout is not None and program.stderr is not None
        reports = [int(line) for line in program.stdout]
        assert program.wait(60) == 0, program.stderr.read()[-2000:]
    second.shutdown()
    assert reports[0] > 2000, "it did not begin at the first part"
    lm = load("atlas")
    with running_on(Local(cuts=True, part_tokens=2000)):
        expected = second_moments(lm, texts, [0, 3], max_tokens=60_000)
    result = load_file(tmp_path / "result")
    for layer, moment in expected.items():
        assert torch.equal(result[str(layer)], moment.matrix)
        assert moment.count == 60_000 and not (tmp_path / "partial").exists()
