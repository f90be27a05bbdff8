"""The names of what a causal trace restores, severs and corrupts.

    Restoration("mlp", window=2).spans(6)      # the layers that are restored together
    Restoration("state", sever="mlp").name     # "state, mlp severed"

A new part needs its name here, and in `batching.py` the module whose output is replaced.

This module does not import torch. The command line reads the names from it before it loads a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ..core.checks import check_count
from ..core.errors import InputError, LayerError

Part: TypeAlias = Literal["mlp", "attention"]
"""A part of a layer whose output can be restored, or held at its corrupted value."""

TraceKind: TypeAlias = Literal["state", "mlp", "attention"]
"""What a trace restores: a layer's output, or the output of one of its parts."""

CorruptionKind: TypeAlias = Literal["noise", "replace"]
"""How a trace corrupts the subject: noise on its embeddings, or another subject."""


@dataclass(frozen=True)
class Restoration:
    """What one map of a causal trace restores.

    Attributes:
        kind: "state" restores a layer's output. "mlp" and "attention" restore the output of that
            part in several neighbouring layers.
        window: Number of neighbouring layers restored together. A state is restored alone.
        sever: With kind "state": the part whose outputs, in all layers above the restored state,
            keep the values of the corrupted run. None: every part runs freely.

    Raises:
        InputError: when the kind or the severed part is unknown, or the two do not fit.
        LayerError: when the window is not a whole number of at least 1.
    """

    kind: TraceKind = "state"
    window: int = 10
    sever: Part | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, "kind", get_args(TraceKind))
        window = check_count(
            self.window, "window", "the number of layers restored together", error=LayerError
        )
        object.__setattr__(self, "window", window)
        check_choice(self.sever, "sever", (*get_args(Part), None))
        if self.sever is not None and self.kind != "state":
            raise InputError(
                f"sever is {self.sever!r} and kind is {self.kind!r}. Only a restored state can be "
                "cut off from the layers above: give kind='state', or leave sever out.",
                argument="sever",
            )

    @property
    def part(self) -> Part | None:
        """The part whose output is restored, or None for a state."""
        return None if self.kind == "state" else self.kind

    @property
    def layers_together(self) -> int:
        """The number of layers restored together: the window, or 1 for a state."""
        return self.window if uses_window(self.kind) else 1

    @property
    def name(self) -> str:
        """The name of the map, such as "mlp" or "state, mlp severed"."""
        return self.kind if self.sever is None else f"{self.kind}, {self.sever} severed"

    def spans(self, n_layers: int) -> list[range]:
        """Return the layers restored together around each layer, cut at the model's ends.

        As in the reference code, the span of layer l is [l - window // 2, l + ceil(window / 2)).
        """
        window = self.layers_together
        return [
            range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
            for layer in range(n_layers)
        ]


def uses_window(kind: TraceKind) -> bool:
    """Return whether a trace of this kind restores several layers together."""
    return kind != "state"


def check_choice(value: object, name: str, choices: Sequence[object]) -> None:
    """Raise an InputError unless the value is one of the choices."""
    if value not in choices:
        raise InputError(
            f"{name} is {value!r}: it must be one of {', '.join(map(repr, choices))}",
            argument=name,
        )
