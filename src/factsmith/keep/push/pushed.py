"""What became of a push or a rollback: the model that users ask for, and the proof."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...core.tables import Shown, Table
from ...remote.server import Server
from .proof import ServedProof


@dataclass(frozen=True, kw_only=True, repr=False)
class Pushed(Shown):
    """A revision in a server.

    Attributes:
        url: The server.
        kind: "vllm" or "llama.cpp".
        model: The name that users ask for. None: the proof failed.
        adapter: The adapter's name in the server. None: the base model, or nothing was loaded.
        path: Where the server read the adapter.
        revision: The id of the revision, or "base".
        proof: The proof in the server. None: nothing was asked of the adapter.
        failures: Why it failed, in words.
        again: Whether the adapter was there before.
        withdrawn: The adapters that were taken out of use.
    """

    url: str
    kind: str
    model: str | None
    adapter: str | None
    path: str | None
    revision: str
    proof: ServedProof | None = None
    failures: tuple[str, ...] = ()
    again: bool = False
    withdrawn: tuple[str, ...] = ()

    @classmethod
    def base(cls, server: Server, model: str, revision: str) -> Pushed:
        """Return the result of going back to the base model."""
        return cls(
            url=server.client.url,
            kind=server.kind,
            model=model,
            adapter=None,
            path=None,
            revision=revision,
        )

    @property
    def passed(self) -> bool:
        """Whether users can have it."""
        return self.model is not None

    def without(self, adapter: str) -> Pushed:
        """Return the result with an adapter that was taken out."""
        return dataclasses.replace(self, withdrawn=(*self.withdrawn, adapter))

    def tables(self) -> list[Table]:
        """Return what became of it, and the proof."""
        is_base = self.passed and self.adapter is None
        what = "the base model" if is_base else f"revision {self.revision[:10]}"
        if self.passed:
            state = "proved again" if self.again else "proved"
            title = f"{what} in {self.url} ({self.kind})"
            title += f": {state}" if self.proof is not None else ""
        elif self.again:
            title = f"{what} in {self.url} ({self.kind}): the proof failed, nothing was changed"
        else:
            title = f"{what} is not in {self.url} ({self.kind}): the proof failed"
        tables = [Table(title, {})]
        return tables if self.proof is None else [*tables, *self.proof.tables()]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            **vars(self),
            "passed": self.passed,
            "proof": None if self.proof is None else self.proof.to_dict(),
            "failures": list(self.failures),
            "withdrawn": list(self.withdrawn),
        }
