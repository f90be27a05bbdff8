"""Targets: the settings of the search for v_star, and its result.

v_star is the output at the subject token that makes the model assert a fact.

config = TargetConfig(steps=25, lr=0.1)
targets = find_targets(lm, facts, layer, config, contexts)      # see search.py
targets.v_star, targets.k_star, targets.convergence
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.errors import InputError
from ..core.fact import Fact
from .keys import Site

_MARGIN_PASSES = 8
"""Forward passes over whole prompts that take as long as a margin search of a dozen evaluations."""

_TENSORS = ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial")
"""The tensors of targets."""


@dataclass(frozen=True)
class TargetConfig:
    """How v_star is searched. The settings of every editing method extend it.

    δ is the change of the output at the subject token, and v₀ is that output before the search. So
    v_star = v₀ + δ.
    """

    _: KW_ONLY
    steps: int = 20
    """How often the loss is evaluated at most. Adam changes δ at most steps − 1 times, as in the
    authors' code. The margin search usually ends after 5 to 15 evaluations, and gives a target up
    that it cannot reach."""
    lr: float = 0.5
    """Learning rate of Adam, which is about the change of each coordinate in a step. With
    scale="auto" the unit is the root mean square of the stream. The margin search's first step is
    at most as long as five steps of Adam, and as half of the clamp."""
    kl_factor: float = 0.0625
    """Weight of the KL term, which keeps what the subject is. 0.0625 is the authors' value for
    every model. In the margin search it says how much longer a step counts that changes the
    prediction after "{} is a"."""
    weight_decay: float = 0.5
    """Weight of the term that prefers near targets. With scale="paper" the term is ‖δ‖ / ‖v₀‖², and
    0.5 is the authors' value for GPT-2 and GPT-J. With "auto" the term is 0.1 · ‖δ‖ / its largest
    ‖δ‖, which is the size of the paper's term on GPT-2 XL. That is too small to keep the search
    from reaching its target. The margin search takes the shortest steps anyway, and only counts
    this term in the loss that it reports."""
    clamp: float = 4.0
    """Largest ‖δ‖. With scale="paper" the unit is ‖v₀‖, and 4 is the authors' value (3 for GPT-2
    medium). With "auto" the unit is half of the stream's norm: a layer may write little today, but
    its target must be able to outweigh the stream."""
    stop_loss: float = 0.05
    """The search for a fact ends when its loss is below this value. With scale="auto", and with the
    margin search, only the first term of the loss counts. At 0.05 nats the target has a probability
    of 95 %."""
    scale: Literal["paper", "auto"] = "paper"
    """"paper": the formulas of the papers, unchanged. "auto": steps, decay and clamp are relative
    to the model's own norms."""
    guards_relations: bool = False
    """Whether the margin search also counts what a step changes after prompts about the subject in
    other relations (`edit/guards.py`). It takes about as long again."""
    optimizer: Literal["adam", "margin"] | None = None
    """How δ moves. "adam": gradient descent as in the papers. "margin": each step solves a linear
    model of the target's margins in all contexts, so that few steps are needed (`edit/margin.py`).
    A fact to forget has no margin and always takes Adam. None: "adam" with scale="paper", and
    "margin" with "auto"."""

    @property
    def searched_by(self) -> Literal["adam", "margin"]:
        """The optimizer, chosen by the scale if none is set."""
        return self.optimizer or ("adam" if self.scale == "paper" else "margin")

    @property
    def passes(self) -> int:
        """Forward passes over whole prompts that take about as long as the search."""
        # Most evaluations of the margin search ask the bare prompt alone.
        return self.steps if self.searched_by == "adam" else min(self.steps, _MARGIN_PASSES)

    def __post_init__(self) -> None:
        steps = check_count(self.steps, "steps", "the number of loss evaluations")
        object.__setattr__(self, "steps", steps)
        for name in ("lr", "kl_factor", "weight_decay", "clamp", "stop_loss"):
            least, above = (None, 0) if name in ("lr", "clamp") else (0, None)
            value = check_number(getattr(self, name), name, least=least, above=above)
            object.__setattr__(self, name, value)
        if self.scale not in ("paper", "auto"):
            raise InputError(
                f'scale is {self.scale!r}: it must be "paper" or "auto"', argument="scale"
            )
        if self.optimizer not in (None, "adam", "margin"):
            raise InputError(
                f'optimizer is {self.optimizer!r}: it must be "adam", "margin" or None',
                argument="optimizer",
            )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Targets:
    """The targets of n facts at one layer: float32, on the model's device.

    Attributes:
        v_star: (n, d_model) the wanted output at the subject token. At the site "ffn" it is the
            output of the down-projection, bias included. At "stream" it is the layer's output.
        v_initial: (n, d_model) the same output without δ, on the bare prompt.
        k_star: (n, d_ff) the input of the down-projection, averaged over the contexts.
        k_prompt: (n, d_ff) that input on the bare prompt.
        ffn_initial: (n, d_model) the output of the down-projection on the bare prompt. At the site
            "ffn" it is v_initial.
        convergence: For each fact: steps, loss, nll, kl, norm (‖δ‖), limit (the clamp) and stopped:
            "loss" if the target was reached, "steps" if the steps ran out, or "stuck" if the
            margin search came no nearer. If the steps run out early in a margin search, nll is
            that of the bare prompt alone.
        facts: The facts, in their order.
        layer: The layer.
        site: The place in the layer: "ffn" or "stream".
    """

    v_star: Tensor
    v_initial: Tensor
    k_star: Tensor
    k_prompt: Tensor
    ffn_initial: Tensor
    convergence: tuple[dict[str, Any], ...]
    facts: tuple[Fact, ...]
    layer: int
    site: Site

    @classmethod
    def gathered(cls, rows: Sequence[tuple[Self, int]]) -> Self:
        """Return the targets that are given as (targets, row) pairs, in this order.

        Args:
            rows: At least one pair. All targets are of one layer and site.
        """
        first, _ = rows[0]
        return cls(
            **{
                name: torch.stack([getattr(part, name)[row] for part, row in rows])
                for name in _TENSORS
            },
            convergence=tuple(part.convergence[row] for part, row in rows),
            facts=tuple(part.facts[row] for part, row in rows),
            layer=first.layer,
            site=first.site,
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the same targets on a device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return dataclasses.replace(self, **moved)

    def __repr__(self) -> str:
        steps = [int(record.get("steps", 0)) for record in self.convergence]
        least, most = min(steps, default=0), max(steps, default=0)
        place = f"layer {self.layer} ({self.site})"
        return f"Targets({len(self.facts)} at {place}, {least} to {most} steps)"
