"""Checks on arguments, made before anything is computed.

    samples = check_count(samples, "samples", "the number of corrupted runs")
    check_text(prompt, "the prompt")

Each check returns the value in a plain type. Otherwise it raises an InputError that says what the
value is and what is accepted:

    samples is 0: it must be the number of corrupted runs, a whole number of at least 1

The range in the message comes from the arguments of the check, so the two cannot differ. The error
carries the name of the argument.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from .errors import InputError


def check_text(value: object, name: str) -> str:
    """Return a string that can be written as UTF-8.

    Raises:
        InputError: when the value is not a string, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise _refusal(value, name, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} {value!r} holds half a character at position {error.start} (a lone "
            "surrogate), so it cannot be written as UTF-8: read it with the right encoding",
            argument=_argument(name),
        ) from None
    return value


def whole_number(value: Any) -> int | None:
    """Return an integer of any type as an int, and None for every other value.

    Integers of numpy and tensors with one integer count; True and False do not.
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(
    value: object,
    name: str,
    meaning: str = "",
    *,
    least: int = 1,
    below: int | None = None,
    also: str = "",
    error: type[InputError] = InputError,
) -> int:
    """Return a whole number in a range as an int.

    Args:
        value: What the caller gave.
        name: Name of the argument.
        meaning: What the argument is, as a noun, such as "the number of corrupted runs".
        least: Smallest accepted number.
        below: Smallest number that is too large. None: no upper end.
        also: What the caller accepts besides and has handled already, such as "None for all".
        error: Class of the error.
    """
    number = whole_number(value)
    if number is None or number < least or (below is not None and number >= below):
        reach = f"of at least {least:,}" if below is None else f"from {least:,} to {below - 1:,}"
        raise _refusal(value, name, f"a whole number {reach}", meaning, also, error)
    return number


def check_seed(value: object) -> int:
    """Return a seed of numpy's RandomState, a whole number below 2**32."""
    return check_count(value, "seed", least=0, below=2**32)


def check_number(
    value: object,
    name: str,
    meaning: str = "",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    also: str = "",
) -> float:
    """Return a finite real number in a range; numbers of numpy become floats.

    Args:
        value: What the caller gave.
        name: Name of the argument.
        meaning: What the argument is, as a noun.
        least: Smallest accepted number.
        above: Number that the value must exceed.
        most: Largest accepted number.
        below: Number that the value must stay under.
        also: What the caller accepts besides and has handled already, such as "None for all".
    """
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = value if isinstance(value, (int, float)) else float(value)
        if not (
            (least is not None and number < least)
            or (above is not None and number <= above)
            or (most is not None and number > most)
            or (below is not None and number >= below)
        ):
            return number
    if least is not None and most is not None:
        raise _refusal(value, name, f"a number from {least:,} to {most:,}", meaning, also)
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    reach = " and ".join(f"{word} {end:,}" for word, end in limits.items() if end is not None)
    accepted = f"a finite number{' of' if reach.startswith('at') else ''} {reach}".rstrip()
    raise _refusal(value, name, accepted, meaning, also)


def check_limit(value: object, name: str) -> float:
    """Return how much to read of something: a number of at least 1, or infinity for all of it."""
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) >= 1:
        raise _refusal(value, name, "a number of at least 1", also="math.inf for no limit")
    return value if isinstance(value, (int, float)) else float(value)


def check_items(value: Any, name: str, items: str, *, also: str = "") -> list[Any]:
    """Return the items of a list or of any other iterable, except a text or a mapping.

    Args:
        value: What the caller gave.
        name: Name of the argument.
        items: What the list holds, in the plural, such as "layer numbers".
        also: What the caller accepts besides and has handled already, such as "one Delta".
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refusal(value, name, f"a list of {items}", also=also)
    return list(value)


def _refusal(
    value: object,
    name: str,
    accepted: str,
    meaning: str = "",
    also: str = "",
    error: type[InputError] = InputError,
) -> InputError:
    """Build the error of a check that failed."""
    accepted = f"{meaning}, {accepted}" if meaning else accepted
    accepted += f", or {also}" if also else ""
    return error(f"{name} is {_shown(value)}: it must be {accepted}", argument=_argument(name))


def _argument(name: str) -> str | None:
    """Return the name where it is the name of an argument, and None where it is words."""
    return name if name.isidentifier() else None


def _shown(value: object) -> str:
    """Return a value as a message shows it: its repr, or its type where the repr is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
