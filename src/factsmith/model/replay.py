"""Resume a forward pass from (layer, position): what lies below the layer and before the position is never computed again.

    replay = record(lm, batch, start=batch.pivot)         # one pass; keys and values before `start` are kept
    hidden = replay.hidden[3].clone()                     # (B, S, d_model): the input of layer 3 at columns start..T
    hidden[:, 0] += delta
    logits = replay.logits(replay.resume(3, hidden)[:, -1])

Three facts make it cheap (layers below do not change; in a causal model positions before do not change; few positions' logits are
read), and the model's own layers do all the work: their arguments are what the model itself hands them when its layers are stood in
for, so masks, rotary angles and per-layer inputs are never imitated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..core.errors import InputError, UnsupportedModelError
from .address import check_layer
from .language_model import LanguageModel
from .tokens import Batch
from .trace import (
    Call,
    first_tensor,
    get_slot,
    recording,
    replacing,
    standing_in,
    stoppable,
    with_slot,
)


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of the prefix; `update` joins new ones to them and changes nothing but what it was told to keep."""

    def __init__(
        self, prefix: tuple[Tensor, Tensor] | None, rows: Tensor | None, keep: bool
    ) -> None:
        super().__init__()
        self.kept: tuple[Tensor, Tensor] | None = None
        self.keep = keep
        self.rows = rows
        self.has_prefix = prefix is not None
        if prefix is not None:
            self.keys, self.values = prefix
            self.dtype, self.device = prefix[0].dtype, prefix[0].device
            self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.has_prefix:
            if (
                self.rows is not None
            ):  # picked when first needed: a sweep asks one layer for each set of rows
                self.keys, self.values, self.rows = (
                    _pick(self.keys, self.rows),
                    _pick(self.values, self.rows),
                    None,
                )
            key_states, value_states = (
                torch.cat([self.keys, key_states], dim=-2),
                torch.cat([self.values, value_states], dim=-2),
            )
        if self.keep:
            self.kept = (key_states, value_states)
        return key_states, value_states


