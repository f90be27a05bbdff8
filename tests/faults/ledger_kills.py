"""Kill processes that work on a ledger, and check what each of them leaves."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.revision import Revision
from faults.forks import Reports, die_at_line, run_until_killed
from faults.spaces import FINGERPRINT, commit, delta_of

KINDS = ("commit", "revert", "middle", "gc", "checkout")


def _one_operation(ledger: Ledger, kind: str, rng: random.Random, report: Reports) -> None:
    """Do one operation of a kind, or one that must precede it."""
    if ledger.current != ledger.head:
        with report.doing("checkout", ledger.head):
            ledger.checkout(LATEST)
    active = ledger.active()
    if kind in ("revert", "middle") and len(active) < 2:
        kind = "commit"
    if kind == "commit":
        with report.doing("commit") as given:
            given.append(
                commit(
                    ledger,
                    f"delta {rng.randrange(10**9)}",
                    tuple(rng.sample(range(3), rng.choice([1, 2]))),
                ).id
            )
    elif kind == "gc":
        delta_of("loose")(ledger.folder / "deltas" / f"{rng.randrange(10**9):064x}")
        with report.doing("gc"):
            ledger.gc()
    elif kind == "checkout":
        target = rng.choice([BASE, *(revision.id for revision in ledger.log())])
        with report.doing("checkout", target):
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
        with report.doing("middle" if again else "revert", patch.id) as given:
            solved = {identity: delta_of(f"again {rng.randrange(10**9)}") for identity in again}
            given.append(ledger.revert(patch.id, facts=facts, solved=solved).id)


def _ledger_work(folder: Path, kind: str, seed: int, report: Reports) -> None:
    """Repeat random operations without end, mostly of one kind."""
    rng = random.Random(seed)
    with Ledger(folder) as ledger:
        while True:
            _one_operation(ledger, kind if rng.random() < 0.7 else rng.choice(KINDS), rng, report)


class Books:
    """The expected contents of a workspace, by the reports of the killed processes."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.current = BASE
        self.unreported = 0

    def settle(self, lines: list[list[str]], log: list[Revision], current: str) -> str:
        """Compare the workspace after a kill, and return the kind of the interrupted operation.

        The interrupted operation may have succeeded without a report.
        """
        flying: tuple[str, str] | None = None
        for what, kind, target, *made in lines:
            if what == "begin":
                flying = (kind, target)
                continue
            flying = None
            self.ids += made
            self.current = made[0] if made else target if kind == "checkout" else self.current
        ids = [revision.id for revision in log]
        assert ids[: len(self.ids)] == self.ids, "a reported revision is missing"
        more = log[len(self.ids) :]
        if more:
            assert flying is not None and len(more) == 1, f"{len(more)} revisions without a report"
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
    """Return the history and the current revision, after a check that all files are whole."""
    with Ledger(folder) as ledger:
        integrity = ledger.verify()
        log = ledger.log()[::-1]
        assert integrity.revisions == len(log)
        for revision in log[-8:]:
            for delta in [revision.delta, *(change.delta for change in revision.changes.values())]:
                if delta is None:
                    continue
                place = folder / "deltas" / delta
                name = json.loads((place / "edit.json").read_text())["name"]
                assert (place / "delta.safetensors").read_bytes() == name.encode() * 500, (
                    "a delta is incomplete"
                )
                assert revision.delta is None or name == revision.message
        return log, ledger.current


def kill_ledgers(folder: Path, seed: int, kills: int, lines: int) -> dict[str, Any]:
    """Kill processes that work on ledgers, and check each ledger afterwards.

    Args:
        folder: Folder of the ledgers.
        seed: Seed of all random choices.
        kills: Number of processes killed from outside, after a random time.
        lines: Number of processes that kill themselves at a random line of code.
    Returns:
        The counts of kills, of interrupted operations by kind, of revisions without a report, and
        of deltas that were left over.
    """
    rng, hit, unreported, leftovers = random.Random(seed), Counter[str](), 0, 0
    space, books = folder, Books()
    for n in range(kills + lines):
        if n % 20 == 0:  # begin a new history, which is checked faster than a long one
            unreported += books.unreported
            space, books = folder / str(n), Books()
            with Ledger.create(space, model="gpt2", fingerprint=FINGERPRINT) as made:
                books.ids = [commit(made, f"first {i}", (i % 3,)).id for i in range(3)]
                books.current = books.ids[-1]
        kind, child_seed, ready = (
            KINDS[n % len(KINDS)],
            rng.randrange(10**9),
            rng.choice([1, 1, 1, 3]),
        )

        def timed(
            report: Reports, kind: str = kind, child_seed: int = child_seed, space: Path = space
        ) -> None:
            _ledger_work(space, kind, child_seed, report)

        def traced(
            report: Reports, kind: str = kind, child_seed: int = child_seed, space: Path = space
        ) -> None:
            die_at_line(random.Random(child_seed).randrange(1500), report)
            _ledger_work(space, kind, child_seed, report)

        reported = (
            run_until_killed(timed, ready, rng.random() * 0.012)
            if n < kills
            else run_until_killed(traced, 0, None)
        )
        hit[books.settle(reported, *_look(space))] += 1
        if n % 3:
            continue  # the next process starts from the remains of this one
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
