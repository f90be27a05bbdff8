"""Adapters in llama.cpp's llama-server: given when it starts, switched on and off while it runs.

    llama-server -m base.gguf --lora-init-without-apply --lora patch-3f2a91c04d7b.gguf

A push asks the proof with the adapter's scale in each request, so users see nothing of it. If the
proof passes, the adapter's scale becomes 1 for all requests, and that of the workspace's other
adapters 0. Adapters of others keep their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from ...core.errors import DamagedError, InputError, ServerError
from ...remote.server import Server
from ..export.gguf_adapter import TASK
from ..export.manifest import read_manifest
from ..export.single import manifest_of
from .carrier import Adapter, Making
from .names import DIGITS
from .proof import Voice

_SCALES = "/lora-adapters"


class LlamaCarrier:
    """llama-server as something that carries adapters."""

    def __init__(self, server: Server) -> None:
        """Take the server."""
        self.server = server
        self._ours: set[str] = set()  # adapters of the workspace, whose scales may be changed

    def check(self) -> None:
        """Raise InputError if the server has no adapter."""
        if not self.adapters():
            raise InputError(
                f"{self.server.client.url} is llama.cpp, and it was started without adapters. "
                f"{_START}",
                argument="url",
            )

    def adapters(self) -> list[Adapter]:
        """Return the adapters, in the order in which they were given."""
        return [
            Adapter(model.name, model.path or "", bool(model.scale))
            for model in self.server.models()
            if model.parent is not None
        ]

    def held(self, revisions: Sequence[str]) -> dict[str, str]:
        """Return {name of an adapter: the revision that it holds}.

        The adapter's file says it, and otherwise its manifest or its name. These adapters are the
        workspace's: from now on their scales may be changed.
        """
        held = {}
        for model in self.server.models():
            path = model.path or ""
            stated = _revision_of_task(model.task) or _manifest_revision(path)
            for revision in revisions:
                if model.parent and revision[:DIGITS] in (stated or PurePath(path).name):
                    held[model.name] = revision
        self._ours |= set(held)
        return held

    def put(self, making: Making) -> Adapter:
        """Return the server's adapter that holds the revision.

        Raises:
            InputError: when there is none: llama.cpp reads adapters only when it starts.
        """
        held = self.held([making.revision])
        for adapter in self.adapters():
            if adapter.name in held:
                return adapter
        raise InputError(
            f"{self.server.client.url} has no adapter of revision {making.revision[:DIGITS]}. "
            f"{_START.replace('REVISION', making.revision[:DIGITS])}",
            argument="revisions",
        )

    def base_voice(self) -> Voice:
        """Return the model without the workspace's adapters."""
        return Voice(self.server, self.server.base, self._scales(None))

    def voice(self, adapter: Adapter) -> Voice:
        """Return the model with one of the workspace's adapters."""
        return Voice(self.server, self.server.base, self._scales(adapter))

    def settle(self, adapter: Adapter) -> None:
        """Give the adapter the scale 1 for all requests, and the workspace's others 0.

        Raises:
            ServerError: when the server does not have these scales afterwards.
        """
        self._set(self._scales(adapter))

    def withdraw(self, adapter: Adapter) -> None:
        """Give an adapter the scale 0 for all requests."""
        now = {each.name: each.is_on for each in self.adapters()}
        if now.get(adapter.name):
            self._set({**self._now(), adapter.name: 0.0})

    def model_of(self, adapter: Adapter | None) -> str:
        """Return the name of the model: requests need not choose."""
        return self.server.base

    def _now(self) -> dict[str, float]:
        return {model.name: model.scale or 0.0 for model in self.server.models() if model.parent}

    def _scales(self, adapter: Adapter | None) -> dict[str, float]:
        """Return every scale with one of the workspace's adapters on, or with none."""
        scales = self._now()
        for name in scales.keys() & self._ours:
            scales[name] = 0.0
        if adapter is not None:
            scales[adapter.name] = 1.0
        return scales

    def _set(self, scales: dict[str, float]) -> None:
        numbers = {model.name: model.number for model in self.server.models() if model.parent}
        body = [{"id": numbers[name], "scale": scale} for name, scale in scales.items()]
        self.server.client.post(_SCALES, body)
        if self._now() != scales:
            raise ServerError(
                f"{self.server.client.url} did not take the scales of its adapters. Push again."
            )


_START = (
    "Export one with the format gguf-adapter, name the file patch-REVISION.gguf, and start "
    "llama-server with --lora-init-without-apply and --lora FILE."
)


def _revision_of_task(task: str | None) -> str | None:
    """Return the revision that the task of an adapter names. None: it names none."""
    return task.removeprefix(TASK) if task is not None and task.startswith(TASK) else None


def _manifest_revision(path: str) -> str | None:
    """Return the revision that the manifest of an adapter's file names. None: it is not here."""
    file = Path(path)
    try:
        return read_manifest(file.parent, manifest_of(file).name).revision
    except (DamagedError, OSError, ValueError):
        return None