class PrefixCache(Cache):  # type: ignore[misc]
    """A key/value cache that is read and never grows, so that layers can be run again and differentiated.

    prefix: per layer (keys, values), each (B, heads, columns, d_head), or None when there is none yet.
    rows: (R,) which of the B rows to use, repeats allowed; None: all of them.
    keep: remember the prefix with what the layers hand in behind it (`kept`); by default where there is no prefix.
    """

    def __init__(
        self,
        prefix: Sequence[tuple[Tensor, Tensor] | None],
        rows: Tensor | None = None,
        keep: bool | None = None,
    ) -> None:
        super().__init__(
            layers=[_PrefixLayer(p, rows, p is None if keep is None else keep) for p in prefix]
        )

    def first_kept(self, n_layers: int) -> list[tuple[Tensor, Tensor]] | None:
        """What the first layers were to keep, or None when some layer did not use the cache."""
        kept = [layer.kept for layer in self.layers[:n_layers]]
        return None if any(k is None for k in kept) else kept

    @property
    def kept(self) -> list[tuple[Tensor, Tensor]] | None:
        """What each layer was to keep, or None when some layer did not use the cache."""
        return self.first_kept(len(self.layers))


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded pass that can be resumed anywhere.

    lm      the model
    batch   the recorded rows, (B, T)
    start   first live column; the columns before it live only in the key/value cache
    hidden  n_layers + 1 tensors (B, S, d_model), S = T - start: each layer's input; the last is the last layer's output. Fewer when the
            pass was recorded up to a layer only
    """

    lm: LanguageModel
    batch: Batch
    start: int
    hidden: tuple[Tensor, ...]
    _before: tuple[Tensor, ...] | None = field(
        repr=False
    )  # inputs of every layer at the columns before start; None with a cache
    _cache: tuple[tuple[Tensor, Tensor], ...] = field(
        repr=False
    )  # keys and values at all T columns; empty without a cache
    _embeddings: Tensor | None = field(repr=False)  # (B, T, d) when they were changed on the way in
    _arguments: OrderedDict[tuple[int, ...], list[Call]] = field(
        default_factory=OrderedDict, repr=False
    )

    @property
    def n_live(self) -> int:
        """Number of live columns S."""
        return self.batch.width - self.start

    def layer(self, layer: int, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run one layer on (R, S, d_model); `rows` (R,) says which recorded row each belongs to (default: in order)."""
        return self.resume(layer, hidden, rows, until=layer + 1)

    def resume(
        self, layer: int, hidden: Tensor, rows: Tensor | None = None, until: int | None = None
    ) -> Tensor:
        """Run layers `layer` .. `until` - 1 (None: to the last) on (R, S, d_model); differentiable in `hidden`.

        rows: (R,) int64, which recorded row's prefix, mask and positions each row of `hidden` uses; R may exceed B.
        Raises InputError for shapes that do not fit, LayerError for a layer that does not exist.
        """
        until = self.lm.n_layers if until is None else until
        if layer == until == self.lm.n_layers:
            return hidden
        check_layer(layer, self.lm.n_layers)
        recorded = len(self._cache) if self._before is None else len(self._before) - 1
        if self.start and until > recorded:
            raise InputError(
                f"this pass was recorded for {recorded} layers; record it whole to resume layer {until - 1}"
            )
        picked = tuple(range(self.batch.size)) if rows is None else tuple(rows.tolist())
        expected = (len(picked), self.n_live, self.lm.d_model)
        if tuple(hidden.shape) != expected:
            raise InputError(
                f"hidden states of shape {tuple(hidden.shape)} given; expected (rows, live columns, d_model) = {expected}"
            )
        calls = self._calls(picked)
        for index in range(layer, until):
            hidden = self._run(index, hidden, calls[index], picked)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own head on last-layer states: (..., d_model) -> (..., vocab). Pick the positions first."""
        return self.lm.head(hidden)

    def at(self, start: int) -> Replay:
        """The same recorded pass, live from a later column on; nothing is computed.

        Raises InputError for an earlier column, and for a pass recorded up to a layer only, which lacks later columns above it.
        """
        if len(self.hidden) <= self.lm.n_layers and start != self.start:
            raise InputError(
                f"this pass was recorded up to layer {len(self.hidden) - 1} only; record it whole to start at a later column"
            )
        if not self.start <= start < self.batch.width:
            raise InputError(
                f"column {start} cannot be made the first live one; expected {self.start} to {self.batch.width - 1}"
            )
        _check_start(self.lm, start)
        shift = start - self.start
        before = None
        if self._before is not None:
            before = tuple(
                torch.cat([b, h[:, :shift]], dim=1)
                for b, h in zip(self._before, self.hidden, strict=True)
            )
        hidden = tuple(h[:, shift:] for h in self.hidden)
        return Replay(self.lm, self.batch, start, hidden, before, self._cache, self._embeddings)

    def keep(self, rows: Tensor) -> Replay:
        """The recorded pass of some of its rows (R,)."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.batch.input_ids.device)
        return Replay(
            self.lm,
            self.batch.keep(rows),
            self.start,
            tuple(_pick(h, rows) for h in self.hidden),
            None if self._before is None else tuple(_pick(h, rows) for h in self._before),
            tuple((_pick(k, rows), _pick(v, rows)) for k, v in self._cache),
            None if self._embeddings is None else _pick(self._embeddings, rows),
        )

    def _run(self, layer: int, hidden: Tensor, call: Call, rows: tuple[int, ...]) -> Tensor:
        if self._before is not None:
            # No cache to lean on: the recorded inputs of this layer at the earlier columns go through it again.
            hidden = torch.cat(
                [_pick(self._before[layer], torch.tensor(rows, device=hidden.device)), hidden],
                dim=1,
            )
        args, kwargs = with_slot(call, self.lm.slot, hidden)
        out = first_tensor(self.lm.layers[layer](*args, **kwargs))
        return out if self._before is None else out[:, self.start :]

    def _calls(self, rows: tuple[int, ...]) -> list[Call]:
        """Every layer's arguments for these rows, as the model makes them; the last few row sets are remembered."""
        found = self._arguments.get(rows)
        if found is None:
            index = torch.tensor(rows, device=self.batch.input_ids.device)
            cache = None
            first = self.start if self._before is None else 0
            if first:
                cache = PrefixCache(
                    _for_all(
                        self.lm, [(k[..., :first, :], v[..., :first, :]) for k, v in self._cache]
                    ),
                    index,
                )
            embeddings = (
                None if self._embeddings is None else _pick(self._embeddings, index)[:, first:]
            )
            found = arguments(self.lm, self.batch.keep(index), first, cache, embeddings)
            self._arguments[rows] = found
            while len(self._arguments) > 2:
                self._arguments.popitem(last=False)
        return found


