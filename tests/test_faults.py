"""What goes wrong around a workspace: processes killed at any moment, many at once, full disks, and files that somebody else made.

Killed processes are forked from a small one of their own (`python tests/test_faults.py kill ...`), never from pytest's.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factsmith.core.errors import (
    DamagedError,
    FactError,
    FactsmithError,
    FingerprintError,
    WorkspaceError,
)
from factsmith.core.fact import Fact, Gates, Probe
from factsmith.core.factfile import FactFile, FactSheet
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.revision import Revision

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="needs fork, SIGKILL and RLIMIT_FSIZE as Linux has them",
)

FINGERPRINT = "ab" * 32
KILLS = {"ledger": 200, "lines": 40, "workbench": 200}
KINDS = ("commit", "revert", "middle", "gc", "checkout")


def delta_of(text: str) -> Callable[[Path], None]:
    """Stands for `delta.save`: the ledger sees files, not tensors."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "edit.json").write_text(json.dumps({"name": text}))
        (folder / "delta.safetensors").write_bytes(text.encode() * 500)

    return write


def commit(
    ledger: Ledger, text: str, layers: tuple[int, ...] = (1,), onto: str | None = None
) -> Revision:
    facts = [Fact("A", "{} is", text), Fact("B", "{} is", text)]
    return ledger.commit(
        delta_of(text),
        onto=ledger.head if onto is None else onto,
        method="rome",
        facts=facts,
        layers=layers,
        message=text,
    )


def whole_state(folder: Path) -> dict[str, str]:
    """Everything a workspace holds, read without the ledger: every entry of the folder, and what the database says.

    SQLite's own files beside the database come and go with its connections, and say nothing that the database does not.
    """
    state = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            state[name] = f"link to {path.readlink()}"
        elif path.is_file():
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            state[name] = "folder" if path.is_dir() else "neither"
    for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
        state.pop(name, None)
    db = sqlite3.connect(folder / "ledger.db")
    state["ledger.db"] = "\n".join(
        [*db.iterdump(), repr(db.execute("PRAGMA user_version").fetchall())]
    )
    db.close()
    return state


# ---- kill -9 --------------------------------------------------------------------------------------------------------------------------


class _Told:
    """What a process that is about to die says over a pipe: each operation before it begins, and what it gave when it is done."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def __call__(self, *fields: str) -> None:
        os.write(self.pipe, (json.dumps(fields) + "\n").encode())

    @contextmanager
    def doing(self, kind: str, target: str = "") -> Iterator[list[str]]:
        given: list[str] = []
        self("begin", kind, target)
        yield given
        self("done", kind, target, *given)


def _one_operation(ledger: Ledger, kind: str, rng: random.Random, told: _Told) -> None:
    """One operation of a kind, or what has to come before there can be one."""
    if ledger.current != ledger.head:
        with told.doing("checkout", ledger.head):
            ledger.checkout(LATEST)
    active = ledger.active()
    if kind in ("revert", "middle") and len(active) < 2:
        kind = "commit"
    if kind == "commit":
        with told.doing("commit") as given:
            given.append(
                commit(
                    ledger,
                    f"delta {rng.randrange(10**9)}",
                    tuple(rng.sample(range(3), rng.choice([1, 2]))),
                ).id
            )
    elif kind == "gc":
        delta_of("loose")(ledger.folder / "deltas" / f"{rng.randrange(10**9):064x}")
        with told.doing("gc"):
            ledger.gc()
    elif kind == "checkout":
        target = rng.choice([BASE, *(revision.id for revision in ledger.log())])
        with told.doing("checkout", target):
            ledger.checkout(target)
    else:
        patch = (
            active[-1]
            if kind == "revert"
            else active[rng.randrange(max(1, len(active) - 3), len(active)) - 1]
        )
        facts = (
            None
            if kind == "revert" or rng.random() < 0.5
            else [patch.facts.index(patch.in_effect[0])]
        )
        again = [step.patch.id for step in ledger.undoing(patch.id, facts) if step.solve]
        with told.doing("middle" if again else "revert", patch.id) as given:
            solved = {identity: delta_of(f"again {rng.randrange(10**9)}") for identity in again}
            given.append(ledger.revert(patch.id, facts=facts, solved=solved).id)


def _ledger_work(folder: Path, kind: str, seed: int, told: _Told) -> None:
    """Random operations without an end, mostly of one kind."""
    rng = random.Random(seed)
    with Ledger(folder) as ledger:
        while True:
            _one_operation(ledger, kind if rng.random() < 0.7 else rng.choice(KINDS), rng, told)


def _die_at_line(n: int, told: _Told) -> None:
    """Let this process be killed at the n-th line of the ledger's own code from the next operation on: a moment between any two."""
    left = n

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if "factsmith" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def _killed(work: Callable[[_Told], None], ready: int, delay: float | None) -> list[list[str]]:
    """Fork, let it work until it has reported so many operations, kill it after a delay (None: it dies by itself); what it told."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            work(_Told(write))
        except BaseException:
            os.write(write, (json.dumps(["failed", traceback.format_exc()]) + "\n").encode())
        finally:
            os._exit(1)
    os.close(write)
    told, until = b"", time.monotonic() + 60
    while told.count(b"\n") < ready and time.monotonic() < until:
        if select.select([read], [], [], 1)[0]:
            block = os.read(read, 65536)
            if not block:
                break
            told += block
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    while block := os.read(read, 65536):
        told += block
    os.close(read)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in told.decode().splitlines()]
    failed = [line[1] for line in lines if line[0] == "failed"]
    assert not failed, failed[0]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it was not killed"
    return lines


class _Books:
    """What a workspace must hold after everything that was reported; the judge of what is found after each kill."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.current = BASE
        self.unreported = 0

    def settle(self, lines: list[list[str]], found: list[Revision], current: str) -> str:
        """Compare with what is there, and take over at most the one operation that was in flight; its kind."""
        flying: tuple[str, str] | None = None
        for what, kind, target, *made in lines:
            if what == "begin":
                flying = (kind, target)
                continue
            flying = None
            self.ids += made
            self.current = made[0] if made else target if kind == "checkout" else self.current
        ids = [revision.id for revision in found]
        assert ids[: len(self.ids)] == self.ids, "a revision that was reported as done is not there"
        more = found[len(self.ids) :]
        if more:
            assert flying is not None and len(more) == 1, (
                f"{len(more)} revisions more than could be"
            )
            assert (more[0].kind == "patch") == (flying[0] == "commit") and flying[0] in (
                "commit",
                "revert",
                "middle",
            )
            assert more[0].reverts == (flying[1] or None) and current == more[0].id
            assert bool(more[0].changes) == (flying[0] != "commit")
            self.ids, self.unreported = ids, self.unreported + 1
        elif current != self.current:
            assert flying is not None and flying[0] == "checkout" and current == flying[1]
        self.current = current
        return "nothing" if flying is None else flying[0]


