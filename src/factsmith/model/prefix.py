"""Keys and values of what comes before a column: computed once, then read and never changed.

    pairs = prefix_states(lm, batch, start, n_layers)      # (keys, values) of each layer
    cache = PrefixCache(for_all_layers(lm, pairs), rows)
    lm.forward(batch, start=start, cache=cache)            # may be differentiated, and repeated

Equal prefixes run once, and so do equal beginnings of different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..core.errors import UnsupportedModelError
from .language_model import LanguageModel
from .tokens import Batch
from .trace import recording

Pair: TypeAlias = tuple[Tensor, Tensor]
"""One layer's keys and values, each (B, heads, columns, d_head)."""

_WORTH_SHARING = 0.15
"""The share of tokens that sharing must save.

Two passes of fewer rows use the machine worse than one."""


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of the prefix.

    `update` joins new ones to them, and changes nothing except what it was asked to keep.
    """

    def __init__(self, prefix: Pair | None, rows: Tensor | None, keep: bool) -> None:
        super().__init__()
        self.kept: Pair | None = None
        self.keep = keep
        self.rows = rows
        self.has_prefix = prefix is not None
        if prefix is not None:
            self.keys, self.values = prefix
            self.dtype, self.device = prefix[0].dtype, prefix[0].device
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Return the keys and values of the prefix followed by the new ones."""
        if self.has_prefix:
            if self.rows is not None:  # picked late: a sweep needs one layer for each set of rows
                self.keys = pick_rows(self.keys, self.rows)
                self.values = pick_rows(self.values, self.rows)
                self.rows = None
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        if self.keep:
            self.kept = (key_states, value_states)
        return key_states, value_states


class PrefixCache(Cache):  # type: ignore[misc]
    """A key/value cache that is read and never grows.

    So layers can be run again and differentiated.
    """

    def __init__(
        self,
        prefix: Sequence[Pair | None],
        rows: Tensor | None = None,
        keep: bool | None = None,
    ) -> None:
        """Take the prefix.

        Args:
            prefix: For each layer (keys, values), each (B, heads, columns, d_head), or None.
            rows: (R,) which of the B rows to use; rows may repeat. None: all.
            keep: Whether to keep the prefix joined with what the layers hand in. None: where there
                is no prefix.
        """
        super().__init__(
            layers=[_PrefixLayer(p, rows, p is None if keep is None else keep) for p in prefix]
        )

    def first_kept(self, n_layers: int) -> list[Pair] | None:
        """Return what the first layers kept, or None if one did not use the cache."""
        kept = [layer.kept for layer in self.layers[:n_layers]]
        return None if any(k is None for k in kept) else kept

    @property
    def kept(self) -> list[Pair] | None:
        """What each layer kept, or None if one did not use the cache."""
        return self.first_kept(len(self.layers))


def prefix_states(lm: LanguageModel, batch: Batch, start: int, n_layers: int) -> list[Pair]:
    """Return the first layers' keys and values at the columns before `start`.

    There is a pair of (B, heads, start, d_head) for each layer. Equal prefixes run once, and so do
    equal beginnings. Padding holds any finite numbers, because nothing reads them.
    """
    masks = batch.attention_mask[:, :start].bool()
    rows = [
        tuple(ids[mask].tolist())
        for ids, mask in zip(batch.input_ids[:, :start], masks, strict=True)
    ]
    distinct = sorted({ids for ids in rows if ids})
    place = {ids: i for i, ids in enumerate(distinct)}
    return _gathered(
        _keys_and_values(lm, distinct, n_layers),
        [place.get(ids, 0) for ids in rows],
        [len(ids) for ids in rows],
        [len(ids) for ids in distinct],
        start,
    )


