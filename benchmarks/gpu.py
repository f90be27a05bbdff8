"""MEMIT and second moments at the size of Llama 3 8B, on one GPU, in bfloat16.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json      # within 12 minutes
    python benchmarks/gpu.py --shape tiny                            # the same code, on any machine

The model has random weights, made on the device, so nothing is loaded. It has nothing to say about
quality; it shows seconds and bytes.

moments  Second moments of five layers in one pass.
batches  MEMIT with 100 and with 1,000 facts, each in one call.
loop     MEMIT with one fact a call, for a few facts: the seconds of one, and of 100 that way.

A step that would not fit into --budget, by the seconds of the steps before it, is left out, and the
record says so. The record is written after each step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import factsmith as fs
from patch import GOLDEN, LARGE, SMALL, random_llama, timed
from scale import changes, texts_of

CONTEXTS = ["{}", "Some words. {}", "In a book. {}", "It is known. {}", "They say. {}", "Yes. {}"]


def settings(shape: str, facts: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Return what is measured at a shape: sizes, layers, tokens and numbers of facts."""
    if shape == "tiny":
        sizes: dict[str, Any] = {"shape": SMALL, "vocabulary": 6144, "layers": (0, 1)}
        return {**sizes, "tokens": 1000, "facts": facts or (4, 8), "alone": 2, "steps": 3}
    sizes = {"shape": LARGE, "vocabulary": 128_256, "layers": (4, 5, 6, 7, 8)}
    return {**sizes, "tokens": 40_000, "facts": facts or (100, 1000), "alone": 5, "steps": 25}


def peak() -> int | None:
    """Return the largest number of bytes on the GPU since the last call. None: there is no GPU."""
    if not torch.cuda.is_available():
        return None
    top: int = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return top


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of all steps."""
    began = time.perf_counter()
    plan = settings(args.shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    lm = random_llama(plan["shape"], plan["vocabulary"], device, tokenizer)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(lm.dtype),
        **{key: plan[key] for key in ("shape", "vocabulary", "layers", "steps")},
        "contexts": len(CONTEXTS),
        "left_out": [],
    }

    def save() -> None:
        print(json.dumps(record), flush=True)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    texts = texts_of(plan["tokens"])
    seconds, moments = timed(
        lambda: fs.second_moments(
            lm, texts, plan["layers"], max_tokens=plan["tokens"], batch_tokens=args.batch_tokens
        )
    )
    count = moments[plan["layers"][0]].count
    record["moments"] = {"tokens": count, "seconds": seconds, "peak_bytes": peak()}
    save()
    config = fs.MemitConfig(plan["layers"], steps=plan["steps"], stop_loss=0)

    def write(some: list[fs.Fact]) -> fs.Delta:
        return fs.memit(lm, some, config, moments=moments, contexts=CONTEXTS)

    facts = changes(max(plan["facts"]))
    write(facts[:1])  # warm up
    peak()
    alone, deltas = timed(lambda: [write([fact]) for fact in facts[: plan["alone"]]])
    a_fact = alone / plan["alone"]
    assert all(torch.isfinite(delta.dense(plan["layers"][-1])).all() for delta in deltas)
    record["loop"] = {"facts": plan["alone"], "seconds_a_fact": a_fact, "peak_bytes": peak()}
    save()
    record["batches"] = []
    expected = a_fact
    for n in plan["facts"]:
        if time.perf_counter() - began + expected * n > args.budget:
            record["left_out"].append(f"{n} facts: {expected * n:.0f} s expected")
            continue
        seconds, delta = timed(lambda n=n: write(facts[:n]))  # type: ignore[misc]
        assert torch.isfinite(delta.dense(plan["layers"][-1])).all()
        record["batches"].append(
            {
                "facts": n,
                "seconds": seconds,
                "seconds_a_fact": seconds / n,
                "times_faster_than_loop": a_fact * n / seconds,
                "peak_bytes": peak(),
            }
        )
        expected = seconds / n
        save()
    record["seconds"] = time.perf_counter() - began
    save()
    return record


def main() -> None:
    """Measure, print a line of JSON after each step, and keep the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b")
    parser.add_argument("--tokenizer", type=Path, default=GOLDEN)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens in one pass")
    parser.add_argument("--budget", type=float, default=660, help="seconds for everything")
    parser.add_argument("--json", type=Path)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
