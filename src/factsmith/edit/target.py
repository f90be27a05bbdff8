"""v_star: what has to stand at the subject token for the model to assert a fact.

    targets = find_targets(lm, facts, layer, config, contexts)                     # output of the down-projection (ROME)
    targets = find_targets(lm, facts, layer, config, contexts, site="stream")      # output of the whole layer (MEMIT, AlphaEdit)
    targets.v_star, targets.k_star, targets.convergence

All facts × contexts, and one row a fact that guards what the subject is, stand in one batch with the subject's last token in one
column. Left of it nothing changes, so those columns live in the key/value cache; below the edited layer nothing changes either. A
gradient step therefore runs the layers above, on the columns from the subject on, and reads logits where a target token is due.
Facts do not see one another: each has its own loss, clamp and early stop, and leaves the batch when it is done.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.errors import InputError
from ..core.fact import Fact
from .keys import Site


@dataclass(frozen=True)
class TargetConfig:
    """How v_star is searched; every editor's configuration builds on it."""

    _: KW_ONLY
    steps: int = 20
    """Evaluations of the loss, so at most steps − 1 updates: as in the authors' code, which made the tables."""
    lr: float = 0.5
    """Adam's learning rate, about the change of each coordinate in an update; with "auto" in units of the stream's root mean square."""
    kl_factor: float = 0.0625
    """Weight of the KL term that keeps the subject's essence; the authors' value for every model."""
    weight_decay: float = 0.5
    """Among targets that work, prefer the near one. "paper": weighs ‖δ‖ / ‖v₀‖², the authors' value for GPT-2 and GPT-J; "auto": ‖δ‖ at
    the clamp costs a tenth of it, as the paper's term does on GPT-2 XL, too little to keep a target from being reached."""
    clamp: float = 4.0
    """Largest ‖δ‖, in units of ‖v₀‖ ("paper"; the authors' value, 3 for GPT-2 medium) or of half the stream's norm ("auto": a layer may
    write little of its own today, but a target must be able to outweigh the stream)."""
    stop_loss: float = 0.05
    """Stop before the update once the loss ("auto": its first term) is below: the target then has 95 % or more, and δ is long enough."""
    scale: Literal["paper", "auto"] = "paper"
    """"paper": the reference formulas to the letter. "auto": step, decay and clamp relative to the model's own norms."""

    def __post_init__(self) -> None:
        steps = check_count(self.steps, "steps", "the number of loss evaluations")
        object.__setattr__(self, "steps", steps)
        for name in ("lr", "kl_factor", "weight_decay", "clamp", "stop_loss"):
            least, above = (None, 0) if name in ("lr", "clamp") else (0, None)
            value = check_number(getattr(self, name), name, least=least, above=above)
            object.__setattr__(self, name, value)
        if self.scale not in ("paper", "auto"):
            raise InputError(f'scale is "paper" or "auto"; got {self.scale!r}')


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Targets:
    """What was found for n facts at one layer; float32, on the model's device.

    v_star       (n, d_model) wanted output at the subject token: of the down-projection, bias included, or of the layer ("stream")
    v_initial    (n, d_model) what is put out there today, on the bare prompt
    k_star       (n, d_ff) the down-projection's input, averaged over the contexts
    k_prompt     (n, d_ff) its input on the bare prompt
    ffn_initial  (n, d_model) what the down-projection puts out on the bare prompt: v_initial, unless that is the layer's
    convergence  for each fact {steps, loss, nll, kl, norm (‖δ‖), limit (the clamp), stopped: "loss" or "steps"}
    facts        the facts, in their order
    layer, site  where: at a layer's "ffn", or in the "stream" after it
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

    def __repr__(self) -> str:
        steps = [int(found["steps"]) for found in self.convergence]
        return f"Targets({len(self.facts)} at layer {self.layer} ({self.site}), {min(steps, default=0)} to {max(steps, default=0)} steps)"


TENSORS = ("v_star", "v_initial", "k_star", "k_prompt", "ffn_initial")
