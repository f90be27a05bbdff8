"""Let several processes write to one workspace at the same time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from factsmith.core.errors import WorkspaceError
from factsmith.core.fact import Fact
from factsmith.keep import connection
from factsmith.keep.ledger import LATEST, Ledger
from faults.benches import Tiny, check_weights
from faults.forks import at_once
from faults.spaces import FINGERPRINT, commit

T = TypeVar("T")


def _until_done(write: Callable[[], T], recover: Callable[[], object], refused: Counter[str]) -> T:
    """Write, and try again while another process writes. Any other refusal fails the test."""
    words = {"another process is writing": "locked", "somebody committed": "moved on"}
    until, action = time.monotonic() + 60, write
    while True:
        assert time.monotonic() < until, "no attempt succeeded within 60 s"
        try:
            if action is write:
                return write()
            recover()
            action = write
        except WorkspaceError as error:
            refused[next(kind for text, kind in words.items() if text in str(error))] += 1
            action = recover  # type: ignore[assignment]
            time.sleep(0.002)


def _commit(ledger: Ledger, text: str, layer: int) -> str:
    return commit(ledger, text, (layer,)).id


def _revert(ledger: Ledger, identity: str) -> str:
    return ledger.revert(identity, onto=ledger.head).id


def crowd_on_network_disk(folder: Path, n: int, steps: int) -> dict[str, Any]:
    """As `crowd_of_ledgers`, without a write-ahead log."""
    connection.is_on_network = lambda file: True
    crowd = crowd_of_ledgers(folder, n, steps)
    with (folder / "ledger.db").open("rb") as file:
        assert file.read(20)[18] == 1, "the ledger has a rollback journal"
    return crowd


def crowd_of_ledgers(folder: Path, n: int, steps: int) -> dict[str, Any]:
    """Let n processes commit and revert every third patch. Half of them wait for the others."""
    Ledger.create(folder, model="gpt2", fingerprint=FINGERPRINT).close()

    def work(me: int) -> dict[str, Any]:
        refused, ids = Counter[str](), []
        # Without a write-ahead log, opening meets the locks of those that write, too.
        open_ledger = partial(Ledger, folder, wait=60 if me % 2 else 0)
        with _until_done(open_ledger, lambda: None, refused) as ledger:
            for step in range(steps):
                text = f"{me} {step}"
                write = partial(_commit, ledger, text, me)
                ids.append(_until_done(write, lambda: None, refused))
                if step % 3 == 2:
                    undo = partial(_revert, ledger, ids[-1])
                    ids.append(_until_done(undo, lambda: None, refused))
        return {"ids": ids, "refused": refused}

    return {"crowd": at_once([lambda me=me: work(me) for me in range(n)])}  # type: ignore[misc]


def crowd_of_workbenches(tiny: Tiny, folder: Path, n: int, steps: int) -> list[dict[str, Any]]:
    """Let n processes commit through workbenches, which check out LATEST before each new try."""
    import torch

    from factsmith.edit.delta import Delta
    from factsmith.keep.bench import create
    from factsmith.keep.workbench import Workbench

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
                    layers={1: factors},
                    k_star=keys,
                    v_star=torch.randn(1, lm.d_model),
                    facts=facts,
                    method="rome",
                    config={},
                    fingerprint=lm.fingerprint,
                )
                return bench.commit(delta).id

            ids = [
                _until_done(write, lambda: bench.checkout(LATEST), refused) for _ in range(steps)
            ]
        return {"ids": ids, "refused": refused}

    crowd = at_once([partial(work, me) for me in range(n)])
    check_weights(tiny, folder)
    return crowd
