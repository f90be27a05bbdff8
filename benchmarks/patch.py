"""The search for v_star beside a plain loop that runs the whole model at every step: speed, floor, batch sizes, memory.

    python benchmarks/patch.py --json benchmarks/results/patch.json        # GPT-2 small's shape, one thread, float32: about 5 minutes
    python benchmarks/patch.py --gpu --json patch-gpu.json                 # Llama-3 8B's shape, bf16: 100 facts in one batch
    python benchmarks/patch.py --gpu --tiny                                # the same on a tiny shape, wherever it is run

`plain_search` is the oracle: one fact after another, its contexts and the guard as one right-padded batch, every layer, every position,
all logits, and torch's own Adam. It knows nothing of factsmith; ids and modules are handed to it. Both sides make all 20 evaluations.

The floor is what no exact search can do without, in multiply-adds: every distinct prefix token once through all layers, the live columns
(from the subject on, padding not counted) once through the layers up to the edited one, then 20 times forward and 19 times backward (with
respect to activations) through the layers above, and through the unembedding where an answer or the guard is read; attention's products
are left out (below 1 %). Divided by what one thread reaches in a product of two 2048 × 2048 float32 matrices in the same run, it gives
seconds. Times are processor seconds of one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from factsmith.core.fact import Fact
from factsmith.edit import target as search
from factsmith.edit.search import find_targets
from factsmith.edit.target import TargetConfig
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from factsmith.model.tokens import encode, subject_span, target_ids

GOLDEN = Path(__file__).resolve().parents[1] / "../shared/golden/facts-gpt2"
COUNTERFACT = Path(__file__).resolve().parents[1] / "../shared/data/counterfact/slim-10000.json"
REFERENCE = {"memit": 14.6, "rome": 32.8}
"""Seconds a fact of the authors' code on the same shape, one thread, float32."""
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


def plain_search(
    module: nn.Module,
    site: nn.Module,
    rows: Sequence[Sequence[int]],
    places: Sequence[int],
    target: Sequence[int],
    config: TargetConfig,
) -> tuple[Tensor, float]:
    """v_star of one fact and the last loss, by whole forward passes. ROME, equation 4, with δ added to the output of `site`.

    rows: token ids of every context with the target's tokens but the last behind it, the bare prompt first, then of the guard; places: the
    subject's last token in each.
    """
    device = next(module.parameters()).device
    width = max(map(len, rows))
    tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=device)
    at, each = torch.tensor(places, device=device), torch.arange(len(rows), device=device)
    initial: list[Tensor] = []
    delta: Tensor | None = None

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal delta
        states = output[0] if isinstance(output, tuple) else output
        initial.append(states[0, at[0]].detach().float())
        if delta is None:
            delta = torch.zeros_like(initial[0], requires_grad=True)
        changed = states.index_put(
            (each, at), delta.to(states).expand(len(rows), -1), accumulate=True
        )
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = site.register_forward_hook(add)
    first, adam = None, None
    for step in range(config.steps):
        log_p = (
            module(input_ids=tokens, attention_mask=mask, use_cache=False)
            .logits.float()
            .log_softmax(-1)
        )
        assert delta is not None
        adam = adam or torch.optim.Adam([delta], lr=config.lr)
        last = [len(ids) - len(target) for ids in rows[:-1]]
        nll = torch.stack(
            [-log_p[r, last[r] + i, t] for r in range(len(last)) for i, t in enumerate(target)]
        ).mean()
        guard = log_p[-1, at[-1]]
        first = guard.detach() if first is None else first
        loss = nll + config.kl_factor * torch.nn.functional.kl_div(
            first, guard, log_target=True, reduction="sum"
        )
        loss = loss + config.weight_decay * delta.norm() / initial[0].norm() ** 2
        if step == config.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= (config.clamp * initial[0].norm() / delta.norm()).clamp(max=1)
    handle.remove()
    assert delta is not None
    return initial[0] + delta.detach(), loss.item()


def plain(
    lm: LanguageModel,
    fact: Fact,
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
    site: search.Site,
) -> Tensor:
    """`plain_search` with the ids and modules of a model."""
    target = target_ids(lm.tokenizer, fact.text, str(fact.target))
    texts = [*(c.replace("{}", fact.text) for c in contexts), f"{fact.subject} is a"]
    ids = [encode(lm.tokenizer, text)[0] for text in texts]
    places = [subject_span(lm, text, fact.subject)[1] - 1 for text in texts]
    rows = [*(x + target[:-1] for x in ids[:-1]), ids[-1]]
    module = lm.ffn[layer].down if site == "ffn" else lm.layers[layer]
    return plain_search(lm.module, module, rows, places, target, config)[0]