def record(
    lm: LanguageModel,
    batch: Batch,
    *,
    start: int = 0,
    embed: Callable[[Tensor], Tensor] | None = None,
    until: int | None = None,
    top: int | None = None,
) -> Replay:
    """One full pass up to the last layer's output, kept so that it can be resumed from (layer, column >= start).

    embed: changes the input embeddings (B, T, d) first, for instance to corrupt the subject.
    until: run the live columns through layers 0 .. until - 1 only, when nobody asks for their states above (None: every layer).
    top: run the columns before `start` through layers 0 .. top - 1 only; above, the pass cannot be resumed (None: every layer).
    What rows have in common before `start` is computed once (unless their embeddings are changed).
    Raises InputError when `start` is outside the batch or the batch is longer than the model's positions; UnsupportedModelError for
    padding that this model does not hide, and for a start above 0 in a model that reads text from both sides.
    """
    until = lm.n_layers if until is None else check_layer(until - 1, lm.n_layers) + 1
    top = lm.n_layers if top is None else max(until, check_layer(top - 1, lm.n_layers) + 1)
    if not 0 <= start < batch.width:
        raise InputError(f"first live column {start} is outside a batch of {batch.width} columns")
    _check_start(lm, start)
    lm.check_batch(batch)
    embeddings: list[Tensor] = []

    def corrupt(output: Tensor) -> Tensor:
        assert embed is not None
        embeddings.append(embed(output))
        return embeddings[-1]

    prefix: list[tuple[Tensor, Tensor]] = []
    if apart := bool(start) and embed is None and lm.caches_prefix:
        prefix = _prefix(lm, batch, start, top)
    elif start or not lm.caches_prefix:
        until = top  # one pass is all there is
    cache = PrefixCache(_for_all(lm, prefix), keep=True) if lm.caches_prefix else None
    changes = {lm.embedding: corrupt} if embed is not None else {}
    with (
        torch.no_grad(),
        replacing(changes),
        recording(dict(enumerate(lm.layers[:until])), stop=True) as calls,
    ):
        lm.forward(batch, start=start if apart else 0, cache=cache)
    states = [get_slot(calls[0][0], lm.slot), *(calls[layer][0].output for layer in range(until))]
    kept = cache.first_kept(until) if cache is not None else []
    if kept is None:
        raise UnsupportedModelError(
            "some layers keep their state outside the key/value cache; load the model again to replay without one"
        )
    kept += prefix[until:]
    before = None if lm.caches_prefix else tuple(s[:, :start] for s in states)
    if start and not apart:  # copies, so that the earlier columns' memory is freed
        states = [s[:, start:].clone() for s in states]
    return Replay(
        lm, batch, start, tuple(states), before, tuple(kept), embeddings[0] if embeddings else None
    )


def _prefix(
    lm: LanguageModel, batch: Batch, start: int, n_layers: int
) -> list[tuple[Tensor, Tensor]]:
    """The first layers' keys and values at the columns before `start`: a pair of (B, heads, start, d_head) for each layer.

    Equal prefixes are run once, and so are equal beginnings; padding holds anything finite, for it is never looked at.
    """
    own = batch.attention_mask[:, :start].bool()
    rows = [
        tuple(ids[seen].tolist()) for ids, seen in zip(batch.input_ids[:, :start], own, strict=True)
    ]
    distinct = sorted({ids for ids in rows if ids})
    place = {ids: i for i, ids in enumerate(distinct)}
    found = _keys_and_values(lm, distinct, n_layers)
    return _gathered(
        found,
        [place.get(ids, 0) for ids in rows],
        [len(ids) for ids in rows],
        [len(ids) for ids in distinct],
        start,
    )


