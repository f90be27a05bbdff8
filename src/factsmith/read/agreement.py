"""Do keys and values agree: does a value promote the token that follows where its key fires most?

    result = agreement(triggers, values)
    result.share, result.chance          # by layer

Geva et al. 2021 (arXiv 2012.14913), section 4: almost no agreement in the lower layers of a
16-layer model, rising to 3.5 % in its upper layers, against 0.0004 % by chance. Chance here pairs
the same values and the same next tokens at random, within their layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import FingerprintError, InputError
from ..core.identity import same_model
from ..core.settled import settled
from ..core.tables import Shown, Table
from .triggers import Sign, Triggers, check_sign
from .values import ValueTokens


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Agreement(Shown):
    """How often a value promotes the token that follows its key's strongest trigger.

    Attributes:
        layers: The layers that were both scanned and read, ascending.
        share: (layers,), the share of the counted neurons whose value has the next token first.
        within: (layers,), the share whose value has it among the tokens that were read.
        chance: (layers,), what `share` would be with triggers and values paired at random.
        counted: (layers,), the number of neurons whose strongest trigger has a next token.
    """

    layers: tuple[int, ...]
    share: Tensor
    within: Tensor
    chance: Tensor
    counted: Tensor

    def tables(self) -> list[Table]:
        """Return one table: the shares by layer, next to chance."""
        columns = zip(
            self.layers,
            self.counted.tolist(),
            self.share.tolist(),
            self.within.tolist(),
            self.chance.tolist(),
            strict=True,
        )
        rows = [
            (str(layer), f"{n:,}", f"{share:.2%}", f"{within:.2%}", f"{chance:.2%}")
            for layer, n, share, within, chance in columns
        ]
        names = ("layer", "neurons", "first token", "among its first", "by chance")
        return [
            Table(
                "values that promote what follows their strongest trigger",
                dict.fromkeys(names, ">"),
                rows,
            )
        ]


@settled()
def agreement(triggers: Triggers, values: ValueTokens, *, sign: Sign = "top") -> Agreement:
    """Return how often keys and values agree in each layer that was scanned and read.

    Args:
        triggers: The triggers of the keys.
        values: The tokens of the values.
        sign: "bottom" compares the smallest coefficients with the tokens that a value demotes.
            A negative coefficient promotes these.

    Raises:
        FingerprintError: when the two are of different models.
        InputError: when they have no layer in common.
    """
    check_sign(sign)
    if not same_model(triggers.fingerprint, values.fingerprint):
        raise FingerprintError(
            f"the triggers are of {triggers.model}, and the values are of another model, "
            f"{values.model}. Read both from one model."
        )
    ids = values.top_ids if sign == "top" else values.bottom_ids
    banks = [bank for bank in triggers.banks if bank in ids]
    layers = tuple(sorted({bank[0] for bank in banks}))
    if not layers:
        raise InputError(
            "triggers and values have no layer in common. "
            "Read the values of the layers that were scanned."
        )
    rows = []
    for layer in layers:
        of_layer = [bank for bank in banks if bank[0] == layer]
        following = torch.cat([triggers.next_tokens(bank, sign)[:, 0] for bank in of_layer])
        promoted = torch.cat([ids[bank] for bank in of_layer])
        rows.append(_shares(following, promoted))
    share, within, chance, counted = torch.tensor(rows, dtype=torch.float64).T
    return Agreement(
        layers=layers, share=share, within=within, chance=chance, counted=counted.long()
    )


def _shares(following: Tensor, promoted: Tensor) -> tuple[float, float, float, int]:
    """Return share, within, chance and count of one layer.

    Args:
        following: (d_ff,), the token that follows each neuron's trigger. -1: none.
        promoted: (d_ff, k), the tokens that its value promotes.
    """
    promoted = promoted[following >= 0]
    following = following[following >= 0]
    n = len(following)
    size = int(max(following.max(), promoted.max())) + 1 if n else 1
    pairs = (
        torch.bincount(promoted[:, 0], minlength=size).double()
        @ torch.bincount(following, minlength=size).double()
    )
    hits = promoted == following[:, None]
    return (
        float(hits[:, 0].sum()) / max(n, 1),
        float(hits.any(1).sum()) / max(n, 1),
        float(pairs) / max(n, 1) ** 2,
        n,
    )
