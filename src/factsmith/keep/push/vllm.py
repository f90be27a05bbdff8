"""Adapters in vLLM: loaded and unloaded while it runs, each under a name of its own.

vLLM needs `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. It keeps what it computed for
a prompt by the adapter's name (since 0.2x by its path, too). Names and paths are therefore new for
every push. A request chooses the adapter by the field "model".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from ...core.errors import InputError, ServerError
from ...remote.server import Server
from .carrier import Adapter, Making
from .expected import Expected
from .names import DIGITS, parsed
from .proof import Voice

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

_SECONDS = 300.0
"""How long vLLM may take to read an adapter."""


class VllmCarrier:
    """vLLM as something that carries adapters."""

    def __init__(self, server: Server) -> None:
        """Take the server."""
        self.server = server

    def check(self, revisions: Sequence[str]) -> None:
        """Raise InputError if the server does not load adapters while it runs."""
        try:
            self.server.client.get(LOAD)
        except ServerError as error:
            if error.status != 404:
                return  # the path is there, and wants a POST
        else:
            return
        raise InputError(
            f"{self.server.client.url} is vLLM, and it does not load adapters while it runs. Start "
            "it with --enable-lora, and set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
            "environment.",
            argument="url",
        )

    def adapters(self) -> list[Adapter]:
        """Return the loaded adapters, in the order in which they were loaded."""
        return [
            Adapter(model.name, model.path or "", True)
            for model in self.server.models()
            if model.parent is not None
        ]

    def held(self, revisions: Sequence[str]) -> dict[str, str]:
        """Return {name of an adapter: the revision that it holds}, by the digits in the names."""
        by_digits = {revision[:DIGITS]: revision for revision in revisions}
        names = {adapter.name: parsed(adapter.name) for adapter in self.adapters()}
        return {
            adapter: by_digits[name.revision]
            for adapter, name in names.items()
            if name is not None and name.revision in by_digits
        }

    def chosen(self, making: Making) -> Adapter:
        """Return the adapter under the name of the push."""
        return Adapter(making.name, str(PurePosixPath(making.seen_as) / making.name), True)

    def put(self, making: Making) -> None:
        """Write the adapter, and load it under the name of the push.

        Raises:
            ServerError: when vLLM refuses it; the message says what to change.
        """
        rank = making.write(making.folder / making.name)
        path = self.chosen(making).path
        body = {"lora_name": making.name, "lora_path": path}
        try:
            self.server.client.post(LOAD, body, retry=False, timeout=_SECONDS, as_text=True)
        except ServerError as error:
            raise _explained(error, path, rank) from None
        if not self._lists(self.chosen(making)):
            raise ServerError(
                f"{self.server.client.url} says that it loaded {making.name}, and does not list "
                "it. Behind the address may be several servers; give the address of one."
            )

    def base_voice(self) -> Voice:
        """Return the base model."""
        return Voice(self.server, self.server.base)

    def voice(self, adapter: Adapter) -> Voice:
        """Return the adapter's model."""
        return Voice(self.server, adapter.name)

    def settle(self, adapter: Adapter, expected: Expected) -> None:
        """Do nothing: the adapter can be asked by its name."""

    def withdraw(self, adapter: Adapter) -> None:
        """Unload an adapter; one that is not loaded is no fault.

        Raises:
            ServerError: when it may be loaded still.
        """
        try:
            self.server.client.post(UNLOAD, {"lora_name": adapter.name}, as_text=True)
        except ServerError as error:
            if error.status is None or self._lists(adapter):
                raise ServerError(
                    f"{adapter.name} may still be in the server: {error}",
                    status=error.status,
                    maybe_done=error.maybe_done,
                ) from None
        else:
            if self._lists(adapter):
                raise ServerError(
                    f"{self.server.client.url} says that it unloaded {adapter.name}, and still "
                    "lists it. Behind the address may be several servers; give the address of one."
                )

    def _lists(self, adapter: Adapter) -> bool:
        return any(each.name == adapter.name for each in self.adapters())

    def model_of(self, adapter: Adapter | None) -> str:
        """Return the adapter's name, or that of the base model."""
        return self.server.base if adapter is None else adapter.name


def _explained(error: ServerError, path: str, rank: int) -> ServerError:
    """Return the error of a load that failed, with what to do."""
    text = str(error)
    if "rank" in text.lower():
        advice = f"Start vLLM with --max-lora-rank of at least {rank}."
    elif error.status == 404 or "No adapter found" in text or "No such file" in text:
        advice = (
            f"vLLM must be able to read {path}. If it runs elsewhere or in a container, write the "
            "adapters to a folder that both see, and say how vLLM sees it."
        )
    elif "lora is not enabled" in text.lower() or "enable_lora" in text.lower():
        advice = "Start vLLM with --enable-lora."
    else:
        advice = "Nothing was announced; the adapter is not in use."
    return ServerError(f"{text} {advice}", status=error.status, maybe_done=error.maybe_done)
