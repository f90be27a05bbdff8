"""The drift of a delta in a folder.

drift_of_saved(lm, "my-delta", max_tokens=2000).kl_text
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..edit.delta import Delta
from ..judge.drift import Drift, drift_of_change
from ..model.language_model import LanguageModel


def drift_of_saved(lm: LanguageModel, folder: str | Path, **options: Any) -> Drift:
    """Measure what a saved delta does to everything else.

    Args:
        lm: The model that the delta was made on.
        folder: The delta's folder.
        options: The other arguments of `drift`.

    Raises:
        DamagedError: A file of the delta is missing or altered.
        FingerprintError: The delta was made on another model.
    """
    return drift_of_change(lm, Delta.load(folder), **options)
