"""Which method suits how many facts: weights that facts share, or a neuron for each.

    seen = outlook(lm, beneath, 300, {"rome": (0,), "memit": (0, 1, 2), "append": (0,)})
    seen.recommended, seen.reason
    seen.options                        # for each method: layers, bytes, load or false firing

ROME and MEMIT change weights that facts share. A patch is then kilobytes and can leave as a LoRA,
but the layers fill up: what counts is the load, facts / (layers · neurons). Appended neurons share
nothing. They grow the model by a row or two a fact, and their limit is false firing. This is a
recommendation: which method writes facts that come without one does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import UnsupportedModelError
from ..core.tables import Table, counted
from ..edit.delta import Delta, homes
from ..edit.widening import check_alone
from ..model.appended import check_widens, row_numbers
from ..model.language_model import LanguageModel
from .firing import recorded_firing

MOST_LOAD = 0.05
"""Load of MEMIT's layers from which on appending is recommended. On the atlas models, memit keeps
its facts and the others' up to a load of 0.03, and loses a tenth of its score at 0.1."""

MOST_FACTS = 50
"""Facts at a time from which on appending is recommended."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one method would do.

    Attributes:
        method: The method's name.
        layers: The layers that it would edit.
        n_bytes: The size of the patch. 0 if the method cannot edit this model.
        load: For a method that updates weights: (facts in these layers + new facts) / (layers ·
            neurons). None: the method appends neurons.
        firing: For appended neurons: the expected share of ordinary tokens on which any of those
            that are there, and of the new ones, fires. The new ones count as the others on average.
            None: the method updates weights, or nothing is appended yet.
        trouble: Why the method cannot edit this model; "" if it can.
    """

    method: str
    layers: tuple[int, ...]
    n_bytes: int
    load: float | None = None
    firing: float | None = None
    trouble: str = ""

    @property
    def figure(self) -> str:
        """The figure that limits the method, in words."""
        if self.trouble:
            return self.trouble
        if self.load is not None:
            return f"load {self.load:z.4f} with these facts"
        if self.firing is None:
            return "false firing: measured when the facts are solved"
        return f"fires on {self.firing:z.3%} of ordinary tokens with these facts"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "layers": list(self.layers)}


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What each method would do, and which one is recommended.

    Attributes:
        recommended: The method's name; "" where there is nothing to write.
        reason: Why, in words.
        options: One for each of rome, memit and append.
    """

    recommended: str = ""
    reason: str = ""
    options: tuple[Option, ...] = ()

    def table(self) -> Table:
        """The methods, and the reason as the title."""
        columns = {"method": "<", "layer": "<", "bytes": ">", "what it costs": "<", "": "<"}
        rows = [
            (
                option.method,
                ", ".join(map(str, option.layers)),
                f"{option.n_bytes:,}",
                option.figure,
                "recommended" if option.method == self.recommended else "",
            )
            for option in self.options
        ]
        return Table(f"{self.recommended} is recommended: {self.reason}", columns, rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "recommended": self.recommended,
            "reason": self.reason,
            "options": [option.to_dict() for option in self.options],
        }


def outlook(
    lm: LanguageModel,
    beneath: Sequence[Delta],
    n_facts: int,
    layers: Mapping[str, Sequence[int]],
) -> Outlook:
    """Return what each method would do with some facts, and which one is recommended.

    Appending is recommended from a load of `MOST_LOAD` in MEMIT's layers on, what is written there
    included, and for more than `MOST_FACTS` facts. Otherwise ROME is recommended for one fact, and
    MEMIT for several.

    Args:
        lm: The model.
        beneath: The deltas that it carries.
        n_facts: How many facts are to be written.
        layers: For each of "rome", "memit" and "append" the layers that it would edit.
    """
    if not n_facts:
        return Outlook()
    chosen = {method: tuple(layers[method]) for method in ("rome", "memit", "append")}
    rome, memit = (_updating(lm, beneath, n_facts, m, chosen[m]) for m in ("rome", "memit"))
    append = _appending(lm, beneath, n_facts, chosen["append"])
    method, reason = _recommended(n_facts, memit, append)
    return Outlook(recommended=method, reason=reason, options=(rome, memit, append))


def _recommended(n_facts: int, memit: Option, append: Option) -> tuple[str, str]:
    few = "rome" if n_facts == 1 else "memit"
    facts, load = counted(n_facts, "fact"), memit.load or 0.0
    if n_facts <= MOST_FACTS and load <= MOST_LOAD:
        return few, (
            f"{facts} fit into weights that are there, at a load of {load:z.4f}; the patch is "
            "small and can be exported as a LoRA"
        )
    why = (
        f"with {facts} more the load of memit's layers is {load:z.2f}, and above {MOST_LOAD:z.2f} "
        "facts push each other out"
        if load > MOST_LOAD
        else f"{facts} at once are many for weights that they would share"
    )
    if append.trouble:
        return few, f"{why}, but {append.trouble}"
    return "append", f"{why}; appended neurons share nothing"


def _updating(
    lm: LanguageModel, beneath: Sequence[Delta], n_facts: int, method: str, layers: tuple[int, ...]
) -> Option:
    widths = [lm.ffn[layer].n_original for layer in layers]
    stored = sum(len(delta.facts) for delta in beneath if set(layers) & set(delta.layers))
    return Option(
        method=method,
        layers=layers,
        n_bytes=update_bytes(lm, layers, n_facts),
        load=(stored + n_facts) / sum(widths),
    )


def _appending(
    lm: LanguageModel, beneath: Sequence[Delta], n_facts: int, layers: tuple[int, ...]
) -> Option:
    trouble = ""
    try:
        for layer in layers:
            check_widens(lm.ffn[layer])
            check_alone(layer, homes(lm))
    except UnsupportedModelError as error:
        trouble = str(error)
    firing = None
    if (known := recorded_firing(beneath)) is not None:
        total, n_known = known
        firing = min(1.0, total * (1 + n_facts / n_known))
    return Option(
        method="append",
        layers=layers,
        n_bytes=0 if trouble else appended_bytes(lm, layers, n_facts),
        firing=firing,
        trouble=trouble,
    )


def update_bytes(lm: LanguageModel, layers: Sequence[int], n_facts: int) -> int:
    """Return the size of a patch that updates weights, in float32.

    These are two factors and the keys of each layer, and the targets.
    """
    widths = [lm.d_model + 2 * lm.ffn[layer].n_original for layer in layers]
    return 4 * n_facts * (sum(widths) + lm.d_model)


def appended_bytes(lm: LanguageModel, layers: Sequence[int], n_facts: int) -> int:
    """Return the size of a patch that appends two neurons for each fact, in float32."""
    return 4 * n_facts * sum(2 * row_numbers(lm.ffn[layer]) for layer in layers)
