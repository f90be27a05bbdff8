"""The former place of the ledger. It is now `factsmith.keep.ledger`.

This module stays until version 0.2, so that scripts written for an earlier layout run.
"""

from __future__ import annotations

import sqlite3
import warnings

from .keep.ledger import Ledger

__all__ = ["Ledger", "sqlite3"]

warnings.warn(
    "factsmith.ledger has moved: import Ledger from factsmith.keep.ledger",
    DeprecationWarning,
    stacklevel=2,
)
