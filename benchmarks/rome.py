"""ROME's cost for one fact, beside a plain loop that runs the whole model at every step, on random models of two shapes.

    python benchmarks/rome.py                       # one thread
    python benchmarks/rome.py --json rome.json --shapes atlas

Both do the same arithmetic on the same 21 contexts (the plain loop: one right-padded batch, every layer, every position, all logits),
and the table says how far their targets are apart. The floor counts 2 operations a weight, forward and backward once each, for the
layers above the edited one on the columns from the subject on: what is left of the plain loop's work when nothing is done twice.
Times are processor seconds, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from factsmith.edit.methods import RomeConfig, rome
from factsmith.edit.moments import SecondMoment
from factsmith.fact import Fact
from factsmith.model.load import LanguageModel, wrap
from factsmith.model.tokens import encode, subject_span, target_ids

SHAPES = {
    "atlas": {"n_layer": 8, "n_embd": 256, "n_head": 8, "vocab_size": 6144, "layer": 1},
    "gpt2-small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "layer": 4},
}
WORDS = ["The old town lies", "In the year after the war it", "She said that", "A letter from the north came with", "Some of the people"]
CONTEXTS = ["{}", *(f"{text} {n}. {{}}" for n in ("", "then", "and", "so") for text in WORDS)]
FACT = Fact("Danielle Darrieux", "The mother tongue of {} is", "English")


def plain(lm: LanguageModel, config: RomeConfig, layer: int) -> tuple[torch.Tensor, float]:
    """v_star by whole forward passes, and the loss it ended with."""
    target = target_ids(lm.tokenizer, FACT.text, FACT.target)
    texts = [c.replace("{}", FACT.text) for c in CONTEXTS] + [f"{FACT.subject} is a"]
    ids = [encode(lm.tokenizer, t)[0] for t in texts]
    last = [len(i) - 1 for i in ids]
    ids = [i + target[:-1] for i in ids[:-1]] + ids[-1:]
    width = max(map(len, ids))
    tokens = torch.tensor([i + [0] * (width - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    at = torch.tensor([subject_span(lm, t, FACT.subject)[1] - 1 for t in texts])
    rows = torch.arange(len(ids))
    delta = torch.zeros(lm.d_model, requires_grad=True)
    initial: list[torch.Tensor] = []

    def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        initial.append(output[0, at[0]].detach())
        return output.index_put((rows, at), delta.expand(len(ids), -1), accumulate=True)

    adam = torch.optim.Adam([delta], lr=config.lr)
    handle = lm.ffn[layer].down.register_forward_hook(add)
    first = None
    for step in range(config.steps):
        log_p = lm.module(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
        nll = torch.stack([-log_p[r, last[r] + i, t] for r in range(len(CONTEXTS)) for i, t in enumerate(target)]).mean()
        guard = log_p[-1, at[-1]]
        first = guard.detach() if first is None else first
        loss = nll + config.kl_factor * torch.nn.functional.kl_div(first, guard, log_target=True, reduction="sum")
        loss = loss + config.weight_decay * delta.norm() / initial[0].norm() ** 2
        if step == config.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= (config.clamp * initial[0].norm() / delta.norm()).clamp(max=1)
    handle.remove()
    return initial[0] + delta.detach(), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).resolve().parents[1] / "../shared/golden/facts-gpt2")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    results = []
    print(f"{'shape':12} {'plain s':>8} {'rome s':>8} {'faster':>7} {'floor s':>8} {'reached':>8} {'apart':>9}")
    for name in args.shapes:
        shape = dict(SHAPES[name])
        layer = shape.pop("layer")
        torch.manual_seed(0)
        lm = wrap(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)), tokenizer)
        config = RomeConfig(layer=layer, stop_loss=0)
        d_ff = lm.ffn[layer].d_ff
        samples = torch.randn(2 * d_ff, d_ff, generator=torch.Generator().manual_seed(0))
        moment = SecondMoment.from_matrix(samples.T @ samples / (2 * d_ff), count=2 * d_ff)
        rome(lm, FACT, RomeConfig(layer=layer, steps=2), moments=moment, contexts=CONTEXTS)  # warm up; factorises the moment
        start = time.process_time()
        delta = rome(lm, FACT, config, moments=moment, contexts=CONTEXTS)
        ours = time.process_time() - start
        start = time.process_time()
        v_star, loss = plain(lm, config, layer)
        theirs = time.process_time() - start
        apart = float((delta.v_star[0] - v_star).norm() / v_star.norm())
        ids, _ = encode(tokenizer, FACT.text)
        tail = len(ids) - subject_span(lm, FACT.text, FACT.subject)[1] + len(target_ids(tokenizer, FACT.text, FACT.target))
        weights = sum(p.numel() for p in lm.layers[0].parameters()) * (lm.n_layers - layer - 1)
        operations = config.steps * 2 * 2 * weights * len(CONTEXTS) * tail
        matrix = torch.randn(1024, 1024)
        start = time.process_time()
        for _ in range(10):
            matrix @ matrix
        floor = operations / (10 * 2 * 1024**3 / (time.process_time() - start))
        print(f"{name:12} {theirs:8.2f} {ours:8.2f} {theirs / ours:6.1f}x {floor:8.2f} {floor / ours:8.0%} {apart:9.1e}", flush=True)
        results.append({"shape": name, **SHAPES[name], "plain_s": theirs, "rome_s": ours, "floor_s": floor, "apart": apart, "loss": loss})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
