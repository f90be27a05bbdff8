"""Claim: parts on Ray give the same bits as in one process, and the engine costs at most 15 %.

    python benchmarks/scale.py --json benchmarks/results/scale.json
    python benchmarks/scale.py --parts costs --models atlas HuggingFaceTB/SmolLM2-135M 1.1B

moments   Second moments in one process and on Ray with one and two workers: the same parts, in the
          same run. The matrices must be equal bit for bit. Without parts, the relative difference
          must be below 1e-12 for a float64 sum.
targets   The search for the targets of facts, in the same way.
costs     What a token, a fact and a part cost by the size of the model, in processor seconds of one
          thread, without Ray. A size such as 1.1B is a random model of that shape; a sample of the
          tokens is enough, because each token costs the same.

The overhead of the engine is 1 - work / (workers * wall), where work is the time in one process.
Another process that uses the same cores counts as overhead too: measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import factsmith as fs
from factsmith import atlas
from factsmith.cluster.shipping import Names, pack
from factsmith.core.executor import Executor
from factsmith.corpus.accumulator import Swept
from factsmith.corpus.moment_sums import MomentSums
from factsmith.corpus.passes import Pass
from factsmith.corpus.sweep import Corpus, sweep

SHAPES: dict[str, dict[str, int]] = {
    "0.36B": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
}
HEADS = {"0.36B": (15, 5, 49_152), "0.5B": (14, 2, 151_936), "1.1B": (32, 4, 32_000)}
"""Heads of queries, heads of keys and values, and the vocabulary of each shape."""


def random_model(name: str) -> fs.LanguageModel:
    """Return a model of a size with random weights, and the tokenizer of the atlas."""
    torch.manual_seed(0)
    heads, groups, vocab = HEADS[name]
    config = LlamaConfig(
        **SHAPES[name],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=name != "1.1B",
    )
    return fs.wrap(LlamaForCausalLM(config).eval(), fs.load("atlas").tokenizer)


def model_of(name: str) -> fs.LanguageModel:
    """Return the model of a name, or a random one of a size."""
    return random_model(name) if name in SHAPES else fs.load(name)


def changes(count: int) -> list[fs.Fact]:
    """Return facts of the atlas, each with the object of another one of its relation."""
    phrasings = {relation: atlas.phrasings(relation).trained[0] for relation in atlas.relations()}
    changed: list[fs.Fact] = []
    for relation, prompt in phrasings.items():
        rows = atlas.facts(relation)
        pairs = zip(rows, (*rows[1:], rows[0]), strict=True)
        changed += [fs.Fact(fact.subject, prompt, other.object) for fact, other in pairs]
    random.Random(0).shuffle(changed)
    subjects: dict[str, fs.Fact] = {}
    for fact in changed:
        subjects.setdefault(fact.subject, fact)
    return list(subjects.values())[:count]


def texts_of(n_tokens: int) -> list[str]:
    """Return texts of at least so many tokens of the atlas, each another one."""
    per_round = [f"{fact.prompt.format(fact.subject)} {fact.target}." for fact in changes(3000)]
    line = [" ".join(per_round[n : n + 6]) for n in range(0, len(per_round), 6)]
    rounds = -(-n_tokens // (30 * len(line)))
    return [f"{n}. {text}" for n in range(rounds) for text in line]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall time of some work, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compared(
    work: Callable[[], dict[str, torch.Tensor]], rounds: int, part_tokens: int | None
) -> dict[str, Any]:
    """Return the times of some work in one process and on Ray, after checking for equal bits."""
    seconds: dict[str, list[float]] = {
        "one piece": [],
        "parts": [],
        "1 worker": [],
        "2 workers": [],
    }
    with fs.running_on(fs.Local()):
        whole = work()
    with fs.running_on(fs.Local(cuts=True, part_tokens=part_tokens)):
        expected = work()

    def run(name: str, executor: Executor) -> None:
        with fs.running_on(executor):
            work()  # models are sent, and code is loaded
            for _ in range(rounds):
                took, result = timed(work)
                seconds[name].append(took)
                if name != "one piece":
                    assert all(torch.equal(result[key], expected[key]) for key in expected), name

    run("one piece", fs.Local())
    run("parts", fs.Local(cuts=True, part_tokens=part_tokens))
    for workers in (1, 2):
        with fs.Ray(workers=workers, part_tokens=part_tokens) as ray:
            name = "1 worker" if workers == 1 else "2 workers"
            run(name, ray)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    work_time = medians["parts"]
    return {
        "seconds": seconds,
        "median": medians,
        "times_faster": {n: work_time / medians[n] for n in ("1 worker", "2 workers")},
        "overhead": {
            "1 worker": 1 - work_time / medians["1 worker"],
            "2 workers": 1 - work_time / (2 * medians["2 workers"]),
        },
        "parts_against_one_piece": max(
            float((whole[key] - expected[key]).double().norm() / whole[key].double().norm())
            for key in whole
        ),
        "equal_bits": True,
    }


def measure_moments(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Return the record of the part `moments`."""
    lm, texts = model_of(name), texts_of(tokens)
    layer = lm.n_layers // 3

    def work() -> dict[str, torch.Tensor]:
        moments = fs.second_moments(lm, texts, [layer], max_tokens=tokens)
        return {str(layer): moments[layer].matrix}

    record = compared(work, rounds, max(tokens // 12, 1))
    assert record["parts_against_one_piece"] <= 1e-12, record
    return {"model": name, "layer": layer, "tokens": tokens, **record}


def measure_targets(name: str, n_facts: int, rounds: int) -> dict[str, Any]:
    """Return the record of the part `targets`."""
    lm, facts = model_of(name), changes(n_facts)
    config = fs.MemitConfig.recommended(lm)
    assert config.layers
    layer = config.layers[-1]
    moments = fs.second_moments(lm, texts_of(20_000), config.layers, max_tokens=20_000)

    def work() -> dict[str, torch.Tensor]:
        delta = fs.memit(lm, facts, config, moments=moments, contexts=["{}", "Yes. {}"])
        return {str(layer): delta.dense(layer)}

    return {"model": name, "facts": n_facts, **compared(work, rounds, None)}


def measure_costs(name: str, tokens: int, n_facts: int) -> dict[str, Any]:
    """Return what a token, a fact and a part of one model cost."""
    lm = model_of(name)
    layer = lm.n_layers // 3
    d_ff = lm.ffn[layer].d_ff
    corpus = Corpus(texts_of(tokens), max_tokens=tokens, halves=True)
    sums = MomentSums({layer: d_ff})
    began = time.process_time()
    swept: Swept = sweep(lm, corpus, [layer], [sums])
    token = (time.process_time() - began) / swept.n_tokens
    names = Names()
    names.add("model", lm)
    part = list(corpus.batches(lm))[:4]
    sent = sum(batch.n_tokens for batch in part)
    run = Pass(lm, (layer,), None, (sums.maker(),))
    record: dict[str, Any] = {
        "model": name,
        "parameters": sum(each.numel() for each in lm.module.parameters()),
        "layers": lm.n_layers,
        "layer": layer,
        "d_ff": d_ff,
        "tokens": swept.n_tokens,
        "seconds_per_million_tokens": token * 1e6,
        "task_bytes": pack(run, names).n_bytes,
        "part_bytes_per_token": pack(part, names).n_bytes / sent,
        "result_bytes": pack([sums], names).n_bytes,
        "result_bytes_per_pair": pack([sums], names).n_bytes / d_ff**2,
    }
    if n_facts:
        moment = sums.result(swept)[layer].mean
        held = {layer: fs.SecondMoment.from_matrix(moment + torch.eye(d_ff) * 1e-3, count=tokens)}
        began = time.process_time()
        facts = changes(n_facts)
        fs.memit(
            lm,
            facts,
            fs.MemitConfig(layers=(layer,), steps=20, scale="auto"),
            moments=held,
            contexts=["{}", "Yes. {}"],
        )
        record["facts"] = n_facts
        record["seconds_per_fact"] = (time.process_time() - began) / n_facts
    record["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return record


def main() -> None:
    """Measure the parts that were asked for, print them, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ["moments", "targets", "costs"]
    parser.add_argument("--parts", nargs="*", default=choices[:2], choices=choices)
    parser.add_argument("--models", nargs="*", default=["atlas"])
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = {}
    if args.json and args.json.is_file():
        kept = json.loads(args.json.read_text(encoding="utf-8"))
    work: dict[str, Callable[[str], dict[str, Any]]] = {
        "moments": lambda name: measure_moments(name, args.tokens, args.rounds),
        "targets": lambda name: measure_targets(name, args.facts, args.rounds),
        "costs": lambda name: measure_costs(name, args.tokens, args.facts),
    }
    for part in args.parts:
        for model in args.models:
            record = work[part](model)
            print(json.dumps({part: record}), flush=True)
            kept.setdefault(part, {})[Path(model).name] = record
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