def _look(folder: Path) -> tuple[list[Revision], str]:
    """The history and the checked-out revision, once all that is kept is whole and says what it was given."""
    with Ledger(folder) as ledger:
        integrity = ledger.verify()
        found = ledger.log()[::-1]
        assert integrity.revisions == len(found)
        for revision in found[-8:]:
            for delta in [revision.delta, *(change.delta for change in revision.changes.values())]:
                if delta is None:
                    continue
                place = folder / "deltas" / delta
                name = json.loads((place / "edit.json").read_text())["name"]
                assert (place / "delta.safetensors").read_bytes() == name.encode() * 500, (
                    "a delta that is half there"
                )
                assert revision.delta is None or name == revision.message
        return found, ledger.current


def _kill_ledgers(folder: Path, seed: int, kills: int, lines: int) -> dict[str, Any]:
    """Kill processes that work on ledgers, look at each afterwards, and go on with it; how often, and in what."""
    rng, hit, unreported, leftovers = random.Random(seed), Counter[str](), 0, 0
    space, books = folder, _Books()
    for n in range(kills + lines):
        if (
            n % 20 == 0
        ):  # a history of its own now and then: checking all of a long one takes longer
            unreported += books.unreported
            space, books = folder / str(n), _Books()
            with Ledger.create(space, model="gpt2", fingerprint=FINGERPRINT) as made:
                books.ids = [commit(made, f"first {i}", (i % 3,)).id for i in range(3)]
                books.current = books.ids[-1]
        kind, child_seed, ready = (
            KINDS[n % len(KINDS)],
            rng.randrange(10**9),
            rng.choice([1, 1, 1, 3]),
        )

        def timed(
            told: _Told, kind: str = kind, child_seed: int = child_seed, space: Path = space
        ) -> None:
            _ledger_work(space, kind, child_seed, told)

        def traced(
            told: _Told, kind: str = kind, child_seed: int = child_seed, space: Path = space
        ) -> None:
            _die_at_line(random.Random(child_seed).randrange(1500), told)
            _ledger_work(space, kind, child_seed, told)

        told = (
            _killed(timed, ready, rng.random() * 0.012) if n < kills else _killed(traced, 0, None)
        )
        hit[books.settle(told, *_look(space))] += 1
        if n % 3:
            continue  # the next process finds what this one left behind
        with Ledger(space) as ledger:
            ledger.checkout(LATEST)
            books.ids.append(commit(ledger, f"after {n}").id)
            books.current = books.ids[-1]
            leftovers += len(ledger.gc())
            assert (
                ledger.gc() == ()
                and ledger.verify().orphans == ()
                and not list((space / "deltas").glob(".*"))
            )
            assert [revision.id for revision in ledger.log()[::-1]] == books.ids
    return {
        "kills": kills + lines,
        "hit": hit,
        "unreported": unreported + books.unreported,
        "leftovers": leftovers,
    }


def _killing(*arguments: str) -> dict[str, Any]:
    """Run one of the killers above in a process of its own; what it counted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


def test_kill_at_any_moment_of_a_ledgers_work(tmp_path: Path) -> None:
    counted = _killing("ledger", str(tmp_path), "1", str(KILLS["ledger"]), str(KILLS["lines"]))
    assert counted["kills"] == KILLS["ledger"] + KILLS["lines"] >= 200
    hit = counted["hit"]
    assert all(hit.get(kind, 0) >= 5 for kind in KINDS), (
        f"some kind of work was hardly ever killed: {hit}"
    )
    assert sum(hit[kind] for kind in KINDS) > 0.5 * counted["kills"], (
        f"most kills came between operations: {hit}"
    )
    assert counted["unreported"] and counted["leftovers"], (
        f"no kill came at a moment that leaves something: {counted}"
    )


class _Tiny:
    """A tiny random model and what patching it takes; made in the killers' own process, where torch is loaded."""

    def __init__(self) -> None:
        from conftest import GPT2, TEXTS, byte_tokenizer, tiny_model
        from factsmith.corpus.moments import second_moments
        from factsmith.edit.configs import RomeConfig
        from factsmith.model.load import wrap

        self.lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
        self.moments = second_moments(
            self.lm, [text[i:] for text in TEXTS for i in range(0, 40, 2)], [0, 1, 2]
        )
        self.config = RomeConfig(layer=1, steps=2)
        self.base = {layer: self.lm.ffn[layer].weight().clone() for layer in range(3)}


def _bench_work(tiny: _Tiny, folder: Path, kind: str, seed: int, told: _Told) -> None:
    """As `_ledger_work`, with a model: facts are solved for, measured, written, taken out, and solved again."""
    from factsmith.keep.workbench import Workbench

    rng = random.Random(seed)
    with Workbench(tiny.lm, folder) as bench:
        if bench.ledger.current != bench.ledger.head:
            bench.checkout(LATEST)
        told("ready", "", "")
        while True:
            active = bench.ledger.active()
            if kind in ("commit", "apply") or len(active) < 3:
                fact = Fact(
                    f"Entity{rng.randrange(10**6)}",
                    "The home of {} is",
                    " q",
                    neighbours=["A is"],
                    paraphrases=["{} lives in"],
                )
                config = dataclasses.replace(tiny.config, layer=rng.choice([1, 1, 2]))
                gates = (
                    Gates(efficacy=0, paraphrases=0, neighbours=0, earlier=0)
                    if kind == "apply"
                    else None
                )
                with told.doing("commit") as given:
                    done = bench.apply(
                        fact,
                        config=config,
                        moments=tiny.moments,
                        contexts=["{}"],
                        texts=["a b c d e"],
                        gates=gates,
                        force=True,
                    )
                    given.append(done.revision.id if done.revision else "nothing was written")
            elif kind == "gc":
                with told.doing("gc"):
                    bench.ledger.gc()
            elif kind == "checkout":
                target = rng.choice([BASE, active[0].id])
                with told.doing("checkout", target):
                    bench.checkout(target)
                with told.doing("checkout", bench.ledger.head):
                    bench.checkout(LATEST)
            else:
                patch = active[-1] if kind == "revert" else active[0]
                again = any(step.solve for step in bench.ledger.undoing(patch.id))
                with told.doing("middle" if again else "revert", patch.id) as given:
                    given.append(bench.revert(patch.id, moments=tiny.moments, force=True).id)


