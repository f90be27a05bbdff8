"""Silence for the libraries that load a model.

with quietly():
    module = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

from transformers.utils import logging as notices


@contextmanager
def quietly() -> Generator[None, None, None]:
    """Silence transformers' progress bars and notices, and accelerate's, while the block runs."""
    placing = logging.getLogger("accelerate")
    placed = placing.level
    placing.setLevel(logging.CRITICAL)
    level, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity(logging.CRITICAL)
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        placing.setLevel(placed)
        notices.set_verbosity(level)
        if bars:
            notices.enable_progress_bar()
