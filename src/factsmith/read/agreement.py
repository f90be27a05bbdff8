"""Do keys and values agree: does a value promote the token that comes next where its key fires most?

    found = agreement(triggers, values)
    found.share, found.chance          # by layer

Geva et al. 2021 (arXiv 2012.14913), section 4: next to nothing in the lower layers of a 16-layer model, rising to 3.5 % in its upper ones,
against 0.0004 % by chance. Chance here is the same values against the same next tokens, each with every neuron of its layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import FingerprintError, InputError
from ..core.tables import Shown, Table
from .triggers import Sign, Triggers, check_sign
from .values import ValueTokens


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Agreement(Shown):
    """How often a value promotes what follows its strongest trigger.

    layers   the layers that were scanned and read, ascending
    share    (layers,) of the neurons whose strongest trigger has a next token, how many values have it as their first token
    within   (layers,) among the first k, as many as were read
    chance   (layers,) what `share` would be were triggers and values of a layer paired at random
    counted  (layers,) neurons with a next token
    """

    layers: tuple[int, ...]
    share: Tensor
    within: Tensor
    chance: Tensor
    counted: Tensor

    def tables(self) -> list[Table]:
        """The shares by layer, beside chance."""
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


def agreement(triggers: Triggers, values: ValueTokens, *, sign: Sign = "top") -> Agreement:
    """Key-value agreement of every layer that both know; for "bottom" triggers with the tokens demoted, which are promoted there.

    Raises FingerprintError when they are of different models, InputError when they have no layer in common.
    """
    check_sign(sign)
    if triggers.fingerprint != values.fingerprint:
        raise FingerprintError(
            f"the triggers are of {triggers.model}, the values of {values.model}, another model: read both of one"
        )
    ids = values.top_ids if sign == "top" else values.bottom_ids
    banks = [bank for bank in triggers.banks if bank in ids]
    layers = tuple(sorted({bank[0] for bank in banks}))
    if not layers:
        raise InputError(
            "triggers and values have no layer in common; read the values of the layers that were scanned"
        )
    rows = []
    for layer in layers:
        own = [bank for bank in banks if bank[0] == layer]
        following = torch.cat([triggers.next_tokens(bank, sign)[:, 0] for bank in own])
        promoted = torch.cat([ids[bank] for bank in own])[following >= 0]
        following = following[following >= 0]
        n = len(following)
        size = int(max(following.max(), promoted.max())) + 1 if n else 1
        first = (
            torch.bincount(promoted[:, 0], minlength=size).double()
            @ torch.bincount(following, minlength=size).double()
        )
        hits = promoted == following[:, None]
        rows.append(
            [
                float(hits[:, 0].sum()) / max(n, 1),
                float(hits.any(1).sum()) / max(n, 1),
                float(first) / max(n, 1) ** 2,
                n,
            ]
        )
    share, within, chance, counted = torch.tensor(rows, dtype=torch.float64).T
    return Agreement(
        layers=layers, share=share, within=within, chance=chance, counted=counted.long()
    )
