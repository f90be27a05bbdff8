"""What `Workbench.apply` did: the attempt, and the revision that keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.tables import Table
from ..patch.attempt import Attempt
from .revision import Revision


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Outcome(Attempt):
    """What `Workbench.apply` did.

    Attributes:
        revision: The record that keeps the patch. None: nothing was written; `warnings` and
            `failures` say why.
        forced: Whether the patch was kept though a gate failed, or though facts were in conflict.
    """

    revision: Revision | None = None
    forced: bool = False

    @classmethod
    def of(
        cls, attempt: Attempt, revision: Revision | None = None, *, forced: bool = False
    ) -> Outcome:
        """Return the outcome of an attempt."""
        return cls(**{**vars(attempt), "revision": revision, "forced": forced})

    def tables(self) -> list[Table]:
        """What became of the attempt, and the attempt itself."""
        kept = (
            "nothing was written"
            if self.revision is None
            else f"committed as {self.revision.id[:10]}"
        )
        return [Table(kept, {}), *super().tables()]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        kept = {"revision": self.revision and self.revision.to_dict(), "forced": self.forced}
        return {**super().to_dict(), **kept}
