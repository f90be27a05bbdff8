"""Second moments: the speed of one pass for all layers, and how much text is enough.

    python benchmarks/moments.py --json benchmarks/results/moments.json
    python benchmarks/moments.py --parts speed         # or: text, edits

speed  One pass against one full pass for each layer, with the same numbers. The model has GPT-2
       small's shape and random weights, and runs in one thread. Both sides run in turn on each part
       of the text. The figure is processor time, the median over the parts.

       `plain_moment` is the oracle. It runs the whole model with logits over batches of padded
       texts in the order given, once for each layer, and sums products in float32. It does not use
       factsmith; it gets the module. The texts are runs of 40 to 100 tokens of ../shared/data/text.
       The layers are those that edits use (MEMIT's are 27 to 35 % up in GPT-2 XL, 11 to 29 % in
       GPT-J, 12 to 25 % in Llama 3) and the middle ones, for which a plain pass costs the same.
       Sorting saves padding, and how much depends on the texts. So the last figure multiplies the
       plain side's time by the share of its columns that hold a token.
text   The worth of a matrix of n tokens a neuron, on trained models: its two halves compared with
       each other, which is what users see, and the same figures measured with a matrix of much
       other text. `excess` is how much more C⁻¹ k disturbs that text than the best u does. C⁻¹ k is
       scaled so that it gives a key k of other text its new value.
edits  Efficacy, generalization and specificity (greedy exact match) of real facts written with each
       of these matrices: one by one by ROME at the recommended layer, and in one batch by MEMIT.

`speed` and `text` also measure what bf16 does to the matrix. It must stay below the difference
between the halves.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from factsmith.corpus.moments import SecondMoment, second_moments
from factsmith.edit.configs import MemitConfig, RomeConfig
from factsmith.edit.contexts import generate_contexts
from factsmith.edit.delta import applied
from factsmith.edit.methods import memit
from factsmith.edit.rome import rome_each
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from factsmith.patch.layer_choice import LayerScore
from factsmith.patch.trial_facts import judge, trial_facts

SHARED = Path(__file__).resolve().parents[1] / "../shared"
PER_NEURON = (2, 4, 8, 16, 32, 64, 128, 200)
EDITED = (2, 4, 8, 32, 128)
REFERENCE = 400
"""Tokens a neuron of the text that represents all text: twice as many as the largest matrix."""


@torch.no_grad()
def plain_moment(
    module: nn.Module, site: nn.Module, rows: Sequence[Sequence[int]], batch: int = 32
) -> tuple[Tensor, int]:
    """Return E[m mᵀ] of the input of `site`, and the number of tokens.

    The passes are full ones with logits over padded batches of token ids, one layer at a time.
    """
    seen: list[Tensor] = []
    handle = site.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    total, count = torch.zeros(()), 0
    try:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(map(len, part))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            module(input_ids=ids, attention_mask=mask)
            m = seen.pop()[mask.bool()]
            total = total + m.T @ m
            count += len(m)
    finally:
        handle.remove()
    return total / count, count


def prose(longest: int = 600) -> list[str]:
    """Return the lines of the shared books, in the same random order every time."""
    lines = [
        line.strip()[:longest]
        for path in sorted((SHARED / "data" / "text").glob("*.txt"))
        for line in path.open(errors="replace")
    ]
    lines = [line for line in lines if len(line) > 20]
    random.Random(0).shuffle(lines)
    return lines


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of some work, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def apart(a: Tensor, b: Tensor) -> float:
    """Return the relative difference of two matrices."""
    return float((a - b).double().norm() / b.double().norm())


def passages(lm: LanguageModel, tokens: int, parts: int) -> list[list[str]]:
    """Return parts of about so many tokens each, in runs of 40 to 100 tokens."""
    text = " ".join(prose()[: 40 * tokens * parts // 400])[: 8 * tokens * parts]
    ids, draw = iter(lm.prompt_ids(text)), random.Random(0)
    passages: list[list[str]] = []
    for _ in range(parts):
        runs: list[str] = []
        left = tokens
        while left > 0:
            run = [next(ids) for _ in range(draw.randint(40, 100))]
            runs.append(lm.tokenizer.decode(run))
            left -= len(run)
        passages.append(runs)
    return passages


def share_of_tokens(rows: Sequence[Sequence[int]], batch: int = 32) -> float:
    """Return which share of the columns of `plain_moment`'s batches holds a token."""
    columns = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        columns += max(map(len, part)) * len(part)
    return sum(map(len, rows)) / columns


