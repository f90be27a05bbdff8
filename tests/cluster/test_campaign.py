"""Campaigns on a local cluster of two workers: the file of one process, whatever is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from factsmith.cluster.engine import Ray
from factsmith.core.executor import Local, running_on
from factsmith.judge.campaign import Campaign
from factsmith.judge.schedule import Schedule
from factsmith.judge.steps import EditsPart
from factsmith.judge.suites import load_suite
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load
from factsmith.patch.editors import editors

ray = pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

pytestmark = pytest.mark.slow

METHODS = ["rome", "memit"]

KILLED = """
import os, signal, sys
from pathlib import Path
import test_campaign
from factsmith.cluster.engine import Ray
from factsmith.model.load import load

def killed(step, done, total):
    kept = (Path(sys.argv[2]) / "size-2" / "rows.jsonl")
    if kept.exists() and '"ends": "rome"' in kept.read_text():
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

with Ray(sys.argv[1], workers=2, num_cpus=0) as engine:
    test_campaign.campaign(load("atlas"), Path(sys.argv[2])).run(engine, progress=killed)
"""
"""A process that begins a campaign and is killed when two edits or so are kept."""


class Recorded:
    """An engine that counts the edits that it hands out."""

    def __init__(self, engine: Ray) -> None:
        self.cuts, self.part_tokens = engine.cuts, engine.part_tokens
        self.engine, self.n = engine, 0

    def map(self, task: Callable[[Any], Any], parts: Iterable[Any], **options: Any) -> Any:
        listed = list(parts)
        self.n += sum(isinstance(part, EditsPart) for part in listed)
        return self.engine.map(task, listed, **options)

    def check(self, thing: object, what: str) -> None:
        self.engine.check(thing, what)


@pytest.fixture(scope="module")
def engine() -> Iterator[Ray]:
    with Ray(workers=2) as started, running_on(Local()):
        yield started


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("atlas")


def campaign(lm: LanguageModel, folder: Path) -> Campaign:
    suite = load_suite("atlas", limit=6)
    few = tuple(replace(record, questions=record.questions[:6]) for record in suite.records)
    return Campaign(
        lm,
        replace(suite, records=few),
        METHODS,
        [2],
        folder,
        editors=editors,
        schedule=Schedule(drift_tokens=60, continued=1),
    )


def rows(folder: Path) -> str:
    """Return the file of rows. Only the seconds that edits took may differ."""
    text = (folder / "size-2" / "rows.jsonl").read_text()
    assert '"seconds": ' in text
    return re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', text)


@pytest.fixture(scope="module")
def expected(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of one process."""
    folder = tmp_path_factory.mktemp("expected")
    campaign(lm, folder).run(Local(cuts=True))
    return rows(folder)


def test_a_campaign_gives_the_file_of_one_process_though_a_worker_is_killed(
    engine: Ray, lm: LanguageModel, expected: str, tmp_path: Path
) -> None:
    pids: list[int] = []

    def kill(step: str, done: int, total: int | None) -> None:
        assert engine._pool is not None
        if step.startswith("judging") and done > 3 and not pids:
            pids.extend(seat.hello.pid for seat in engine._pool.seats if seat.hello is not None)
            os.kill(pids[0], signal.SIGKILL)

    judged = campaign(lm, tmp_path).run(engine, progress=kill)
    assert pids and engine._pool is not None and engine._pool.lost == 1
    assert rows(tmp_path) == expected
    assert judged.evaluations[0].editors == ("base", *METHODS)
    n_units = judged.evaluations[0].units
    ends = re.findall(r'"ends": "(\w+)", "unit": (\d+)', expected)
    assert ends == [(name, str(n)) for name in ("base", *METHODS) for n in range(n_units)]


def test_a_campaign_whose_process_is_killed_goes_on(
    engine: Ray, lm: LanguageModel, expected: str, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    process = subprocess.run(
        [sys.executable, "-c", KILLED, address, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL and "killed" in process.stdout, process.stderr
    kept = rows(tmp_path)
    assert expected.startswith(kept.rstrip("\n")) and '"ends": "memit"' not in kept
    parts = Recorded(engine)
    campaign(lm, tmp_path).run(parts)
    n_kept, n_all = kept.count('"ends"'), expected.count('"ends"')
    assert 4 <= n_kept < n_all and parts.n == n_all - n_kept, "what is kept is not handed out"
    assert rows(tmp_path) == expected
