"""What a model is made of: how much of it is memory, how many neurons that is, and how full they look.

    found = census(lm)                                       # parameters by part
    found = census(lm, triggers=triggers, moments=moments)   # and idle neurons, and how many directions the coefficients use

The effective rank of a second moment C is exp(−Σ pᵢ ln pᵢ) of its eigenvalues' shares pᵢ (Roy & Vetterli 2007): d_ff when all directions
are used alike, 1 when one is. A layer whose text uses few of them has room for more keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FingerprintError, InputError
from ..core.tables import Shown, Table, counted
from ..model.language_model import LanguageModel, check_model
from .triggers import Triggers


@dataclass(frozen=True)
class LayerCensus:
    """One layer: parameters of its memory and its attention, and its neurons.

    idle            neurons whose mean square coefficient is below a ten-thousandth of their bank's median: they add next to nothing to what
                    the layer writes; None where the layer was not scanned
    effective_rank  of the second moment; None where none was given
    """

    layer: int
    ffn: int
    attention: int
    neurons: int
    experts: int
    idle: int | None
    effective_rank: float | None


@dataclass(frozen=True, repr=False)
class Census(Shown):
    """Parameters by part, and each layer's.

    ffn, attention, embeddings, other  numbers of parameters; a tied unembedding counts once, as an embedding
    """

    model: str
    ffn: int
    attention: int
    embeddings: int
    other: int
    layers: tuple[LayerCensus, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "parts": {
                "ffn": self.ffn,
                "attention": self.attention,
                "embeddings": self.embeddings,
                "other": self.other,
            },
            "neurons": self.neurons,
            "layers": [dict(vars(layer)) for layer in self.layers],
        }

    def tables(self) -> list[Table]:
        """Parameters by part, and layer by layer."""
        parts = {
            "memory (FFN)": self.ffn,
            "attention": self.attention,
            "embeddings": self.embeddings,
            "other": self.other,
        }
        columns = {
            "layer": [str(layer.layer) for layer in self.layers],
            "memory": [f"{layer.ffn:,}" for layer in self.layers],
            "attention": [f"{layer.attention:,}" for layer in self.layers],
            "neurons": [f"{layer.neurons:,}" for layer in self.layers],
            "idle": ["" if layer.idle is None else f"{layer.idle:,}" for layer in self.layers],
            "effective rank": [
                ""
                if layer.effective_rank is None
                else f"{layer.effective_rank:,.0f} of {layer.neurons:,}"
                for layer in self.layers
            ],
        }
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        return [
            Table(
                f"{self.model}: {self.parameters:,} parameters, {counted(self.neurons, 'neuron')}",
                {"part": "<", "parameters": ">", "share": ">"},
                [(name, f"{n:,}", f"{n / self.parameters:.1%}") for name, n in parts.items()],
            ),
            Table("by layer", dict.fromkeys(columns, ">"), [*zip(*columns.values(), strict=True)]),
        ]

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.ffn + self.attention + self.embeddings + self.other

    @property
    def neurons(self) -> int:
        """All neurons, those of experts included."""
        return sum(layer.neurons for layer in self.layers)


_IDLE = 1e-4


def census(
    lm: LanguageModel,
    *,
    triggers: Triggers | None = None,
    moments: Mapping[int, Tensor] | None = None,
) -> Census:
    """Count a model's parameters by part and layer, and look at how its neurons are used.

    triggers  of a corpus: idle neurons are counted on it
    moments   {layer: (d_ff, d_ff)} second moments: their effective rank

    Raises FingerprintError for another model's triggers, InputError for a matrix that is not its layer's.
    """
    check_model(lm)
    if triggers is not None and triggers.fingerprint != lm.fingerprint:
        raise FingerprintError(
            f"the triggers are of {triggers.model}, another model than {lm.name}: scan the corpus with it"
        )
    counted: set[int] = set()

    def count(module: nn.Module | None) -> int:
        new = {
            id(p): p.numel()
            for p in (() if module is None else module.parameters())
            if id(p) not in counted
        }
        counted.update(new)
        return sum(new.values())

    embeddings = count(lm.embedding) + count(lm.module.get_output_embeddings())
    embeddings += sum(
        count(m) for m in lm.module.modules() if isinstance(m, nn.Embedding)
    )  # of positions
    layers = []
    for ffn, attention in zip(lm.ffn, lm.attention, strict=True):
        moment = (moments or {}).get(ffn.layer)
        if moment is not None and (ffn.n_experts or tuple(moment.shape) != (ffn.d_ff, ffn.d_ff)):
            raise InputError(
                f"the second moment of layer {ffn.layer} is {tuple(moment.shape)}; expected one row for each of its neurons"
            )
        layers.append(
            LayerCensus(
                layer=ffn.layer,
                ffn=count(ffn.module),
                attention=count(attention),
                neurons=sum(bank.d_ff for bank in ffn.banks),
                experts=ffn.n_experts,
                idle=None if triggers is None else _idle(triggers, ffn.layer),
                effective_rank=None if moment is None else effective_rank(moment),
            )
        )
    return Census(
        model=lm.name,
        ffn=sum(layer.ffn for layer in layers),
        attention=sum(layer.attention for layer in layers),
        embeddings=embeddings,
        other=count(lm.module),
        layers=tuple(layers),
    )


def effective_rank(moment: Tensor) -> float:
    """exp of the entropy of a second moment's eigenvalues (n, n), taken as shares: 1 to n; 0 for a matrix of zeros."""
    values = torch.linalg.eigvalsh(moment.double()).clamp(min=0)
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _idle(triggers: Triggers, layer: int) -> int | None:
    """Neurons of a layer that are as good as never on in the corpus; None where it was not scanned."""
    own = [bank.mean_square for place, bank in triggers.banks.items() if place[0] == layer]
    return (
        sum(
            int((squares < _IDLE * squares.median()).sum() + (squares == 0).all() * len(squares))
            for squares in own
        )
        if own
        else None
    )
