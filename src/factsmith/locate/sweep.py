"""Restore every state of a recorded run in turn, and read p(answer) off.

    trace_runs(runs, Restoration("mlp", window=10))                    # a whole map
    restored_scores(runs, Restoration("state"), columns=[5, 9])        # some tokens of one

A restored state changes only later positions and higher layers. So for each token one sweep climbs
the layers. It carries every variant restored so far as one batch. Variants that are still equal
(windows that begin at the same layer) are carried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.multiply import quick_products
from ..model.replay import Replay
from ..model.turns import asking
from .batching import Override, rows_at_once, run_layer
from .kinds import Part, Restoration
from .records import CausalTrace
from .runs import HEAD_ROWS, Runs, answer_probability


@asking()
def trace_runs(
    runs: Runs,
    restoration: Restoration,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> CausalTrace:
    """Return one map of the recorded runs.

    Args:
        runs: The recorded runs.
        restoration: What to restore.
        progress: Called with (tokens done, tokens to do) after each token.

    Raises:
        UnsupportedModelError: when a layer lacks the attention part to restore or to sever.
    """
    scores = restored_scores(runs, restoration, runs.columns, progress=progress)
    return CausalTrace(**runs.trace_fields(restoration, scores))


@torch.no_grad()
@quick_products()
def restored_scores(
    runs: Runs,
    restoration: Restoration,
    columns: Sequence[int],
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Return mean p(answer) with each state of some tokens restored: (len(columns), n_layers).

    Args:
        runs: The recorded runs.
        restoration: What to restore.
        columns: The tokens, from the subject's first token on.
        progress: Called with (tokens done, tokens to do) after each token.

    Raises:
        UnsupportedModelError: when a layer lacks the attention part to restore or to sever.
    """
    n_layers = runs.lm.n_layers
    spans = restoration.spans(n_layers)
    for part in (restoration.part, restoration.sever):
        if part is not None:
            runs.part_outputs(part)
    entered = _entered(runs, restoration.part, spans)
    scores = torch.full((len(columns), n_layers), runs.p_corrupted, dtype=torch.float32)
    finals: list[tuple[int, range, Tensor]] = []
    for index, column in enumerate(columns):
        sweep = _Sweep(runs, runs.corrupted.at(column), restoration, spans, entered)
        finals.extend((index, span, states) for span, states in sweep.climb())
        is_last = index == len(columns) - 1
        if sum(len(states) for _, _, states in finals) >= HEAD_ROWS or is_last:
            _read_off(runs, finals, spans, scores)
            finals = []
        if progress is not None:
            progress(index + 1, len(columns))
    return scores


def _read_off(
    runs: Runs,
    finals: Sequence[tuple[int, range, Tensor]],
    spans: Sequence[range],
    scores: Tensor,
) -> None:
    """Write p(answer) of some last-layer states into the scores, many states together."""
    if not finals:
        return
    hidden = torch.cat([states for _, _, states in finals])
    each = answer_probability(runs.lm, hidden, runs.answer_ids)
    means = each.view(len(finals), -1).mean(1).tolist()
    for (index, span, _), mean in zip(finals, means, strict=True):
        for layer, restored in enumerate(spans):
            if restored == span:
                scores[index, layer] = mean


def _entered(runs: Runs, part: Part | None, spans: Sequence[range]) -> dict[int, Tensor | None]:
    """{first restored layer: its output with every column restored}, (samples or 1, S, d_model).

    Where a restoration begins, it changes its own column only: the layer's input is that of the
    corrupted run, and only position-wise parts follow the restored part. So one pass with all
    columns restored gives the entry of each column.

    None where positions meet again after the restored part. Such a layer runs once for each column.
    """
    if part is None:
        return {span.start: runs.clean.hidden[span.start + 1] for span in spans}
    entered: dict[int, Tensor | None] = {}
    for layer in sorted({span.start for span in spans}):
        if runs.lm.attention[layer] is None or (part == "mlp" and runs.attention_last[layer]):
            entered[layer] = None
            continue
        clean = runs.outputs[part][layer][:1].expand(runs.samples, -1, -1)
        override = Override(part, clean, torch.ones(clean.shape[:2], dtype=torch.bool))
        rows = torch.arange(runs.samples)
        entered[layer] = run_layer(
            runs.corrupted, layer, runs.corrupted.hidden[layer], rows, override
        )
    return entered


