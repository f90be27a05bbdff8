"""The names of the dtypes that a model can be loaded in."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16", "float64")

SAVED_DTYPE = "auto"
"""The dtype in which a checkpoint was saved, as transformers calls it."""
