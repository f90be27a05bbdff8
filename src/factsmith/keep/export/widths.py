"""The width of each layer in a checkpoint with appended neurons, and its entry in the config.

    widths = find_widths(lm, {5: 12})       # 12 neurons were appended to layer 5
    widths.width                            # intermediate_size is 1,600 instead of 1,536
    with applied(lm, deltas, padding=widths.padding(lm)), widths.in_config(lm.config): ...

No entry is known by its name. An entry that holds the present width, or twice that, or nothing, is
set to the new one. The model is then built from that config, without memory for its weights. The
entry is taken if every weight has the shape that it must have. Where a config has one width for all
layers, the other layers are padded with neurons that read and write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ...core.errors import UnsupportedModelError
from ...core.tables import counted
from ...edit.delta import homes
from ...edit.widening import check_rows
from ...model.appended import AppendedRows
from ...model.ffn import FeedForward
from ...model.language_model import LanguageModel
from ...model.neurons import Matrix
from ...model.quiet import quietly
from .record import Width

MULTIPLE = 64
"""What a width is a multiple of, so that servers can cut it into tiles and shards."""

Shapes: TypeAlias = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The widths of a checkpoint's layers.

    Attributes:
        path: Where the config has the width: the names from the outside to the inside.
        value: What it holds in the checkpoint.
        width: How wide the layers are, before and after.
        zeros: {layer: how many neurons of zeros follow the appended ones}.
    """

    path: tuple[str, ...]
    value: int | list[int]
    width: Width
    zeros: Mapping[int, int]

    def padding(self, lm: LanguageModel) -> dict[int, AppendedRows]:
        """Return the neurons of zeros, by layer."""
        return {layer: zero_rows(lm.ffn[layer], n) for layer, n in self.zeros.items() if n}

    @contextmanager
    def in_config(self, config: Any) -> Iterator[None]:
        """Return a block in which a config has the new width."""
        *outer, name = self.path
        for part in outer:
            config = getattr(config, part)
        before = getattr(config, name)
        try:
            setattr(config, name, self.value)
            yield
        finally:
            setattr(config, name, before)


def zero_rows(ffn: FeedForward, n: int) -> AppendedRows:
    """Return n neurons for a layer that read and write nothing."""
    zeros = torch.zeros(1, 1).expand(n, ffn.shape[0])  # no memory
    keys = {"gate_keys": zeros, "up_keys": zeros} if ffn.is_gated else {"keys": zeros}
    return AppendedRows(values=zeros, facts=(0,) * n, **keys)


def find_widths(lm: LanguageModel, appended: Mapping[int, int]) -> Widths:
    """Find the entry of a model's config that can hold the widths of its layers.

    Args:
        lm: The model, without patches.
        appended: {layer: how many neurons are appended to it}.

    Raises:
        UnsupportedModelError: The config has no such entry, or layers share their weights.
    """
    for path, value in _candidates(lm, appended):
        built = _built(lm, path, value)
        if built is None:
            continue
        zeros = _zeros(lm, appended, built)
        if zeros is None:
            continue
        added = {ffn: n + zeros[ffn.layer] for ffn, n in _all(lm, appended)}
        if built != _widened(lm, added):
            continue
        width = Width.of(
            ".".join(path),
            [ffn.d_ff for ffn in added],
            [ffn.d_ff + n for ffn, n in added.items()],
        )
        widths = Widths(path=path, value=value, width=width, zeros=zeros)
        check_rows(lm.ffn, widths.padding(lm), homes(lm))
        return widths
    layers = ", ".join(map(str, sorted(appended)))
    raise UnsupportedModelError(
        f"{counted(sum(appended.values()), 'neuron')} appended to layer {layers}: a checkpoint of "
        f"{lm.name} cannot hold them, because no entry of its config sets the width of these "
        "layers alone. Export a patch, or write the facts with a method that updates weights, such "
        "as memit."
    )


