"""Shallow or semantic: what the triggers of a layer's neurons have in common.

    result = profile(triggers)                              # last one, two, three tokens; position
    result = profile(triggers, labels={"relation": {text: "P36", ...}})    # a label of the texts
    result = profile(triggers, labels={"capital": lambda t: t.prefix[-1:].isupper()})
    result.share                                            # (layers, features): selective neurons
    result.tally("relation", 3)                             # {"P36": 14, ...}: selective for what

Geva et al. 2021 (arXiv 2012.14913) had people read the triggers of some keys. They found shallow
patterns (a last word) in the lower layers and semantic ones above. Here a neuron is selective for a
feature when at least half of its triggers share one value, and more of them than in 99 of 100
neurons of a control. The control deals the triggers out at random among the layer's neurons, so it
keeps how common each value is.

A neuron that fires on one rare word fires in every sentence about the one thing with that word in
its name. So it seems to know all that the corpus says about the thing. Two arguments guard against
that: `groups` of texts that belong together, so that the control deals labels out group by group,
and `only`, which leaves triggers out, such as those inside the name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.checks import check_count, check_seed
from ..core.errors import InputError
from ..core.settled import settled
from ..core.tables import Shown, Table
from ..corpus.scan import Bank
from .features import (
    Feature,
    Label,
    filled_places,
    labelled,
    ngrams,
    positions,
    possible_share,
)
from .triggers import Sign, Trigger, Triggers, check_sign


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Profile(Shown):
    """What triggers share, by layer and feature.

    Attributes:
        layers: The layers, ascending.
        features: "token", "bigram", "trigram", "position", and the labels given.
        share: (layers, features), the share of the counted neurons that are selective for the
            feature. NaN where the control is so pure that no neuron differs from it.
        chance: (layers, features), the same for triggers or groups dealt out at random a second
            time: about 0.01 or less.
        purity: (layers, features), the mean share of a neuron's triggers that have its commonest
            value.
        control: (layers, features), the same for triggers or groups dealt out at random.
        needed: (layers, features), the purity from which a neuron is selective. Above 1 where more
            than 1 in 100 of the control is pure: then no neuron is.
        possible: (features,), how much of the corpus a neuron could be selective for: the share of
            the labelled texts whose value is common enough to fill half of a neuron's triggers.
            NaN for a feature that is not a mapping of texts.
        neurons: {bank: (d_ff, features)}, the purity of each neuron. NaN for a neuron with fewer
            triggers than `least`.
        counted: (layers,), the number of neurons with enough triggers.
    """

    layers: tuple[int, ...]
    features: tuple[str, ...]
    share: Tensor
    chance: Tensor
    purity: Tensor
    control: Tensor
    needed: Tensor
    possible: Tensor
    neurons: Mapping[Bank, Tensor]
    counted: Tensor
    _commonest: Mapping[Bank, Tensor] = field(repr=False)
    """{bank: (d_ff, features)}, the number of each neuron's commonest value. -1: none."""
    _values: Mapping[str, Sequence[Hashable]] = field(repr=False)
    """{feature: the value that each number means}."""

    def tables(self) -> list[Table]:
        """Return one table: the share of each layer's neurons selective for each feature."""
        rows = [
            (str(layer), f"{int(n):,}", *("" if math.isnan(x) else f"{x:.1%}" for x in share))
            for layer, n, share in zip(self.layers, self.counted, self.share.tolist(), strict=True)
        ]
        chance = [x for x in self.chance.flatten().tolist() if not math.isnan(x)]
        return [
            Table(
                "neurons selective for",
                {"layer": ">", "neurons": ">", **dict.fromkeys(self.features, ">")},
                rows,
                f"dealt out at random: at most {max(chance):.1%}" if chance else "",
            )
        ]

    def selective(
        self, feature: str, layer: int, *, without: Iterable[str] = ()
    ) -> list[tuple[int, ...]]:
        """Return the neurons of a layer that are selective for a feature, purest first.

        Args:
            feature: The feature.
            layer: The layer.
            without: Features for which they must not be selective.

        Raises:
            InputError: when the profile has no such feature or layer.
        """
        without = tuple(without)
        unknown = {feature, *without} - set(self.features)
        if unknown or layer not in self.layers:
            raise InputError(
                f"there is no profile of {min(unknown or {feature})!r} in layer {layer}. "
                f"The features are {', '.join(self.features)}, the layers {self.layers}."
            )
        row, column = self.layers.index(layer), self.features.index(feature)
        others = [self.features.index(other) for other in without]
        neurons: list[tuple[float, tuple[int, ...]]] = []
        for bank, each in self.neurons.items():
            if bank[0] == layer:
                passed = each >= self.needed[row]
                chosen = passed[:, column] & ~passed[:, others].any(1)
                neurons += [
                    (float(each[i, column]), (*bank, i)) for i in chosen.nonzero()[:, 0].tolist()
                ]
        return [neuron for _, neuron in sorted(neurons, key=lambda pair: (-pair[0], pair[1]))]

    def share_of(self, feature: str, *, without: Iterable[str] = ()) -> Tensor:
        """Return `share` of a feature, (layers,) float64, for a stricter count.

        Args:
            feature: The feature.
            without: Neurons that are selective for one of these do not count as selective.

        Raises:
            InputError: when the profile has no such feature.
        """
        without = tuple(without)
        shares = []
        for row, layer in enumerate(self.layers):
            chosen = self.selective(feature, layer, without=without)
            column = self.features.index(feature)
            counted = _counted(
                each[:, column] for bank, each in self.neurons.items() if bank[0] == layer
            )
            has_share = len(counted) and not self.share[row, column].isnan()
            shares.append(len(chosen) / len(counted) if has_share else math.nan)
        return torch.tensor(shares, dtype=torch.float64)

    def tally(self, feature: str, layer: int) -> dict[Hashable, int]:
        """Return how many of a layer's neurons are selective for each value, most first.

        Tokens are ids, and n-grams are tuples of ids.

        Raises:
            InputError: when the profile has no such feature or layer.
        """
        neurons = self.selective(feature, layer)
        column = self.features.index(feature)
        codes = Counter(
            int(self._commonest[neuron[:-1]][neuron[-1], column])  # type: ignore[index]
            for neuron in neurons
        )
        return {self._values[feature][code]: n for code, n in codes.most_common()}