@torch.no_grad()
def _keys_and_values(
    lm: LanguageModel, sequences: Sequence[tuple[int, ...]], n_layers: int
) -> list[tuple[Tensor, Tensor]]:
    """The first layers' keys and values of token sequences (sorted, each once), the last token in the last column.

    A position's keys and values depend on what stands before it and on nothing else. So what neighbours in the sorted list begin with in
    common is run first, by the same rule, and the rest of each sequence is run behind it.
    """
    lengths = [len(ids) for ids in sequences]
    shared = [0, *(_in_common(a, b) for a, b in pairwise(sequences)), 0]
    heads = [ids[: max(pair)] for ids, pair in zip(sequences, pairwise(shared), strict=True)]
    distinct = sorted(set(heads) - {()})
    saved = sum(map(len, heads)) - sum(map(len, distinct))
    below: list[tuple[Tensor, Tensor]] = []
    if len(distinct) == len(sequences) or saved <= _WORTH_SHARING * sum(lengths):
        heads, distinct = [()] * len(sequences), []
    else:
        below = _keys_and_values(lm, distinct, n_layers)
    place = {ids: i for i, ids in enumerate(distinct)}
    tails = [length - len(head) for length, head in zip(lengths, heads, strict=True)]
    width = max(lengths)
    out: list[tuple[Tensor, Tensor]] = []
    for group in lm.groups(tails if lm.hides_padding else lengths):
        batch = lm.align([sequences[i] for i in group], [lengths[i] - 1 for i in group])
        start = batch.width - max(tails[i] for i in group)
        kept: list[tuple[Tensor, Tensor]] | None = None
        if start:
            at, before = (
                [place.get(heads[i], 0) for i in group],
                [max(0, lengths[i] + start - batch.width) for i in group],
            )
            kept = _gathered(below, at, before, [len(ids) for ids in distinct], start)
        if start < batch.width:
            cache = PrefixCache(_for_all(lm, kept or []), keep=True)
            with recording({"last": lm.layers[n_layers - 1]}, stop=True, copy=False):
                lm.forward(batch, start=start, cache=cache)
            kept = cache.first_kept(n_layers)
        if kept is None:
            raise UnsupportedModelError(
                "some layers keep their state outside the key/value cache; load the model again to replay without one"
            )
        rows, first = torch.tensor(group), width - batch.width
        for layer, pair in enumerate(kept):
            if layer == len(out):
                out.append(
                    tuple(x.new_zeros(len(sequences), x.shape[1], width, x.shape[3]) for x in pair)
                )  # type: ignore[arg-type]
            for whole, part in zip(out[layer], pair, strict=True):
                whole[rows.to(whole.device), :, first:] = part
    return out


def _for_all(
    lm: LanguageModel, pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor] | None]:
    """An entry for every layer; those that will not be run get the last one's, since masks may be made from the size of any."""
    return [*pairs, *[pairs[-1] if pairs else None] * (lm.n_layers - len(pairs))]


_WORTH_SHARING = 0.15
"""The share of the tokens that must be saved: two passes of fewer rows use the machine less well than one."""


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _gathered(
    pairs: Sequence[tuple[Tensor, Tensor]],
    rows: Sequence[int],
    lengths: Sequence[int],
    whole: Sequence[int],
    width: int,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first lengths[r] tokens of sequence rows[r], the last of them in the last of `width` columns.

    whole: how many tokens each sequence in `pairs` has, the last in the last column there.
    """
    picked = torch.tensor(rows)
    columns = (
        torch.arange(width) - width + torch.tensor(lengths)[:, None]
    )  # (R, width) which token; negative for padding
    out = []
    for pair in pairs:
        first = pair[0].shape[-2] - torch.tensor(whole)[picked]
        at = (columns + first[:, None]).clamp(min=0).to(pair[0].device)
        out.append(
            tuple(
                x[picked.to(x.device)[:, None], :, at.to(x.device)].transpose(1, 2).contiguous()
                for x in pair
            )
        )
    return out  # type: ignore[return-value]


def _check_start(lm: LanguageModel, start: int) -> None:
    if start and not lm.is_causal:
        raise UnsupportedModelError(
            f"{lm.name} reads text from both sides, so what follows a place changes what stands before it; use a causal language model here"
        )


def arguments(
    lm: LanguageModel,
    batch: Batch,
    start: int,
    cache: PrefixCache | None,
    embeddings: Tensor | None,
) -> list[Call]:
    """The arguments every layer gets for the columns from `start` on: the model runs with its layers stood in for."""
    calls: list[Call] = []
    with torch.no_grad(), stoppable() as stop:

        def play(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(Call(args=args, kwargs=kwargs, result=None))
            if index == lm.n_layers - 1:
                stop()
            return lm.as_layer_output(get_slot(calls[-1], lm.slot))

        with (
            standing_in(lm.layers, play),
            replacing({lm.embedding: lambda _: embeddings} if embeddings is not None else {}),
        ):
            lm.forward(batch, start=start, cache=cache)
    return calls


def _pick(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of the first dimension; no copy when they are all of them in order, or the only one repeated."""
    rows = rows.to(tensor.device)
    if len(rows) == tensor.shape[0] and bool(
        (rows == torch.arange(len(rows), device=rows.device)).all()
    ):
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(len(rows), *tensor.shape[1:])
    return tensor.index_select(0, rows)
