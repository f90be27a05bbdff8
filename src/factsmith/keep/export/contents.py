"""The contents of an export: a model, its patches, and where each patch comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a patch comes from, as its workspace records it.

    Attributes:
        revision: The id of the revision that committed it. None: no workspace did.
        message: The message of that revision, one line.
        moments: The sha256 of the second moments it was made with. None: not recorded.
    """

    revision: str | None = None
    message: str = ""
    moments: str | None = None