def _check_weights(tiny: _Tiny, folder: Path) -> tuple[list[Revision], str]:
    """The history, once the weights that it stands for were summed up by hand and are the model's; afterwards these are the base's."""
    import torch
    from safetensors.torch import load_file

    from factsmith.keep.workbench import Workbench

    with Workbench(tiny.lm, folder) as bench:
        assert bench.rebuild().revisions == len(bench.log())
        sums = dict(tiny.base)
        for revision in bench.ledger.active():
            held = load_file(folder / "deltas" / str(revision.carried) / "delta.safetensors")
            for layer in {int(name.rpartition(".")[2]) for name in held if name.startswith("left")}:
                sums[layer] = sums[layer] + held[f"left.{layer}"] @ held[f"right.{layer}"]
        assert all(torch.equal(sums[layer], tiny.lm.ffn[layer].weight()) for layer in sums)
        found, current = bench.log()[::-1], bench.ledger.current
    assert all(torch.equal(tiny.base[layer], tiny.lm.ffn[layer].weight()) for layer in tiny.base)
    return found, current


def _kill_workbenches(tiny: _Tiny, folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """As `_kill_ledgers`, through a workbench."""
    from factsmith.keep.workbench import Workbench, create

    rng, books, hit = random.Random(seed), _Books(), Counter[str]()
    create(tiny.lm, folder).close()

    def begin() -> dict[str, Any]:
        with Workbench(tiny.lm, folder) as bench:
            facts = [Fact(f"Place{n}", "The home of {} is", " q") for n in range(4)]
            done = [
                bench.apply(
                    fact, config=tiny.config, moments=tiny.moments, contexts=["{}"], force=True
                )
                for fact in facts
            ]
            return {"ids": [one.revision.id for one in done if one.revision]}

    books.ids = _at_once([begin])[0][
        "ids"
    ]  # forked, so that this process itself never computes a gradient
    for n in range(kills):
        kind, child_seed = (
            ("commit", "middle", "apply", "revert", "gc", "checkout", "apply")[n % 7],
            rng.randrange(10**9),
        )

        def work(told: _Told, kind: str = kind, child_seed: int = child_seed) -> None:
            _bench_work(tiny, folder, kind, child_seed, told)

        told = _killed(
            work,
            rng.choice([2, 2, 4]),
            rng.random() * {"commit": 0.15, "middle": 0.15, "apply": 0.2}.get(kind, 0.05),
        )
        books.current = books.ids[-1]  # where the child began
        hit[books.settle(told[1:], *_check_weights(tiny, folder))] += 1
    with Ledger(folder) as ledger:
        ledger.gc()
        assert ledger.verify().orphans == () and not list((folder / "deltas").glob(".*"))
    return {"kills": kills, "hit": hit, "unreported": books.unreported, "revisions": len(books.ids)}


@pytest.fixture(scope="module")
def with_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What became of workbenches that were killed, and of several at once: one process, since torch takes seconds to load."""
    folder = tmp_path_factory.mktemp("benches")
    return folder, _killing("workbenches", str(folder), "1", str(KILLS["workbench"]), "8", "3")


def test_kill_at_any_moment_of_a_workbenchs_work(with_models: tuple[Path, dict[str, Any]]) -> None:
    counted = with_models[1]["killed"]
    assert counted["kills"] == KILLS["workbench"] >= 200 and counted["revisions"] >= 20
    hit = counted["hit"]
    assert (
        hit.get("commit", 0) >= 30
        and hit.get("middle", 0) >= 10
        and sum(hit[kind] for kind in hit if kind != "nothing") >= 100
    ), hit


# ---- many at once ---------------------------------------------------------------------------------------------------------------------


def _at_once(works: list[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run each in a forked process of its own, all let go at the same moment; what they gave."""
    gate_read, gate_write = os.pipe()
    children = []
    for work in works:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(gate_write)
            os.read(gate_read, 1)
            try:
                given = json.dumps(work())
            except BaseException:
                given = json.dumps({"failed": traceback.format_exc()})
            os.write(write, given.encode())
            os._exit(0)
        os.close(write)
        children.append((child, read))
    os.close(gate_write)
    found = []
    for child, read in children:
        said = b""
        while block := os.read(read, 65536):
            said += block
        os.close(read)
        os.waitpid(child, 0)
        found.append(json.loads(said))
        assert "failed" not in found[-1], found[-1]["failed"]
    return found


def _until_done(
    write: Callable[[], str], recover: Callable[[], object], refused: Counter[str]
) -> str:
    """Try again for as long as somebody else is at work; any other refusal is a failure."""
    words = {"another process is writing": "locked", "somebody committed": "moved on"}
    until, action = time.monotonic() + 60, write
    while True:
        assert time.monotonic() < until, "it never got through"
        try:
            if action is write:
                return write()
            recover()
            action = write
        except WorkspaceError as error:
            refused[next(kind for text, kind in words.items() if text in str(error))] += 1
            action = recover  # type: ignore[assignment]
            time.sleep(0.002)


def _crowd_of_ledgers(folder: Path, n: int, steps: int) -> dict[str, Any]:
    """So many processes that each commit so often, and take every third out again; half of them wait for others, half do not."""
    Ledger.create(folder, model="gpt2", fingerprint=FINGERPRINT).close()

    def work(me: int) -> dict[str, Any]:
        refused, ids = Counter[str](), []
        with Ledger(folder, wait=60 if me % 2 else 0) as ledger:
            for step in range(steps):
                ids.append(
                    _until_done(
                        lambda: commit(ledger, f"{me} {step}", (me,)).id, lambda: None, refused
                    )
                )  # noqa: B023
                if step % 3 == 2:
                    last = ids[-1]
                    ids.append(
                        _until_done(
                            lambda: ledger.revert(last, onto=ledger.head).id, lambda: None, refused
                        )
                    )  # noqa: B023
        return {"ids": ids, "refused": refused}

    return {"crowd": _at_once([lambda me=me: work(me) for me in range(n)])}  # type: ignore[misc]


def _crowd_of_workbenches(tiny: _Tiny, folder: Path, n: int, steps: int) -> list[dict[str, Any]]:
    """The same through workbenches, which go to the newest revision before they try again."""
    import torch

    from factsmith.edit.delta import Delta
    from factsmith.keep.workbench import Workbench, create

    create(tiny.lm, folder).close()

    def work(me: int) -> dict[str, Any]:
        refused, ids = Counter[str](), []
        torch.manual_seed(me)
        lm, d_ff = tiny.lm, tiny.lm.ffn[1].d_ff
        with Workbench(lm, folder) as bench:

            def write() -> str:
                factors = (torch.randn(lm.d_model, 1) * 0.1, torch.randn(1, d_ff) * 0.1)
                facts, keys = (Fact(f"A{me}", "{} is", "x"),), {1: torch.randn(1, d_ff)}
                delta = Delta(
                    layers={1: factors}, k_star=keys, v_star=torch.randn(1, lm.d_model), facts=facts, method="rome", config={},
                    fingerprint=lm.fingerprint,
                )  # fmt: skip
                return bench.commit(delta).id

            ids = [
                _until_done(write, lambda: bench.checkout(LATEST), refused) for _ in range(steps)
            ]
        return {"ids": ids, "refused": refused}

    found = _at_once([lambda me=me: work(me) for me in range(n)])  # type: ignore[misc]
    _check_weights(tiny, folder)
    return found


def _workbenches(folder: Path, seed: int, kills: int, n: int, steps: int) -> dict[str, Any]:
    """Workbenches killed, and several at once."""
    tiny = _Tiny()
    return {
        "killed": _kill_workbenches(tiny, folder / "killed", seed, kills),
        "crowd": _crowd_of_workbenches(tiny, folder / "crowd", n, steps),
    }


def test_eight_ledgers_at_once_lose_nothing(tmp_path: Path) -> None:
    _check_crowd(
        _killing("ledgers", str(tmp_path / "space"), "8", "6")["crowd"],
        tmp_path / "space",
        8 * (6 + 2),
    )


def test_workbenches_at_once_lose_nothing(with_models: tuple[Path, dict[str, Any]]) -> None:
    folder, found = with_models
    _check_crowd(found["crowd"], folder / "crowd", 8 * 3)


def _check_crowd(crowd: list[dict[str, Any]], space: Path, n_revisions: int) -> None:
    """They waited or were refused in clear words, and all that they reported is there, in one line."""
    reported = [identity for one in crowd for identity in one["ids"]]
    refused = sum((Counter(one["refused"]) for one in crowd), Counter[str]())
    assert len(set(reported)) == len(reported) == n_revisions
    assert refused, "nobody met anybody: the test did not test"
    with Ledger(space) as ledger:
        log = ledger.log()[::-1]
        assert sorted(revision.id for revision in log) == sorted(reported), (
            "as many revisions as were reported, and those"
        )
        assert [revision.parent for revision in log] == [
            BASE,
            *(revision.id for revision in log[:-1]),
        ], "one line"
        for one in crowd:
            places = [next(r.number for r in log if r.id == identity) for identity in one["ids"]]
            assert places == sorted(places), "each in the order in which it was told"
        assert ledger.verify().revisions == len(reported)
        ledger.gc()
        assert ledger.verify().orphans == () and not list((space / "deltas").glob(".*"))


# ---- full and read-only disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Three patches; the second stands on the first, the third alone."""
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as made:
        for text, layers in (("one", (1,)), ("two", (1, 2)), ("three", (0,))):
            commit(made, text, layers)
        yield made


@pytest.fixture(scope="module")
def lm() -> Any:
    from conftest import GPT2, byte_tokenizer, tiny_model
    from factsmith.model.load import wrap

    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


def _revert_in_the_middle(ledger: Ledger) -> Revision:
    first = ledger.log()[-1]
    again = [step.patch.id for step in ledger.undoing(first.id) if step.solve]
    assert len(again) == 1
    return ledger.revert(first.id, solved={again[0]: delta_of("two again")})


WRITES: dict[str, Callable[[Ledger], object]] = {
    "commit": lambda ledger: commit(ledger, "four"),
    "revert": lambda ledger: ledger.revert(LATEST),
    "revert in the middle": _revert_in_the_middle,
    "checkout": lambda ledger: ledger.checkout(BASE),
}


def _unchanged(folder: Path, before: dict[str, str]) -> bool:
    """Whether all is as before, but for deltas that no revision names, which the next gc takes."""
    now = whole_state(folder)
    assert (
        now["ledger.db"] == before["ledger.db"]
        and {name: now.get(name) for name in before} == before
    )
    if now == before:
        return True
    with Ledger(folder) as ledger:
        ledger.gc()
    assert whole_state(folder) == before
    return False


@contextmanager
def _fails(
    monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: OSError
) -> Iterator[list[int]]:
    """Let a function of `os` fail from its at-th call on, as it does on a disk that is full."""
    real, calls = getattr(os, name), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > at:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patching:
        patching.setattr(os, name, wrapped)
        yield calls


@pytest.mark.parametrize("write", ["commit", "revert in the middle"])
def test_a_disk_that_fills_up_at_any_point_leaves_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    before, at = whole_state(ledger.folder), 0
    while True:
        with _fails(
            monkeypatch, "fsync", at, OSError(errno.ENOSPC, "No space left on device")
        ) as calls:
            try:
                WRITES[write](ledger)
                break
            except WorkspaceError as error:
                assert "The disk is full" in str(error) and "Free some space" in str(error)
                assert calls[0] > at
        _unchanged(ledger.folder, before)
        at += 1
    assert at >= 3, "files, their folder, and the folder above"
    assert ledger.verify().revisions == 4


@contextmanager
def _files_of_at_most(n: int) -> Iterator[None]:
    """No file grows beyond n bytes, SQLite's neither: writing ends in an error of the system's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", WRITES)
def test_files_that_cannot_grow_leave_nothing(ledger: Ledger, write: str) -> None:
    """The system itself refuses, in the delta's files or in the database, wherever the limit falls."""
    folder = ledger.folder
    ledger.close()
    before, refused = whole_state(folder), set()
    for limit in (0, 10, 100, 1000, 2000, 4000, 5000, 8000, 12_000, 20_000, 36_000):
        with _files_of_at_most(limit):
            try:
                with Ledger(folder) as opened:
                    WRITES[write](opened)
            except WorkspaceError as error:
                assert re.search(
                    "Free some space|Make it writable, or use a copy|Cannot write to", str(error)
                ), error
                refused.add(limit)
            else:
                break
        _unchanged(folder, before)
    assert {0, 100, 1000} <= refused
    with Ledger(folder) as opened:
        assert opened.verify().revisions == 3 + (write != "checkout") * (limit not in refused)
        opened.checkout(LATEST)
        commit(opened, "five")


def test_a_full_disk_leaves_model_and_workspace_as_they_were(
    lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exports import some_delta
    from factsmith.keep.workbench import Workbench

    with Workbench(lm, tmp_path / "space") as bench:
        first = bench.commit(some_delta(lm, 1))
        before, carried, at = whole_state(tmp_path / "space"), lm.fingerprint, 0
        while True:
            with _fails(monkeypatch, "fsync", at, OSError(errno.ENOSPC, "No space left on device")):
                try:
                    bench.commit(some_delta(lm, 2))
                    break
                except WorkspaceError as error:
                    assert re.search("(?i)the disk is full.*free some space", str(error))
            _unchanged(tmp_path / "space", before)
            assert lm.fingerprint == carried and bench.ledger.current == first.id
            at += 1
        assert at >= 5 and lm.fingerprint != carried and len(bench.log()) == 2


@pytest.mark.parametrize("write", [*WRITES, "gc"])
def test_what_cannot_be_written_is_refused_before_anything_changes(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    """That the system says so stands for a read-only folder, which root can write all the same (test_ledger.py has one of another user)."""
    delta_of("loose")(ledger.folder / "deltas" / ("0" * 64))
    before = whole_state(ledger.folder)
    with monkeypatch.context() as patching:
        patching.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
        with Ledger(ledger.folder) as opened:
            with pytest.raises(
                WorkspaceError, match=r"cannot be written: .*Make it writable, or use a copy"
            ):
                WRITES.get(write, Ledger.gc)(opened)
            assert len(opened.log()) == 3 and opened.verify().orphans == ("0" * 64,)
    assert whole_state(ledger.folder) == before
    WRITES.get(write, Ledger.gc)(ledger)  # the control
    assert whole_state(ledger.folder) != before


# ---- deltas, ledgers and models that are others -----------------------------------------------------------------------------------------


def _harm(harm: str, folder: Path, other: Path) -> None:
    file = folder / "delta.safetensors"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "swapped":
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
    elif harm == "one file swapped":
        shutil.copy(other / file.name, file)
    elif harm == "a link to its file":
        file.rename(folder.parent.parent / "elsewhere")
        file.symlink_to(folder.parent.parent / "elsewhere")
    elif harm == "a link to its folder":
        folder.rename(folder.parent.parent / "elsewhere")
        folder.symlink_to(folder.parent.parent / "elsewhere")
    elif harm == "a link to nothing":
        shutil.rmtree(folder)
        folder.symlink_to(folder.parent.parent / "nowhere")
    elif harm == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif harm == "a file":
        shutil.rmtree(folder)
        folder.write_bytes(b"")
    elif harm == "a folder in it":
        (folder / "more").mkdir()
    else:
        shutil.rmtree(folder)


HARMS = (
    "truncated", "swapped", "one file swapped", "a link to its file", "a link to its folder", "a link to nothing", "a pipe", "a file",
    "a folder in it", "gone",
)  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_delta_that_is_another_is_refused(lm: Any, tmp_path: Path, harm: str) -> None:
    """By the ledger and by the workbench, in words that name what to do, and nothing changes; making the delta again heals it."""
    from exports import some_delta
    from factsmith.keep.workbench import Workbench

    space = tmp_path / "space"
    with Workbench(lm, space) as bench:
        delta = some_delta(lm, 1)
        one, two = bench.commit(delta), bench.commit(some_delta(lm, 2, (2,)))
        places = [bench.ledger.delta_folder(revision) for revision in (one, two)]
    _harm(harm, *places)
    before, base = whole_state(space), lm.fingerprint
    with Ledger(space) as ledger:
        for use in (
            ledger.verify,
            ledger.status,
            lambda: ledger.checkout(one.id),
            lambda: ledger.revert(two.id),
        ):
            with pytest.raises(
                DamagedError, match=r"backup, or go back with `factsmith checkout base"
            ):
                use()
    with pytest.raises(DamagedError, match=one.id[:10]):
        Workbench(lm, space)
    assert lm.fingerprint == base and whole_state(space) == before
    with Ledger(space) as ledger:
        ledger.checkout(BASE)
    with Workbench(lm, space) as bench, pytest.raises(DamagedError):
        bench.checkout(LATEST)
    assert lm.fingerprint == base
    with Ledger(space) as ledger:
        ledger._database.connection.execute("UPDATE workspace SET current = ?", (two.id,))
        ledger.commit(delta.save, onto=two.id, method="rome", facts=delta.facts, layers=[1])
        assert ledger.verify().deltas == 2


def test_newer_ledgers_and_other_models_are_refused(lm: Any, tmp_path: Path) -> None:
    from conftest import GPT2, byte_tokenizer, tiny_model
    from exports import some_delta
    from factsmith.keep.workbench import Workbench
    from factsmith.model.load import wrap

    space = tmp_path / "space"
    with Workbench(lm, space) as bench:
        bench.commit(some_delta(lm, 1))
    before = whole_state(space)
    stranger = wrap(tiny_model("gpt2", seed=5, **GPT2), byte_tokenizer())
    fingerprint = stranger.fingerprint
    with pytest.raises(FingerprintError, match="load that model, unpatched"):
        Workbench(stranger, space)
    assert stranger.fingerprint == fingerprint and whole_state(space) == before
    db = sqlite3.connect(space / "ledger.db")
    db.execute("PRAGMA user_version = 3")
    db.close()
    before = whole_state(space)
    for use in (lambda: Ledger(space), lambda: Workbench(lm, space)):
        with pytest.raises(WorkspaceError, match=r"ledger format 3.*pip install -U factsmith"):
            use()
    assert whole_state(space) == before


# ---- files from others are data -------------------------------------------------------------------------------------------------------

FUZZ = {"JSON": 4000, "YAML": 2200, "deltas": 4000, "ledgers": 200}
_TIMES = int(os.environ.get("FACTSMITH_FUZZ", "1"))
_SEED = 20240 if _TIMES == 1 else _TIMES


def _deep(n: int) -> Any:
    value: Any = 0
    for i in range(n):
        value = [value] if i % 2 else {"a": value}
    return value


STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64 - 1, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"), -0.0,
    "", " ", "{}", "{}{}", "..", "../..", "/etc/passwd", "C:\\", "~", "a\0b", "\ud800", "\u202e", "\ufeff", "x" * 30_000, "-1", "1",
    "NaN", "yes",
    "!!python/object/apply:os.system", [], [[]], {}, [{}], {"": {}}, {"self": 1}, {"__class__": "x"}, [None], ["a"] * 2000,
    list(range(3000)),
    _deep(20), _deep(300),
]  # fmt: skip


def _mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with something else somewhere in it, something gone, renamed, or there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {name: held for name, held in value.items() if name != key}
        what = rng.random()
        if what < 0.1:
            return rest
        if what < 0.2:
            return {
                **rest,
                rng.choice(
                    [key + "x", key[:-1], "self", "../" + key, "\ud800", "x" * 500, "1"]
                ): value[key],
            }
        return {**value, key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        what = rng.random()
        if what < 0.15:
            return value[:at] + value[at + 1 :]
        return (
            value + value[at : at + 1]
            if what < 0.25
            else [*value[:at], _mutated(value[at], rng), *value[at + 1 :]]
        )
    return rng.choice(STRANGE)


def _corrupted(content: bytes, rng: random.Random, pieces: list[bytes]) -> bytes:
    """Bytes flipped, cut out, doubled, or put in: at random, and of what has a meaning in the format."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        cut = rng.choice([0, 0, 1, 1, 3, 40, len(content)])
        new = rng.choice(
            [
                b"",
                rng.randbytes(1),
                rng.randbytes(4),
                rng.choice(pieces),
                rng.choice(pieces),
                content[: rng.randrange(60)],
            ]
        )
        content = content[:at] + new + content[at + cut :]
    return content


def _write(path: Path, content: bytes) -> None:
    """A new file, since some file systems flush one that is written over: milliseconds, ten thousand times."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _refused(use: Callable[[], Any], seed: object) -> bool:
    """Whether it was refused, in an error of ours of a length that can be read; any other exception fails, naming the case."""
    try:
        use()
    except FactsmithError as error:
        assert 0 < len(str(error)) < 1500, f"case {seed}: a message of {len(str(error))} characters"
        str(error).encode()  # could be printed
        return True
    except BaseException as error:
        raise AssertionError(f"case {seed}: {type(error).__name__}: {str(error)[:300]}") from error
    return False


SHEET = {
    "facts": [
        {
            "subject": "Łódź",
            "prompt": "The river of {} is",
            "target": "Ner",
            "target_true": "Bzura",
            "paraphrases": ["{} lies on"],
            "neighbours": ["Cairo lies on", {"prompt": "Rome lies on", "expected": "Tiber"}],
            "relation": "P206",
        },
        {"subject": "B", "prompt": "{} is", "target": None},
    ],
    "gates": {"efficacy": 1.0, "kl_text": 0.1},
    "method": "rome",
    "settings": {"layer": 3, "lr": 0.5},
}
JSON_PIECES = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b'"subject":"x",',
    b"[" * 2000,
    b'{"a":' * 2000,
    b"\\ud800",
    b"\xff",
    b"\0",
    b"null",
]
YAML_PIECES = [
    b"&a ", b"*a", b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!omap ", b"!!pairs ", b"!!map ",
    b"!!seq ",
    b"!!null ", b"!!str ", b"!!python/name:os.system ", b"!!python/object/apply:os.getcwd []", b"! ", b"!x ", b"<<: *a\n", b"<<: 1\n",
    b"? [a]\n: b\n", b"? ", b"- ", b": ", b"2024-99-99", b"0x" + b"f" * 5000, b"9" * 5000, b"1:99:99", b".nan", b"-.inf", b"yes", b"~",
    b"|\n", b">-\n",
    b"%YAML 9.9\n", b"---\n", b"...\n", b"\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b'"\\ud800"', b'"\\x00"', b"=", b"[" * 400,
    b"{a: " * 300,
    b"# ", b"'", b'"', b"\r",
]  # fmt: skip


def _is_a_sheet(path: Path) -> None:
    """Read a fact file; what is taken can be kept, shown, and written."""
    sheet = FactFile.sheet(path)
    assert isinstance(sheet, FactSheet) and sheet.facts
    json.dumps(
        [
            fact.to_dict() | {"neighbours": [probe.prompt for probe in fact.neighbours]}
            for fact in sheet.facts
        ]
    ).encode()
    "".join(map(str, sheet.facts)).encode()


@pytest.mark.parametrize("kind", ["JSON", "YAML"])
def test_no_fact_file_ends_in_anything_but_words(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"facts.{kind.lower()}"
    text = (
        json.dumps(SHEET).encode()
        if kind == "JSON"
        else yaml.safe_dump(SHEET, allow_unicode=True, sort_keys=False).encode()
    )
    path.write_bytes(text)
    assert not _refused(lambda: _is_a_sheet(path), "none"), "the control: nothing was done to it"
    refused, began = 0, time.process_time()
    for seed in range(_SEED, _SEED + FUZZ[kind] * _TIMES):
        rng = random.Random(seed)
        if kind == "JSON" and rng.random() < 0.6:
            _write(
                path,
                json.dumps(
                    _mutated(_mutated(SHEET, rng) if rng.random() < 0.3 else SHEET, rng)
                ).encode(),
            )
        else:
            _write(path, _corrupted(text, rng, JSON_PIECES if kind == "JSON" else YAML_PIECES))
        refused += _refused(lambda: _is_a_sheet(path), seed)
    assert 0.4 * FUZZ[kind] < refused / _TIMES < FUZZ[kind]
    assert time.process_time() - began < 60 * _TIMES


def _laughs(levels: int, last: str, *, merged: bool = False) -> str:
    """Aliases of aliases, ten at a time: 10^levels texts from a few hundred bytes."""
    lines = ["a0: &a0 lol" if not merged else "a0: &a0 {k: lol}"]
    for level in range(1, levels):
        few = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{few}]}}" if merged else f"[{few}]"))
    return "\n".join([*lines, last.replace("BOMB", f"*a{levels - 1}")])


_ONE = "facts:\n- {subject: A, prompt: '{} is', target: x, "
BOMBS = {
    "of paraphrases": _laughs(10, _ONE + "paraphrases: BOMB}"),
    "of settings": _laughs(10, _ONE + "relation: r}\nsettings: {x: BOMB}"),
    "of a subject": _laughs(10, "facts:\n- {subject: BOMB, prompt: '{} is', target: x}"),
    "of facts": _laughs(10, "facts: BOMB"),
    "of merges": _laughs(10, "facts:\n- BOMB", merged=True),
    "small enough to be taken apart": _laughs(7, _ONE + "paraphrases: BOMB}"),
    "that holds itself": "facts: &a\n- *a\n- {subject: *a}",
    "that merges itself": "- &a {subject: A, <<: *a}",
    "of brackets": "[" * 100_000,
    "of dashes": "- " * 100_000,
    "of tags": "!!seq " * 50_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_little_time_and_memory(tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(BOMBS[bomb])
    tracemalloc.start()
    began = time.process_time()
    try:
        assert _refused(lambda: FactFile.sheet(path), bomb)
        assert time.process_time() - began < 10 and tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_an_endless_fact_file_is_refused(tmp_path: Path) -> None:
    for name in ("facts.yaml", "facts.json"):
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(FactError, match="more than 67,108,864 bytes; split it"):
            FactFile.read(tmp_path / name)
    entries = ["{subject: A, prompt: '{} is', target: x, neighbours: &n [Rome is, Paris is]}"]
    entries += ["{subject: B, prompt: '{} is', target: y, neighbours: *n}"]
    (tmp_path / "shared.yaml").write_text("- " + "\n- ".join(entries))
    assert [len(fact.neighbours) for fact in FactFile.read(tmp_path / "shared.yaml")] == [2, 2], (
        "the control: aliases have their use"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A delta's record, its tensors' header, and their bytes."""
    import torch

    from factsmith.edit.delta import Delta

    folder = tmp_path_factory.mktemp("delta")
    Delta(
        layers={layer: (torch.ones(4, 2), torch.ones(2, 6)) for layer in (0, 2)},
        k_star={layer: torch.ones(2, 6) for layer in (0, 2)},
        v_star=torch.ones(2, 4),
        facts=(
            Fact("A", "{} is", "x"),
            Fact("B", "{} is", None, paraphrases=["{}"], neighbours=[Probe("C is", "d")]),
        ),
        method="rome",
        config={"layer": 0, "contexts": ["{}"]},
        fingerprint="ab" * 32,
        convergence=({"steps": 3}, {"steps": 4, "loss": 0.5}),
    ).save(folder)
    raw = (folder / "delta.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return (
        json.loads((folder / "edit.json").read_text()),
        json.loads(raw[8 : 8 + length]),
        raw[8 + length :],
    )


def _put(folder: Path, record: Any, tensors: bytes, *, signed: bool = True) -> None:
    """Write a delta's files, with checksums made anew, as whoever alters it on purpose would."""
    if signed and isinstance(record, dict):
        record = (
            {**record, "tensors_sha256": hashlib.sha256(tensors).hexdigest()}
            if "tensors_sha256" in record
            else record
        )
        record = {key: value for key, value in record.items() if key != "sha256"}
        content = json.dumps(record, sort_keys=True, ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        record["sha256"] = hashlib.sha256(content).hexdigest()
    _write(folder / "edit.json", json.dumps(record).encode())
    _write(folder / "delta.safetensors", tensors)


def _tensors(header: Any, body: bytes, length: int | None = None) -> bytes:
    content = json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + body


def _is_a_delta(folder: Path) -> None:
    """Load a delta; what is taken can be shown, kept, and put into a model that has its layers."""
    from factsmith.edit.delta import Delta

    delta = Delta.load(folder)
    assert all(type(layer) is int and layer >= 0 for layer in delta.layers) and repr(delta)
    assert all(delta.dense(layer).isfinite().all() for layer in delta.layers)


def test_no_delta_ends_in_anything_but_words(
    tmp_path: Path, saved: tuple[dict[str, Any], dict[str, Any], bytes]
) -> None:
    record, header, body = saved
    whole = _tensors(header, body)
    _put(tmp_path, record, whole)
    assert not _refused(lambda: _is_a_delta(tmp_path), "none"), (
        "the control: checksums made anew are not what is refused"
    )
    refused, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(_SEED, _SEED + FUZZ["deltas"] * _TIMES):
        rng = random.Random(seed)
        kind = rng.randrange(5)
        if kind == 0:
            _put(tmp_path, _mutated(record, rng), whole, signed=rng.random() < 0.9)
        elif kind == 1:
            _put(tmp_path, record, _tensors(_mutated(header, rng), body))
        elif kind == 2:
            length = rng.choice(
                [
                    0,
                    1,
                    7,
                    len(whole),
                    2**20,
                    10**8,
                    10**10,
                    2**40,
                    2**63,
                    2**64 - 1,
                    rng.randrange(len(whole)),
                ]
            )
            _put(tmp_path, record, _tensors(header, body, length))
        elif kind == 3:
            _put(
                tmp_path,
                record,
                _corrupted(
                    whole,
                    rng,
                    [
                        b"F64",
                        b"BF16",
                        b"BOOL",
                        b"U64",
                        b"F8_E4M3",
                        b"C64",
                        b"-1",
                        b"1e9",
                        b"[0,",
                        b"9" * 30,
                    ],
                ),
            )
        else:
            _write(
                tmp_path / "edit.json", _corrupted(json.dumps(record).encode(), rng, JSON_PIECES)
            )
            _write(tmp_path / "delta.safetensors", whole)
        refused += _refused(lambda: _is_a_delta(tmp_path), seed)
    assert 0.7 * FUZZ["deltas"] < refused / _TIMES < FUZZ["deltas"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000, "kilobytes"


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "10 GB": lambda h: {
        **h,
        "v_star": {"dtype": "F32", "shape": [2, 1_250_000_000], "data_offsets": [0, 10**10]},
    },
    "10 GB from 32 bytes": lambda h: {**h, "v_star": {**h["v_star"], "shape": [2, 1_250_000_000]}},
    "more than there are numbers": lambda h: {
        **h,
        "v_star": {**h["v_star"], "shape": [2**63, 2**63]},
    },
    "no rows of endless length": lambda h: {**h, "v_star": {**h["v_star"], "shape": [0, 2**63]}},
    "a negative size": lambda h: {**h, "v_star": {**h["v_star"], "shape": [-2, -4]}},
    "another dtype": lambda h: {
        **h,
        "v_star": {"dtype": "F64", "shape": [2, 2], "data_offsets": h["v_star"]["data_offsets"]},
    },
    "a negative layer": lambda h: {name.replace(".2", ".-2"): field for name, field in h.items()},
    "a path": lambda h: {
        name.replace(".2", "../../../etc/passwd"): field for name, field in h.items()
    },
    "a list": lambda h: [h],
    "overlapping tensors": lambda h: {
        **h,
        "k_star.0": {**h["k_star.0"], "data_offsets": h["k_star.2"]["data_offsets"]},
    },
    "a header of its own": lambda h: {
        "__metadata__": {"format": "pt", "run": "rm -rf /"},
        **h,
        "more": h["v_star"],
    },
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_header_claims_is_not_believed(
    tmp_path: Path, saved: tuple[dict[str, Any], dict[str, Any], bytes], claim: str
) -> None:
    record, header, body = saved
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for layers in ([0, 2], [0, -2], [0, "2../../../etc/passwd"]):
        _put(tmp_path, {**record, "layers": layers}, _tensors(CLAIMS[claim](header), body))
        assert _refused(lambda: _is_a_delta(tmp_path), claim)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000, "kilobytes"


def test_files_that_have_no_end_or_are_no_files_are_refused(
    tmp_path: Path, saved: tuple[dict[str, Any], dict[str, Any], bytes]
) -> None:
    record, header, body = saved
    for name in ("edit.json", "delta.safetensors"):
        for target in ("/dev/zero", "pipe"):
            _put(tmp_path, record, _tensors(header, body))
            (tmp_path / name).unlink()
            (tmp_path / name).symlink_to(target) if target != "pipe" else os.mkfifo(tmp_path / name)
            assert _refused(lambda: _is_a_delta(tmp_path), (name, target))
            (tmp_path / name).unlink()
    _put(tmp_path, record, _tensors(header, body))
    os.truncate(tmp_path / "edit.json", 10 * 2**30)  # takes no room on the disk
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _refused(lambda: _is_a_delta(tmp_path), "10 GB of nothing")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000, "kilobytes"
    assert _refused(lambda: _is_a_delta(Path("a\0b")), "no path")


def test_no_ledger_ends_in_anything_but_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of the database changed, cut and put in; of the few that do no harm what is read is what was there."""
    monkeypatch.setattr(
        "factsmith.keep.ledger._now", lambda: "2026-01-02T03:04:05+00:00"
    )  # so that a case can be had again by its seed
    with Ledger.create(tmp_path / "space", model="gpt2", fingerprint=FINGERPRINT) as ledger:
        for text, layers in (("one", (1,)), ("two", (1, 2)), ("three", (0,))):
            commit(ledger, text, layers)
        expected = [revision.to_dict() | {"state": ""} for revision in ledger.log()]
    file = ledger.folder / "ledger.db"
    whole, others = (
        file.read_bytes(),
        [file.with_name(f"ledger.db-{end}") for end in ("wal", "shm")],
    )

    def use() -> None:
        with Ledger(ledger.folder) as opened:
            opened.verify()
            log = opened.log()
            assert [revision.to_dict() | {"state": ""} for revision in log] == expected[
                len(expected) - len(log) :
            ]
            opened.active(), opened.status(), opened.gc(dry_run=True)
            opened.checkout(BASE), opened.checkout(LATEST)
            opened.undoing(LATEST)

    assert not _refused(use, "none")
    refused = 0
    for seed in range(_SEED, _SEED + FUZZ["ledgers"] * _TIMES):
        rng = random.Random(seed)
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 20])):
            content[rng.choice([rng.randrange(100), rng.randrange(len(content))])] = rng.randrange(
                256
            )
        if rng.random() < 0.3:
            at = rng.randrange(len(content))
            content[at : at + rng.choice([1, 50, 4096, len(content)])] = rng.randbytes(
                rng.choice([0, 1, 50])
            )
        _write(file, bytes(content))
        for other in others:
            other.unlink(missing_ok=True)
        refused += _refused(use, seed)
    assert 0.3 * FUZZ["ledgers"] < refused / _TIMES


def test_there_were_enough_cases() -> None:
    assert sum(FUZZ.values()) >= 10_000


def test_nothing_that_can_run_code_is_read() -> None:
    """No pickle, no YAML but plain values, no eval, in all of the library; torch.load only of what a training run kept for itself."""
    dangerous = r"pickle|marshal|shelve|joblib|dill|yaml\.(full_|unsafe_)?load|(Full|Unsafe)Loader|\b(eval|exec)\("
    dangerous += r"|(?<!safetensors\.)torch\.load|allow_pickle=True"
    root = Path(__file__).resolve().parents[1] / "src/factsmith"
    found = []
    for path in sorted(root.rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.search(dangerous, line.replace(".eval(", ".")):
                found.append(
                    (path.relative_to(root).as_posix(), match[0], "weights_only=True" in line)
                )
    assert found == [("model/atlas/train.py", "torch.load", True)]
    assert re.search(dangerous, "x = torch.load(y)") and not re.search(
        dangerous, "safetensors.torch.load(y)"
    ), "the control"


# ---- what is written is what is read --------------------------------------------------------------------------------------------------

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    str.strip
)
_PROMPTS = (
    st.tuples(st.text(max_size=20), st.text(max_size=20))
    .map("{}".join)
    .filter(lambda text: text.count("{}") == 1)
)
_FACTS = st.builds(
    Fact,
    _TEXTS,
    _PROMPTS,
    st.none() | _TEXTS,
    paraphrases=st.lists(_TEXTS, max_size=3),
    neighbours=st.lists(_TEXTS | st.builds(Probe, _TEXTS, st.none() | _TEXTS), max_size=3),
    relation=st.none() | _TEXTS,
)


@given(facts=st.lists(_FACTS, min_size=1, max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_facts_come_back_from_a_file_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, facts: list[Fact]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("random.yaml", "random.json"):
        FactFile.write(folder / name, facts)
        assert FactFile.read(folder / name) == facts
        assert FactFile.sheet(folder / name) == FactSheet(facts=tuple(facts))


# ---- main, of the processes that are killed ---------------------------------------------------------------------------------------------

if __name__ == "__main__":
    which, place, *numbers = sys.argv[1:]
    run = {
        "ledger": _kill_ledgers,
        "ledgers": _crowd_of_ledgers,
        "workbenches": _workbenches,
    }[which]
    print(json.dumps(run(Path(place), *map(int, numbers))))
