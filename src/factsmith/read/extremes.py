"""read.extremes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEAR = 16


_ROWS, _GROUP, _MARGIN, _ERRORS = 256, 64, 14, 5


def extreme_tokens(
    vectors: Tensor, weight: Tensor, k: int, screen: Screen | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows of a matrix (vocab, d), the k with the largest and the k with the smallest product with each vector (n, d).

    Returns (ids, scores, ids, scores), each (n, k), best and most negative first. Rows are screened by a rough product: kept by groups of
    64, then one by one, `_MARGIN` more than asked for, and these are scored in float32. How far the rough scores are off is seen there;
    a vector whose k best do not lie `_ERRORS` of these errors clear of what was left out is multiplied with the whole matrix instead.
    `screen` is `Screen.of(weight)`, for who asks often.
    """
    k = min(k, len(weight))
    vectors = vectors.to(weight.device, torch.float32)
    if screen is None:
        if len(vectors) <= _ROWS:
            return _plain_extremes(vectors, weight, k)
        screen = Screen.of(weight)
    near = min(len(weight), k + _MARGIN)
    buffer = screen.empty(min(_ROWS, len(vectors)))
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for part in torch.split(vectors, _ROWS):
        rough, unit = screen.scores(part, buffer[: len(part)])
        row: list[Tensor] = []
        doubtful = torch.zeros(len(part), dtype=torch.bool, device=part.device)
        for sign in (1, -1):
            columns, guessed = _largest(rough, near, len(weight), sign)
            exact = torch.cat(
                [
                    _products(part[a : a + 32], weight, columns[a : a + 32])
                    for a in range(0, len(part), 32)
                ]
            )
            best = (sign * exact).topk(k, dim=1)
            row += [columns.gather(1, best.indices), sign * best.values]
            guessed = guessed * unit
            error = (guessed - exact).square().mean(1).sqrt()
            if near < len(weight):
                doubtful |= best.values[:, -1] - sign * guessed[:, -1] < _ERRORS * error
        again = doubtful.nonzero()[:, 0]
        if len(again):
            for own, plain in zip(row, _plain_extremes(part[again], weight, k), strict=True):
                own[again] = plain.to(own)
        found.append(tuple(tensor.cpu() for tensor in row))  # type: ignore[arg-type]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]


def _plain_extremes(
    vectors: Tensor, weight: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = vectors @ weight.float().T
    top, bottom = scores.topk(k, dim=1), scores.topk(k, dim=1, largest=False)
    return top.indices.cpu(), top.values.cpu(), bottom.indices.cpu(), bottom.values.cpu()


def _products(vectors: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Products of each vector (n, d) with some rows of a matrix, numbered (n, m): (n, m). Few at a time stay in the cache."""
    products: Tensor = torch.linalg.vecdot(
        nn.functional.embedding(rows, weight).float(), vectors[:, None]
    )
    return products


def _largest(scores: Tensor, near: int, vocab: int, sign: int) -> tuple[Tensor, Tensor]:
    """Columns (n, near) of the largest scores (n, vocab and padding), or of the smallest, and these scores, best first.

    The largest lie in as many groups as there are of them, those with the largest maxima.
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
    """A matrix (vocab, d) to be multiplied with quickly and roughly, with zeros up to whole groups of rows.

    rows     (vocab and padding, d): int8 or bfloat16 where the processor multiplies them by instruction, else float32
    columns  (d,) float32, what one step of int8 is worth in each column; None for other dtypes
    """

    rows: Tensor
    columns: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Screen:
        """For a matrix, on its device."""
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
        """Room for the scores of n vectors."""
        return torch.empty(
            n,
            len(self.rows),
            dtype=self.rows.dtype if self.columns is None else torch.int32,
            device=self.rows.device,
        )

    def scores(self, vectors: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Rough products with vectors (n, d), written to `out` (n, vocab and padding), and what one of their units is worth, (n, 1)."""
        if self.columns is None:
            return torch.mm(vectors.to(self.rows.dtype), self.rows.T, out=out), vectors.new_ones(
                len(vectors), 1
            )
        vectors = vectors * self.columns
        unit = (vectors.abs().amax(1, keepdim=True) / _STEPS).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        return torch._int_mm((vectors / unit).round_().to(torch.int8), self.rows.T, out=out), unit


_STEPS = 127


def _fastest(device: torch.device) -> torch.dtype:
    """The dtype whose products a device makes fastest."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        if any(known.get(name) for name in ("amx_int8", "avx512_vnni", "avx_vnni")):
            return torch.int8
        if any(known.get(name) for name in ("amx_bf16", "avx512_bf16")):
            return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32
