"""The carrier for a server, by its kind.

    carrier = carrier_of(server)                    # a VllmCarrier or a LlamaCarrier

A new kind of server needs its name in `remote.server`, a class with the methods of `Carrier`, and a
line here.
"""

from __future__ import annotations

from ...core.errors import InputError
from ...remote.server import Server
from .carrier import Carrier
from .llama_cpp import LlamaCarrier
from .vllm import VllmCarrier


def carrier_of(server: Server) -> Carrier:
    """Return the carrier for a server.

    Raises:
        InputError: when its kind takes no adapters.
    """
    if server.kind == "vllm":
        return VllmCarrier(server)
    if server.kind == "llama.cpp":
        return LlamaCarrier(server)
    raise InputError(
        f"{server.client.url} is neither vLLM nor llama.cpp, so it takes no adapters by HTTP. "
        "Export a checkpoint and start the server with it, or evaluate the server as it is.",
        argument="url",
    )