def _all(lm: LanguageModel, appended: Mapping[int, int]) -> list[tuple[FeedForward, int]]:
    """Return every layer that has neurons of its own, and how many are appended to it."""
    return [(ffn, appended.get(ffn.layer, 0)) for ffn in lm.ffn if not ffn.n_experts]


def _candidates(
    lm: LanguageModel, appended: Mapping[int, int]
) -> Iterator[tuple[tuple[str, ...], int | list[int]]]:
    """Yield entries that may be the width, each with its new value; the likeliest first."""
    now = {ffn.layer: ffn.d_ff for ffn, _ in _all(lm, appended)}
    most = max(appended.values())
    entries = list(_entries(lm.config.to_dict()))
    for path, value in entries:
        if isinstance(value, list):
            if len(value) == lm.n_layers and all(value[layer] == now[layer] for layer in now):
                added = [appended.get(layer, 0) for layer in range(lm.n_layers)]
                yield path, [_up(v + n) if n else v for v, n in zip(value, added, strict=True)]
        elif type(value) is int:
            if value in now.values():
                yield path, _up(value + most)
            if value % 2 == 0 and value // 2 in now.values():  # of a gate and an up-projection
                yield path, 2 * _up(value // 2 + most)
    for path, value in entries:
        if value is None:
            yield path, _up(max(now.values()) + most)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the entries of a config and of the configs in it."""
    for name, value in config.items():
        if isinstance(value, dict):
            if name.endswith("_config"):
                yield from (((name, *path), inner) for path, inner in _entries(value))
        else:
            yield (name,), value


def _up(width: int) -> int:
    return -(-width // MULTIPLE) * MULTIPLE


def _built(lm: LanguageModel, path: tuple[str, ...], value: int | list[int]) -> Shapes | None:
    """Return the shapes of a model with another entry in its config; None if there is none."""
    record = lm.config.to_dict()
    inner = record
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    try:
        with quietly(), torch.device("meta"):
            return _shapes(type(lm.module)(type(lm.config).from_dict(record)))
    except Exception:  # an entry that means something else may raise anything
        return None


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _zeros(lm: LanguageModel, appended: Mapping[int, int], built: Shapes) -> dict[int, int] | None:
    """Return how many neurons each layer lacks to fill a model; None if one has too many."""
    zeros = {}
    for ffn, n in _all(lm, appended):
        assert ffn._weight is not None
        name, axis = _place(lm, ffn._weight, 1)
        if len(built.get(name, ())) != 2:
            return None
        zeros[ffn.layer] = built[name][axis] - ffn.d_ff - n
    return None if min(zeros.values()) < 0 else zeros


def _widened(lm: LanguageModel, added: Mapping[FeedForward, int]) -> Shapes:
    """Return the shapes of a model with some neurons more in each layer."""
    shapes = {name: list(shape) for name, shape in _shapes(lm.module).items()}
    for ffn, n in added.items():
        assert ffn._weight is not None
        name, axis = _place(lm, ffn._weight, 1)
        shapes[name][axis] += n
        for reader in (ffn._gate, ffn._up):
            if reader is None:
                continue
            name, axis = _place(lm, reader, 0)
            shapes[name][axis] += n
            bias = name.removesuffix("weight") + "bias"
            if bias in shapes:
                shapes[bias][0] += n
    return {name: tuple(shape) for name, shape in shapes.items()}


def _place(lm: LanguageModel, matrix: Matrix, axis: int) -> tuple[str, int]:
    """Return the name of a matrix in the model's state, and the axis of its neurons there.

    Args:
        lm: The model.
        matrix: A matrix of a layer.
        axis: The axis of its neurons in a matrix (out, in).
    """
    stem = next(name for name, module in lm.module.named_modules() if module is matrix.module)
    return f"{stem}.{matrix.name}", 1 - axis if matrix.transposed else axis
