"""A bank of neurons: where its keys and values are in the model, as views.

    bank.values[i]                 # (d_model,) what neuron i writes
    bank.keys[i]                   # (d_model,) what it reads; gate_keys and up_keys if gated
    bank.weight()                  # (d_model, d_ff) the down-projection, in the model's storage
    bank.n_appended                # how many of the neurons a patch has appended

Appended neurons are the last ones of a bank. The matrices are read at each use, so they follow
every change of the weights. Their orientation comes from the type of the module, never from their
shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import UnsupportedModelError
from .absent import place_of, whole

APPENDED = "factsmith_appended"
"""Attribute of a widened parameter: how many neurons were appended to it."""

Rows: TypeAlias = Literal["all", "first", "second", "even", "odd"]
"""Which rows of a matrix: all, or one half of a fused gate and up-projection. The halves lie one
after the other, or alternate."""


def rows_of(rows: Rows, n_rows: int) -> slice:
    """Return which of n rows these are."""
    half = n_rows // 2
    return {
        "all": slice(None),
        "first": slice(0, half),
        "second": slice(half, None),
        "even": slice(0, None, 2),
        "odd": slice(1, None, 2),
    }[rows]


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is one linear map whose orientation its type settles."""
    return isinstance(module, (nn.Linear, Conv1D))


@dataclass(frozen=True, eq=False)
class Matrix:
    """Where a matrix (out, in), or some of its rows, is in a module.

    Attributes:
        module: The module.
        name: The parameter's name.
        transposed: Whether the parameter is (in, out).
        expert: The index in the parameter's first dimension. None: it has no such dimension.
        rows: Which rows of the matrix.
    """

    module: nn.Module
    name: str = "weight"
    transposed: bool = False
    expert: int | None = None
    rows: Rows = "all"

    def read(self) -> Tensor:
        """Return the matrix (out, in), or the vector of a bias: a view of the module's storage.

        That of a streamed layer is read from its file, unless the layer is in memory.
        """
        return self._view(whole(getattr(self.module, self.name)))

    @property
    def shape(self) -> torch.Size:
        """Its shape. Nothing is read."""
        return self._view(getattr(self.module, self.name).detach()).shape

    @property
    def home(self) -> tuple[object, ...]:
        """What two matrices share if they are one in memory."""
        stored = getattr(self.module, self.name)
        if place_of(stored) is not None:
            return self.module, self.name
        view = self._view(stored.detach())
        return view.device, view.data_ptr(), view.shape, view.stride()

    def _view(self, stored: Tensor) -> Tensor:
        stored = stored if self.expert is None else stored[self.expert]
        matrix = stored.T if self.transposed else stored
        return matrix[rows_of(self.rows, len(matrix))]

    def moved(self, places: Mapping[nn.Module, nn.Module]) -> Matrix:
        """Return the same matrix in another layer that is built alike."""
        return dataclasses.replace(self, module=places[self.module])


def linear_matrix(module: nn.Module) -> Matrix:
    """Return the weight of a linear module. Conv1D keeps it transposed."""
    return Matrix(module, transposed=isinstance(module, Conv1D))


@dataclass(frozen=True, eq=False, kw_only=True)
class Neurons:
    """A bank of d_ff neurons, each with a key it matches and a value it writes.

    Attributes:
        layer: Index of the decoder layer.
    """

    layer: int
    _weight: Matrix | None = field(repr=False)
    _bias: Matrix | None = field(repr=False)
    _gate: Matrix | None = field(repr=False)
    _up: Matrix | None = field(repr=False)

    def weight(self) -> Tensor:
        """Return the down-projection, (d_model, d_ff).

        It is a view of the model's storage in either orientation.
        """
        return self._read(self._weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the down-projection. Nothing is read."""
        matrix = self._matrix(self._weight)
        dtype: torch.dtype = getattr(matrix.module, matrix.name).dtype
        return dtype

    @property
    def home(self) -> tuple[object, ...]:
        """What layers share that have one down-projection in memory."""
        return self._matrix(self._weight).home

    @property
    def values(self) -> Tensor:
        """What each neuron writes: (d_ff, d_model), a view."""
        return self.weight().T

    @property
    def bias(self) -> Tensor | None:
        """What is written whatever the input is: (d_model,), or None."""
        return None if self._bias is None else self._bias.read()

    @property
    def d_ff(self) -> int:
        """Number of neurons."""
        return self.shape[1]

    @property
    def shape(self) -> torch.Size:
        """(d_model, d_ff), the shape of the down-projection. Nothing is read."""
        return self._matrix(self._weight).shape

    @property
    def n_appended(self) -> int:
        """Number of neurons that patches have appended. They are the last ones."""
        if self._weight is None:
            return 0
        return int(getattr(getattr(self._weight.module, self._weight.name), APPENDED, 0))

    @property
    def n_original(self) -> int:
        """Number of neurons without the appended ones: the width that low-rank edits work in."""
        return self.d_ff - self.n_appended

    def original_weight(self) -> Tensor:
        """Return the down-projection without appended neurons, (d_model, n_original), a view."""
        return self.weight()[:, : self.n_original]

    @property
    def is_gated(self) -> bool:
        """Whether a coefficient is act(gate·x)·(up·x), not act(key·x)."""
        return self._gate is not None

    @property
    def keys(self) -> Tensor:
        """What each neuron matches: (d_ff, d_model).

        Raises:
            UnsupportedModelError: The neurons are gated, so a key is a pair.
        """
        if self.is_gated:
            raise UnsupportedModelError(
                f"layer {self.layer} is gated, so a key is a pair; use .gate_keys and .up_keys"
            )
        return self._read(self._up)

    @property
    def gate_keys(self) -> Tensor:
        """The gate half of each key: (d_ff, d_model).

        Raises:
            UnsupportedModelError: The neurons are not gated.
        """
        return self._half(self._gate)

    @property
    def up_keys(self) -> Tensor:
        """The up half of each key: (d_ff, d_model).

        Raises:
            UnsupportedModelError: The neurons are not gated.
        """
        return self._half(self._up)

    def moved(self, layer: int, places: Mapping[nn.Module, nn.Module]) -> Neurons:
        """Return the same bank in another layer that is built alike."""
        weight, bias, gate, up = (
            None if m is None else m.moved(places)
            for m in (self._weight, self._bias, self._gate, self._up)
        )
        return Neurons(layer=layer, _weight=weight, _bias=bias, _gate=gate, _up=up)

    def _half(self, matrix: Matrix | None) -> Tensor:
        if not self.is_gated:
            raise UnsupportedModelError(f"layer {self.layer} is not gated; use .keys")
        return self._read(matrix)

    def _read(self, matrix: Matrix | None) -> Tensor:
        return self._matrix(matrix).read()

    def _matrix(self, matrix: Matrix | None) -> Matrix:
        if matrix is None:
            raise UnsupportedModelError(
                f"layer {self.layer} has experts, and each has its own matrices; use .experts[e] "
                "or .shared"
            )
        return matrix
