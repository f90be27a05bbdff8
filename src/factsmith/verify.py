"""The former place of the proof of a patch. It is now `factsmith.patch.proof.prove`.

This module stays until version 0.2, so that scripts written for an earlier layout run.
"""

from __future__ import annotations

import warnings

from .patch.proof import prove as verify
from .patch.verification import Check, Verification

__all__ = ["Check", "Verification", "verify"]

warnings.warn(
    "factsmith.verify has moved: import prove from factsmith.patch.proof, "
    "and Check and Verification from factsmith.patch.verification",
    DeprecationWarning,
    stacklevel=2,
)
