"""Shallow or semantic: what the triggers of a layer's neurons have in common.

    found = profile(triggers)                                            # last token, last two tokens, position
    found = profile(triggers, labels={"relation": {text: "P36", ...}})   # and what is known about the texts
    found.share                                                          # (layers, features): neurons selective for each

Geva et al. 2021 (arXiv 2012.14913) had people read the triggers of some keys and found shallow patterns (a last word) in the lower layers
and semantic ones above. Here a neuron is selective for a feature when at least half of its triggers share one value of it, and more than
in 99 of 100 neurons whose triggers are dealt out at random among the layer's: the control keeps how common each value is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count, check_seed
from ..errors import InputError
from ..model.scan import Bank
from .triggers import BankTriggers, Sign, Triggers


@dataclass(frozen=True, eq=False, kw_only=True)
class Profile:
    """What triggers share, by layer and feature.

    layers    the layers, ascending
    features  "token", "bigram", "position", and the labels given
    share     (layers, features) of the neurons with triggers, how many are selective for the feature
    purity    (layers, features) mean share of a neuron's triggers that have its commonest value
    control   (layers, features) the same for triggers dealt out at random
    needed    (layers, features) the purity that counts as selective
    neurons   {bank: (d_ff, features)} each neuron's purity; NaN for one with fewer triggers than `least`
    counted   (layers,) neurons with triggers enough
    """

    layers: tuple[int, ...]
    features: tuple[str, ...]
    share: Tensor
    purity: Tensor
    control: Tensor
    needed: Tensor
    neurons: Mapping[Bank, Tensor]
    counted: Tensor

    def selective(self, feature: str, layer: int) -> list[tuple[int, ...]]:
        """The neurons of a layer that are selective for a feature, purest first. Raises InputError for one that is not there."""
        if feature not in self.features or layer not in self.layers:
            raise InputError(f"no profile of {feature!r} in layer {layer}; there are {', '.join(self.features)} in layers {self.layers}")
        column, needed = self.features.index(feature), float(self.needed[self.layers.index(layer), self.features.index(feature)])
        found = [
            (float(purity), (*bank, i))
            for bank, each in self.neurons.items()
            if bank[0] == layer
            for i, purity in enumerate(each[:, column].tolist())
            if purity >= needed
        ]
        return [neuron for _, neuron in sorted(found, key=lambda pair: (-pair[0], pair[1]))]


_QUANTILE = 0.99


def profile(
    triggers: Triggers,
    labels: Mapping[str, Mapping[str, Hashable]] | None = None,
    *,
    sign: Sign = "top",
    least: int = 10,
    seed: int = 0,
) -> Profile:
    """How many of each layer's neurons have triggers that share a token, a position, or a label of their text.

    labels  {feature: {text: value}}; triggers in texts without a value are left out for that feature
    least   triggers a neuron must have to be counted
    seed    of the control

    Raises InputError for labels that no text has.
    """
    least, seed = check_count(least, "least", "how many triggers a neuron must have"), check_seed(seed)
    coded: dict[str, Tensor] = {}
    for feature, by_text in (labels or {}).items():
        codes = {value: code for code, value in enumerate(dict.fromkeys(by_text.values()))}
        coded[feature] = torch.tensor([codes[by_text[text]] if text in by_text else -1 for text in triggers.texts])
        if not bool((coded[feature] >= 0).any()):
            raise InputError(f"no text of these triggers has a label {feature!r}; give {{text: value}} for the texts of the corpus")
    features = ("token", "bigram", "position", *coded)
    layers = tuple(sorted({bank[0] for bank in triggers.banks}))
    generator = torch.Generator().manual_seed(seed)
    neurons: dict[Bank, list[Tensor]] = {bank: [] for bank in triggers.banks}
    shape = (len(layers), len(features))
    share, purity, control, needed = (torch.full(shape, torch.nan) for _ in range(4))
    counted = torch.zeros(len(layers), dtype=torch.int64)
    for row, layer in enumerate(layers):
        banks = [bank for bank in triggers.banks if bank[0] == layer]
        for column, feature in enumerate(features):
            values = [_values(triggers, bank, sign, coded.get(feature), feature) for bank in banks]
            each = [_purity(v, least) for v in values]
            for bank, own in zip(banks, each, strict=True):
                neurons[bank].append(own)
            both = torch.cat(each)
            both = both[~both.isnan()]
            if not len(both):
                continue
            dealt = torch.cat([_purity(v, least) for v in _dealt(values, generator)])
            dealt = dealt[~dealt.isnan()]
            needed[row, column] = max(0.5, float(dealt.quantile(_QUANTILE)) + 1e-6)
            share[row, column] = (both >= needed[row, column]).float().mean()
            purity[row, column], control[row, column] = both.mean(), dealt.mean()
            counted[row] = max(int(counted[row]), len(both))
    return Profile(
        layers=layers,
        features=features,
        share=share,
        purity=purity,
        control=control,
        needed=needed,
        neurons={bank: torch.stack(each, 1) for bank, each in neurons.items()},
        counted=counted,
    )


def _values(triggers: Triggers, bank: Bank, sign: Sign, codes: Tensor | None, feature: str) -> Tensor:
    """A feature's value at every trigger of a bank: (d_ff, t) int64, -1 where there is none."""
    own: BankTriggers = triggers.banks[bank]
    there = own.coefficients[sign] != 0
    if codes is not None:
        found = codes[own.texts[sign]]
    elif feature == "position":
        found = own.positions[sign]
    else:
        found = triggers.tokens(bank, sign)
        if feature == "bigram":
            before = triggers.tokens(bank, sign, back=1)
            found = torch.where(before >= 0, before * (int(found.max()) + 1) + found, -1)
    return torch.where(there, found, -1)


def _purity(values: Tensor, least: int) -> Tensor:
    """The share of each row's values (n, t) that equal its commonest; -1 does not count, rows with fewer than `least` give NaN."""
    ordered = values.sort(dim=1).values
    # The length of the run of equal values that ends at each place; runs of -1 stay 0.
    run = torch.zeros_like(ordered)
    run[:, 0] = 1
    for i in range(1, ordered.shape[1]):
        run[:, i] = torch.where(ordered[:, i] == ordered[:, i - 1], run[:, i - 1] + 1, 1)
    most = torch.where(ordered >= 0, run, 0).amax(1)
    n = (values >= 0).sum(1)
    return torch.where(n >= least, most / n.clamp(min=1), torch.nan)


def _dealt(values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same values, dealt out at random among the places that have one."""
    flat = torch.cat([v.flatten() for v in values])
    places = (flat >= 0).nonzero()[:, 0]
    flat[places] = flat[places][torch.randperm(len(places), generator=generator)]
    return [part.view(v.shape) for part, v in zip(flat.split([v.numel() for v in values]), values, strict=True)]  # type: ignore[no-untyped-call]
