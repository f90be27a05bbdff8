"""Shallow or semantic: what the triggers of a layer's neurons have in common.

    found = profile(triggers)                                            # last token, last two, last three, position
    found = profile(triggers, labels={"relation": {text: "P36", ...}})   # and what is known about the texts
    found = profile(triggers, labels={"capital": lambda t: t.prefix[-1:].isupper()})   # or about the places
    found.share                                                          # (layers, features): neurons selective for each
    found.tally("relation", 3)                                           # {"P36": 14, ...}: for which one

Geva et al. 2021 (arXiv 2012.14913) had people read the triggers of some keys and found shallow patterns (a last word) in the lower layers
and semantic ones above. Here a neuron is selective for a feature when at least half of its triggers share one value of it, and more than
in 99 of 100 neurons whose triggers are dealt out at random among the layer's: the control keeps how common each value is.

A neuron that knows one rare word fires in every sentence about the one thing with that word in its name, and so seems to know all that the
corpus says of it. Two arguments answer that: `groups` of texts that belong together, so that the control deals labels out group by group,
and `only`, which leaves triggers out of account, such as those inside the name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..core.checks import check_count, check_seed
from ..core.errors import InputError
from ..core.tables import Shown, Table
from ..corpus.scan import Bank
from .triggers import Sign, Trigger, Triggers, check_sign

Label: TypeAlias = Mapping[str, Hashable] | Callable[[Trigger], Hashable | None]
"""What is known about triggers: a value for each text, or a function of the trigger; None, or a text that is not there, is no value."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Profile(Shown):
    """What triggers share, by layer and feature.

    layers    the layers, ascending
    features  "token", "bigram", "trigram", "position", and the labels given
    share     (layers, features) of the neurons with triggers, how many are selective for the feature; NaN where the control is so pure
              that none can be told from it
    chance    (layers, features) the same for triggers or groups dealt out at random once more: about 0.01 or less
    purity    (layers, features) mean share of a neuron's triggers that have its commonest value
    control   (layers, features) the same for triggers or groups dealt out at random
    needed    (layers, features) the purity that counts as selective; above 1 where more than 1 in 100 of the control is pure: then none is
    possible  (features,) how much of the corpus a neuron could be selective for at all: the share of the labelled texts whose value stands
              in texts enough to fill half of a neuron's triggers; NaN for what is no mapping of texts
    neurons   {bank: (d_ff, features)} each neuron's purity; NaN for one with fewer triggers than `least`
    counted   (layers,) neurons with triggers enough
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
    _commonest: Mapping[Bank, Tensor] = field(
        repr=False
    )  # (d_ff, features) which value it is, -1 for none
    _values: Mapping[str, Sequence[Hashable]] = field(repr=False)

    def tables(self) -> list[Table]:
        """Of each layer's neurons, how many are selective for each feature."""
        rows = [
            (str(layer), f"{int(n):,}", *("" if math.isnan(x) else f"{x:.1%}" for x in share))
            for layer, n, share in zip(self.layers, self.counted, self.share.tolist(), strict=True)
        ]
        chance = [x for x in self.chance.flatten().tolist() if not math.isnan(x)]
        note = f"dealt out at random: at most {max(chance):.1%}" if chance else ""
        return [
            Table(
                "neurons selective for",
                {"layer": ">", "neurons": ">", **dict.fromkeys(self.features, ">")},
                rows,
                note,
            )
        ]

    def selective(
        self, feature: str, layer: int, *, without: Iterable[str] = ()
    ) -> list[tuple[int, ...]]:
        """The neurons of a layer that are selective for a feature, and not for any of some others, purest first.

        Raises InputError for a feature or layer that is not there.
        """
        unknown = {feature, *(without := tuple(without))} - set(self.features)
        if unknown or layer not in self.layers:
            there = f"there are {', '.join(self.features)} in layers {self.layers}"
            raise InputError(
                f"no profile of {min(unknown or {feature})!r} in layer {layer}; {there}"
            )
        row, column = self.layers.index(layer), self.features.index(feature)
        others = [self.features.index(other) for other in without]
        found = []
        for bank, each in self.neurons.items():
            if bank[0] == layer:
                passed = each >= self.needed[row]
                chosen = passed[:, column] & ~passed[:, others].any(1)
                found += [
                    (float(each[i, column]), (*bank, i)) for i in chosen.nonzero()[:, 0].tolist()
                ]
        return [neuron for _, neuron in sorted(found, key=lambda pair: (-pair[0], pair[1]))]

    def share_of(self, feature: str, *, without: Iterable[str] = ()) -> Tensor:
        """(layers,) float64: `share` of a feature, counting only neurons that are not selective for any of some others.

        Raises InputError for a feature that is not there.
        """
        without = tuple(without)
        shares = []
        for layer in self.layers:
            chosen = self.selective(feature, layer, without=without)
            known = _known(
                each[:, self.features.index(feature)]
                for bank, each in self.neurons.items()
                if bank[0] == layer
            )
            there = (
                len(known)
                and not self.share[self.layers.index(layer), self.features.index(feature)].isnan()
            )
            shares.append(len(chosen) / len(known) if there else math.nan)
        return torch.tensor(shares, dtype=torch.float64)

    def tally(self, feature: str, layer: int) -> dict[Hashable, int]:
        """For each value how many of a layer's neurons are selective for it, most first; tokens as ids, n-grams as tuples of them.

        Raises InputError for a feature or layer that is not there.
        """
        neurons = self.selective(feature, layer)
        column = self.features.index(feature)
        counted = Counter(
            int(self._commonest[neuron[:-1]][neuron[-1], column]) for neuron in neurons
        )  # type: ignore[index]
        return {self._values[feature][code]: n for code, n in counted.most_common()}