def agreement(
    layer: int, wide: SecondMoment, narrow: SecondMoment, oracle: Tensor | None
) -> dict[str, Any]:
    """Return how far the matrices of one layer differ, after checking that it is little."""
    measured = {
        "layer": layer,
        "tokens": wide.count,
        "float32_against_plain": None if oracle is None else apart(wide.matrix, oracle),
        "bfloat16_against_float32": apart(narrow.matrix, wide.matrix),
        "split_half": wide.split_half,
    }
    assert (measured["float32_against_plain"] or 0) < 1e-5, measured
    assert measured["bfloat16_against_float32"] < 0.5 * (wide.split_half or 0), measured
    return measured


def add_ratios(record: dict[str, Any], share: float) -> None:
    """Add to a record how much faster our side is, and how much of that is not padding."""
    seconds = record["seconds"]
    for name in ("float32", "bfloat16"):
        faster = statistics.median(
            plain / ours for plain, ours in zip(seconds["plain"], seconds[name], strict=True)
        )
        record[f"times_faster_{name}"] = faster
        record[f"times_faster_{name}_without_padding"] = faster * share


def measure_speed(
    tokens: int, parts: int, layer_sets: Sequence[tuple[int, ...]] = ((3, 4, 5), (5, 6, 7))
) -> list[dict[str, Any]]:
    """Return the records of the part `speed`, one for each set of layers."""
    torch.manual_seed(0)
    lm = wrap(GPT2LMHeadModel(GPT2Config(vocab_size=50257)).eval(), load("atlas").tokenizer)
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    records: list[dict[str, Any]] = [
        {"layers": layers, "seconds": {"plain": [], "float32": [], "bfloat16": []}, "agreement": []}
        for layers in layer_sets
    ]
    shares, counts = [], []
    for texts in passages(lm, tokens, parts):
        rows = [lm.prompt_ids(text) for text in texts]
        counts.append(sum(map(len, rows)))
        shares.append(share_of_tokens(rows))
        oracle: dict[int, Tensor] = {}
        spent = 0.0
        for layer in layer_sets[0]:
            work = partial(plain_moment, lm.module, lm.ffn[layer].down, rows)
            took, (oracle[layer], _) = seconds_of(work)
            spent += took
        for record in records:
            layers, moments = record["layers"], {}
            record["seconds"]["plain"].append(spent)
            for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
                took, moments[name] = seconds_of(
                    partial(second_moments, lm, texts, layers, max_tokens=math.inf, dtype=dtype)
                )
                record["seconds"][name].append(took)
            record["agreement"] += [
                agreement(x, moments["float32"][x], moments["bfloat16"][x], oracle.get(x))
                for x in layers
            ]
        last = [{name: times[-1] for name, times in r["seconds"].items()} for r in records]
        print(last, flush=True)
    for record in records:
        add_ratios(record, statistics.mean(shares))
        record["tokens"] = counts
        shown = {key: value for key, value in record.items() if key != "agreement"}
        print(json.dumps(shown), flush=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.module.state_dict().items())
    first = records[0]
    assert first["times_faster_float32"] > 2.5, "slower than promised"
    assert first["times_faster_bfloat16"] > 5, "slower than promised"
    return records


def divided(lm: LanguageModel, texts: Sequence[str], tokens: Sequence[int]) -> list[list[str]]:
    """Return runs of texts, one after the other, of at least so many tokens each."""
    parts, at = [], iter(texts)
    for n in tokens:
        part: list[str] = []
        while n > 0:
            part.append(next(at))
            n -= len(lm.prompt_ids(part[-1]))
        parts.append(part)
    return parts


def keys_of(lm: LanguageModel, layer: int, texts: Sequence[str]) -> Tensor:
    """Return the coefficients at the last token of each text's beginning, (n, d_ff) float64."""
    return torch.stack([lm.coefficients(text[:200], [layer])[0, -1] for text in texts]).double()


def excess_of(moment: SecondMoment, keys: Tensor, truth: Tensor, best: Tensor) -> Tensor:
    """Return for each key how much more than necessary C⁻¹ k disturbs text of moment `truth`."""
    u = moment.solve(keys)
    return (u @ truth * u).sum(1) / (u * keys).sum(1) ** 2 / best - 1


def text_row(
    per: int, layer: int, moment: SecondMoment, truth: SecondMoment, keys: Tensor
) -> dict[str, Any]:
    """Return what a matrix says about itself, and the same measured with other text."""
    true = excess_of(moment, keys, truth.matrix, 1 / (keys * truth.solve(keys)).sum(1))
    return {
        "tokens_per_neuron": per,
        "layer": layer,
        "tokens": moment.count,
        "split_half": moment.split_half,
        "error": apart(moment.matrix, truth.matrix),
        "excess": moment.excess,
        "true_excess_median": float(true.median()),
        "true_excess_95": float(true.quantile(0.95)),
    }