@torch.no_grad()
def _keys_and_values(
    lm: LanguageModel, sequences: Sequence[tuple[int, ...]], n_layers: int
) -> list[Pair]:
    """Return the first layers' keys and values of token sequences.

    A position's keys and values depend only on the tokens before it and on its own. So the common
    beginnings of neighbours in the sorted list run first, by the same rule. The rest of each
    sequence runs after them.

    Args:
        lm: The model.
        sequences: Sorted, each once.
        n_layers: How many layers to run.

    Returns:
        For each layer a pair (n, heads, longest, d_head), the last token in the last column.
    """
    lengths = [len(ids) for ids in sequences]
    shared = [0, *(_in_common(a, b) for a, b in pairwise(sequences)), 0]
    heads = [ids[: max(pair)] for ids, pair in zip(sequences, pairwise(shared), strict=True)]
    distinct = sorted(set(heads) - {()})
    saved = sum(map(len, heads)) - sum(map(len, distinct))
    shorter: list[Pair] = []
    if len(distinct) == len(sequences) or saved <= _WORTH_SHARING * sum(lengths):
        heads, distinct = [()] * len(sequences), []
    else:
        shorter = _keys_and_values(lm, distinct, n_layers)
    place = {ids: i for i, ids in enumerate(distinct)}
    tails = [length - len(head) for length, head in zip(lengths, heads, strict=True)]
    width = max(lengths)
    out: list[Pair] = []
    for group in lm.groups(tails if lm.hides_padding else lengths):
        batch = lm.align([sequences[i] for i in group], [lengths[i] - 1 for i in group])
        start = batch.width - max(tails[i] for i in group)
        kept: list[Pair] | None = None
        if start:
            at = [place.get(heads[i], 0) for i in group]
            before = [max(0, lengths[i] + start - batch.width) for i in group]
            kept = _gathered(shorter, at, before, [len(ids) for ids in distinct], start)
        if start < batch.width:
            cache = PrefixCache(for_all_layers(lm, kept or []), keep=True)
            with recording({"last": lm.layers[n_layers - 1]}, stop=True, copy=False):
                lm.forward(batch, start=start, cache=cache)
            kept = cache.first_kept(n_layers)
        if kept is None:
            raise other_state_error()
        rows, first = torch.tensor(group), width - batch.width
        for layer, pair in enumerate(kept):
            if layer == len(out):
                keys, values = (
                    x.new_zeros(len(sequences), x.shape[1], width, x.shape[3]) for x in pair
                )
                out.append((keys, values))
            for whole, part in zip(out[layer], pair, strict=True):
                whole[rows.to(whole.device), :, first:] = part
    return out


def for_all_layers(lm: LanguageModel, pairs: Sequence[Pair]) -> list[Pair | None]:
    """Return an entry for every layer.

    Layers that will not run get the last entry, since masks may depend on the size of any.
    """
    return [*pairs, *[pairs[-1] if pairs else None] * (lm.n_layers - len(pairs))]


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _gathered(
    pairs: Sequence[Pair],
    rows: Sequence[int],
    lengths: Sequence[int],
    whole: Sequence[int],
    width: int,
) -> list[Pair]:
    """Return keys and values of beginnings of sequences, padded on the left to `width` columns.

    Args:
        pairs: Keys and values of whole sequences, the last token in the last column.
        rows: The sequence of each row.
        lengths: How many of its first tokens each row takes.
        whole: How many tokens each sequence in `pairs` has.
        width: Columns of the result.
    """
    picked = torch.tensor(rows)
    # The token of each column, (R, width); negative for padding.
    columns = torch.arange(width) - width + torch.tensor(lengths)[:, None]
    out: list[Pair] = []
    for pair in pairs:
        first = pair[0].shape[-2] - torch.tensor(whole)[picked]
        at = (columns + first[:, None]).clamp(min=0).to(pair[0].device)
        keys, values = (
            x[picked.to(x.device)[:, None], :, at.to(x.device)].transpose(1, 2).contiguous()
            for x in pair
        )
        out.append((keys, values))
    return out


def pick_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return rows of the first dimension.

    There is no copy if they are all rows in order, or the only row repeated.
    """
    rows = rows.to(tensor.device)
    if len(rows) == tensor.shape[0] and bool(
        (rows == torch.arange(len(rows), device=rows.device)).all()
    ):
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(len(rows), *tensor.shape[1:])
    return tensor.index_select(0, rows)


def other_state_error() -> UnsupportedModelError:
    """Return the error for a model that seemed to cache its prefix, and does not."""
    return UnsupportedModelError(
        "some layers keep their state outside the key/value cache; load the model again to replay "
        "without a cache"
    )
