"""The drift of a delta in a folder.

change = saved_change("my-delta")          # needs no model
drift_of_saved(lm, change, max_tokens=2000).kl_text
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..edit.delta import Delta
from ..judge.drift import Drift, drift_of_change
from ..model.language_model import LanguageModel


def saved_change(folder: str | Path) -> Delta:
    """Return the delta of a folder.

    Raises:
        DamagedError: A file of the delta is missing or altered.
    """
    return Delta.load(folder)


def drift_of_saved(lm: LanguageModel, change: Delta, **options: Any) -> Drift:
    """Measure what a saved delta does to everything else.

    Args:
        lm: The model that the delta was made on.
        change: The delta.
        options: The other arguments of `drift`.

    Raises:
        FingerprintError: The delta was made on another model.
    """
    return drift_of_change(lm, change, **options)
