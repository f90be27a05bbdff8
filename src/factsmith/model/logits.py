"""Logits of a large vocabulary, computed a piece of the vocabulary at a time on a CPU.

with wide_unembedding(module, hidden):
    logits = module(...).logits
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.multiply import are_quick
from .trace import hook_count, standing_in


@contextmanager
def wide_unembedding(module: Any, hidden: Tensor) -> Generator[None, None, None]:
    """Compute a large vocabulary's logits in pieces while the block runs, where that is faster.

    That is on a CPU in 32 bits. In one product the logits leave the caches again and again, which
    takes half as long again. The numbers are the same. oneDNN cuts the product by itself.
    """
    unembedding = module.get_output_embeddings()
    plain = (
        type(unembedding) is nn.Linear
        and unembedding.bias is None
        and not hook_count([unembedding])
    )
    # With parts on several devices, the hooks that move states between them must run.
    plain = plain and unembedding.weight.device == hidden.device
    if not (
        plain
        and unembedding.out_features >= 2**14
        and hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and not are_quick()
    ):
        yield
        return

    def play(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        (states,) = args
        rows = states.reshape(-1, states.shape[-1])
        logits: Tensor = _Logits.apply(rows, unembedding.weight)  # type: ignore[no-untyped-call]
        return logits.view(*states.shape[:-1], -1)

    with standing_in([unembedding], play):
        yield


class _Logits(torch.autograd.Function):
    """states @ weight.T, (n, d) and (vocab, d) to (n, vocab), a piece of the vocabulary at a time.

    Gradients reach the states.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        logits = states.new_empty(len(states), len(weight))
        for at in range(0, len(weight), 1024):
            torch.mm(states, weight[at : at + 1024].T, out=logits[:, at : at + 1024])
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.weight, None
