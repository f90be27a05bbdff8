"""The search for v_star next to a plain loop that runs the whole model at every step.

    python benchmarks/patch.py --json benchmarks/results/patch.json
    python benchmarks/patch.py --default --json benchmarks/results/patch.json
    python benchmarks/patch.py --gpu --json patch-gpu.json
    python benchmarks/patch.py --gpu --tiny

The first line measures GPT-2 small's shape, on one thread in float32, in about 5 minutes. The
second measures the default search on the same shape, in about 3 minutes. The third measures Llama-3
8B's shape in bf16, with 100 facts in one batch. The fourth runs the same on a tiny shape, on any
machine.

`plain_search` is the oracle. It takes one fact after another. The contexts and the guard of a fact
are one right-padded batch. It runs every layer at every position, computes all logits, and uses
torch's own Adam. It knows nothing of factsmith, and is given ids and modules. Both sides make all
20 evaluations.

The default search does other work than the plain loop: it ends when a target is reached. A model
with random weights says nothing that a target could change, so `--default` first teaches the shape
some sentences, each with a fact. Then both searches look for other targets of these facts. A row
says how long a fact takes, how probable its target is in all contexts (the geometric mean of the
probabilities, then the mean over the facts), how many targets are reached, and how long δ is in
units of the stream's norm.

The floor is the work that every exact search must do, in multiply-adds. Each distinct prefix token
goes once through all layers. The live columns (from the subject on, without padding) go once
through the layers up to the edited one. Then they go 20 times forward and 19 times backward (for
activations) through the layers above, and through the unembedding where an answer or the guard is
read. The products of attention are left out (below 1 %). Divided by the rate of one thread in a
product of two 2048 × 2048 float32 matrices in the same run, the floor is in seconds. Times are
processor seconds of one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from factsmith.core.fact import Fact
from factsmith.edit import batches
from factsmith.edit.batches import batch_bytes
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.keys import Site, read_stream
from factsmith.edit.questions import tokenize_fact
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig, Targets
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from plain_search import gemm_rate, multiply_adds, plain
from taught import taught

GOLDEN = Path(__file__).resolve().parents[1] / "../shared/golden/facts-gpt2"
COUNTERFACT = Path(__file__).resolve().parents[1] / "../shared/data/counterfact/slim-10000.json"
REFERENCE = {"memit": 14.6, "rome": 32.8}
"""Seconds that the authors' code takes for a fact on the same shape, one thread, float32."""
WORDS = [
    "The old town lies",
    "In the year after the war it",
    "She said that",
    "A letter from the north came with",
    "Some of the people",
]
ROME_CONTEXTS = [
    "{}",
    *(f"{text} {n}. {{}}" for n in ("", "then it was", "and yet", "so") for text in WORDS),
]
MEMIT_CONTEXTS = [
    "{}",
    "The old town lies in the north of. {}",
    "Therefore it was said that some of the. {}",
    "Because the war came after a year. {}",
    "I have seen a letter from the. {}",
    "You are one of those who came. {}",
]


@contextmanager
def in_one_batch() -> Generator[None, None, None]:
    """Search all facts in one batch, however much padding that needs."""
    kept, batches._pass_cost = batches._pass_cost, lambda lm: 10**9
    try:
        yield
    finally:
        batches._pass_cost = kept


