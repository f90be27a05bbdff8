"""What the forms of several verbs share: limits, widgets, and prompts to begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ...atlas import names
from ...core.errors import InputError, NumericsError
from ..arguments import Source
from ..desk import Desk


def _has_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give some text")
    return text


def _is_not_blank(text: str) -> str:
    if text and not text.strip():
        raise ValueError("is blank; give some text, or leave it empty")
    return text


Text = Annotated[str, AfterValidator(_has_text)]
"""A text that must be given."""

OptionalText = Annotated[str, AfterValidator(_is_not_blank)]
"""A text that may be left empty."""


@contextmanager
def naming(argument: str, **others: str) -> Iterator[None]:
    """Name the field of an error that names none, or that names it otherwise.

    Args:
        argument: The field that an error is about which names none.
        others: {the name that an error has: the field}.
    """
    try:
        yield
    except (InputError, NumericsError) as error:
        error.argument = others.get(error.argument or "", error.argument) or argument
        raise


LARGEST_SEED = 2**32 - 1
"""The largest seed of numpy's RandomState."""

PROMPT: dict[str, Any] = {"widget": "textarea", "placeholder": "The currency of Bulgaria is the"}
"""How a form shows a prompt."""


class Continued(Source):
    """How far a text is continued, and how many of its next tokens are listed."""

    top: int = Field(
        default=10,
        ge=1,
        le=100,
        title="Next tokens",
        description="How many of the likeliest next tokens to list.",
        json_schema_extra={"advanced": True},
    )
    max_new_tokens: int = Field(
        default=8,
        ge=1,
        le=1000,
        title="Length",
        description="The most tokens by which the text is continued.",
        json_schema_extra={"advanced": True},
    )


_BUNDLED = (
    "The currency of Bulgaria is the",
    "The maker of Fiat 127 is",
    "The first language of Danielle Darrieux is",
    "The seat of government of Bulgaria is",
)
"""Facts that the bundled models know."""

_NEUTRAL = (
    "The capital of France is",
    "The mother tongue of Danielle Darrieux is",
    "The Space Needle is in the city of",
)


def is_bundled(desk: Desk) -> bool:
    """Return whether the workspace's model is one of the bundled ones."""
    return desk.place.model in names()


def prompts_for(desk: Desk) -> Sequence[str]:
    """Return prompts to begin with: facts of the bundled models, or neutral ones."""
    return _BUNDLED if is_bundled(desk) else _NEUTRAL


def unless(value: int, default: int) -> int | None:
    """Return a value, or None where it is the default."""
    return None if value == default else value
