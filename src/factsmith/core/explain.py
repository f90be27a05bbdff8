"""Short words about foreign values, for messages that stay readable whatever a file holds.

short("x" * 10**6)      at most 160 characters
explain(error, "fact")  the first faults that pydantic found, each in one clause
"""

from __future__ import annotations

import reprlib

import pydantic

NAMED = 5
"""Faults that one message names; a file may have millions."""

_LONGEST = 160
"""Characters of a quoted value."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120
_brief.maxlevel = 2


def short(value: object) -> str:
    """Return a value as messages quote it: never long, however large or deep it is."""
    try:
        text = _brief.repr(value)
    except ValueError:  # an integer of too many digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def explain(error: pydantic.ValidationError, subject: str) -> str:
    """Return the first faults of a validation, each with the name of its field.

    Args:
        error: What pydantic found.
        subject: What was validated, such as "fact". It begins the message.
    """
    faults = error.errors(include_url=False)
    clauses = []
    for fault in faults[:NAMED]:
        field = ".".join(short(part).strip("'") for part in fault["loc"]) or subject
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "string_type":
            message = (
                f"is {short(fault['input'])}; expected text "
                "(in quotes, if it looks like a number, a date, or yes and no)"
            )
        elif fault["type"] == "tuple_type":
            message = f"is {short(fault['input'])}; expected a list"
        clauses.append(f"{field} {message[0].lower() + message[1:]}" if message else field)
    more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return f"{subject}: " + "; ".join(clauses) + more
