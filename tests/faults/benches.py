"""Kill processes that patch a tiny model, and check what each of them leaves."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

from factsmith.core.fact import Fact
from factsmith.core.gates import Gates
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.revision import Revision
from faults.forks import Reports, at_once, run_until_killed
from faults.ledger_kills import Books


class Tiny:
    """A tiny random model with the moments and settings for an edit."""

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


def _bench_work(tiny: Tiny, folder: Path, kind: str, seed: int, report: Reports) -> None:
    """Repeat random operations without end, mostly of one kind."""
    from factsmith.keep.workbench import Workbench

    rng = random.Random(seed)
    with Workbench(tiny.lm, folder) as bench:
        if bench.ledger.current != bench.ledger.head:
            bench.checkout(LATEST)
        report("ready", "", "")
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
                with report.doing("commit") as given:
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
                with report.doing("gc"):
                    bench.ledger.gc()
            elif kind == "checkout":
                target = rng.choice([BASE, active[0].id])
                with report.doing("checkout", target):
                    bench.checkout(target)
                with report.doing("checkout", bench.ledger.head):
                    bench.checkout(LATEST)
            else:
                patch = active[-1] if kind == "revert" else active[0]
                again = any(step.solve for step in bench.ledger.undoing(patch.id))
                with report.doing("middle" if again else "revert", patch.id) as given:
                    given.append(bench.revert(patch.id, moments=tiny.moments, force=True).id)


def check_weights(tiny: Tiny, folder: Path) -> tuple[list[Revision], str]:
    """Return the history and the current revision, after a check of the model's weights.

    The weights must be the sum of the base and the kept factors while the workbench is open, and
    the base afterwards.
    """
    import torch
    from safetensors.torch import load_file

    from factsmith.keep.workbench import Workbench

    with Workbench(tiny.lm, folder) as bench:
        assert bench.rebuild().revisions == len(bench.log())
        sums = dict(tiny.base)
        for revision in bench.ledger.active():
            factors = load_file(folder / "deltas" / str(revision.carried) / "delta.safetensors")
            for layer in {
                int(name.rpartition(".")[2]) for name in factors if name.startswith("left")
            }:
                sums[layer] = sums[layer] + factors[f"left.{layer}"] @ factors[f"right.{layer}"]
        assert all(torch.equal(sums[layer], tiny.lm.ffn[layer].weight()) for layer in sums)
        log, current = bench.log()[::-1], bench.ledger.current
    assert all(torch.equal(tiny.base[layer], tiny.lm.ffn[layer].weight()) for layer in tiny.base)
    return log, current


def kill_workbenches(tiny: Tiny, folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """Kill processes that use one workspace through a workbench; arguments as `kill_ledgers`."""
    from factsmith.keep.bench import create
    from factsmith.keep.workbench import Workbench

    rng, books, hit = random.Random(seed), Books(), Counter[str]()
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

    # Edit in a forked process, so that this one never computes a gradient.
    books.ids = at_once([begin])[0]["ids"]
    for n in range(kills):
        kind, child_seed = (
            ("commit", "middle", "apply", "revert", "gc", "checkout", "apply")[n % 7],
            rng.randrange(10**9),
        )

        def work(report: Reports, kind: str = kind, child_seed: int = child_seed) -> None:
            _bench_work(tiny, folder, kind, child_seed, report)

        reported = run_until_killed(
            work,
            rng.choice([2, 2, 4]),
            rng.random() * {"commit": 0.15, "middle": 0.15, "apply": 0.2}.get(kind, 0.05),
        )
        books.current = books.ids[-1]  # where the child began
        hit[books.settle(reported[1:], *check_weights(tiny, folder))] += 1
    with Ledger(folder) as ledger:
        ledger.gc(patches=True)
        assert ledger.verify().orphans == () and not list((folder / "deltas").glob(".*"))
    return {"kills": kills, "hit": hit, "unreported": books.unreported, "revisions": len(books.ids)}
