"""What triggers can have in common, as numbers: tokens, positions, and labels given by the caller.

filled = {bank: filled_places(triggers, bank, sign, only) for bank in triggers.banks}
feature = ngrams(triggers, filled, sign, 2)     # the last two tokens
feature.codes[bank]                             # (d_ff, t): equal numbers, equal tokens
feature.values[7]                               # the tokens that 7 means
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..core.errors import InputError
from ..corpus.scan import Bank
from .triggers import Sign, Trigger, Triggers

Label: TypeAlias = Mapping[str, Hashable] | Callable[[Trigger], Hashable | None]
"""A property of triggers: {text: value}, or a function of the trigger.

None is no value; nor is a text that the mapping lacks."""


@dataclass(frozen=True, eq=False)
class Feature:
    """A property of triggers in numbers.

    Attributes:
        codes: {bank: (d_ff, t) int64}, the number of each trigger's value. -1: no value.
        values: The value that each number means.
        by_text: (texts,) int64, the number of each text's value, where texts decide on it.
    """

    codes: Mapping[Bank, Tensor]
    values: Sequence[Hashable]
    by_text: Tensor | None = None


def filled_places(
    triggers: Triggers, bank: Bank, sign: Sign, only: Callable[[Trigger], bool] | None
) -> Tensor:
    """Return which places of a bank (d_ff, t) hold a trigger that counts.

    Args:
        triggers: The triggers.
        bank: The bank.
        sign: Which end.
        only: Triggers for which it is false do not count. None: all count.
    """
    filled = triggers.banks[bank].coefficients[sign] != 0
    if only is None:
        return filled
    return (
        filled
        & _each(triggers, bank, sign, filled, lambda trigger: int(bool(only(trigger))), 0).bool()
    )


def _each(
    triggers: Triggers,
    bank: Bank,
    sign: Sign,
    filled: Tensor,
    value: Callable[[Trigger], int],
    empty: int,
) -> Tensor:
    """Return a function of every trigger of a bank, (d_ff, t) int64, `empty` in empty places."""
    values = torch.full(filled.shape, empty)
    for i, used in enumerate(filled.any(1).tolist()):
        if used:
            # Empty places come last.
            row = [value(trigger) for trigger in triggers.of((*bank, i), sign=sign)]
            values[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return torch.where(filled, values, empty)


def ngrams(triggers: Triggers, filled: Mapping[Bank, Tensor], sign: Sign, n: int) -> Feature:
    """Return the last n tokens of each trigger as a feature. A value is a tuple, or one token."""
    by_bank: dict[Bank, Tensor] = {}
    codes: dict[tuple[int, ...], int] = {}
    for bank, places in filled.items():
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
        by_bank[bank] = torch.where(places, numbers[place].view(places.shape), -1)
    return Feature(by_bank, [each if n > 1 else each[0] for each in codes])


def positions(triggers: Triggers, filled: Mapping[Bank, Tensor], sign: Sign) -> Feature:
    """Return the position of each trigger in its text as a feature."""
    by_bank = {
        bank: torch.where(places, triggers.banks[bank].positions[sign], -1)
        for bank, places in filled.items()
    }
    last = max((int(each.max()) for each in by_bank.values() if each.numel()), default=-1)
    return Feature(by_bank, range(1 + last))


def labelled(
    triggers: Triggers, filled: Mapping[Bank, Tensor], sign: Sign, name: str, label: Label
) -> Feature:
    """Return a label as a feature.

    Raises:
        InputError: when the label is neither a mapping nor a function, or no trigger has a value.
    """
    codes: dict[Hashable, int] = {}

    def code(value: Hashable | None) -> int:
        return -1 if value is None else codes.setdefault(value, len(codes))

    by_text = None
    if isinstance(label, Mapping):
        by_text = torch.tensor([code(label.get(text)) for text in triggers.texts])
        by_bank = {
            bank: torch.where(places, by_text[triggers.banks[bank].texts[sign]], -1)
            for bank, places in filled.items()
        }
    elif callable(label):
        by_bank = {
            bank: _each(triggers, bank, sign, places, lambda trigger: code(label(trigger)), -1)
            for bank, places in filled.items()
        }
    else:
        raise InputError(
            f"label {name!r} is a {type(label).__name__}: it must be {{text: value}}, or a "
            "function of a trigger",
            argument="labels",
        )
    if not any(bool((numbers >= 0).any()) for numbers in by_bank.values()):
        raise InputError(
            f"no trigger has a value of label {name!r}. Give {{text: value}} for texts of the "
            "corpus, or a function of a trigger.",
            argument="labels",
        )
    return Feature(by_bank, list(codes), by_text)


def possible_share(triggers: Triggers, label: Label | None, sign: Sign) -> float:
    """Return how much of the corpus a neuron could be selective for.

    This is the share of the labelled texts whose value is common enough to fill half of a neuron's
    triggers. NaN for a label that is not a mapping of texts.
    """
    if not isinstance(label, Mapping):
        return math.nan
    enough = max(bank.coefficients[sign].shape[1] for bank in triggers.banks.values()) / 2
    common = Counter(value for value in label.values() if value is not None)
    return sum(n for n in common.values() if n >= enough) / max(sum(common.values()), 1)
