"""Neurons appended to a feed-forward layer: an INSERT, where a low-rank delta is an UPDATE.

    rows = AppendedRows(keys=keys, biases=biases, values=values, facts=(0, 1))
    rows.check(lm.ffn[3])          # whether the layer can take them
    rows.of([1])                   # the rows of some facts

A layer with more neurons is still a plain feed-forward layer. The appended ones come after the
layer's own, which stay as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError, UnsupportedModelError
from ..core.tables import counted
from .ffn import FeedForward
from .neurons import Matrix

NAMES = ("keys", "gate_keys", "up_keys", "biases", "gate_biases", "up_biases", "values")
"""The tensors of appended rows, in the order in which they are described."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AppendedRows:
    """Neurons appended to one layer, float32 on the CPU.

    The input x is what enters the feed-forward network. A plain neuron has the coefficient
    act(key·x + bias), and a gated one act(gate·x + gate bias) · (up·x + up bias).

    Attributes:
        values: (n, d_model) what each neuron writes.
        facts: (n,) the index of the fact that each neuron belongs to. A fact may have several.
        keys: (n, d_model) of plain neurons. None: they are gated.
        gate_keys: (n, d_model) of gated neurons. None: they are plain.
        up_keys: (n, d_model) of gated neurons. None: they are plain.
        biases: (n,) added before the activation of plain neurons. None: the layer has none.
        gate_biases: (n,) the same of gated neurons.
        up_biases: (n,) added to up·x.
        inputs: (n_facts, d_model) what enters the layer at each fact's subject, averaged over its
            contexts, in the order of the facts' indices. Later facts are told apart from these.
            None: not known.

    Raises:
        InputError: Shapes or dtypes do not fit together.
        NumericsError: A number is not finite.
    """

    values: Tensor
    facts: tuple[int, ...]
    keys: Tensor | None = None
    gate_keys: Tensor | None = None
    up_keys: Tensor | None = None
    biases: Tensor | None = None
    gate_biases: Tensor | None = None
    up_biases: Tensor | None = None
    inputs: Tensor | None = None

    def __post_init__(self) -> None:
        plain, gated = self.keys is not None, self.gate_keys is not None
        if plain == gated or gated != (self.up_keys is not None):
            raise InputError(
                "appended rows have neither keys alone nor a pair of gate_keys and up_keys; give "
                "one of the two"
            )
        unused = (self.gate_biases, self.up_biases) if plain else (self.biases,)
        if any(biases is not None for biases in unused):
            raise InputError("appended rows have biases of another kind of neuron; leave them out")
        n = len(self.facts)
        if self.values.ndim != 2 or len(self.values) != n or not n:
            raise InputError(
                f"the appended values have shape {tuple(self.values.shape)} for "
                f"{counted(n, 'row')}; expected (n, d_model), at least one"
            )
        inputs = {} if self.inputs is None else {"inputs": self.inputs}
        for name, tensor in {**self.tensors(), **inputs}.items():
            expected = self._expected(name)
            if tuple(tensor.shape) != expected or tensor.dtype != torch.float32:
                raise InputError(
                    f"{name} of the appended rows is {tuple(tensor.shape)} {tensor.dtype}; "
                    f"expected {expected} torch.float32"
                )
            if not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} of the appended rows holds NaN or infinity. These rows would break "
                    "the model."
                )

    def _expected(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor must have."""
        n, d_model = self.values.shape
        if name == "inputs":
            return len(set(self.facts)), d_model
        return (n,) if name.endswith("biases") else (n, d_model)

    def __repr__(self) -> str:
        kind = "plain" if self.keys is not None else "gated"
        facts = counted(len(set(self.facts)), "fact")
        return f"AppendedRows({counted(len(self), f'{kind} neuron')}, {facts})"

    def __len__(self) -> int:
        """Return the number of neurons."""
        return len(self.facts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by name."""
        named = {name: getattr(self, name) for name in NAMES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def n_bytes(self) -> int:
        """Bytes of the neurons, as they are saved."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def as_bytes(self) -> list[bytes]:
        """Return the numbers of each row, as bytes. Equal rows have equal bytes."""
        columns = [tensor.reshape(len(self), -1) for tensor in self.tensors().values()]
        return [row.numpy().tobytes() for row in torch.cat(columns, dim=1).contiguous()]

    def of(self, facts: Sequence[int]) -> AppendedRows:
        """Return the rows of some facts. Their new indices are their places in `facts`.

        Raises:
            InputError: No row belongs to them.
        """
        places = {fact: place for place, fact in enumerate(facts)}
        kept = [row for row, fact in enumerate(self.facts) if fact in places]
        inputs = self.inputs
        if inputs is not None:
            rows = {fact: row for row, fact in enumerate(sorted(set(self.facts)))}
            inputs = inputs[[rows[fact] for fact in places if fact in rows]]
        return dataclasses.replace(
            self,
            inputs=inputs,
            facts=tuple(places[self.facts[row]] for row in kept),
            **{name: tensor[kept] for name, tensor in self.tensors().items()},
        )

    def check(self, ffn: FeedForward) -> None:
        """Check that a layer can take the rows.

        Raises:
            UnsupportedModelError: The layer has experts.
            InputError: The layer's neurons are of another kind or width.
        """
        check_widens(ffn)
        kind, rows = ("gated" if ffn.is_gated else "plain"), self
        d_model = ffn.shape[0]
        if (rows.keys is None) != ffn.is_gated or self.values.shape[1] != d_model:
            other = "gated" if rows.keys is None else "plain"
            raise InputError(
                f"layer {ffn.layer} has {kind} neurons of width {d_model}; the appended rows are "
                f"{other}, of width {self.values.shape[1]}, so they were made for another model"
            )
        for matrix, _, biases in self.parts(ffn):
            if biases is not None and getattr(matrix.module, "bias", None) is None:
                raise InputError(
                    f"layer {ffn.layer} has no biases; the appended rows have them, so they were "
                    "made for another model"
                )

    def parts(self, ffn: FeedForward) -> list[tuple[Matrix, Tensor, Tensor | None]]:
        """Return what is appended to each reading matrix: (matrix, keys (n, d_model), biases)."""
        if self.keys is not None:
            assert ffn._up is not None
            return [(ffn._up, self.keys, self.biases)]
        assert ffn._gate is not None and ffn._up is not None
        assert self.gate_keys is not None and self.up_keys is not None
        return [
            (ffn._gate, self.gate_keys, self.gate_biases),
            (ffn._up, self.up_keys, self.up_biases),
        ]


def joined(rows: Sequence[AppendedRows]) -> AppendedRows:
    """Return the rows of several deltas of one layer, one after another.

    The facts are numbered on, so those of different deltas stay apart.
    """
    first, *_ = rows
    names = [name for name in NAMES if any(name in each.tensors() for each in rows)]
    facts: list[int] = []
    for each in rows:
        start = max(facts, default=-1) + 1
        facts += [start + fact for fact in each.facts]
    inputs = [each.inputs for each in rows if each.inputs is not None]
    return dataclasses.replace(
        first,
        inputs=torch.cat(inputs) if len(inputs) == len(rows) else None,
        facts=tuple(facts),
        **{name: torch.cat([_or_zeros(each, name) for each in rows]) for name in names},
    )


def _or_zeros(rows: AppendedRows, name: str) -> Tensor:
    tensor: Tensor | None = getattr(rows, name)
    return torch.zeros(len(rows), dtype=torch.float32) if tensor is None else tensor


def by_layer(
    deltas: Collection[Mapping[int, AppendedRows]],
) -> dict[int, AppendedRows]:
    """Return the rows of several deltas, joined layer by layer, in their order."""
    layers = sorted({layer for delta in deltas for layer in delta})
    return {layer: joined([delta[layer] for delta in deltas if layer in delta]) for layer in layers}


def row_numbers(ffn: FeedForward) -> int:
    """Return how many numbers one appended neuron of a layer has."""
    n_keys = 2 if ffn.is_gated else 1
    readers = [matrix for matrix in (ffn._gate, ffn._up) if matrix is not None]
    n_biases = sum(getattr(matrix.module, "bias", None) is not None for matrix in readers)
    return (n_keys + 1) * int(ffn.shape[0]) + n_biases


def check_widens(ffn: FeedForward) -> None:
    """Check that neurons can be appended to a layer at all.

    Raises:
        UnsupportedModelError: The layer has experts, or other weights with a number for each
            neuron, such as those of a norm of the coefficients.
    """
    if ffn.n_experts:
        raise UnsupportedModelError(
            f"layer {ffn.layer} has {ffn.n_experts} experts, and neurons cannot be appended to "
            "them yet; choose a layer without experts"
        )
    linears = [matrix.module for matrix in (ffn._gate, ffn._up, ffn._weight) if matrix is not None]
    d_model, d_ff = ffn.shape
    for name, module in ffn.module.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if module not in linears and parameter.shape == (d_ff,) and d_ff != d_model:
                raise UnsupportedModelError(
                    f"layer {ffn.layer} has {name}.{kind}, with a number for each neuron, so "
                    "neurons cannot be appended to it; use a method that updates weights, such as "
                    "memit"
                )
