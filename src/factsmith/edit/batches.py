"""Which facts are searched together: batches that fit into memory and cost little time.

    for batch in fitting_batches([question.size for question in questions], lm, layer, memory):
        ...                                       # a list of indices of questions

All rows of a batch have the same width, so a short question next to a long one is padded, which
costs time. So does each additional pass. Questions of similar width share a batch, and dynamic
programming finds the cheapest way to cut the sorted list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..model.language_model import LanguageModel

_GPU_PASS, _CPU_PASS = 512, 20
"""Cost of one more pass in live tokens: the weights are read again, and kernels are started again.
On one core of a processor, products of 14 rows reach 45 % of the rate of large products, and
products of 44 rows reach 70 %."""

_STREAM_VECTORS = 14
"""Vectors of the stream's width that autograd keeps for a token in a layer: norms, queries, keys,
values and sums."""

_COEFFICIENT_VECTORS = 8
"""Vectors of the feed-forward width that autograd keeps for a token in a layer. An activation
function that is written out, such as GPT-2's, keeps each of its steps."""

_LOGIT_BYTES = 16
"""Bytes for a token of the vocabulary at a place where an answer is read: the logits, their
logarithmic softmax, and the gradients of both."""


class Size(NamedTuple):
    """The size of a batch.

    Attributes:
        rows: Token sequences.
        width: Columns from the subject token on.
        length: All columns.
        answers: Places where logits are read.
    """

    rows: int = 0
    width: int = 0
    length: int = 0
    answers: int = 0

    def __or__(self, other: Size) -> Size:
        """Return the size of one batch that holds both."""
        width, length = max(self.width, other.width), max(self.length, other.length)
        return Size(self.rows + other.rows, width, length, self.answers + other.answers)


def fitting_batches(
    sizes: Sequence[Size], lm: LanguageModel, layer: int, memory: int, most: int | None = None
) -> list[list[int]]:
    """Return the questions in batches, as lists of indices.

    Args:
        sizes: The size of a batch that holds one question, for each question.
        lm: The model.
        layer: The layer where targets are searched.
        memory: Bytes that a batch may take. A batch of one question is always accepted.
        most: Questions of a batch, at most. None: as many as fit.
    """
    most = max(1, len(sizes)) if most is None else most
    order = sorted(range(len(sizes)), key=lambda i: sizes[i].width)
    pass_cost, bytes_of = _pass_cost(lm), _estimate(lm, layer)
    cost = [0.0]  # cost[n]: of the first n questions, in the best batches
    first = [0]  # first[n]: where the last of these batches begins
    for stop in range(1, len(order) + 1):
        best, size = (float("inf"), 0), Size()
        for start in range(stop - 1, max(-1, stop - 1 - most), -1):
            size = size | sizes[order[start]]
            if bytes_of(size) > memory and start < stop - 1:
                break
            best = min(best, (cost[start] + size.rows * size.width + pass_cost, start))
        cost.append(best[0])
        first.append(best[1])
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[first[stop] : stop])
        stop = first[stop]
    return batches[::-1]


def search_memory(lm: LanguageModel) -> int:
    """Return the bytes that a batch may take by default: half of a GPU's free memory, or 1 GiB.

    It is a power of two, so that the batches do not depend on how much exactly is free.
    """
    if lm.device.type == "cuda":
        half = int(torch.cuda.mem_get_info(lm.device)[0]) // 2
        return int(2 ** max(0, half.bit_length() - 1))
    return 2**30


def _pass_cost(lm: LanguageModel) -> int:
    return _CPU_PASS if lm.device.type == "cpu" else _GPU_PASS


def batch_bytes(size: Size, lm: LanguageModel, layer: int) -> int:
    """Return an estimate of the memory that a search takes in addition to the model.

    It errs on the large side.
    """
    return _estimate(lm, layer)(size)


def _estimate(lm: LanguageModel, layer: int) -> Callable[[Size], int]:
    """Return `batch_bytes` of one model and layer."""
    token = _STREAM_VECTORS * lm.d_model + _COEFFICIENT_VECTORS * lm.ffn[layer].d_ff
    # In each layer autograd keeps the keys and values of the prefix, joined to the live ones.
    vocabulary = next(lm.embedding.parameters()).shape[0]  # often larger than the tokenizer's
    above, d_model, n_layers = lm.n_layers - layer, lm.d_model, lm.n_layers
    itemsize = lm.dtype.itemsize

    def of(size: Size) -> int:
        graph = above * (size.width * token + 2 * size.length * d_model)
        kept = (2 * n_layers * size.length + (layer + 2) * size.width) * d_model
        return size.rows * (graph + kept) * itemsize + size.answers * vocabulary * _LOGIT_BYTES

    return of