_QUANTILE = 0.99

_NGRAMS = {"token": 1, "bigram": 2, "trigram": 3}


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
    """How many of each layer's neurons have triggers that share a token, a position, or a label of their text or of themselves.

    labels  {feature: {text: value} or a function of the `Trigger`}; triggers without a value are left out for that feature
    groups  {text: group} of texts that come together, as the sentences of one fact: labels of texts are dealt out among groups, not among
            triggers, in the control. Each group has one value of such a label
    only    triggers for which it is false are left out of everything
    least   triggers a neuron must have to be counted
    seed    of the control

    Raises InputError for labels that no trigger has or that are called as a feature that is always there, texts without a group, and groups
    with several values.
    """
    least, seed = (
        check_count(least, "least", "the number of triggers that a neuron must have"),
        check_seed(seed),
    )
    check_sign(sign)
    labels = dict(labels or {})
    if taken := labels.keys() & {*_NGRAMS, "position"}:
        raise InputError(
            f"a label is called {min(taken)!r}, as a feature that is always there; give it another name"
        )
    there = {bank: _filled(triggers, bank, sign, only) for bank in triggers.banks}
    coded = {name: _ngrams(triggers, there, sign, n) for name, n in _NGRAMS.items()}
    coded["position"] = _positions(triggers, there, sign)
    for name, label in labels.items():
        coded[name] = _labelled(triggers, there, sign, label)
        if not any(bool((codes >= 0).any()) for codes in coded[name].codes.values()):
            raise InputError(
                f"no trigger has a label {name!r}; give {{text: value}} for the corpus' texts, or a function of a trigger"
            )
    features, layers = tuple(coded), tuple(sorted({bank[0] for bank in triggers.banks}))
    grouped = None if groups is None else _numbered(triggers, groups)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(layers), len(features))
    share, chance, purity, control, needed = (torch.full(shape, torch.nan) for _ in range(5))
    counted = torch.zeros(len(layers), dtype=torch.int64)
    neurons: dict[Bank, list[Tensor]] = {bank: [] for bank in triggers.banks}
    commonest: dict[Bank, list[Tensor]] = {bank: [] for bank in triggers.banks}
    for row, layer in enumerate(layers):
        banks = [bank for bank in triggers.banks if bank[0] == layer]
        for column, feature in enumerate(features):
            own = coded[feature]
            for bank in banks:
                pure, most = _purity(own.codes[bank], least)
                neurons[bank].append(pure)
                commonest[bank].append(most)
            both = _known(neurons[bank][column] for bank in banks)
            if not len(both):
                continue
            if own.by_text is not None and grouped is not None:
                places = [triggers.banks[bank].texts[sign] for bank in banks]
                shuffled = [_regrouped(own.by_text, grouped, feature, generator) for _ in range(2)]
                controls = [
                    [
                        torch.where(own.codes[b] >= 0, s[p], -1)
                        for b, p in zip(banks, places, strict=True)
                    ]
                    for s in shuffled
                ]
            else:
                controls = [
                    _dealt([own.codes[bank] for bank in banks], generator) for _ in range(2)
                ]
            dealt, again = (
                _known(_purity(each, least)[0] for each in values) for values in controls
            )
            needed[row, column] = max(0.5, float(dealt.quantile(_QUANTILE)) + 1e-6)
            if (
                needed[row, column] <= 1
            ):  # else the control is as pure as can be, and nothing tells a neuron from it
                share[row, column] = (both >= needed[row, column]).float().mean()
                chance[row, column] = (again >= needed[row, column]).float().mean()
            purity[row, column], control[row, column] = both.mean(), dealt.mean()
            counted[row] = max(int(counted[row]), len(both))
    return Profile(
        layers=layers,
        features=features,
        share=share,
        chance=chance,
        purity=purity,
        control=control,
        needed=needed,
        possible=torch.tensor([_possible(triggers, labels.get(name), sign) for name in features]),
        neurons={bank: torch.stack(each, 1) for bank, each in neurons.items()},
        counted=counted,
        _commonest={bank: torch.stack(each, 1) for bank, each in commonest.items()},
        _values={name: own.values for name, own in coded.items()},
    )


