"""Where adapters and the records of pushes are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..ledger import Ledger
from .records import FOLDER


@dataclass(frozen=True)
class AdapterPlace:
    """Where adapters and records are kept.

    Attributes:
        folder: The folder that holds them. None: `served` in the workspace.
        seen_as: The same folder, as the server sees it. None: by the same path.
    """

    folder: Path | None = None
    seen_as: str | None = None

    def below(self, ledger: Ledger) -> Path:
        """Return the folder for a workspace, as a full path."""
        return (self.folder or ledger.folder / FOLDER).resolve()


IN_THE_WORKSPACE = AdapterPlace()
"""The folder `served` of the workspace, which the server sees by the same path."""