_QUANTILE = 0.99

_NGRAMS = {"token": 1, "bigram": 2, "trigram": 3}


@settled()
def profile(
    triggers: Triggers,
    labels: Mapping[str, Label] | None = None,
    *,
    groups: Mapping[str, Hashable] | None = None,
    only: Callable[[Trigger], bool] | None = None,
    sign: Sign = "top",
    least: int = 10,
    seed: int = 0,
) -> Profile:
    """Return how many of each layer's neurons are selective for each feature of their triggers.

    Args:
        triggers: The triggers.
        labels: {feature: {text: value}, or a function of the `Trigger`}. Triggers without a value
            are left out for that feature.
        groups: {text: group} of texts that belong together, such as the sentences of one fact. The
            control then deals labels of texts out among groups, not among triggers. Each group
            must have one value of such a label.
        only: Triggers for which it is false are left out of everything.
        sign: "top" for the largest coefficients, "bottom" for the smallest.
        least: Number of triggers that a neuron must have to be counted.
        seed: Seed of the control.

    Raises:
        InputError: when no trigger has a value of a label, a label has the name of a feature that
            is always measured, a text has no group, or a group has several values.
    """
    least = check_count(least, "least", "the number of triggers that a neuron must have")
    seed = check_seed(seed)
    check_sign(sign)
    labels = dict(labels or {})
    features = _features(triggers, labels, sign, only)
    names, layers = tuple(features), tuple(sorted({bank[0] for bank in triggers.banks}))
    grouped = None if groups is None else _numbered(triggers, groups)
    control = _Control(triggers, sign, grouped, torch.Generator().manual_seed(seed))
    cells = torch.full((len(_CELL), len(layers), len(names)), torch.nan, dtype=torch.float32)
    counted = torch.zeros(len(layers), dtype=torch.int64)
    neurons: dict[Bank, list[Tensor]] = {bank: [] for bank in triggers.banks}
    commonest: dict[Bank, list[Tensor]] = {bank: [] for bank in triggers.banks}
    for row, layer in enumerate(layers):
        banks = [bank for bank in triggers.banks if bank[0] == layer]
        for column, (name, feature) in enumerate(features.items()):
            for bank in banks:
                purity, most = _purity(feature.codes[bank], least)
                neurons[bank].append(purity)
                commonest[bank].append(most)
            pure = _counted(neurons[bank][column] for bank in banks)
            if len(pure):
                dealt, again = (
                    _counted(
                        _purity(codes, least)[0] for codes in control.deal(name, feature, banks)
                    )
                    for _ in range(2)
                )
                cells[:, row, column] = _cell(pure, dealt, again)
                counted[row] = max(int(counted[row]), len(pure))
    return Profile(
        layers=layers,
        features=names,
        **dict(zip(_CELL, cells, strict=True)),
        possible=torch.tensor(
            [possible_share(triggers, labels.get(name), sign) for name in names],
            dtype=torch.float32,
        ),
        neurons={bank: torch.stack(each, 1) for bank, each in neurons.items()},
        counted=counted,
        _commonest={bank: torch.stack(each, 1) for bank, each in commonest.items()},
        _values={name: feature.values for name, feature in features.items()},
    )


