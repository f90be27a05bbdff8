"""Reading a whole model: every value's tokens against a plain product, every neuron's triggers against a bare pass.

    python benchmarks/read.py --json benchmarks/results/read.json

values    GPT-2 small's shape with random weights, one thread: the ten most promoted tokens of all 36,864 values. `plain_values` is the
          oracle: one float32 product with the whole vocabulary and a topk, 256 values at a time. Both are run in turn on each layer,
          processor time of one thread, median over layers times twelve. Ours finds the ten most demoted as well; the plain side of that
          is timed apart.
triggers  the bundled models on sentences of their facts: tokens a second of `find_triggers`, both signs, beside those of `bare_pass`, the
          same batches through all layers without the unembedding.
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
from transformers import GPT2Config, GPT2LMHeadModel

import factsmith as fs
from factsmith.inspect.values import extreme_tokens, find_unembedding
from factsmith.model import atlas
from factsmith.model.atlas.corpus import told
from factsmith.model.load import LanguageModel
from factsmith.model.scan import batches, pieces, windows
from factsmith.model.tokens import align

TOP, TOKENS = 10, 4096


def plain_values(values: Tensor, weight: Tensor, k: int, *, bottom: bool = False) -> Tensor:
    """The ids of the k largest products of each value with the rows of a matrix; with `bottom` the k smallest are found as well."""
    found = []
    for part in torch.split(values, 256):
        scores = part @ weight.T
        found.append(scores.topk(k, dim=1).indices)
        if bottom:
            scores.topk(k, dim=1, largest=False)
    return torch.cat(found)


def bare_pass(lm: LanguageModel, texts: list[str]) -> None:
    """The batches of a scan through all layers, and nothing else."""
    for window in windows(pieces(lm, texts)):
        for rows in batches(window, TOKENS):
            lm.last_hidden(align(lm, [piece.ids for piece in rows], [0] * len(rows)))


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what came out."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def values() -> dict[str, Any]:
    """Seconds for all values of GPT-2 small's shape."""
    torch.manual_seed(0)
    lm = fs.wrap(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval(), fs.load("atlas").tokenizer)
    head = find_unembedding(lm)
    ours, plain, both, agree = [], [], [], []
    for ffn in lm.ffn:
        folded = head.fold(ffn.values)
        seconds, (top, *_) = clock(lambda folded=folded: extreme_tokens(folded, head.weight, TOP))
        ours.append(seconds)
        seconds, expected = clock(lambda folded=folded: plain_values(folded, head.weight, TOP))
        plain.append(seconds)
        both.append(clock(lambda folded=folded: plain_values(folded, head.weight, TOP, bottom=True))[0])
        agree.append(float((top == expected).all(1).double().mean()))
        print(f"layer {ffn.layer}: ours {ours[-1]:.2f} s, plain {plain[-1]:.2f} s, top and bottom {both[-1]:.2f} s", flush=True)
    layers = len(lm.ffn)
    seconds = {name: layers * statistics.median(each) for name, each in (("ours", ours), ("plain", plain), ("plain_both", both))}
    capabilities = torch.cpu.get_capabilities()
    return {
        "values": layers * lm.ffn[0].d_ff,
        "seconds": seconds,
        "times_faster": seconds["plain"] / seconds["ours"],
        "times_faster_both": seconds["plain_both"] / seconds["ours"],
        "same_top_10": statistics.fmean(agree),
        "processor": {name: capabilities.get(name) for name in ("cpu_name", "avx512_vnni", "avx512_bf16", "amx_int8")},
    }


def triggers(name: str, n_facts: int) -> dict[str, Any]:
    """Tokens a second of a scan and of a bare pass, in turn on five parts of the text."""
    lm = fs.load(name)
    texts = told(atlas.facts()[:n_facts])
    parts = [texts[start::5] for start in range(5)]
    ours, bare = [], []
    n_tokens = 0
    with torch.no_grad():
        for part in parts:
            seconds, found = clock(lambda part=part: fs.find_triggers(lm, part, top=25, batch_tokens=TOKENS))
            ours.append(found.n_tokens / seconds)
            bare.append(found.n_tokens / clock(lambda part=part: bare_pass(lm, part))[0])
            n_tokens += found.n_tokens
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(
        f"{name}: {statistics.median(ours):,.0f} tokens a second, bare pass {statistics.median(bare):,.0f}: {ratio:.2f} of it", flush=True
    )
    return {"tokens": n_tokens, "tokens_a_second": statistics.median(ours), "bare": statistics.median(bare), "share_of_bare": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["values", "triggers"], choices=["values", "triggers"])
    parser.add_argument("--facts", type=int, default=4000, help="facts whose sentences are scanned")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if "values" in given.parts:
        found["values"] = values()
        print(json.dumps(found["values"]), flush=True)
    if "triggers" in given.parts:
        found["triggers"] = {name: triggers(name, given.facts) for name in atlas.names()}
    if given.json:
        before = json.loads(given.json.read_text()) if given.json.is_file() else {}
        given.json.write_text(json.dumps({**before, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