@dataclass(frozen=True, eq=False)
class _Coded:
    """A feature in numbers.

    codes    {bank: (d_ff, t) int64} at every trigger, -1 where there is none
    values   what the numbers stand for
    by_text  (texts,) int64 at every text, for what is known by text; -1 where it is not
    """

    codes: Mapping[Bank, Tensor]
    values: Sequence[Hashable]
    by_text: Tensor | None = None


def _filled(
    triggers: Triggers, bank: Bank, sign: Sign, only: Callable[[Trigger], bool] | None
) -> Tensor:
    """Which places of a bank (d_ff, t) hold a trigger that counts."""
    there = triggers.banks[bank].coefficients[sign] != 0
    return (
        there
        if only is None
        else there
        & _each(triggers, bank, sign, there, lambda trigger: int(bool(only(trigger))), 0).bool()
    )


def _each(
    triggers: Triggers,
    bank: Bank,
    sign: Sign,
    there: Tensor,
    value: Callable[[Trigger], int],
    empty: int,
) -> Tensor:
    """A function of every trigger of a bank: (d_ff, t) int64."""
    found = torch.full(there.shape, empty)
    for i, used in enumerate(there.any(1).tolist()):
        if used:
            row = [
                value(trigger) for trigger in triggers.of((*bank, i), sign=sign)
            ]  # empty places come last
            found[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return torch.where(there, found, empty)


def _ngrams(triggers: Triggers, there: Mapping[Bank, Tensor], sign: Sign, n: int) -> _Coded:
    """The last n tokens."""
    found: dict[Bank, Tensor] = {}
    codes: dict[tuple[int, ...], int] = {}
    for bank, filled in there.items():
        tokens = torch.stack(
            [triggers.tokens(bank, sign, back=back) for back in reversed(range(n))], -1
        )  # (d_ff, t, n)
        unique, place = torch.unique(tokens.flatten(0, 1), dim=0, return_inverse=True)
        numbers = torch.tensor(
            [
                -1 if min(each) < 0 else codes.setdefault(tuple(each), len(codes))
                for each in unique.tolist()
            ]
        )
        found[bank] = torch.where(filled, numbers[place].view(filled.shape), -1)
    return _Coded(found, [each if n > 1 else each[0] for each in codes])


def _positions(triggers: Triggers, there: Mapping[Bank, Tensor], sign: Sign) -> _Coded:
    found = {
        bank: torch.where(filled, triggers.banks[bank].positions[sign], -1)
        for bank, filled in there.items()
    }
    return _Coded(
        found,
        range(1 + max((int(each.max()) for each in found.values() if each.numel()), default=-1)),
    )


def _labelled(triggers: Triggers, there: Mapping[Bank, Tensor], sign: Sign, label: Label) -> _Coded:
    codes: dict[Hashable, int] = {}

    def code(value: Hashable | None) -> int:
        return -1 if value is None else codes.setdefault(value, len(codes))

    if isinstance(label, Mapping):
        by_text = torch.tensor([code(label.get(text)) for text in triggers.texts])
        found = {
            bank: torch.where(filled, by_text[triggers.banks[bank].texts[sign]], -1)
            for bank, filled in there.items()
        }
        return _Coded(found, list(codes), by_text)
    if not callable(label):
        raise InputError(
            f"a label is a {type(label).__name__}; expected {{text: value}}, or a function of a trigger"
        )
    found = {
        bank: _each(triggers, bank, sign, filled, lambda trigger: code(label(trigger)), -1)
        for bank, filled in there.items()
    }
    return _Coded(found, list(codes))


def _numbered(triggers: Triggers, groups: Mapping[str, Hashable]) -> Tensor:
    """Every text's group, as a number: (texts,) int64."""
    missing = next((text for text in triggers.texts if text not in groups), None)
    if missing is not None:
        raise InputError(
            f"{missing!r} has no group; groups must have every text of the corpus, even one by itself"
        )
    numbers = {
        group: number
        for number, group in enumerate(dict.fromkeys(groups[text] for text in triggers.texts))
    }
    return torch.tensor([numbers[groups[text]] for text in triggers.texts])


def _regrouped(by_text: Tensor, groups: Tensor, feature: str, generator: torch.Generator) -> Tensor:
    """A label of texts dealt out among their groups at random: (texts,); groups without one stay so."""
    by_group = torch.full((int(groups.max()) + 1,), -1)
    by_group[groups] = by_text
    if not torch.equal(by_group[groups], by_text):
        raise InputError(
            f"texts of one group differ in their label {feature!r}; give groups in which every label has one value"
        )
    known = (by_group >= 0).nonzero()[:, 0]
    by_group[known] = by_group[known][torch.randperm(len(known), generator=generator)]
    return by_group[groups]


def _possible(triggers: Triggers, label: Label | None, sign: Sign) -> float:
    """The share of labelled texts whose value could fill half of a neuron's triggers; NaN for what is no mapping."""
    if not isinstance(label, Mapping):
        return math.nan
    enough = max(own.coefficients[sign].shape[1] for own in triggers.banks.values()) / 2
    common = Counter(value for value in label.values() if value is not None)
    return sum(n for n in common.values() if n >= enough) / max(sum(common.values()), 1)


def _known(purities: Iterable[Tensor]) -> Tensor:
    both = torch.cat(list(purities))
    return both[~both.isnan()]


def _purity(values: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """The share of each row's values (n, t) that equal its commonest, and that value (one of them, where several are).

    -1 does not count; rows with fewer than `least` values give NaN.
    """
    ordered = values.sort(dim=1).values
    # The length of the run of equal values that ends at each place; runs of -1 stay 0.
    run = torch.zeros_like(ordered)
    run[:, 0] = 1
    for i in range(1, ordered.shape[1]):
        run[:, i] = torch.where(ordered[:, i] == ordered[:, i - 1], run[:, i - 1] + 1, 1)
    most, where = torch.where(ordered >= 0, run, 0).max(1)
    n = (values >= 0).sum(1)
    return torch.where(n >= least, most / n.clamp(min=1), torch.nan), ordered.gather(
        1, where[:, None]
    )[:, 0]


def _dealt(values: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The same values, dealt out at random among the places that have one."""
    flat = torch.cat([v.flatten() for v in values])
    places = (flat >= 0).nonzero()[:, 0]
    flat[places] = flat[places][torch.randperm(len(places), generator=generator)]
    return [
        part.view(v.shape)
        for part, v in zip(flat.split([v.numel() for v in values]), values, strict=True)
    ]  # type: ignore[no-untyped-call]