@dataclass(frozen=True, eq=False)
class _Sweep:
    """All restorations at one token, carried up the layers together.

    Attributes:
        runs: The recorded runs.
        live: The corrupted runs from that token on.
        restoration: What is restored, and which part is severed.
        spans: The restored layers of each variant.
        entered: The outputs where a restoration begins, from `_entered`.
    """

    runs: Runs
    live: Replay
    restoration: Restoration
    spans: Sequence[range]
    entered: Mapping[int, Tensor | None]

    @property
    def column(self) -> int:
        """The token's column among the live columns of the runs."""
        return self.live.start - self.runs.corrupted.start

    def climb(self) -> Iterator[tuple[range, Tensor]]:
        """Yield each variant that differs from the corrupted run, at the top.

        A variant is (restored layers, last hidden states (samples, answer tokens, d_model)).
        """
        live, n_answer = self.live, len(self.runs.answer_ids)
        n_layers = self.runs.lm.n_layers
        # {layers restored so far: what enters the next layer, (samples, S, d_model)}
        carried: dict[range, Tensor] = {}
        for layer in range(n_layers):
            # Variants with the same layers restored so far are one, until the shorter window ends.
            reached = list(
                dict.fromkeys(
                    range(s.start, min(s.stop, layer + 1)) for s in self.spans if s.start <= layer
                )
            )
            running = [s for s in reached if s.start < layer or self.entered[s.start] is None]
            below = [
                carried[range(s.start, min(s.stop, layer))]
                if s.start < layer
                else live.hidden[layer]
                for s in running
            ]
            after = self._run(layer, running, torch.cat(below)) if running else ()
            carried = dict(zip(running, after, strict=True))
            first = range(layer, layer + 1)
            # In the last layer only the answer's columns are read: another column has no effect.
            is_read = layer < n_layers - 1 or live.n_live <= n_answer
            if first in reached and is_read and (entry := self.entered[layer]) is not None:
                carried[first] = live.hidden[layer + 1].clone()
                carried[first][:, 0] = entry[:, self.column]
        for span, states in carried.items():
            yield span, states[:, -n_answer:]

    def _run(self, layer: int, spans: Sequence[range], hidden: Tensor) -> Sequence[Tensor]:
        """Run one layer on the variants (n * samples, S, d_model), cut to the memory budget."""
        runs, live = self.runs, self.live
        rows = torch.arange(runs.samples).repeat(len(spans))
        override = self._override(layer, spans, rows)
        is_last = layer == runs.lm.n_layers - 1
        read = len(runs.answer_ids) if is_last else live.n_live
        out = []
        for some in torch.split(
            torch.arange(len(hidden)), rows_at_once(live, hidden, runs.samples)
        ):
            part = slice(int(some[0]), int(some[-1]) + 1)
            part_override = None if override is None else override.rows(part)
            out.append(run_layer(live, layer, hidden[part], rows[part], part_override, read))
        return torch.split(torch.cat(out), runs.samples)

    def _override(self, layer: int, spans: Sequence[range], rows: Tensor) -> Override | None:
        """The outputs at the token that a layer's part is made to give in each variant."""
        restoration, samples = self.restoration, self.runs.samples
        part = restoration.sever or restoration.part
        if part is None:
            return None
        source = self.runs.outputs[part][layer][:, self.column]  # (1 + samples, d_model)
        is_severed = restoration.sever is not None
        values = source[1:] if is_severed else source[:1].expand(samples, -1)
        marked = torch.tensor([is_severed or layer in span for span in spans])
        cells = torch.zeros(len(rows), self.live.n_live, dtype=torch.bool)
        cells[:, 0] = marked.repeat_interleave(samples)
        return Override(part, values[rows.to(values.device), None], cells)
