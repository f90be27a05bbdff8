"""What the forms of several verbs share: limits, widgets, and prompts to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ...atlas import names
from ..arguments import Source
from ..desk import Desk

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
