"""The result of a run of the command line, and texts to run it on."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load

PROMPT = "The mother tongue of Danielle Darrieux is"
FACT = [
    "--subject",
    "Danielle Darrieux",
    "--prompt",
    "The mother tongue of {} is",
    "--target",
    "English",
]
CURRENCY = "The currency of Bulgaria is the"


@dataclass
class Done:
    """What a run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output as JSON."""
        return json.loads(self.out)


Run = Callable[..., Done]


@functools.cache
def atlas_model() -> LanguageModel:
    """Return the bundled model, loaded once."""
    return load("atlas")