def narrow_row(
    per: int,
    layer: int,
    matrices: tuple[SecondMoment, SecondMoment],
    truth: SecondMoment,
    keys: Tensor,
) -> dict[str, Any]:
    """Return what bf16 does to a matrix, given in float32 and in bf16."""
    wide, rounded = matrices
    best = 1 / (keys * truth.solve(keys)).sum(1)
    more = excess_of(rounded, keys, truth.matrix, best) - excess_of(wide, keys, truth.matrix, best)
    off = apart(rounded.matrix, wide.matrix)
    assert off < 0.5 * (wide.split_half or 0)
    return {
        "tokens_per_neuron": per,
        "layer": layer,
        "bfloat16_against_float32": off,
        "split_half": wide.split_half,
        "added_excess_median": float(more.median()),
        "excess": wide.excess,
    }


def measure_text(
    name: str, lm: LanguageModel, layers: Sequence[int]
) -> tuple[dict[str, Any], dict[int, dict[int, SecondMoment]]]:
    """Return the record of the part `text`, and the moments by tokens a neuron and layer."""
    d_ff = max(lm.ffn[layer].d_ff for layer in layers)
    ours, others, held_out = divided(lm, prose(), (max(PER_NEURON) * d_ff, REFERENCE * d_ff, 4000))
    reference = second_moments(lm, others, layers, max_tokens=math.inf)
    keys = {layer: keys_of(lm, layer, held_out[:150]) for layer in layers}
    moments: dict[int, dict[int, SecondMoment]] = {}
    rows, narrow = [], []
    for per in PER_NEURON:
        moments[per] = second_moments(lm, ours, layers, max_tokens=per * d_ff)
        for layer in layers:
            row = text_row(per, layer, moments[per][layer], reference[layer], keys[layer])
            rows.append(row)
            shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            print(name, " ".join(shown), flush=True)
    for per in (8, 32):
        rounded = second_moments(lm, ours, layers, max_tokens=per * d_ff, dtype=torch.bfloat16)
        for layer in layers:
            both = (moments[per][layer], rounded[layer])
            narrow.append(narrow_row(per, layer, both, reference[layer], keys[layer]))
            print(name, narrow[-1], flush=True)
    record = {
        "model": name,
        "d_ff": d_ff,
        "layers": list(layers),
        "reference_tokens": reference[layers[0]].count,
        "rows": rows,
        "bfloat16": narrow,
    }
    return record, moments


def measure_edits(
    name: str,
    lm: LanguageModel,
    moments: dict[int, dict[int, SecondMoment]],
    n_single: int,
    n_batch: int,
) -> list[dict[str, Any]]:
    """Return the rows of the part `edits`: one for each number of tokens and each method."""
    facts = trial_facts(lm, max(n_single, n_batch), seed=7)
    contexts = generate_contexts(lm, 7)
    single, batch = RomeConfig.recommended(lm), MemitConfig.recommended(lm)
    rows = []
    for per in EDITED:
        held, trials = moments[per], []
        for fact, delta in zip(
            facts[:n_single],
            rome_each(lm, facts[:n_single], single, moments=held, contexts=contexts),
            strict=True,
        ):
            with applied(lm, delta):
                trials.append(judge(lm, fact))
        with applied(lm, memit(lm, facts[:n_batch], batch, moments=held, contexts=contexts)):
            together = [judge(lm, fact) for fact in facts[:n_batch]]
        for method, some in (("rome", trials), ("memit", together)):
            score = LayerScore.of(0, some)
            kept = {
                key: getattr(score, key)
                for key in ("efficacy", "generalization", "specificity", "score")
            }
            rows.append(
                {
                    "model": name,
                    "tokens_per_neuron": per,
                    "method": method,
                    "facts": len(some),
                    **kept,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure the parts that were asked for, and keep the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="*", default=["speed", "text", "edits"], choices=["speed", "text", "edits"]
    )
    parser.add_argument(
        "--models", nargs="*", default=["atlas", "golden"], help="models for text and edits"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=12_000,
        help="tokens in each part of the text of the speed comparison",
    )
    parser.add_argument("--repeats", type=int, default=2, help="parts of the text")
    parser.add_argument("--single", type=int, default=24, help="facts written one by one")
    parser.add_argument("--batch", type=int, default=40, help="facts written together")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text(encoding="utf-8"))

    def save(part: str, record: Any) -> None:
        results[part] = record
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if "speed" in args.parts:
        save("speed", measure_speed(args.tokens, args.repeats))
    if "text" in args.parts or "edits" in args.parts:
        for name in args.models:
            lm = load(name if name != "golden" else str(SHARED / "golden" / "facts-gpt2"))
            table, moments = measure_text(name, lm, (0, 1, 2))
            save("text", {**results.get("text", {}), name: table})
            if "edits" in args.parts and name != "golden":  # it knows few of the facts to try
                edits = measure_edits(name, lm, moments, args.single, args.batch)
                save("edits", {**results.get("edits", {}), name: edits})


if __name__ == "__main__":
    main()
