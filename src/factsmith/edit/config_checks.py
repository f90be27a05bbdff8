"""Checks of single settings, which the classes of settings have in common."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.checks import check_number, whole_number
from ..core.errors import InputError, LayerError


def set_positive(
    config: object, name: str, *, below: float | None = None, also: str = "None"
) -> None:
    """Store a setting as a plain number, after a check that it is above 0."""
    value = check_number(getattr(config, name), name, above=0, below=below, also=also)
    object.__setattr__(config, name, value)


def check_choice(value: object, name: str, choices: tuple[str, str]) -> None:
    """Check that a setting is one of two words."""
    if value not in choices:
        first, second = choices
        raise InputError(f'{name} is {value!r}: it must be "{first}" or "{second}"', argument=name)


def sorted_layers(layers: object) -> tuple[int, ...]:
    """Return the numbers of layers in ascending order, each once."""
    listed = isinstance(layers, Iterable) and not isinstance(layers, (str, bytes))
    given = list(layers) if listed else [layers]  # type: ignore[call-overload]
    numbers = [n for n in map(whole_number, given) if n is not None and n >= 0]
    if not numbers or len(numbers) < len(given) or len(set(numbers)) < len(numbers):
        raise LayerError(
            f"layers is {layers!r}: it must be a list of layer numbers, counted from 0, with each "
            "layer once, or None",
            argument="layer",
        )
    return tuple(sorted(numbers))
