"""What callers give, checked before anything is computed: an InputError says what was got and what was expected.

samples = check_count(samples, "samples", "1 or more corrupted runs")
check_text(prompt, "the prompt")
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from .errors import InputError


def check_text(value: object, name: str) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {_shown(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} {value!r} holds half a character at place {error.start} (a lone surrogate); expected text that can be written as "
            "UTF-8: read it with the right encoding"
        ) from None
    return value


def whole_number(value: Any) -> int | None:
    """Anything that counts (numpy's integers and tensors with one included) as an int; None for all else, and for True and False."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(
    value: object,
    name: str,
    expected: str,
    *,
    least: int = 1,
    below: int | None = None,
    error: type[InputError] = InputError,
) -> int:
    """A whole number from `least` on (and under `below`), as an int; `error` is what is raised otherwise."""
    number = whole_number(value)
    if number is None or number < least or (below is not None and number >= below):
        raise error(f"{name} is {_shown(value)}; expected {expected}")
    return number


def check_seed(value: object) -> int:
    """A seed of numpy's RandomState."""
    return check_count(value, "seed", "a whole number from 0 to 2**32 - 1", least=0, below=2**32)


def check_number(value: object, name: str, expected: str = "a finite number") -> float:
    """A finite real number, numpy's included."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} is {_shown(value)}; expected {expected}")
    return value if isinstance(value, (int, float)) else float(value)


def check_limit(value: object, name: str) -> float:
    """How much to read of something: a number of at least 1, infinity for all of it."""
    if not isinstance(value, Real) or isinstance(value, bool) or not float(value) >= 1:
        raise InputError(
            f"{name} is {_shown(value)}; expected a number of at least 1, or math.inf for all there is"
        )
    return value if isinstance(value, (int, float)) else float(value)


def check_items(value: Any, name: str, expected: str) -> list[Any]:
    """The items of a list or of anything else that can be gone through, but a text or a mapping."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {_shown(value)}; expected {expected}")
    return list(value)


def _shown(value: object) -> str:
    """A value in a message: as it is written, or what it is where that is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