def measured(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of a call, and its result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def peak(run: Callable[[], Any]) -> int:
    """Return the most bytes held at a time, in addition to those held before, by the profiler."""
    gc.collect()  # otherwise garbage of earlier work is freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held, most = 0, 0
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def facts_for(lm: LanguageModel, n: int) -> list[Fact]:
    """Return facts of CounterFact, evenly spread, or made-up ones without the file."""
    if not COUNTERFACT.is_file():
        names = [
            "Danielle Darrieux",
            "Edwin of Northumbria",
            "LeBron James",
            "Anaal Nathrakh",
            "Marie Curie",
            "Alan Turing",
        ]
        return [
            Fact(
                f"{names[i % len(names)]} {i}",
                "The mother tongue of {} is",
                "English",
                target_true=("French", "Dutch", "Greek")[i % 3],
            )
            for i in range(n)
        ]
    records = json.loads(COUNTERFACT.read_text(encoding="utf-8"))
    facts: list[Fact] = []
    for record in records[:: max(1, len(records) // (2 * n))]:
        subject, prompt = record["subject"], record["prompt"]
        if prompt.count(subject) == 1 and len(facts) < n:
            template, truth = prompt.replace(subject, "{}"), record["ground_truth"]
            facts.append(Fact(subject, template, record["target_new"], target_true=truth))
    return facts


class Job(NamedTuple):
    """A row of the table.

    Attributes:
        name: "memit" or "rome".
        layer: The layer where targets are searched.
        site: The place in the layer.
        contexts: The contexts.
        facts: Facts in one batch.
        repeats: How often the search is timed.
        plains: Facts of the plain loop.
    """

    name: str
    layer: int
    site: Site
    contexts: list[str]
    facts: int
    repeats: int
    plains: int


JOBS = (
    Job("memit", 5, "stream", MEMIT_CONTEXTS, 10, 2, 3),
    Job("memit", 5, "stream", MEMIT_CONTEXTS, 1, 2, 1),
    Job("memit", 5, "stream", MEMIT_CONTEXTS, 50, 1, 0),
    Job("rome", 4, "ffn", ROME_CONTEXTS, 1, 2, 1),
)


def difference(targets: Targets, i: int, v_star: Tensor) -> float:
    """Return the distance of a target from another v_star, in units of the way from v₀."""
    return float((targets.v_star[i] - v_star).norm() / (v_star - targets.v_initial[i]).norm())


def compare(lm: LanguageModel, facts: Sequence[Fact], job: Job) -> dict[str, Any]:
    """Return one row of the table: a batch of facts, and the plain loop on the first of them."""
    site, contexts, layer = job.site, job.contexts, min(job.layer, lm.n_layers - 2)
    config = TargetConfig(stop_loss=0, clamp=4.0 if site == "ffn" else 0.75)
    facts = list(facts[: job.facts])
    times, rates, slow, apart = [], [], [], []
    for _ in range(job.repeats):
        rates.append(gemm_rate())
        seconds, targets = measured(
            lambda: find_targets(lm, facts, layer, config, contexts, site=site, memory=2**40)
        )
        times.append(seconds / len(facts))
    for i, fact in enumerate(facts[: job.plains]):
        seconds, v_star = measured(lambda fact=fact: plain(lm, fact, layer, config, contexts, site))
        slow.append(seconds)
        apart.append(difference(targets, i, v_star))
        rates.append(gemm_rate())
    work = multiply_adds(lm, facts, layer, config, contexts)
    ours, rate = statistics.median(times), statistics.median(rates)
    row: dict[str, Any] = {
        "job": job.name,
        "layer": layer,
        "contexts": len(contexts),
        "facts": len(facts),
        "seconds_a_fact": ours,
        "gemm_multiply_adds_a_second": rate,
        "multiply_adds_a_fact": {name: count / len(facts) for name, count in work.items()},
        "floor_seconds_a_fact": sum(work.values()) / len(facts) / rate,
    }
    row["floor_reached"] = row["floor_seconds_a_fact"] / ours
    if slow:
        row |= {
            "plain_seconds_a_fact": statistics.mean(slow),
            "plain_facts": len(slow),
            "largest_relative_difference": max(apart),
        }
        row["times_faster_than_plain"] = row["plain_seconds_a_fact"] / ours
    row["times_faster_than_reference"] = REFERENCE[job.name] / ours
    return row


def memory_row(lm: LanguageModel, facts: Sequence[Fact], job: Job) -> dict[str, Any]:
    """Return the estimated and the measured memory of one batch."""
    layer, facts = min(job.layer, lm.n_layers - 2), facts[: job.facts]
    size = reduce(or_, (tokenize_fact(lm, fact, job.contexts).size for fact in facts))
    config = TargetConfig(stop_loss=0, steps=3)
    with in_one_batch():
        taken = peak(
            lambda: find_targets(
                lm, facts, layer, config, job.contexts, site=job.site, memory=2**40
            )
        )
    return {
        "job": job.name,
        "facts": job.facts,
        "estimate_bytes": batch_bytes(size, lm, layer),
        "peak_bytes": taken,
    }


def searched(lm: LanguageModel, facts: Sequence[Fact], job: Job, *, paper: bool) -> dict[str, Any]:
    """Return a row of the second table: the published search, or the default one.

    ROME takes one fact after another, and the MEMIT family all at once.
    """
    layer, facts = min(job.layer, lm.n_layers - 2), facts[: job.facts]
    config: TargetConfig
    if paper:
        config = TargetConfig(clamp=4.0 if job.site == "ffn" else 0.75)
    elif job.site == "ffn":
        config = RomeConfig(layer, scale="auto", steps=80, lr=0.1)
    else:
        config = MemitConfig((layer,), **MemitConfig.scale_free())
    batches = [[fact] for fact in facts] if job.site == "ffn" else [facts]
    seconds, parts = measured(
        lambda: [
            find_targets(lm, batch, layer, config, job.contexts, site=job.site) for batch in batches
        ]
    )
    ends = [record for targets in parts for record in targets.convergence]
    with torch.no_grad():
        lengths = [
            float(
                (t.v_star - t.v_initial)
                .norm(dim=-1)
                .div(read_stream(lm, t.facts, layer).norm(dim=-1))
                .sum()
            )
            for t in parts
        ]
    return {
        "job": job.name,
        "search": "published" if paper else "default",
        "facts": len(facts),
        "contexts": len(job.contexts),
        "seconds_a_fact": seconds / len(facts),
        "times_faster_than_reference": REFERENCE[job.name] * len(facts) / seconds,
        "evaluations": statistics.mean(record["steps"] for record in ends),
        "probability_of_target": statistics.mean(math.exp(-record["nll"]) for record in ends),
        "share_reached": statistics.mean(record["nll"] < 0.05 for record in ends),
        "norm": sum(lengths) / len(facts),
    }


SEARCHES = (
    Job("memit", 5, "stream", MEMIT_CONTEXTS, 10, 1, 0),
    Job("memit", 5, "stream", MEMIT_CONTEXTS, 1, 1, 0),
    Job("rome", 4, "ffn", ROME_CONTEXTS, 2, 1, 0),
)


def on_cpu_default(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the default search on GPT-2 small's shape, next to the published one."""
    lm = gpt2_shape(args)
    facts = facts_for(lm, 12)
    loss = taught(lm, facts, [*MEMIT_CONTEXTS, *ROME_CONTEXTS[1:]], 20 if args.tiny else 60)
    print(f"taught {len(facts)} sentences: {loss:.2f} nats a token", flush=True)
    rows = []
    for job in SEARCHES:
        for paper in (True, False):
            rows.append(searched(lm, facts, job, paper=paper))
            print(json.dumps(rows[-1]), flush=True)
    return {
        "shape": "GPT-2 small, taught 12 sentences, float32, one thread",
        "torch": torch.__version__,
        "nats_a_token": loss,
        "rows": rows,
    }


TABLE = {
    "s/fact": ("seconds_a_fact", "7.2f"),
    "plain": ("plain_seconds_a_fact", "7.2f"),
    "faster": ("times_faster_than_plain", "6.1f"),
    "vs ref": ("times_faster_than_reference", "6.1f"),
    "floor": ("floor_seconds_a_fact", "7.2f"),
    "reached": ("floor_reached", "8.0%"),
    "apart": ("largest_relative_difference", "8.1e"),
}
"""{column: (number of a row, format)}."""


def gpt2_shape(args: argparse.Namespace) -> LanguageModel:
    """Return GPT-2 small's shape with random weights, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 64, "n_head": 2} if args.tiny else {}
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    config = GPT2Config(**shape, vocab_size=50257, bos_token_id=0, eos_token_id=0)
    return wrap(GPT2LMHeadModel(config), tokenizer)


def on_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Measure GPT-2 small's shape, and how good the memory estimate is."""
    lm = gpt2_shape(args)
    facts = facts_for(lm, 50)
    find_targets(lm, facts[:1], 0, TargetConfig(steps=2), ["{}"])  # warm up
    results: dict[str, Any] = {
        "shape": "GPT-2 small, random weights, float32, one thread",
        "torch": torch.__version__,
        "rows": [],
        "memory": [],
    }
    print(f"{'job':14} {'facts':>5} " + " ".join(f"{name:>8}" for name in TABLE), flush=True)
    for job in JOBS:
        row = compare(lm, facts, job)
        results["rows"].append(row)
        cells = (f"{row.get(key, float('nan')):{form}}" for key, form in TABLE.values())
        print(
            f"{job.name:14} {job.facts:5} " + " ".join(f"{cell:>8}" for cell in cells), flush=True
        )
    for job in (JOBS[0], JOBS[1], JOBS[3]):
        row = memory_row(lm, facts, job)
        results["memory"].append(row)
        estimate, taken = (row[name] / 2**20 for name in ("estimate_bytes", "peak_bytes"))
        print(
            f"{job.name:14} {job.facts:5} estimated {estimate:7.0f} MiB, peak {taken:7.0f} MiB",
            flush=True,
        )
    return results


LARGE = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_llama(
    shape: dict[str, int], vocabulary: int, device: str, tokenizer: Any
) -> LanguageModel:
    """Return a Llama with random weights in bfloat16."""
    config = LlamaConfig(
        **shape, vocab_size=vocabulary, rope_theta=500000.0, max_position_embeddings=8192
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return wrap(module, tokenizer)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall seconds of a call, with all of the GPU's work, and its result."""
    on_device = torch.cuda.is_available()
    if on_device:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if on_device:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def on_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Measure 100 facts in one batch, and a few facts one by one, in wall seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    shape, vocabulary = (SMALL, 6144) if args.tiny else (LARGE, 128256)
    lm = random_llama(shape, vocabulary, device, tokenizer)
    layer = min(8, lm.n_layers - 2)
    facts = facts_for(lm, args.facts)
    few = facts[: args.plain_facts]
    settings = TargetConfig(stop_loss=0, lr=0.1, clamp=0.75)

    def search(some: Sequence[Fact], **options: Any) -> Targets:
        return find_targets(lm, some, layer, settings, MEMIT_CONTEXTS, site="stream", **options)

    search(few[:1])  # warm up
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    with in_one_batch():
        batch, targets = timed(lambda: search(facts, memory=2**40))
    top = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    cut, _ = timed(lambda: search(facts))
    alone, ones = timed(lambda: [search([fact]) for fact in few])
    plain(lm, few[0], layer, settings, MEMIT_CONTEXTS, "stream")  # warm up
    loop, plains = timed(
        lambda: [plain(lm, fact, layer, settings, MEMIT_CONTEXTS, "stream") for fact in few]
    )
    size = reduce(or_, (tokenize_fact(lm, fact, MEMIT_CONTEXTS).size for fact in facts))

    def apart(others: Sequence[Tensor]) -> float:
        return statistics.median(difference(targets, i, v) for i, v in enumerate(others))

    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "shape": shape,
        "dtype": "bfloat16",
        "facts": len(facts),
        "seconds_a_fact_in_one_batch": batch / len(facts),
        "seconds_a_fact_in_batches_of_alike": cut / len(facts),
        "seconds_a_fact_one_by_one": alone / len(few),
        "seconds_a_fact_plain": loop / len(few),
        "median_relative_difference_from_one_by_one": apart([one.v_star[0] for one in ones]),
        "median_relative_difference_from_plain": apart(plains),
        "peak_bytes": top,
        "estimate_bytes": batch_bytes(size, lm, layer),
    }
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    """Measure on the CPU or the GPU, and write the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=GOLDEN)
    parser.add_argument(
        "--gpu", action="store_true", help="the large shape, on a GPU if there is one"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape, to see that the benchmark runs"
    )
    parser.add_argument(
        "--default", action="store_true", help="the default search, on a shape that was taught"
    )
    parser.add_argument("--facts", type=int, default=100, help="facts in the batch of --gpu")
    parser.add_argument("--plain-facts", type=int, default=5, help="facts of the loops")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kind = "gpu" if args.gpu else "default" if args.default else "cpu"
    result = {"gpu": on_gpu, "default": on_cpu_default, "cpu": on_cpu}[kind](args)
    if args.json:
        kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
        kept[kind] = result
        args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
