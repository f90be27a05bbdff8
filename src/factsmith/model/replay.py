"""Resume a forward pass from (layer, column). What is below the layer is never computed again.

    replay = record(lm, batch, start=batch.pivot)     # one pass; it keeps keys and values
    hidden = replay.hidden[3].clone()                 # (B, S, d_model): layer 3's input, from start
    hidden[:, 0] += delta
    logits = replay.logits(replay.resume(3, hidden)[:, -1])

Three facts make it cheap. Layers below do not change. In a causal model the columns before do not
change. Few columns' logits are read. The model's own layers do all the work. Their arguments are
what the model itself passes when something stands in for its layers, so masks, rotary angles and
per-layer inputs are never imitated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, UnsupportedModelError
from .address import check_layer
from .language_model import LanguageModel
from .prefix import Pair, PrefixCache, for_all_layers, other_state_error, pick_rows, prefix_states
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
from .turns import asking, turn


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded pass that can be resumed anywhere.

    Attributes:
        lm: The model.
        batch: The recorded rows, (B, T).
        start: The first live column. Columns before it exist only in the key/value cache.
        hidden: Each layer's input and then the last layer's output: n_layers + 1 tensors
            (B, S, d_model), S = T - start. There are fewer if the pass was recorded up to a layer.
    """

    lm: LanguageModel
    batch: Batch
    start: int
    hidden: tuple[Tensor, ...]
    _before: tuple[Tensor, ...] | None = field(repr=False)
    """Inputs of every layer at the columns before start. None with a cache."""
    _cache: tuple[Pair, ...] = field(repr=False)
    """Keys and values at all T columns. Empty without a cache."""
    _embeddings: Tensor | None = field(repr=False)
    """(B, T, d), if they were changed on the way in."""
    _arguments: OrderedDict[tuple[int, ...], list[Call]] = field(
        default_factory=OrderedDict, repr=False
    )

    @property
    def n_live(self) -> int:
        """Number of live columns S."""
        return self.batch.width - self.start

    def layer(self, layer: int, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Run one layer on (R, S, d_model).

        Args:
            layer: The layer.
            hidden: Its input.
            rows: (R,) which recorded row each row belongs to. None: in order.
        """
        return self.resume(layer, hidden, rows, until=layer + 1)

    def resume(
        self, layer: int, hidden: Tensor, rows: Tensor | None = None, until: int | None = None
    ) -> Tensor:
        """Run layers `layer` to `until` - 1 on (R, S, d_model). Gradients reach `hidden`.

        Args:
            layer: The first layer to run.
            hidden: Its input.
            rows: (R,) int64, whose prefix, mask and positions each row uses. R may exceed B. None:
                in order.
            until: The layer to stop before. None: run to the last.

        Raises:
            InputError: The shapes do not fit, or the pass was not recorded that far.
            LayerError: The model has no such layer.
        """
        until = self.lm.n_layers if until is None else until
        if layer == until == self.lm.n_layers:
            return hidden
        check_layer(layer, self.lm.n_layers)
        recorded = len(self._cache) if self._before is None else len(self._before) - 1
        if self.start and until > recorded:
            raise InputError(
                f"this pass was recorded for {recorded} layers; record all layers to resume layer "
                f"{until - 1}"
            )
        picked = tuple(range(self.batch.size)) if rows is None else tuple(rows.tolist())
        expected = (len(picked), self.n_live, self.lm.d_model)
        if tuple(hidden.shape) != expected:
            raise InputError(
                f"the hidden states are {tuple(hidden.shape)}; give (rows, live columns, d_model) "
                f"= {expected}"
            )
        with turn(self.lm):
            calls = self._calls(picked)
            for index in range(layer, until):
                hidden = self._run(index, hidden, calls[index], picked)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Run the model's own head on last-layer states: (..., d_model) to (..., vocab).

        Pick the columns first.
        """
        return self.lm.head(hidden)

    def at(self, start: int) -> Replay:
        """Return the same recorded pass, live from a later column on. Nothing is computed.

        Raises:
            InputError: The column is earlier, or the pass was recorded up to a layer only, so that
                later columns are missing above it.
        """
        if len(self.hidden) <= self.lm.n_layers and start != self.start:
            raise InputError(
                f"this pass was recorded up to layer {len(self.hidden) - 1} only; record all "
                "layers to start at a later column"
            )
        if not self.start <= start < self.batch.width:
            raise InputError(
                f"column {start} cannot be the first live one; expected {self.start} to "
                f"{self.batch.width - 1}"
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
        """Return the recorded pass of some of its rows (R,)."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.batch.input_ids.device)
        return Replay(
            self.lm,
            self.batch.keep(rows),
            self.start,
            tuple(pick_rows(h, rows) for h in self.hidden),
            None if self._before is None else tuple(pick_rows(h, rows) for h in self._before),
            tuple((pick_rows(k, rows), pick_rows(v, rows)) for k, v in self._cache),
            None if self._embeddings is None else pick_rows(self._embeddings, rows),
        )

    def _run(self, layer: int, hidden: Tensor, call: Call, rows: tuple[int, ...]) -> Tensor:
        if self._before is not None:
            # Without a cache this layer's recorded inputs at the earlier columns run again.
            before = pick_rows(self._before[layer], torch.tensor(rows, device=hidden.device))
            hidden = torch.cat([before, hidden], dim=1)
        args, kwargs = with_slot(call, self.lm.slot, hidden)
        out = first_tensor(self.lm.layers[layer](*args, **kwargs))
        return out if self._before is None else out[:, self.start :]

    def _calls(self, rows: tuple[int, ...]) -> list[Call]:
        """Return every layer's arguments for these rows, as the model makes them.

        Those of the last few sets of rows are remembered.
        """
        calls = self._arguments.get(rows)
        if calls is None:
            index = torch.tensor(rows, device=self.batch.input_ids.device)
            cache = None
            first = self.start if self._before is None else 0
            if first:
                cache = PrefixCache(
                    for_all_layers(
                        self.lm, [(k[..., :first, :], v[..., :first, :]) for k, v in self._cache]
                    ),
                    index,
                )
            embeddings = (
                None if self._embeddings is None else pick_rows(self._embeddings, index)[:, first:]
            )
            calls = arguments(self.lm, self.batch.keep(index), first, cache, embeddings)
            self._arguments[rows] = calls
            while len(self._arguments) > 2:
                self._arguments.popitem(last=False)
        return calls


@asking()
def record(
    lm: LanguageModel,
    batch: Batch,
    *,
    start: int = 0,
    embed: Callable[[Tensor], Tensor] | None = None,
    until: int | None = None,
    top: int | None = None,
) -> Replay:
    """Run one full pass up to the last layer's output, and keep it so that it can be resumed.

    What rows have in common before `start` is computed once, unless their embeddings are changed.

    Args:
        lm: The model.
        batch: The rows.
        start: The first column to resume from.
        embed: Changes the input embeddings (B, T, d) first, for example to corrupt the subject.
        until: Run the live columns through layers 0 to until - 1 only. None: every layer.
        top: Run the columns before `start` through layers 0 to top - 1 only. Above them the pass
            cannot be resumed. None: every layer.

    Raises:
        InputError: `start` is outside the batch, or the batch is longer than the model's positions.
        UnsupportedModelError: The model does not hide the padding; or `start` is above 0 and the
            model reads text from both sides.
        LayerError: The model has no such layer.
    """
    until = lm.n_layers if until is None else check_layer(until - 1, lm.n_layers) + 1
    top = lm.n_layers if top is None else max(until, check_layer(top - 1, lm.n_layers) + 1)
    if not 0 <= start < batch.width:
        raise InputError(
            f"the first live column {start} is outside the batch; give one from 0 to "
            f"{batch.width - 1}"
        )
    _check_start(lm, start)
    lm.check_batch(batch)
    embeddings: list[Tensor] = []

    def corrupt(output: Tensor) -> Tensor:
        assert embed is not None
        embeddings.append(embed(output))
        return embeddings[-1]

    prefix: list[Pair] = []
    if apart := bool(start) and embed is None and lm.caches_prefix:
        prefix = prefix_states(lm, batch, start, top)
    elif start or not lm.caches_prefix:
        until = top  # one pass is all there is
    cache = PrefixCache(for_all_layers(lm, prefix), keep=True) if lm.caches_prefix else None
    changes = {lm.embedding: corrupt} if embed is not None else {}
    with (
        replacing(changes),
        recording(dict(enumerate(lm.layers[:until])), stop=True) as calls,
    ):
        lm.forward(batch, start=start if apart else 0, cache=cache)
    states = [get_slot(calls[0][0], lm.slot), *(calls[layer][0].output for layer in range(until))]
    kept = cache.first_kept(until) if cache is not None else []
    if kept is None:
        raise other_state_error()
    kept += prefix[until:]
    before = None if lm.caches_prefix else tuple(s[:, :start] for s in states)
    if start and not apart:  # copies, so that the earlier columns' memory is freed
        states = [s[:, start:].clone() for s in states]
    return Replay(
        lm, batch, start, tuple(states), before, tuple(kept), embeddings[0] if embeddings else None
    )


def _check_start(lm: LanguageModel, start: int) -> None:
    if start and not lm.is_causal:
        raise UnsupportedModelError(
            f"{lm.name} reads text from both sides, so a later token changes what is before it; "
            "use a causal language model"
        )


def arguments(
    lm: LanguageModel,
    batch: Batch,
    start: int,
    cache: PrefixCache | None,
    embeddings: Tensor | None,
) -> list[Call]:
    """Return the arguments that every layer gets for the columns from `start` on.

    The model runs with something standing in for its layers.
    """
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
