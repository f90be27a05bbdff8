"""Scale any neurons while the prompts of one fact run, many sets of neurons in one batch.

    subject = Subject(lm, prompts, target)
    subject.log_p([neurons, others], 0.0, "last")      # (2, n_prompts)

The scope "last" scales where the target is predicted, and "every" at every token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from factsmith.model.address import Neuron
from factsmith.model.language_model import LanguageModel
from factsmith.model.replay import Replay, record
from factsmith.model.tokens import target_ids
from factsmith.model.trace import replacing


class Subject:
    """The prompts of one fact, run once, and then log p(target) with any neurons scaled."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[str], target: str) -> None:
        self.lm = lm
        heads = [lm.prompt_ids(p) for p in prompts]
        tail = target_ids(lm.tokenizer, prompts[0], target)
        batch = lm.align([h + tail[:-1] for h in heads], [len(h) - 1 for h in heads])
        self.target = torch.tensor(tail)
        self.replays: dict[str, Replay] = {"every": record(lm, batch)}
        self.replays["last"] = self.replays["every"].at(batch.pivot)
        self.clean = self.log_p([()], 1.0, "last")[0]

    @torch.no_grad()
    def log_p(
        self,
        sets: Sequence[Sequence[Neuron]],
        scale: float,
        scope: str,
        prompts: Sequence[int] | None = None,
    ) -> Tensor:
        """Return log p(target) with each set of neurons scaled: (len(sets), n_prompts) float64.

        Args:
            sets: The sets of neurons.
            scale: The factor of their coefficients.
            scope: "last" or "every".
            prompts: Indices of the prompts. None: all.
        """
        replay = self.replays[scope]
        columns = range(replay.batch.size) if prompts is None else prompts
        pairs = [(s, p) for s in range(len(sets)) for p in columns]
        size = max(1, 3000 // replay.n_live)
        parts = [
            self._run(replay, [sets[s] for s, _ in part], [p for _, p in part], scale)
            for part in _cut(pairs, size)
        ]
        return torch.cat(parts).view(len(sets), len(columns))

    def _run(
        self, replay: Replay, sets: Sequence[Sequence[Neuron]], rows: Sequence[int], scale: float
    ) -> Tensor:
        """log p(target) of some rows, each with neurons of its own scaled."""
        ffn = self.lm.ffn
        factors = torch.ones(len(sets), len(ffn), max(f.d_ff for f in ffn))
        touched: set[int] = set()
        for row, neurons in enumerate(sets):
            if neurons:
                place = torch.tensor(neurons)  # (n, 2)
                factors[row, place[:, 0], place[:, 1]] = scale
                touched.update(place[:, 0].unique().tolist())

        def scaled(layer: int) -> Callable[[Tensor], Tensor]:
            factor = factors[:, layer, None, : ffn[layer].d_ff]
            return lambda m: (m.view(len(sets), -1, m.shape[-1]) * factor).view(m.shape)

        first = min(touched, default=len(ffn))
        index = torch.tensor(rows)
        with replacing({ffn[layer].down: scaled(layer) for layer in touched}, where="input"):
            hidden = replay.resume(first, replay.hidden[first][index], index)
        logits = replay.logits(hidden[:, -len(self.target) :]).double()
        return (
            logits.log_softmax(-1)
            .gather(-1, self.target.expand(len(rows), -1)[..., None])[..., 0]
            .sum(1)
        )


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The items in parts of a size."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def ranked(scores: Tensor, n: int) -> list[Neuron]:
    """Return the n neurons with the largest scores (n_layers, d_ff), largest first."""
    return [
        divmod(flat, scores.shape[1])
        for flat in scores.flatten().topk(min(n, scores.numel())).indices.tolist()
    ]


def anywhere(lm: LanguageModel, n: int, draw: random.Random) -> list[Neuron]:
    """Return n random neurons of the whole model."""
    every = [(layer, i) for layer in range(lm.n_layers) for i in range(lm.ffn[layer].d_ff)]
    return list(draw.sample(every, n))


def same_layers(lm: LanguageModel, neurons: Sequence[Neuron], draw: random.Random) -> list[Neuron]:
    """Return as many other neurons of the same layers."""
    drawn: list[Neuron] = []
    for layer, count in sorted(Counter(n[0] for n in neurons).items()):
        others = [(layer, i) for i in range(lm.ffn[layer].d_ff) if (layer, i) not in set(neurons)]
        drawn += draw.sample(others, min(count, len(others)))
    return drawn
