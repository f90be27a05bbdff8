"""The plain ways to do the jobs of `real.py`, each in a process that `real.py` times as a whole.

    python benchmarks/real_plain.py trace --model path/to/folder-or-file.gguf

The last line that it prints is JSON: `more`, the processor seconds that the rest of a loop would
take of which only a part ran, and `words`, what ran.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TRACED = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
CELLS = 15
"""Cells of a trace that the plain loop computes; the other cells cost the same."""

ROME_LAYER, MEMIT_LAYER = 5, 8
TARGETS = 20
"""Targets of the job "memit". The loop searches one, and the others cost the same."""


def loaded(model: str) -> tuple[Any, Any]:
    """Return a model and its tokenizer, by transformers alone."""
    path = Path(model)
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent if options else path)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return module.eval(), tokenizer


def load(model: str) -> tuple[float, str]:
    """Load the model."""
    loaded(model)
    return 0.0, "transformers' from_pretrained"


def ask(model: str) -> tuple[float, str]:
    """Load the model and continue a prompt greedily."""
    module, tokenizer = loaded(model)
    ids = tokenizer(TRACED[0], return_tensors="pt")
    with torch.no_grad():
        module.generate(**ids, max_new_tokens=8, do_sample=False)
    return 0.0, "from_pretrained and generate"


def trace(model: str) -> tuple[float, str]:
    """Trace some cells of the prompt, with one whole pass for each."""
    from locate import PlainRuns, plain_trace

    module, tokenizer = loaded(model)
    text, subject = TRACED
    coded = tokenizer(text, return_offsets_mapping=True)
    first, stop = text.index(subject), text.index(subject) + len(subject)
    inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < stop and b > first]
    ids, span = coded["input_ids"], (inside[0], inside[-1] + 1)
    embedding = module.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    noise = 3 * embedding.std() * torch.randn(10, span[1] - span[0], embedding.shape[1])
    answer = module(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
    runs = PlainRuns([ids] * 11, [answer], span, noise)
    layers = list(module.model.layers)
    every = [(token, layer) for token in range(len(ids)) for layer in range(len(layers))]
    cells = random.Random(0).sample(every, CELLS)
    began = time.process_time()
    plain_trace(module, layers, runs, cells=cells)
    seconds = time.process_time() - began
    more = seconds / CELLS * (len(every) - CELLS)
    return more, f"{len(every)} cells, scaled from {CELLS}; {len(ids)} tokens, {len(layers)} layers"


def rome(model: str) -> tuple[float, str]:
    """Search one of ROME's targets, without second moments, proof and drift."""
    _search(model, ROME_LAYER, is_memit=False)
    return 0.0, "v_star of one fact alone: 21 contexts, 20 steps"


def memit(model: str) -> tuple[float, str]:
    """Search one of MEMIT's targets."""
    seconds = _search(model, MEMIT_LAYER, is_memit=True)
    return seconds * (
        TARGETS - 1
    ), f"v_star of {TARGETS} facts, scaled from one: 6 contexts, 25 steps"


def _search(model: str, layer: int, *, is_memit: bool) -> float:
    """Search v_star of one fact by whole passes, and return the processor seconds."""
    from factsmith.edit.target import TargetConfig
    from patch import MEMIT_CONTEXTS, ROME_CONTEXTS
    from plain_search import plain_search

    module, tokenizer = loaded(model)
    text, subject = TRACED
    target = tokenizer(" Rome", add_special_tokens=False)["input_ids"]
    contexts = MEMIT_CONTEXTS if is_memit else ROME_CONTEXTS
    texts = [*(context.replace("{}", text) for context in contexts), f"{subject} is a"]
    coded = [tokenizer(each, return_offsets_mapping=True) for each in texts]
    places = [
        _last_of(each, one["offset_mapping"], subject)
        for each, one in zip(texts, coded, strict=True)
    ]
    rows = [[*one["input_ids"], *target[:-1]] for one in coded[:-1]] + [coded[-1]["input_ids"]]
    block = module.model.layers[layer]
    site = block if is_memit else block.mlp.down_proj
    config = TargetConfig(
        steps=25 if is_memit else 20, clamp=0.75 if is_memit else 4.0, stop_loss=0.0
    )
    began = time.process_time()
    plain_search(module, site, rows, places, target, config)
    return time.process_time() - began


def _last_of(text: str, offsets: Sequence[tuple[int, int]], subject: str) -> int:
    """Return the column of the subject's last token."""
    stop = text.rindex(subject) + len(subject)
    return max(i for i, (first, end) in enumerate(offsets) if first < stop and end > first)


WAYS = {"load": load, "ask": ask, "trace": trace, "rome": rome, "memit": memit}


def main() -> None:
    """Run one of the plain ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    more, words = WAYS[given.way](given.model)
    print(json.dumps({"more": round(more, 1), "words": words}))


if __name__ == "__main__":
    main()
