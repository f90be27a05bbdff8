"""Values that are written as text: NAME=VALUE, as options and forms take them.

read_value("1e3")                          1000
named_values(["steps=40", "clamp=1.5"])    {"steps": 40, "clamp": 1.5}
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import InputError


def named_values(
    pairs: Iterable[str], taker: str = "settings", *, example: str = "steps=40"
) -> dict[str, Any]:
    """Return {name: value} of texts such as "steps=40".

    Args:
        pairs: The texts.
        taker: The argument or option that they are given to.
        example: A pair that it takes, for the message of an error.

    Raises:
        InputError: when a text has no name, no "=" or no value.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(
                f"{taker} takes NAME=VALUE, such as {example}; got {pair!r}",
                argument=None if taker.startswith("-") else taker,
            )
        values[name.strip()] = read_value(value.strip())
    return values


def read_value(text: str) -> Any:
    """Read a value: "none" is None, what is not a number stays text, and 1e3 is 1000."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    is_count = "e" in text.lower() and number.is_integer() and abs(number) < 2**53
    return int(number) if is_count else number