def _features(
    triggers: Triggers,
    labels: Mapping[str, Label],
    sign: Sign,
    only: Callable[[Trigger], bool] | None,
) -> dict[str, Feature]:
    """Return the features that are always measured, then the labels."""
    if taken := labels.keys() & {*_NGRAMS, "position"}:
        raise InputError(
            f"a label is called {min(taken)!r}, like a feature that is always measured. "
            "Give it another name.",
            argument="labels",
        )
    filled = {bank: filled_places(triggers, bank, sign, only) for bank in triggers.banks}
    features = {name: ngrams(triggers, filled, sign, n) for name, n in _NGRAMS.items()}
    features["position"] = positions(triggers, filled, sign)
    for name, label in labels.items():
        features[name] = labelled(triggers, filled, sign, name, label)
    return features


def _numbered(triggers: Triggers, groups: Mapping[str, Hashable]) -> Tensor:
    """Return the group of every text as a number: (texts,) int64."""
    missing = next((text for text in triggers.texts if text not in groups), None)
    if missing is not None:
        raise InputError(
            f"{missing!r} has no group. Put every text of the corpus into a group, even if it is "
            "alone in its group.",
            argument="groups",
        )
    numbers = {
        group: number
        for number, group in enumerate(dict.fromkeys(groups[text] for text in triggers.texts))
    }
    return torch.tensor([numbers[groups[text]] for text in triggers.texts])


# ── the control ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Control:
    """Deals the values of features out at random.

    Attributes:
        triggers: The triggers.
        sign: Which end.
        groups: (texts,), the number of each text's group. None: there are no groups.
        generator: The source of chance.
    """

    triggers: Triggers
    sign: Sign
    groups: Tensor | None
    generator: torch.Generator

    def deal(self, name: str, feature: Feature, banks: Sequence[Bank]) -> list[Tensor]:
        """Return the codes of banks of one layer, dealt out: (d_ff, t) for each bank."""
        codes = [feature.codes[bank] for bank in banks]
        if feature.by_text is None or self.groups is None:
            return _dealt(codes, self.generator)
        by_text = _regrouped(feature.by_text, self.groups, name, self.generator)
        places = [self.triggers.banks[bank].texts[self.sign] for bank in banks]
        return [
            torch.where(each >= 0, by_text[place], -1)
            for each, place in zip(codes, places, strict=True)
        ]


def _dealt(codes: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return codes dealt out at random among the places that have one."""
    flat = torch.cat([each.flatten() for each in codes])
    places = (flat >= 0).nonzero()[:, 0]
    flat[places] = flat[places][torch.randperm(len(places), generator=generator)]
    parts = torch.split(flat, [each.numel() for each in codes])
    return [part.view(each.shape) for part, each in zip(parts, codes, strict=True)]


def _regrouped(by_text: Tensor, groups: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return a label of texts (texts,) dealt out among the groups that have one."""
    by_group = torch.full((int(groups.max()) + 1,), -1)
    by_group[groups] = by_text
    if not torch.equal(by_group[groups], by_text):
        raise InputError(
            f"texts of one group differ in their label {name!r}. "
            "Give groups in which every label has one value.",
            argument="groups",
        )
    with_value = (by_group >= 0).nonzero()[:, 0]
    by_group[with_value] = by_group[with_value][
        torch.randperm(len(with_value), generator=generator)
    ]
    return by_group[groups]


# ── purity ────────────────────────────────────────────────────────────────────────────────────────


_CELL = ("share", "chance", "purity", "control", "needed")
"""The attributes of `Profile` that `_cell` computes, in this order."""


def _cell(pure: Tensor, dealt: Tensor, again: Tensor) -> Tensor:
    """Return what a profile says about one feature in one layer, in the order of `_CELL`.

    Args:
        pure: (n,), the purity of the layer's neurons.
        dealt: (n,), the purity in the control.
        again: (n,), the purity in a second control.
    """
    needed = torch.tensor(max(0.5, float(dealt.quantile(_QUANTILE)) + 1e-6), dtype=torch.float32)
    share = chance = torch.tensor(torch.nan, dtype=torch.float32)
    if needed <= 1:  # otherwise the control is pure, and no neuron differs from it
        share, chance = (pure >= needed).float().mean(), (again >= needed).float().mean()
    return torch.stack([share, chance, pure.mean(), dealt.mean(), needed])


def _counted(purities: Iterable[Tensor]) -> Tensor:
    """Return the purities of all neurons with enough triggers."""
    every = torch.cat(list(purities))
    return every[~every.isnan()]


def _purity(codes: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return the share of each row's codes (n, t) that equal its commonest, and that code.

    -1 does not count. A row with fewer than `least` codes gives NaN.
    """
    ordered = codes.sort(dim=1).values
    # The length of the run of equal values that ends at each place; runs of -1 stay 0.
    run = torch.zeros_like(ordered)
    run[:, 0] = 1
    for i in range(1, ordered.shape[1]):
        run[:, i] = torch.where(ordered[:, i] == ordered[:, i - 1], run[:, i - 1] + 1, 1)
    most, where = torch.where(ordered >= 0, run, 0).max(1)
    n = (codes >= 0).sum(1)
    purity = torch.where(n >= least, most.float() / n.clamp(min=1), torch.nan)
    return purity, ordered.gather(1, where[:, None])[:, 0]
