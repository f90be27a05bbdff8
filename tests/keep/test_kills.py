"""Ledgers survive killed processes, and several processes that write at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from factsmith.keep.ledger import Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from ledgers import commit
from workbenches import by_hand, same_state

_WORK = """
import os, random, signal, sys, time
from factsmith.core.errors import WorkspaceError
from factsmith.core.fact import Fact
from factsmith.keep.ledger import Ledger

fact = Fact("A", "{} is", "B")

def work(name, steps, out):
    with Ledger(sys.argv[1], wait=60) as ledger:
        for step in range(steps):
            def write(folder):
                folder.mkdir()
                (folder / "delta.safetensors").write_bytes(f"{name} {step}".encode() * 5000)
            while True:
                try:
                    revision = ledger.commit(
                        write, onto=ledger.head, method="rome", facts=[fact], layers=[1]
                    )
                    break
                except WorkspaceError as error:
                    if "somebody committed" not in str(error):
                        raise
            os.write(out, revision.id.encode() + b"\\n")
            if name == "killed" and step % 2:
                os.write(out, ledger.revert(revision.id).id.encode() + b"\\n")
"""


_KILLS = (
    _WORK
    + """
random.seed(int(sys.argv[2]))
for round_ in range(int(sys.argv[3])):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        work("killed", 10**9, write)
    os.close(write)
    lines = os.read(read, 65)  # one commit is reported, and the kill lands in one of the next few
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 65536):
        lines += more
    os.close(read)
    print(lines.decode(), end="")
"""
)


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_kill_in_the_middle_of_commits(ledger: Ledger) -> None:
    """After a kill at any moment, every reported revision exists and every delta is whole."""
    kills = 40
    done = subprocess.run(
        [sys.executable, "-c", _KILLS, str(ledger.folder), "0", str(kills)],
        capture_output=True,
        text=True,
        check=True,
    )
    reported = done.stdout.split()
    with Ledger(ledger.folder) as opened:
        integrity = opened.verify()
        ids = [r.id for r in opened.log()]
        assert len(set(reported)) == len(reported) >= kills
        assert set(reported) <= set(ids)
        assert len(ids) - len(reported) <= kills  # at most one entry per kill went unreported
        assert integrity.revisions == len(ids) == opened.log()[0].number
        commit(opened, "after")
    assert not any((ledger.folder / "deltas").glob(".staging-*"))


_ROWS = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[3])
import torch
from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.keep.workbench import Workbench
from factsmith.model.load import wrap
from workbenches import some_delta, some_rows

lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())

def work(seed, out):
    rng = random.Random(seed)
    with Workbench(lm, sys.argv[1]) as bench:
        while True:
            active = [each for each in bench.ledger.active() if each.appended]
            if len(active) > 3:
                patch = rng.choice(active)
                some = rng.choice([None, list(patch.indices_in_effect)[:1]])
                made = bench.revert(patch.id, some, force=True)
            else:
                rows = some_rows(lm, rng.randrange(10**6), rng.choice([(1,), (0, 1)]))
                made = bench.commit(rows)
            os.write(out, made.id.encode() + b"\\n")

random.seed(int(sys.argv[2]))
for round_ in range(6):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        work(round_, write)
    os.close(write)
    lines = os.read(read, 65)
    time.sleep(random.random() * 0.15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 65536):
        lines += more
    os.close(read)
    print(lines.decode(), end="")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_kill_while_rows_are_appended_and_dropped(lm: LanguageModel, tmp_path: Path) -> None:
    """The next process has the weights that the files say, and can go on."""
    base = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    done = subprocess.run(
        [sys.executable, "-c", _ROWS, str(tmp_path), "0", str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=True,
    )
    reported = done.stdout.split()
    with Workbench(lm, tmp_path) as bench:
        ids = [revision.id for revision in bench.log()]
        assert set(reported) <= set(ids) and len(ids) - len(reported) <= 6
        assert len(reported) >= 6 and any(revision.kind == "revert" for revision in bench.log())
        assert same_state(lm, by_hand(base, bench)) and not same_state(lm, base)
        bench.rebuild()
        for patch in bench.ledger.active():
            bench.revert(patch.id, force=True)
        assert same_state(lm, base)


def test_processes_at_once_lose_nothing(ledger: Ledger) -> None:
    script = _WORK + "work(sys.argv[2], 5, 1)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(ledger.folder), str(n)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    committed = sorted(identity for output in outputs for identity in output)
    assert len(committed) == 15 and committed == sorted(r.id for r in ledger.log())
    assert ledger.verify().deltas == 15
