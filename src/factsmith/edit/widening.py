"""Widen a layer by appended neurons, and put the very same parameters back.

    held = parameters_of(lm.ffn[3])
    widen(lm.ffn[3], rows)         # the layer has len(rows) neurons more
    put_back(held)                 # the parameters of before: the same objects

A widened layer has new parameters. Those of before are not changed, so an undo is exact. Only
`delta` and `keep.carried` call this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import NumericsError, UnsupportedModelError
from ..core.settled import settled
from ..model.address import check_layer
from ..model.appended import AppendedRows, check_widens
from ..model.ffn import FeedForward
from ..model.neurons import APPENDED, Matrix, Rows, rows_of

_SIZES = ("in_features", "out_features", "nf", "nx")
"""Attributes in which linears keep their sizes."""


@dataclass(frozen=True, eq=False)
class Held:
    """The parameters and sizes of the linears of one layer, as they were.

    Attributes:
        layer: The layer.
        parameters: For each linear and parameter name, the parameter.
        sizes: For each linear and name of a size, the number.
    """

    layer: int
    parameters: tuple[tuple[nn.Module, str, nn.Parameter | None], ...]
    sizes: tuple[tuple[nn.Module, str, int], ...]


def parameters_of(ffn: FeedForward) -> Held:
    """Return what `put_back` needs to undo a widening of a layer."""
    check_widens(ffn)
    linears = list(_linears(ffn))
    return Held(
        ffn.layer,
        tuple(
            (linear, name, linear._parameters[name])
            for linear in linears
            for name in ("weight", "bias")
            if name in linear._parameters
        ),
        tuple(
            (linear, name, int(vars(linear)[name]))
            for linear in linears
            for name in _SIZES
            if name in vars(linear)
        ),
    )


def put_back(held: Held) -> None:
    """Give a layer the parameters that it had, the same objects."""
    for linear, name, parameter in held.parameters:
        linear._parameters[name] = parameter
    for linear, name, size in held.sizes:
        setattr(linear, name, size)


@settled()
def widen(ffn: FeedForward, rows: AppendedRows) -> None:
    """Append neurons to a layer that has none, or on top of those that it has.

    All new parameters are made and checked before the first one is put in, so an error leaves the
    layer as it was.

    Args:
        ffn: The layer.
        rows: The neurons.

    Raises:
        InputError: The rows do not fit the layer.
        NumericsError: A number is too large for the model's dtype.
        UnsupportedModelError: The layer has experts, or other modules share its weights.
    """
    rows.check(ffn)
    assert ffn._weight is not None
    n, weight = len(rows), ffn._weight
    new: list[tuple[nn.Module, str, Tensor]] = []
    readers: dict[nn.Module, dict[Rows, tuple[Tensor, Tensor]]] = {}
    for matrix, keys, biases in rows.parts(ffn):
        zeros = torch.zeros(n, dtype=torch.float32)
        added = (keys, zeros if biases is None else biases)
        readers.setdefault(matrix.module, {})[matrix.rows] = added
    for linear, halves in readers.items():
        matrix = next(m for m, *_ in rows.parts(ffn) if m.module is linear)
        whole = Matrix(linear, transposed=matrix.transposed).read()
        keys_of = {half: keys for half, (keys, _) in halves.items()}
        new.append((linear, "weight", _stored(_with_rows(whole, keys_of), matrix.transposed)))
        if linear._parameters.get("bias") is not None:
            biases_of = {half: biases for half, (_, biases) in halves.items()}
            new.append((linear, "bias", _with_rows(Matrix(linear, "bias").read(), biases_of)))
    down = weight.read()
    values = rows.values.T.to(down)
    new.append((weight.module, "weight", _stored(torch.cat([down, values], 1), weight.transposed)))
    _check_finite(ffn, new)
    n_appended = ffn.n_appended + n
    for linear, name, tensor in new:
        _put(linear, name, tensor, n_appended)
    for linear, halves in readers.items():
        _grow(linear, ("out_features", "nf"), len(halves) * n)
    _grow(weight.module, ("in_features", "nx"), n)


def check_rows(
    ffn: Sequence[FeedForward], rows: Mapping[int, AppendedRows], places: Mapping[int, int]
) -> None:
    """Check that layers can take appended neurons.

    Args:
        ffn: Each layer's memory.
        rows: {layer: the neurons}.
        places: From `delta.homes`.

    Raises:
        LayerError: The model does not have a layer.
        InputError: The neurons are of another kind or width than the layer's.
        UnsupportedModelError: A layer has experts, or shares its weights with another layer.
    """
    for layer, neurons in rows.items():
        neurons.check(ffn[check_layer(layer, len(ffn))])
        check_alone(layer, places)


def check_alone(layer: int, places: Mapping[int, int]) -> None:
    """Check that a layer shares its down-projection with no other.

    Args:
        layer: The layer.
        places: From `delta.homes`.

    Raises:
        UnsupportedModelError: It does.
    """
    others = [other for other, home in places.items() if home == places.get(layer)]
    if len(others) > 1:
        raise UnsupportedModelError(
            f"layers {', '.join(map(str, others))} share their weights, so neurons cannot be "
            f"appended to layer {layer} alone; use a method that updates weights, such as memit"
        )


def _linears(ffn: FeedForward) -> Iterator[nn.Module]:
    """Yield each linear of a layer once."""
    seen: list[nn.Module] = []
    for matrix in (ffn._gate, ffn._up, ffn._weight):
        if matrix is not None and matrix.module not in seen:
            seen.append(matrix.module)
            yield matrix.module


def _with_rows(whole: Tensor, added: Mapping[Rows, Tensor]) -> Tensor:
    """Return a matrix or vector with rows after each of its parts.

    Args:
        whole: (rows, d_model) or (rows,).
        added: For each part, as many rows more.
    """
    new = {part: tensor.to(whole) for part, tensor in added.items()}
    if "even" in new:  # the halves alternate, so the new rows do
        pairs = torch.stack([new["even"], new["odd"]], dim=1)
        return torch.cat([whole, pairs.flatten(0, 1)])
    pieces = []
    for part in ("all", "first", "second"):
        if part in new:
            pieces += [whole[rows_of(part, len(whole))], new[part]]
    return torch.cat(pieces)


def _stored(matrix: Tensor, transposed: bool) -> Tensor:
    return (matrix.T if transposed else matrix).contiguous()


def _check_finite(ffn: FeedForward, new: list[tuple[nn.Module, str, Tensor]]) -> None:
    for _, _, tensor in new:
        if not torch.isfinite(tensor).all():
            raise NumericsError(
                f"layer {ffn.layer}: the appended rows hold numbers that are too large for "
                f"{tensor.dtype}; nothing was written"
            )


def _put(linear: nn.Module, name: str, tensor: Tensor, n_appended: int) -> None:
    old = linear._parameters[name]
    if old is None:
        raise UnsupportedModelError(
            f"the {name} of {type(linear).__name__} is computed from other weights, so neurons "
            "cannot be appended; load the model without adapters"
        )
    parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(parameter, APPENDED, n_appended)
    linear._parameters[name] = parameter


def _grow(linear: nn.Module, names: tuple[str, ...], n: int) -> None:
    for name in names:
        if name in vars(linear):
            setattr(linear, name, vars(linear)[name] + n)
