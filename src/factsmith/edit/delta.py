"""Delta: one edit as a value, and the only code that writes weights.

    delta = rome(lm, fact, moments=moments)     # the model is untouched
    with applied(lm, delta):                    # W + Δ inside, and the same bits as before outside
        lm.answer([fact.text])
    delta.save("edits/0001")                    # edit.json and delta.safetensors
    Delta.load("edits/0001")

In floating point W + Δ − Δ is not W. So an undo never subtracts: the base matrix is kept, and
copied back. A delta may also append neurons. The layer then gets new parameters, and an undo puts
the old ones back, the same objects (`widening`).

Layers may share one matrix, as in a model that runs one decoder layer several times. Their updates
are then added to that matrix, which is kept and restored once (`homes`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, LayerError, NumericsError
from ..core.fact import Fact
from ..core.settled import settled
from ..core.tables import counted
from ..model.appended import AppendedRows, by_layer
from ..model.language_model import LanguageModel
from ..model.turns import asking, turn
from .delta_folder import (
    appended_prefix,
    read_delta_folder,
    refusing_what_is_not_a_delta,
    stated_rows,
    tensors_as_bytes,
    tensors_of,
    write_delta_folder,
)
from .lending import (
    change_streamed,
    check_in_memory,
    copy_into,
    is_streamed,
    lent,
    weight_of,
)
from .widening import check_rows, widen


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Delta:
    """An update of down-projections, kept as factors, and neurons appended to layers.

    All tensors are float32 on the CPU, whatever the model's dtype and device.

    Attributes:
        layers: {l: (left (d_model, r), right (r, d_ff))}. The update of layer l is left @ right. It
            is that of the layer's own neurons, whatever was appended to them.
        k_star: {l: (n_facts, d_ff)} the key of each fact, averaged over contexts.
        v_star: (n_facts, d_model) the wanted output at the subject token. For ROME it is the output
            of the down-projection, bias included. For the MEMIT family it is the stream after the
            last edited layer.
        facts: The facts that were written, in the order of the rows of k_star and v_star.
        method: The name of the method, such as "rome".
        config: The settings and contexts, as JSON values. Together with the facts they are the
            recipe.
        fingerprint: The fingerprint of the model that the delta was made on.
        convergence: For each fact, how the search for its target ended: steps, loss, nll, kl, norm,
            and stopped, which is "loss", "steps" or "stuck". A fact may also have shares_key_with,
            the index of a fact with another target and nearly the same key in some layer, and
            cosine, that of the two keys under C⁻¹ (0.95 or more). What is written for one of the
            two then arrives at the other too, unless a large update keeps them apart.
        appended: {l: neurons appended to layer l}.

    Raises:
        InputError: Shapes or dtypes do not fit together.
        NumericsError: A number is not finite.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    k_star: Mapping[int, Tensor]
    v_star: Tensor
    facts: tuple[Fact, ...]
    method: str
    config: Mapping[str, Any]
    fingerprint: str
    convergence: tuple[Mapping[str, Any], ...] = ()
    appended: Mapping[int, AppendedRows] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.touched or set(self.layers) != set(self.k_star):
            raise InputError(
                f"layers has {sorted(self.layers)} and k_star has {sorted(self.k_star)}: both must "
                "have the same layers, at least one, unless neurons are appended"
            )
        if self.v_star.ndim != 2:
            raise InputError(
                f"v_star has shape {tuple(self.v_star.shape)}; expected (n_facts, d_model)"
            )
        n, d = self.v_star.shape
        if n != len(self.facts):
            raise InputError(
                f"v_star has {n} rows for {len(self.facts)} facts; expected a row for each"
            )
        for layer in self.layers:
            self._check_shapes(layer, n, d)
        for layer, rows in self.appended.items():
            if rows.values.shape[1] != d or not set(rows.facts) <= set(range(n)):
                raise InputError(
                    f"layer {layer}: the appended rows write {rows.values.shape[1]} numbers for "
                    f"facts {sorted(set(rows.facts))[:5]}; expected {d}, for facts 0 to {n - 1}"
                )
        for name, tensor in self._tensors().items():
            if tensor.dtype != torch.float32:
                raise InputError(
                    f"{name} is {tensor.dtype}; expected float32. Convert it with .float()."
                )
            if not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity. This update would break the model."
                )

    def _check_shapes(self, layer: int, n_facts: int, d_model: int) -> None:
        """Check that the factors and keys of a layer fit each other and v_star."""
        (left, right), key = self.layers[layer], self.k_star[layer]
        matrices = left.ndim == right.ndim == 2
        if not matrices or left.shape[1] != right.shape[0] or left.shape[0] != d_model:
            raise InputError(
                f"layer {layer}: left is {tuple(left.shape)} and right is {tuple(right.shape)}; "
                f"expected ({d_model}, r) and (r, d_ff)"
            )
        if key.shape != (n_facts, right.shape[1]):
            raise InputError(
                f"layer {layer}: k_star has shape {tuple(key.shape)}; expected "
                f"{(n_facts, right.shape[1])}"
            )

    def __repr__(self) -> str:
        facts, layers = counted(len(self.facts), "fact"), list(self.touched)
        size = f"{self.size}, {self.n_bytes:,} bytes"
        return f"Delta({self.method}, {facts}, layers {layers}, {size})"

    @property
    def touched(self) -> tuple[int, ...]:
        """Every layer that the delta changes, in ascending order."""
        return tuple(sorted({*self.layers, *self.appended}))

    @property
    def n_appended(self) -> int:
        """Number of appended neurons."""
        return sum(map(len, self.appended.values()))

    @property
    def size(self) -> str:
        """The rank, or the number of appended neurons, in words."""
        rank = [f"rank {self.rank}"] if self.layers else []
        rows = [counted(self.n_appended, "neuron")] if self.appended else []
        return ", ".join(rank + rows)

    @settled()
    def dense(self, layer: int) -> Tensor:
        """Return the update of one layer's down-projection, (d_model, d_ff) float32.

        Raises:
            LayerError: The delta does not touch the layer.
        """
        if layer not in self.layers:
            raise LayerError(
                f"this delta does not touch layer {layer}; it has {sorted(self.layers)}"
            )
        left, right = self.layers[layer]
        return left @ right

    @property
    def rank(self) -> int:
        """The largest number of columns of a left factor; 0 if there is none."""
        return max((left.shape[1] for left, _ in self.layers.values()), default=0)

    @property
    def n_bytes(self) -> int:
        """Bytes of the factors and of the appended neurons, as they are saved."""
        factors = sum(
            x.numel() * x.element_size() for factors in self.layers.values() for x in factors
        )
        return factors + sum(rows.n_bytes for rows in self.appended.values())

    @property
    def digest(self) -> str:
        """The sha256 of the tensors as they are saved, in hexadecimal."""
        return hashlib.sha256(tensors_as_bytes(self._tensors())).hexdigest()

    def inside(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """Return a `with` block in which the model carries this delta, as `applied` does."""
        return applied(lm, self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `edit.json` and `delta.safetensors` into a folder, which is made if it is missing.

        Each file replaces an older one in one step. edit.json is written last, with the sha256 of
        the tensors, so that `load` sees an interrupted save.

        Raises:
            WorkspaceError: The folder cannot be written.
        """
        record = {
            "method": self.method,
            "fingerprint": self.fingerprint,
            "layers": sorted(self.layers),
            "facts": [fact.to_dict() for fact in self.facts],
            "config": dict(self.config),
            "convergence": [dict(entry) for entry in self.convergence],
        }
        if self.appended:
            record["appended"] = {
                str(layer): list(rows.facts) for layer, rows in sorted(self.appended.items())
            }
        write_delta_folder(Path(folder), record, tensors_as_bytes(self._tensors()))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Delta:
        """Read what `save` wrote.

        Checksums, shapes, dtypes and finiteness are checked before anything is returned.

        Raises:
            DamagedError: A file is missing or altered, or does not fit the other.
        """
        folder = Path(folder)
        record, tensors = read_delta_folder(folder)
        with refusing_what_is_not_a_delta(folder):
            if not isinstance(record["method"], str) or not isinstance(record["config"], dict):
                raise TypeError("its method is not a name, or its config is not a mapping")
            if not isinstance(record["fingerprint"], str):
                raise TypeError("its fingerprint is not a text")
            if not all(isinstance(entry, dict) for entry in record["convergence"]):
                raise TypeError("its convergence is not a list of mappings")
            layers = record["layers"]
            return cls(
                layers={x: (tensors[f"left.{x}"], tensors[f"right.{x}"]) for x in layers},
                k_star={x: tensors[f"k_star.{x}"] for x in layers},
                v_star=tensors["v_star"],
                facts=tuple(Fact.from_dict(fields) for fields in record["facts"]),
                method=record["method"],
                config=record["config"],
                fingerprint=record["fingerprint"],
                convergence=tuple(record["convergence"]),
                appended={
                    layer: AppendedRows(facts=facts, **tensors_of(tensors, appended_prefix(layer)))
                    for layer, facts in stated_rows(record).items()
                },
            )

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the names that they have in the file."""
        named = {"v_star": self.v_star}
        for layer, (left, right) in sorted(self.layers.items()):
            named[f"left.{layer}"], named[f"right.{layer}"] = left, right
            named[f"k_star.{layer}"] = self.k_star[layer]
        for layer, rows in sorted(self.appended.items()):
            prefix = appended_prefix(layer)
            named |= {f"{prefix}{name}": tensor for name, tensor in rows.tensors().items()}
            if rows.inputs is not None:
                named[f"{prefix}inputs"] = rows.inputs
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


@asking()
def read_weights(lm: LanguageModel, layers: Iterable[int]) -> dict[int, Tensor]:
    """Return copies of down-projections, to write back for an exact undo.

    Returns:
        {l: (d_model, d_ff)} in the model's dtype and on its device, without appended neurons.
    """
    return {layer: weight_of(lm, layer).detach().clone() for layer in sorted(set(layers))}


def write_weights(lm: LanguageModel, weights: Mapping[int, Tensor]) -> None:
    """Overwrite down-projections. No other code of factsmith changes a model's weights.

    All weights are checked before the first number is written, so an error leaves the model as it
    was.

    Args:
        lm: The model.
        weights: {l: (d_model, d_ff)} in the model's dtype.

    Raises:
        LayerError: The model does not have a layer.
        InputError: A shape or dtype does not fit.
        NumericsError: A number is not finite.
        UnsupportedModelError: A layer is read from its file each time it runs.
    """
    check_in_memory(lm, weights, "this")
    places, by_home = homes(lm), dict[int, Tensor]()
    for layer, new in weights.items():
        old = weight_of(lm, layer)
        twin = by_home.setdefault(places.get(layer, layer), new)
        if twin is not new and not torch.equal(twin, new):
            raise InputError(
                f"layers {places[layer]} and {layer} share a matrix, and the new weights of "
                "the two differ; give the matrix once"
            )
        _check_fits(layer, new, old)
    copy_into(lm, weights)


def _check_fits(layer: int, new: Tensor, old: Tensor) -> None:
    """Check that a new down-projection can take the place of the old one."""
    if new.shape != old.shape or new.dtype != old.dtype:
        raise InputError(
            f"layer {layer}: the weights are {tuple(new.shape)} {new.dtype}; expected "
            f"{tuple(old.shape)} {old.dtype}, as the model's down-projection"
        )
    if not torch.isfinite(new).all():
        raise NumericsError(
            f"layer {layer}: the new weights hold NaN or infinity in {new.dtype}; nothing was "
            "written"
        )


def homes(lm: LanguageModel) -> dict[int, int]:
    """Return {layer: the first layer with the same down-projection in memory}, without experts."""
    first: dict[tuple[object, ...], int] = {}
    places: dict[int, int] = {}
    for layer, ffn in enumerate(lm.ffn):
        if not ffn.n_experts:
            places[layer] = first.setdefault(ffn.home, layer)
    return places


@settled()
def patched(
    base: Mapping[int, Tensor],
    deltas: Iterable[Delta],
    places: Mapping[int, int] | None = None,
    *,
    partly: bool = False,
) -> dict[int, Tensor]:
    """Return base + Σ deltas for each layer of the base.

    The deltas are added in their order, in float32 or wider. The sum is rounded once to the base's
    dtype. The same base and deltas always give the same bits.

    Args:
        base: {layer: (d_model, d_ff)}.
        deltas: The deltas.
        places: From `homes`: the layer of the base that has a layer's matrix. None: its own.
        partly: Leave out layers that the base does not hold.

    Raises:
        LayerError: A delta touches a layer that the base does not hold.
        InputError: The shape of a delta does not fit.
    """
    sums = {
        layer: weight.to(torch.promote_types(weight.dtype, torch.float32))
        for layer, weight in base.items()
    }
    for delta in deltas:
        for layer in delta.layers:
            home = (places or {}).get(layer, layer)
            if home not in sums and partly:
                continue
            if home not in sums:
                raise LayerError(f"the delta edits layer {layer}; the base holds {sorted(sums)}")
            update = delta.dense(layer).to(sums[home])
            if update.shape != sums[home].shape:
                raise InputError(
                    f"layer {layer}: the delta is {tuple(update.shape)} and the model's "
                    f"down-projection is {tuple(sums[home].shape)}, so it was made for another "
                    "model"
                )
            sums[home] = sums[home] + update
    return {layer: total.to(base[layer].dtype) for layer, total in sums.items()}


@contextmanager
def applied(
    lm: LanguageModel,
    delta: Delta | Iterable[Delta],
    *,
    padding: Mapping[int, AppendedRows] | None = None,
) -> Iterator[None]:
    """Put one delta, or the sum of several, into the model for the length of a `with` block.

    Afterwards the weights are the same bits as before, also after an exception. Blocks can be
    nested: the inner one adds to what the outer one left. Other threads that use the model wait
    until the block ends (`model.turns`). Fingerprints are not checked, because a
    delta may have been made on a model that carried others. A Workbench checks them.

    Args:
        lm: The model.
        delta: The delta, or several.
        padding: {layer: neurons to append after those of the deltas}. None: no more.

    Raises:
        LayerError, InputError, NumericsError: A delta does not fit. Then nothing has changed.
    """
    deltas = [delta] if isinstance(delta, Delta) else list(delta)
    places = homes(lm)
    layers = {places.get(layer, layer) for delta in deltas for layer in delta.layers}
    rows = by_layer([*(delta.appended for delta in deltas), padding or {}])
    check_rows(lm.ffn, rows, places)
    with (
        turn(lm, changes=bool(layers or rows), block=True),
        lm.gap_choices.held(lm),
        lent(lm, layers, rows) as base,
    ):
        write_weights(lm, patched(base, deltas, places, partly=True))
        for layer in sorted(layers - base.keys()):
            change_streamed(lm, layer, partial(_add, lm, layer, deltas, places))
        for layer, neurons in rows.items():
            change = partial(widen, lm.ffn[layer], neurons)
            change_streamed(lm, layer, change) if is_streamed(lm, layer) else change()
        yield


def _add(lm: LanguageModel, layer: int, deltas: Iterable[Delta], places: Mapping[int, int]) -> None:
    """Add deltas to a layer that was just read from its file."""
    weight = weight_of(lm, layer)
    new = patched({layer: weight}, deltas, places, partly=True)[layer]
    _check_fits(layer, new, weight)
    weight.detach().copy_(new)


@contextmanager
def written(
    lm: LanguageModel,
    weights: Mapping[int, Tensor],
    *,
    appended: Mapping[int, AppendedRows] | None = None,
) -> Iterator[None]:
    """Put down-projections {l: (d_model, d_ff)} into the model for the length of a `with` block,
    and append neurons. Afterwards the weights are the same bits as before.

    Raises:
        LayerError, InputError, NumericsError: As `applied`. Then nothing has changed.
    """
    rows = appended or {}
    check_in_memory(lm, [*weights, *rows], "this")
    check_rows(lm.ffn, rows, homes(lm))
    with (
        turn(lm, changes=bool(weights or rows), block=True),
        lm.gap_choices.held(lm),
        lent(lm, weights, rows),
    ):
        write_weights(lm, weights)
        for layer, neurons in rows.items():
            widen(lm.ffn[layer], neurons)
        yield
