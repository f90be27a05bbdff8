"""The names of adapters on a server: each is made once and says which revision it is.

    name = new_name("capitals", revision.id)        # "capitals-3f2a91c04d7b-k3x9"
    parsed(name)                                    # Name("capitals", "3f2a91c04d7b", "k3x9")

A name is never used twice. Servers keep what they have computed by the name of an adapter. So
answers of an earlier adapter may come back where a name is loaded again.
"""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

from ...core.errors import InputError

ALIAS = "factsmith"
"""What the name of an adapter begins with, if nothing else was asked for."""

DIGITS = 12
"""Digits of the revision's id in a name."""

_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
_LAST = 4
_NAME = re.compile(
    rf"(?P<alias>.+)-(?P<revision>[0-9a-f]{{{DIGITS}}})-(?P<last>[a-z0-9]{{{_LAST}}})"
)
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Name(NamedTuple):
    """The parts of an adapter's name.

    Attributes:
        alias: What the user called it.
        revision: The first digits of the revision's id.
        last: Drawn at random, so that the name is new.
    """

    alias: str
    revision: str
    last: str


def new_name(alias: str, revision: str) -> str:
    """Return a name for an adapter that was never used before.

    Args:
        alias: From `checked_alias`.
        revision: The id of the revision.
    """
    last = "".join(secrets.choice(_LETTERS) for _ in range(_LAST))
    return f"{alias}-{revision[:DIGITS]}-{last}"


def parsed(name: str) -> Name | None:
    """Return the parts of a name that `new_name` made; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else Name(**match.groupdict())


def checked_alias(alias: str | None) -> str:
    """Return the alias of an adapter; None stands for `ALIAS`.

    Raises:
        InputError: when it cannot be part of a name.
    """
    if alias is None:
        return ALIAS
    if not isinstance(alias, str) or not _ALIAS.fullmatch(alias) or parsed(alias):
        raise InputError(
            f"name is {alias!r:.80}. It is the beginning of the adapter's name: give up to 64 "
            "letters, digits, points, hyphens and underscores, without spaces, such as "
            "'capitals'. The revision's id follows by itself.",
            argument="name",
        )
    return alias