def multiply_adds(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
) -> dict[str, float]:
    """What the search cannot do without: {"prefix", "below", "above", "logits"}; counted from the model's own modules and the token ids."""
    weights = [sum(p.numel() for p in module.parameters() if p.dim() == 2) for module in lm.layers]
    head = lm.module.get_output_embeddings().weight.numel()
    prefixes: set[tuple[int, ...]] = set()
    live, read = 0, 0
    for fact in facts:
        target = target_ids(lm.tokenizer, fact.text, str(fact.target))
        seen: set[tuple[int, ...]] = set()
        for text in (*(c.replace("{}", fact.text) for c in contexts), fact.subject):
            ids, _ = encode(lm.tokenizer, text)
            place = subject_span(lm, text, fact.subject)[1] - 1
            prefixes |= {tuple(ids[: i + 1]) for i in range(place)}
            is_guard = text == fact.subject
            if not (
                is_guard and tuple(ids) in seen
            ):  # the bare prompt begins with the subject: its row serves as the guard
                live += len(ids) - place + (0 if is_guard else len(target) - 1)
            seen.add(tuple(ids[: place + 1]))
            read += 1 if is_guard else len(target)
    passes = 2 * config.steps - 1
    return {
        "prefix": float(len(prefixes) * sum(weights)),
        "below": float(live * sum(weights[: layer + 1])),
        "above": float(passes * live * sum(weights[layer + 1 :])),
        "logits": float(passes * read * head),
    }


@contextmanager
def in_one_batch() -> Generator[None, None, None]:
    """Whatever it costs in padding."""
    kept, search._PASS = search._PASS, (10**9, 10**9)
    try:
        yield
    finally:
        search._PASS = kept


def gemm_rate() -> float:
    """Multiply-adds a second of one thread in large float32 products: the best of three."""
    matrix = torch.randn(2048, 2048)
    times = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(2):
            matrix @ matrix
        times.append((time.process_time() - start) / 2)
    return float(2048**3 / min(times))


