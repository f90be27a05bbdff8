"""The largest and smallest products of many vectors with the rows of a large matrix.

    top, top_scores, bottom, bottom_scores = extreme_tokens(vectors, weight, 10)

A plain product of thousands of values with a whole vocabulary is slow. So a rough product, in int8
where the processor has an instruction for it, screens the rows first:

1. Keep the groups of 64 rows with the largest rough scores, then the best rows of these groups:
   `_MARGIN` more than asked for.
2. Score these rows in float32. This also shows how large the error of the rough scores is.
3. Where the error may have hidden one of the best rows of a vector, multiply that vector with the
   whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ROWS = 256
"""Vectors screened at a time."""

_GROUP = 64
"""Rows of the matrix that are screened by their maximum."""

_MARGIN = 14
"""Rows scored in float32 beyond those asked for."""

_ERRORS = 5
"""How many errors of the rough scores the best rows must lie above the rows left out."""

_STEPS = 127
"""The largest number in int8."""


def extreme_tokens(
    vectors: Tensor, weight: Tensor, k: int, screen: Screen | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the k rows with the largest and the k with the smallest product with each vector.

    Args:
        vectors: The vectors, (n, d).
        weight: The matrix, (vocab, d).
        k: Number of rows to return at either end. At most vocab are returned.
        screen: `Screen.of(weight)`, for repeated calls. None: made where it pays.

    Returns:
        Ids and scores of the largest, then ids and scores of the smallest. Each is (n, k) on the
        CPU, the best and the most negative first.
    """
    k = min(k, len(weight))
    vectors = vectors.to(weight.device, torch.float32)
    if screen is None:
        if len(vectors) <= _ROWS:
            return _plain_extremes(vectors, weight, k)
        screen = Screen.of(weight)
    buffer = screen.empty(min(_ROWS, len(vectors)))
    parts: list[tuple[Tensor, ...]] = []
    for part in torch.split(vectors, _ROWS):
        results, doubtful = _screened(part, weight, k, screen, buffer[: len(part)])
        again = doubtful.nonzero()[:, 0]
        if len(again):
            for tensor, plain in zip(results, _plain_extremes(part[again], weight, k), strict=True):
                tensor[again] = plain.to(tensor)
        parts.append(tuple(tensor.cpu() for tensor in results))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]


def _screened(
    vectors: Tensor, weight: Tensor, k: int, screen: Screen, buffer: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the results of `extreme_tokens` by screening, and which vectors are doubtful (n,)."""
    near = min(len(weight), k + _MARGIN)
    rough, unit = screen.scores(vectors, buffer)
    results: list[Tensor] = []
    doubtful = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    for sign in (1, -1):
        columns, guessed = _largest(rough, near, len(weight), sign)
        exact = torch.cat(
            [
                _products(vectors[a : a + 32], weight, columns[a : a + 32])
                for a in range(0, len(vectors), 32)
            ]
        )
        best = (sign * exact).topk(k, dim=1)
        results += [columns.gather(1, best.indices), sign * best.values]
        guessed = guessed * unit
        error = (guessed - exact).square().mean(1).sqrt()
        if near < len(weight):
            doubtful |= best.values[:, -1] - sign * guessed[:, -1] < _ERRORS * error
    return results, doubtful


def _plain_extremes(
    vectors: Tensor, weight: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `extreme_tokens` from the full product."""
    scores = vectors @ weight.float().T
    top, bottom = scores.topk(k, dim=1), scores.topk(k, dim=1, largest=False)
    return top.indices.cpu(), top.values.cpu(), bottom.indices.cpu(), bottom.values.cpu()


def _products(vectors: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Return products of each vector (n, d) with its rows of a matrix, numbered (n, m): (n, m).

    Call it with few vectors: their rows then stay in the cache.
    """
    products: Tensor = torch.linalg.vecdot(
        nn.functional.embedding(rows, weight).float(), vectors[:, None]
    )
    return products


def _largest(scores: Tensor, near: int, vocab: int, sign: int) -> tuple[Tensor, Tensor]:
    """Return the columns (n, near) of the largest scores, and the scores, best first.

    The `near` largest scores lie in at most `near` groups: those with the largest maxima.

    Args:
        scores: Rough scores, (n, vocab and padding). The padding is overwritten.
        near: Number of columns.
        vocab: Number of columns that are not padding.
        sign: 1 for the largest scores, -1 for the smallest.
    """
    ends = torch.iinfo(scores.dtype) if scores.dtype == torch.int32 else torch.finfo(scores.dtype)
    scores[:, vocab:] = ends.min if sign > 0 else ends.max
    groups = scores.view(len(scores), -1, _GROUP)
    extremes = groups.amax(2) if sign > 0 else groups.amin(2)
    kept = extremes.topk(min(near, extremes.shape[1]), dim=1, largest=sign > 0).indices
    rows = torch.arange(len(scores), device=scores.device)[:, None] * groups.shape[1]
    members = groups.view(-1, _GROUP).index_select(0, (rows + kept).flatten()).view(len(scores), -1)
    best = members.topk(near, dim=1, largest=sign > 0)
    return kept.gather(1, best.indices // _GROUP) * _GROUP + best.indices % _GROUP, best.values


@dataclass(frozen=True, eq=False)
class Screen:
    """A matrix (vocab, d) in a form that multiplies quickly and roughly.

    Attributes:
        rows: The rows, with zeros up to whole groups: int8 or bfloat16 where the processor has an
            instruction for it, otherwise float32.
        columns: What one step of int8 is worth in each column, (d,) float32. None for other dtypes.
    """

    rows: Tensor
    columns: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Screen:
        """Make the screen of a matrix, on its device."""
        padding = (0, 0, 0, -len(weight) % _GROUP)
        dtype = _fastest(weight.device)
        if dtype != torch.int8:
            return cls(nn.functional.pad(weight.to(dtype), padding))
        columns = (weight.abs().amax(0).float() / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        rows = torch.cat(
            [(part / columns).round_().to(torch.int8) for part in torch.split(weight, 4096)]
        )
        return cls(nn.functional.pad(rows, padding), columns)

    def empty(self, n: int) -> Tensor:
        """Return room for the scores of n vectors."""
        return torch.empty(
            n,
            len(self.rows),
            dtype=self.rows.dtype if self.columns is None else torch.int32,
            device=self.rows.device,
        )

    def scores(self, vectors: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return rough products with vectors (n, d), and what one unit of them is worth, (n, 1).

        The products are written to `out`, (n, vocab and padding).
        """
        if self.columns is None:
            return torch.mm(vectors.to(self.rows.dtype), self.rows.T, out=out), vectors.new_ones(
                len(vectors), 1
            )
        vectors = vectors * self.columns
        unit = (vectors.abs().amax(1, keepdim=True) / _STEPS).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        return torch._int_mm((vectors / unit).round_().to(torch.int8), self.rows.T, out=out), unit


def _fastest(device: torch.device) -> torch.dtype:
    """Return the dtype in which a device multiplies fastest."""
    mkldnn = torch.backends.mkldnn
    if device.type == "cpu" and mkldnn.is_available():  # type: ignore[no-untyped-call]
        flags: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        if any(flags.get(name) for name in ("amx_int8", "avx512_vnni", "avx_vnni")):
            return torch.int8
        if any(flags.get(name) for name in ("amx_bf16", "avx512_bf16")):
            return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32
