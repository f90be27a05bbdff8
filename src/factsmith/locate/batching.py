"""Run one layer for many variants of a run at once, with some outputs of its parts replaced.

    override = Override("mlp", values, cells)      # in the marked cells the MLP puts out `values`
    hidden = run_layer(live, layer, hidden, rows, override)

The variants of a sweep are rows of one batch. A batch is cut to a memory budget. An MLP works on
each position by itself, so it is run only at the positions whose output is read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.replay import Replay
from ..model.trace import first_tensor, replacing, standing_in, tensors, with_first_tensor
from .kinds import Part

BATCH_BYTES = 512 * 2**20
"""Working memory of one batch on an accelerator: enough to keep it busy."""

CPU_BATCH_BYTES = 32 * 2**20
"""Working memory of one batch on a CPU. Its caches hold no more, and larger batches are slower."""


@dataclass(frozen=True, eq=False)
class Override:
    """Outputs that replace those of a layer's part.

    Attributes:
        part: The part.
        values: (R, S, d_model) the outputs, or a shape that expands to it.
        cells: (R, S) bool, which outputs are replaced. The other outputs stay.
    """

    part: Part
    values: Tensor
    cells: Tensor

    def rows(self, rows: slice) -> Override:
        """Return the override of some rows."""
        return Override(self.part, self.values[rows], self.cells[rows])

    def applied(self, output: Tensor) -> Tensor:
        """Return the part's output with the marked cells replaced.

        Args:
            output: (R, columns, d_model) or (R * columns, d_model). The cells are those of its
                last S columns.
        """
        changed = output.reshape(len(self.cells), -1, output.shape[-1]).clone()
        cells = self.cells.to(output.device)
        last = changed[:, changed.shape[1] - cells.shape[1] :]
        last[cells] = self.values.to(output).expand(*cells.shape, -1)[cells]
        return changed.view(output.shape)


def rows_at_once(live: Replay, hidden: Tensor, samples: int) -> int:
    """Return how many rows run together in one layer.

    Args:
        live: The recorded run that is replayed.
        hidden: (R, S, d_model) what enters the layer.
        samples: Rows of one variant. Whole variants run together where more than one fits, because
            they share the recorded arguments.
    """
    # In a layer each column widens to about 16 times d_model (coefficients, gate and their copies),
    # and each row has its keys and values.
    per_row = hidden.element_size() * live.lm.d_model * (16 * live.n_live + 4 * live.batch.width)
    budget = CPU_BATCH_BYTES if hidden.device.type == "cpu" else BATCH_BYTES
    at_once = max(1, budget // per_row)
    return at_once - at_once % samples if at_once > samples else at_once


def run_layer(
    live: Replay,
    layer: int,
    hidden: Tensor,
    rows: Tensor,
    override: Override | None,
    read: int | None = None,
) -> Tensor:
    """Run one layer on a batch, with some outputs of one of its parts replaced.

    Args:
        live: The recorded run that is replayed.
        layer: The layer.
        hidden: (R, S, d_model) what enters the layer.
        rows: (R,) the recorded row that each row belongs to.
        override: The outputs to replace. None: no output.
        read: Only the last `read` columns of the result have to be right. None: all columns.
    """
    lm = live.lm
    of_mlp = override if override is not None and override.part == "mlp" else None
    needed = torch.ones(hidden.shape[:2], dtype=torch.bool)
    if read is not None:
        needed[:, : hidden.shape[1] - read] = False
    if of_mlp is not None:
        needed &= ~of_mlp.cells
    attention = lm.attention[layer]
    changes: AbstractContextManager[None] = nullcontext()
    if override is not None and of_mlp is None and attention is not None:
        changes = replacing({attention: override.applied})
    asked: AbstractContextManager[None] = nullcontext()
    if not bool(needed.all()):
        asked = _asked_only(lm.ffn[layer].module, needed, of_mlp)
    with changes, asked:
        return live.layer(layer, hidden, rows)


def _asked_only(
    module: nn.Module, needed: Tensor, override: Override | None
) -> AbstractContextManager[None]:
    """Run a position-wise module for some cells of its last S columns only.

    needed: (R, S) bool, the cells to run. The other cells hold the override, or zeros.
    """
    forward = module.forward  # an instance may have its own, if the model is spread over devices

    def play(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if sum(1 for _ in tensors((args, kwargs))) != 1:
            # Another tensor comes with the hidden state. Its shape is not known, so run every cell.
            result = forward(*args, **kwargs)
            if override is None:
                return result
            return with_first_tensor(result, override.applied(first_tensor(result)))
        given = first_tensor((args, kwargs))
        shaped = given.reshape(len(needed), -1, given.shape[-1])
        cells = needed.to(given.device).nonzero()
        cells = cells if len(cells) else cells.new_zeros(1, 2)  # some modules refuse empty input
        row, column = cells[:, 0], cells[:, 1] + shaped.shape[1] - needed.shape[1]
        few = shaped[row, column]
        few = few[None] if given.dim() == 3 else few
        result = forward(
            *(few if isinstance(a, Tensor) else a for a in args),
            **{k: few if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )
        answered = first_tensor(result)
        output = answered.new_zeros(*shaped.shape[:2], answered.shape[-1])
        output[row, column] = answered.reshape(len(row), -1)
        output = output.view(*given.shape[:-1], -1)
        return with_first_tensor(result, output if override is None else override.applied(output))

    return standing_in([module], play)