def measured(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what was returned."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def peak(run: Callable[[], Any]) -> int:
    """The most bytes held at a time beyond what was held before, by the profiler's account of allocations on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    held, most = 0, 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def facts_for(lm: LanguageModel, n: int) -> list[Fact]:
    """Counterfactual facts, evenly spread over the file; made up ones when it is not there."""
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
            Fact(f"{names[i % len(names)]} {i}", "The mother tongue of {} is", "English")
            for i in range(n)
        ]
    records = json.loads(COUNTERFACT.read_text(encoding="utf-8"))
    found: list[Fact] = []
    for record in records[:: max(1, len(records) // (2 * n))]:
        subject, prompt = record["subject"], record["prompt"]
        if prompt.count(subject) == 1 and len(found) < n:
            found.append(Fact(subject, prompt.replace(subject, "{}"), record["target_new"]))
    return found


def compare(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    site: search.Site,
    contexts: Sequence[str],
    batch: int,
    repeats: int,
    plains: int,
) -> dict[str, Any]:
    """One row of the table: `batch` facts at a time, beside the plain loop on the first `plains` of them, in turn."""
    config = TargetConfig(stop_loss=0, clamp=4.0 if site == "ffn" else 0.75)
    facts = list(facts[:batch])
    times, rates, slow, apart = [], [], [], []
    for _ in range(repeats):
        rates.append(gemm_rate())
        seconds, targets = measured(
            lambda: find_targets(lm, facts, layer, config, contexts, site=site, memory=2**40)
        )
        times.append(seconds / len(facts))
    for i, fact in enumerate(facts[:plains]):
        seconds, v_star = measured(lambda fact=fact: plain(lm, fact, layer, config, contexts, site))
        slow.append(seconds)
        apart.append(
            float((targets.v_star[i] - v_star).norm() / (v_star - targets.v_initial[i]).norm())
        )
        rates.append(gemm_rate())
    work = multiply_adds(lm, facts, layer, config, contexts)
    ours, rate = statistics.median(times), statistics.median(rates)
    row = {
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
    return row


def on_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """The table on GPT-2 small's shape, and what the memory estimate is worth."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2} if args.tiny else {}
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    lm = wrap(
        GPT2LMHeadModel(GPT2Config(**shape, vocab_size=50257, bos_token_id=0, eos_token_id=0)),
        tokenizer,
    )
    facts = facts_for(lm, 50)
    find_targets(lm, facts[:1], 0, TargetConfig(steps=2), ["{}"])  # warm up
    results: dict[str, Any] = {
        "shape": "GPT-2 small, random weights, float32, one thread",
        "torch": torch.__version__,
        "rows": [],
    }
    print(
        f"{'job':14} {'facts':>5} {'s/fact':>7} {'plain':>7} {'faster':>7} {'vs ref':>7} {'floor':>7} {'reached':>8} {'apart':>8}",
        flush=True,
    )
    jobs: list[tuple[str, int, search.Site, list[str], int, int, int]] = [
        ("memit", 5, "stream", MEMIT_CONTEXTS, 10, 2, 3),
        ("memit", 5, "stream", MEMIT_CONTEXTS, 1, 2, 1),
        ("memit", 5, "stream", MEMIT_CONTEXTS, 50, 1, 0),
        ("rome", 4, "ffn", ROME_CONTEXTS, 1, 2, 1),
    ]
    for name, layer, site, contexts, batch, repeats, plains in jobs:
        layer = min(layer, lm.n_layers - 2)
        row = compare(lm, facts, layer, site, contexts, batch, repeats, plains)
        row = {
            "job": name,
            "layer": layer,
            "contexts": len(contexts),
            **row,
            "times_faster_than_reference": REFERENCE[name] / row["seconds_a_fact"],
        }
        results["rows"].append(row)
        print(
            f"{name:14} {batch:5} {row['seconds_a_fact']:7.2f} {row.get('plain_seconds_a_fact', float('nan')):7.2f} "
            f"{row.get('times_faster_than_plain', float('nan')):6.1f}x {row['times_faster_than_reference']:6.1f}x "
            f"{row['floor_seconds_a_fact']:7.2f} {row['floor_reached']:8.0%} {row.get('largest_relative_difference', float('nan')):8.1e}",
            flush=True,
        )
    results["memory"] = []
    for name, layer, site, contexts, batch, *_ in [jobs[0], jobs[1], jobs[3]]:
        layer = min(layer, lm.n_layers - 2)
        size = reduce(or_, (search._tokenize(lm, fact, contexts).size for fact in facts[:batch]))
        config = TargetConfig(stop_loss=0, steps=3)
        with in_one_batch():
            taken = peak(
                lambda layer=layer, contexts=contexts, site=site, batch=batch, config=config: (
                    find_targets(
                        lm, facts[:batch], layer, config, contexts, site=site, memory=2**40
                    )
                )
            )
        row = {
            "job": name,
            "facts": batch,
            "estimate_bytes": search._bytes(size, lm, layer),
            "peak_bytes": taken,
        }
        results["memory"].append(row)
        print(
            f"{name:14} {batch:5} estimated {row['estimate_bytes'] / 2**20:7.0f} MiB, peak {taken / 2**20:7.0f} MiB",
            flush=True,
        )
    return results


def on_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """100 facts in one batch, and the loop one by one on a few of them; wall seconds, everything waited for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    shape = (
        {
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        if args.tiny
        else {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
    )
    config = LlamaConfig(
        **shape,
        vocab_size=6144 if args.tiny else 128256,
        rope_theta=500000.0,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        module = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    lm = wrap(module, tokenizer)
    layer = min(8, lm.n_layers - 2)
    facts = facts_for(lm, args.facts)
    settings = TargetConfig(stop_loss=0, lr=0.1, clamp=0.75)

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    few = facts[: args.plain_facts]
    find_targets(lm, few[:1], layer, settings, MEMIT_CONTEXTS, site="stream")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    with in_one_batch():
        batch, targets = timed(
            lambda: find_targets(
                lm, facts, layer, settings, MEMIT_CONTEXTS, site="stream", memory=2**40
            )
        )
    top = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    cut, _ = timed(lambda: find_targets(lm, facts, layer, settings, MEMIT_CONTEXTS, site="stream"))
    alone, ones = timed(
        lambda: [
            find_targets(lm, [fact], layer, settings, MEMIT_CONTEXTS, site="stream") for fact in few
        ]
    )
    plain(lm, few[0], layer, settings, MEMIT_CONTEXTS, "stream")
    loop, plains = timed(
        lambda: [plain(lm, fact, layer, settings, MEMIT_CONTEXTS, "stream") for fact in few]
    )
    size = reduce(or_, (search._tokenize(lm, fact, MEMIT_CONTEXTS).size for fact in facts))

    def apart(others: Sequence[Tensor]) -> float:
        moved = [
            float((targets.v_star[i] - v).norm() / (v - targets.v_initial[i]).norm())
            for i, v in enumerate(others)
        ]
        return statistics.median(moved)

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
        "estimate_bytes": search._bytes(size, lm, layer),
    }
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=GOLDEN)
    parser.add_argument(
        "--gpu", action="store_true", help="the large shape; on a GPU when there is one"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape, to see that the benchmark runs"
    )
    parser.add_argument("--facts", type=int, default=100, help="facts in the batch of --gpu")
    parser.add_argument("--plain-facts", type=int, default=5, help="facts of the loops beside it")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = on_gpu(args) if args.gpu else on_cpu(args)
    if args.json:
        kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
        kept["gpu" if args.gpu else "cpu"] = result
        args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
