"""How long planning, applying and reverting 1, 100 and 1,000 facts takes, and how many bytes.

    python benchmarks/keep.py --json benchmarks/results/keep.json

For each size there are two sets of facts: real facts that a bundled model knows, each with another
object. Both are planned and applied behind gates, with the recommended settings of MEMIT, the
second on top of the first. Then the first is taken out, so the second is solved again from its
stored targets. This is compared with the plain way: the second set is written again on the base
model, with the search for its targets. More than 300 facts are written in one pass of 30 steps
without repairs: these take minutes, and change little of what is measured.

The numbers are processor seconds of one thread, the share of facts that are answered right
afterwards, how long a checkout and a rebuild take, and bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import factsmith as fs
from factsmith.edit.configs import MemitConfig
from methods import chosen


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of a call, and its result."""
    began = time.process_time()
    result = run()
    return round(time.process_time() - began, 2), result


def measured(name: str, size: int, seed: int) -> dict[str, Any]:
    """Measure one size on one model."""
    lm = fs.load(name)
    facts, _ = chosen(lm, 2 * size, seed, 0)
    plain = [
        fs.Fact(f.subject, f.prompt, f.target, target_true=f.target_true, relation=f.relation)
        for f in facts
    ]
    first, second = plain[:size], plain[size:]
    config = MemitConfig.recommended(lm)
    if size > 300:
        config = dataclasses.replace(config, steps=30, repair=0)
    gates = fs.Gates(efficacy=0.0, paraphrases=None, neighbours=None, earlier=None)
    row: dict[str, Any] = {"facts": size}

    def right(facts: list[fs.Fact]) -> float:
        says = lm.says([fact.text for fact in facts], [str(fact.target) for fact in facts])
        return round(100 * sum(says) / len(facts), 1)

    with tempfile.TemporaryDirectory() as folder, fs.Workbench(lm, Path(folder) / "space") as bench:
        bench.find_moments(config.layers or ())
        row["plan_s"], planned = clock(lambda: bench.plan(first, "memit", config))
        row["planned_s"] = round(planned.seconds or 0.0, 1)
        row["apply_s"], one = clock(
            lambda: bench.apply(first, "memit", config, gates=gates, force=True)
        )
        row["apply_second_s"], two = clock(
            lambda: bench.apply(second, "memit", config, gates=gates, force=True)
        )
        row["bytes"], row["right_before"] = one.revision.delta_bytes, right(second)
        row["revert_newest_s"], undone = clock(lambda: bench.revert("latest"))
        row["bring_back_s"], _ = clock(lambda: bench.revert(undone.id))
        row["revert_middle_s"], _ = clock(lambda: bench.revert(one.revision.id, force=True))
        row["right_solved_again"] = right(second)
        row["checkout_base_s"], _ = clock(lambda: bench.checkout("base"))
        row["checkout_latest_s"], _ = clock(lambda: bench.checkout("latest"))
        row["rebuild_s"], _ = clock(bench.rebuild)
        row["ledger_bytes"] = (Path(folder) / "space/ledger.db").stat().st_size
        assert two.revision is not None
    with tempfile.TemporaryDirectory() as folder, fs.Workbench(lm, Path(folder) / "space") as bench:
        row["write_anew_s"], _ = clock(
            lambda: bench.apply(second, "memit", config, gates=gates, force=True)
        )
        row["right_written_anew"] = right(second)
    row["times_as_fast"] = round(row["write_anew_s"] / max(row["revert_middle_s"], 1e-3), 1)
    row["model_bytes"] = sum(p.numel() * p.element_size() for p in lm.module.parameters())
    return row


def main() -> None:
    """Measure, print, and write the numbers if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["atlas", "atlas-llama"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 100, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = (
        json.loads(given.json.read_text())
        if given.json is not None and given.json.is_file()
        else {}
    )
    for model in given.models:
        for size in given.sizes:
            rows.setdefault(model, {})[str(size)] = measured(model, size, given.seed)
            print(model, json.dumps(rows[model][str(size)]), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
