"""Measure how fast a whole model is read: all values, and the triggers of all neurons.

    python benchmarks/read.py --json benchmarks/results/read.json

values    The ten most promoted tokens of all 36,864 values of GPT-2 small's shape, with random
          weights. The oracle is `plain_values`: one float32 product with the whole vocabulary and a
          topk, 256 values at a time. Both run in turn on each layer. The seconds are processor time
          of one thread: the median over layers, times twelve. factsmith also finds the ten most
          demoted tokens; the plain product that does so is timed separately.
triggers  Tokens a second of `find_triggers`, both signs, compared with `bare_pass`: the same
          batches through all layers, without the unembedding. On sentences of the bundled models'
          facts, for these models and for random ones with experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import factsmith as fs
from factsmith import atlas
from factsmith.atlas.texts import sentences
from factsmith.corpus.text import batches, pieces, windows
from factsmith.model.language_model import LanguageModel
from factsmith.read.extremes import extreme_tokens
from factsmith.read.unembedding import find_unembedding

TOP, TOKENS = 10, 4096


def plain_values(values: Tensor, weight: Tensor, k: int, *, bottom: bool = False) -> Tensor:
    """Return the ids of the k largest products of each value with the rows of a matrix.

    With `bottom`, also compute the k smallest.
    """
    ids = []
    for part in torch.split(values, 256):
        scores = part @ weight.T
        ids.append(scores.topk(k, dim=1).indices)
        if bottom:
            scores.topk(k, dim=1, largest=False)
    return torch.cat(ids)


def bare_pass(lm: LanguageModel, texts: list[str]) -> None:
    """Run the batches of a scan through all layers, and nothing else."""
    for window in windows(pieces(lm, texts)):
        for rows in batches(window, TOKENS):
            lm.last_hidden(lm.align([piece.ids for piece in rows], [0] * len(rows)))


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of a function, and its result."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def values() -> dict[str, Any]:
    """Measure the seconds for all values of GPT-2 small's shape."""
    torch.manual_seed(0)
    lm = fs.wrap(
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval(),
        fs.load("atlas").tokenizer,
    )
    head = find_unembedding(lm)
    ours, plain, both, agree = [], [], [], []
    for ffn in lm.ffn:
        folded = head.fold(ffn.values)
        seconds, (top, *_) = clock(lambda folded=folded: extreme_tokens(folded, head.weight, TOP))
        ours.append(seconds)
        seconds, expected = clock(lambda folded=folded: plain_values(folded, head.weight, TOP))
        plain.append(seconds)
        both.append(
            clock(lambda folded=folded: plain_values(folded, head.weight, TOP, bottom=True))[0]
        )
        agree.append(float((top == expected).all(1).double().mean()))
        print(
            f"layer {ffn.layer}: ours {ours[-1]:.2f} s, plain {plain[-1]:.2f} s, "
            f"top and bottom {both[-1]:.2f} s",
            flush=True,
        )
    layers = len(lm.ffn)
    seconds = {
        name: layers * statistics.median(each)
        for name, each in (("ours", ours), ("plain", plain), ("plain_both", both))
    }
    capabilities = torch.cpu.get_capabilities()
    return {
        "values": layers * lm.ffn[0].d_ff,
        "seconds": seconds,
        "times_faster": seconds["plain"] / seconds["ours"],
        "times_faster_both": seconds["plain_both"] / seconds["ours"],
        "same_top_10": statistics.fmean(agree),
        "processor": {
            name: capabilities.get(name)
            for name in ("cpu_name", "avx512_vnni", "avx512_bf16", "amx_int8")
        },
    }


_SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LARGE = {
    **_SMALL,
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
_MIXTRAL = {"num_local_experts": 8}
_QWEN = {"num_experts": 16, "num_experts_per_tok": 4, "mlp_only_layers": []}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-256": ("mixtral", {**_SMALL, **_MIXTRAL, "intermediate_size": 512}),
    "mixtral-768": ("mixtral", {**_LARGE, **_MIXTRAL, "intermediate_size": 2048}),
    "qwen2_moe-256": (
        "qwen2_moe",
        {**_SMALL, **_QWEN, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    ),
    "qwen2_moe-768": (
        "qwen2_moe",
        {**_LARGE, **_QWEN, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 2048},
    ),
}
"""Random models with experts: {name with the width of the hidden state: (family, shape)}."""


def with_experts(name: str) -> LanguageModel:
    """Make one of `EXPERTS`, with the tokenizer of a bundled model.

    Its weights are large enough that the router's choices differ.
    """
    family, shape = EXPERTS[name]
    tokenizer = fs.load("atlas").tokenizer
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=len(tokenizer), **special, **shape)
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.3 * parameter.shape[-1] ** -0.5)
    return fs.wrap(module, tokenizer)


def triggers(name: str, n_facts: int) -> dict[str, Any]:
    """Measure tokens a second of a scan and of a bare pass, in turn on five parts of the text."""
    lm = with_experts(name) if name in EXPERTS else fs.load(name)
    texts = sentences(atlas.facts()[:n_facts])
    parts = [texts[start::5] for start in range(5)]
    ours, bare = [], []
    n_tokens = 0
    with torch.no_grad():
        for part in parts:
            seconds, result = clock(
                lambda part=part: fs.find_triggers(lm, part, top=25, batch_tokens=TOKENS)
            )
            ours.append(result.n_tokens / seconds)
            bare.append(result.n_tokens / clock(lambda part=part: bare_pass(lm, part))[0])
            n_tokens += result.n_tokens
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(
        f"{name}: {statistics.median(ours):,.0f} tokens a second, "
        f"bare pass {statistics.median(bare):,.0f}: {ratio:.2f} of it",
        flush=True,
    )
    return {
        "tokens": n_tokens,
        "tokens_a_second": statistics.median(ours),
        "bare": statistics.median(bare),
        "share_of_bare": ratio,
    }


def main() -> None:
    """Measure the parts that are asked for, and add them to the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", default=["values", "triggers"], choices=["values", "triggers"]
    )
    parser.add_argument("--facts", type=int, default=2000, help="facts whose sentences are scanned")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if "values" in given.parts:
        results["values"] = values()
        print(json.dumps(results["values"]), flush=True)
    if "triggers" in given.parts:
        results["triggers"] = {
            name: triggers(name, given.facts) for name in (*atlas.names(), *EXPERTS)
        }
    if given.json:
        before = json.loads(given.json.read_text()) if given.json.is_file() else {}
        given.json.write_text(json.dumps({**before, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
