"""The strongest neurons of one layer at one token of a prompt.

    spot = token_neurons(lm, "The currency of Bulgaria is the", layer=1, position=3)
    spot.strongest[0].neuron, spot.strongest[0].coefficient, spot.strongest[0].writes
    spot.writes                     # the tokens that the whole layer promotes there
    spot.half                       # how many neurons carry half of what the layer adds

The sub-update of a neuron is its coefficient times its value. The neurons are ordered by the size
of their sub-updates, |m|·‖v‖ (Geva et al. 2022, arXiv 2203.14680). The share of a neuron is the
part of its sub-update that points in the direction of what the layer adds. The shares of all
neurons, and that of a bias, sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count
from ..core.tables import Shown, Table, counted, quoted
from ..corpus.scan import Bank
from ..model.address import Neuron, check_layer
from ..model.ffn import FeedForward
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .extremes import extreme_tokens
from .stream import Fired, carrying_half, check_position, read_stream, shares
from .unembedding import find_unembedding, output_scales
from .values import tokens_of


@dataclass(frozen=True)
class TokenNeuron:
    """How strongly one neuron fires at one token, and what it adds there.

    Attributes:
        neuron: (layer, i) or (layer, expert, i).
        coefficient: Its coefficient, times its expert's weight.
        size: The length of its sub-update.
        share: Its share of what the layer adds. Negative: it points the other way.
        writes: The tokens that its sub-update promotes most.
    """

    neuron: Neuron
    coefficient: float
    size: float
    share: float
    writes: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class TokenNeurons(Shown):
    """What the feed-forward memory of one layer does at one token.

    Attributes:
        prompt: The text.
        tokens: Its tokens, as text.
        position: The number of the token.
        layer: The layer.
        strongest: The neurons with the largest sub-updates, largest first.
        writes: The tokens that all neurons of the layer promote together.
        half: How many neurons make up half of the shares above zero, the largest first.
        n_neurons: How many neurons took part: in a layer with experts, those of the chosen ones.
        model: The name that the model was loaded by.
    """

    prompt: str
    tokens: tuple[str, ...]
    position: int
    layer: int
    strongest: tuple[TokenNeuron, ...]
    writes: tuple[str, ...]
    half: int
    n_neurons: int
    model: str

    def tables(self) -> list[Table]:
        """Return one table: the strongest neurons."""
        title = (
            f"layer {self.layer} at {self.tokens[self.position]!r}: it promotes "
            f"{quoted(self.writes)}; {counted(self.half, 'neuron')} of {self.n_neurons:,} carry "
            "half of what it adds"
        )
        columns = {"neuron": "<", "coefficient": ">", "share": ">", "what it writes": "<"}
        rows = [
            (
                " ".join(map(str, each.neuron)),
                f"{each.coefficient:+z.2f}",
                f"{each.share:+z.1%}",
                quoted(each.writes),
            )
            for each in self.strongest
        ]
        return [Table(title, columns, rows)]

    def rows(self) -> list[dict[str, Any]]:
        """Return the strongest neurons as rows of a table."""
        return [
            {
                "layer": each.neuron[0],
                "expert": each.neuron[1] if len(each.neuron) == 3 else None,
                "neuron": each.neuron[-1],
                "coefficient": each.coefficient,
                "size": each.size,
                "share": each.share,
                "writes": " | ".join(each.writes),
            }
            for each in self.strongest
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        return {
            "prompt": self.prompt,
            "tokens": list(self.tokens),
            "position": self.position,
            "layer": self.layer,
            "neurons": [
                {**vars(each), "neuron": list(each.neuron), "writes": list(each.writes)}
                for each in self.strongest
            ],
            "writes": list(self.writes),
            "half": self.half,
            "n_neurons": self.n_neurons,
            "model": self.model,
        }


@asking()
def token_neurons(
    lm: LanguageModel,
    prompt: str,
    layer: int,
    position: int = -1,
    *,
    top: int = 10,
    tokens: int = 5,
) -> TokenNeurons:
    """Return the neurons of a layer with the largest sub-updates at one token.

    Args:
        lm: The model.
        prompt: The text.
        layer: The layer.
        position: The number of the token. A negative number counts from the end.
        top: Number of neurons.
        tokens: Number of tokens to look up for each.

    Raises:
        LayerError: when the model has no such layer.
        InputError: when the prompt is empty, the position is outside it, or a number is below 1.
        UnsupportedModelError: as `find_unembedding` and `output_scales`.
    """
    check_model(lm)
    layer = check_layer(layer, lm.n_layers)
    top = check_count(top, "top", "the number of neurons")
    tokens = check_count(tokens, "tokens", "the number of tokens of each neuron")
    ids = lm.prompt_ids(prompt)
    at = check_position(position, len(ids))
    head, scales = find_unembedding(lm), output_scales(lm)
    stream = read_stream(lm, [ids], [at], scales)
    every = _every(lm.ffn[layer], stream.fired[layer], stream.factors[layer], stream.ffn[layer])
    largest = every.sizes.topk(min(top, len(every.sizes))).indices.tolist()
    neurons = [every.neurons[i] for i in largest]
    negative = [bool(every.m[i] < 0) for i in largest]
    written = tokens_of(lm, head, scales, neurons, negative, tokens)
    output = stream.written[layer].to(head.scale) * scales[layer].to(head.scale)
    promoted, *_ = extreme_tokens(head.fold(output), head.weight, tokens)
    return TokenNeurons(
        prompt=prompt,
        tokens=tuple(lm.tokenizer.decode([i]) for i in ids),
        position=at,
        layer=layer,
        strongest=tuple(
            TokenNeuron(
                neuron=neuron,
                coefficient=float(every.m[i]),
                size=float(every.sizes[i]),
                share=float(every.shares[i]),
                writes=tuple(token for token, _ in words),
            )
            for i, neuron, words in zip(largest, neurons, written, strict=True)
        ),
        writes=tuple(lm.tokenizer.decode([i]) for i in promoted[0].tolist()),
        half=int(carrying_half(every.shares)),
        n_neurons=len(every.neurons),
        model=lm.name,
    )


@dataclass(frozen=True, eq=False)
class _Every:
    """All neurons of a layer at one token, (n,) each, on the CPU."""

    neurons: list[Neuron]
    m: Tensor
    sizes: Tensor
    shares: Tensor


def _every(ffn: FeedForward, fired: list[Fired], factor: Tensor, added: Tensor) -> _Every:
    """Return coefficient, size and share of every neuron that took part.

    Args:
        ffn: The layer.
        fired: Its coefficients at one token.
        factor: (1, d_model) what a norm after the layer multiplies its output by.
        added: (1, d_model) what the layer adds to the stream.
    """
    direction = added * factor / added.square().sum(-1, keepdim=True).clamp(min=1e-30)
    neurons: list[Neuron] = []
    m, sizes, along = [], [], []
    for some in fired:
        of_banks = shares(ffn, some, direction)[0].cpu()
        for slot, place in enumerate(some.places[0].tolist()):
            if place < 0:
                continue
            values = ffn.banks[place].values
            bank: Bank = (ffn.layer, place) if ffn.n_experts else (ffn.layer,)
            lengths = (values.float() * factor.to(values.device)).norm(dim=1).cpu()
            coefficients = some.m[0, slot].cpu()
            neurons += [(*bank, i) for i in range(len(coefficients))]
            m.append(coefficients)
            sizes.append(coefficients.abs() * lengths)
            along.append(of_banks[slot])
    return _Every(neurons, torch.cat(m), torch.cat(sizes), torch.cat(along))
