"""The former place of the errors. They are now names of `factsmith` itself.

This module stays until version 0.2, so that scripts written for an earlier layout run.
"""

from __future__ import annotations

import warnings

from .core.errors import (
    DamagedError,
    FactError,
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    LedgerError,
    ModelError,
    ModelNotFoundError,
    NumericsError,
    RevisionError,
    SubjectError,
    TokenizerError,
    UnsupportedModelError,
    WorkspaceError,
)

__all__ = [
    "DamagedError",
    "FactError",
    "FactsmithError",
    "FingerprintError",
    "InputError",
    "LayerError",
    "LedgerError",
    "ModelError",
    "ModelNotFoundError",
    "NumericsError",
    "RevisionError",
    "SubjectError",
    "TokenizerError",
    "UnsupportedModelError",
    "WorkspaceError",
]

warnings.warn(
    "factsmith.errors has moved: import the errors from factsmith itself",
    DeprecationWarning,
    stacklevel=2,
)
