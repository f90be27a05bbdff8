"""Adapters in llama.cpp's llama-server: given when it starts, switched on and off while it runs.

    llama-server -m base.gguf --no-cache-prompt --lora-scaled patch-3f2a91c04d7b.gguf:0

llama-server keeps what it has computed for a prompt, and does not ask which scales that was for. So
the answers of before come back after a change of scales, and patched ones after a proof. Only
without this cache are pushes possible.

A push asks the proof with the adapter's scale in each request, so users see nothing of it. If the
proof passes, the adapter's scale becomes 1 for all requests, and that of the workspace's other
adapters 0. Adapters of others keep their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from ...core.errors import DamagedError, InputError, ServerError
from ...model.matching import begins_with
from ...remote.replies import as_mapping
from ...remote.server import Server
from ..export.gguf_adapter import TASK
from ..export.manifest import read_manifest
from ..export.single import manifest_of
from .carrier import Adapter, Making
from .expected import Expected
from .names import DIGITS
from .proof import Voice

_SCALES, _ASK = "/lora-adapters", "/v1/completions"

_LONG = "One, two, three, four, five, six, seven, eight, nine, ten"
"""A prompt of several tokens, to see whether a second request finds it computed."""

_FEW = 8
"""Facts that are asked as users ask."""


class LlamaCarrier:
    """llama-server as something that carries adapters."""

    def __init__(self, server: Server) -> None:
        """Take the server."""
        self.server = server
        self._ours: set[str] = set()  # adapters of the workspace, whose scales may be changed

    def check(self, revisions: Sequence[str]) -> None:
        """Raise InputError if the server lacks an adapter, or keeps what it has computed."""
        if not self.adapters():
            raise InputError(
                f"{self.server.client.url} is llama.cpp, and it was started without adapters. "
                f"{_START}",
                argument="url",
            )
        body = {"prompt": _LONG, "max_tokens": 1, "temperature": 0.0}
        answers = [self.server.client.post(_ASK, body) for _ in range(2)]
        if any(map(_n_cached, answers)):
            raise InputError(
                f"{self.server.client.url} is llama.cpp, and it keeps what it has computed for a "
                "prompt, whatever the scales of the adapters were. Users would get old answers. "
                "Start llama-server with --no-cache-prompt.",
                argument="url",
            )
        for revision in revisions:
            self._of(revision)

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

    def chosen(self, making: Making) -> Adapter:
        """Return the server's adapter that holds the revision; raises InputError without one."""
        return self._of(making.revision)

    def put(self, making: Making) -> None:
        """Do nothing: llama.cpp reads adapters only when it starts."""

    def _of(self, revision: str) -> Adapter:
        held = self.held([revision])
        for adapter in self.adapters():
            if adapter.name in held:
                return adapter
        raise InputError(
            f"{self.server.client.url} has no adapter of revision {revision[:DIGITS]}. "
            f"{_START.replace('REVISION', revision[:DIGITS])}",
            argument="revisions",
        )

    def base_voice(self) -> Voice:
        """Return the model without the workspace's adapters."""
        return Voice(self.server, self.server.base, self._scales(None))

    def voice(self, adapter: Adapter) -> Voice:
        """Return the model with one of the workspace's adapters."""
        return Voice(self.server, self.server.base, self._scales(adapter))

    def settle(self, adapter: Adapter, expected: Expected) -> None:
        """Give the adapter the scale 1 for all requests, and the workspace's others 0.

        Then some facts are asked as users ask, without scales in the request.

        Raises:
            ServerError: when the server does not have these scales afterwards, or users do not get
                the facts. The scales are then as before.
        """
        before = self._now()
        try:
            self._set(self._scales(adapter))
            self._check_users(expected)
        except BaseException as error:
            try:
                self._set(before)
            except ServerError as second:
                error.add_note(f"The scales of {self.server.client.url} may be wrong: {second}")
            raise

    def _check_users(self, expected: Expected) -> None:
        probes = [each for each in expected.probes if each.role == "prompt" and each.held]
        some = probes[:_FEW]
        answers = self.server.as_users(
            [probe.prompt for probe in some],
            n_tokens=expected.n_tokens,
            lines=[probe.lines for probe in some],
        )
        for probe, answer in zip(some, answers, strict=True):
            if begins_with(answer.text, probe.wanted) == probe.forget:
                raise ServerError(
                    f"{self.server.client.url} gives the fact to the proof and not to users: "
                    f"{probe.prompt!r} is answered {answer.text!r}. The scales are as before. "
                    "Start llama-server with --no-cache-prompt."
                )

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
    "llama-server with --no-cache-prompt and --lora-scaled patch-REVISION.gguf:0, which leaves it "
    "off until it is proved."
)


def _n_cached(answer: Any) -> int:
    """Return how many tokens of the prompt the server had computed before; 0 if it is not known."""
    details = as_mapping(as_mapping(answer).get("usage")).get("prompt_tokens_details")
    try:
        return int(float(as_mapping(details).get("cached_tokens") or 0))
    except (TypeError, ValueError, OverflowError):
        return 0


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
