"""Delta: one edit as a value, and the only code that writes weights.

    delta = rome(lm, fact, moments=moments)     # the model is untouched
    with applied(lm, delta):                    # W + Δ inside, the very same bits as before outside
        lm.answer([fact.text])
    delta.save("edits/0001")                    # edit.json + delta.safetensors
    Delta.load("edits/0001")

W + Δ − Δ is not W in floating point, so nothing here subtracts: the base matrix is kept and copied back.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.errors import (
    DamagedError,
    FactError,
    InputError,
    LayerError,
    NumericsError,
    WorkspaceError,
)
from ..core.fact import Fact
from ..core.files import file_digest, record_digest, write_file
from ..core.tables import counted
from ..model.language_model import LanguageModel

_FORMAT = 1

_MOST_JSON = 64 * 2**20

_JSON = "edit.json"

_TENSORS = "delta.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Delta:
    """An update of down-projections, kept as factors; float32 on the CPU, whatever the model's dtype and device.

    layers       {l: (left (d_model, r), right (r, d_ff))}; the update to layer l is left @ right
    k_star       {l: (n_facts, d_ff)} the key each fact was stored under, averaged over contexts
    v_star       (n_facts, d_model) what was wanted at the subject token: of the down-projection, bias included (ROME), or in the stream
                 after the last edited layer (the MEMIT family)
    facts        what was written, in the order of the rows of k_star and v_star
    method       "rome", ...
    config       JSON-able settings it was made with, contexts included: with the facts, the recipe
    fingerprint  of the model it was made on
    convergence  for each fact, how its target was found: steps, loss, nll, kl, norm, stopped ("loss" or "steps"). Where another fact with
                 another target has nearly the same key in some layer, also shares_key_with, its index, and their cosine under C⁻¹, 0.95
                 or more: what is written for one then arrives at the other too, or takes a large update to be kept apart

    Raises InputError when shapes or dtypes do not fit together, NumericsError when a number is not finite.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    k_star: Mapping[int, Tensor]
    v_star: Tensor
    facts: tuple[Fact, ...]
    method: str
    config: Mapping[str, Any]
    fingerprint: str
    convergence: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.layers or set(self.layers) != set(self.k_star):
            raise InputError(
                f"a delta has factors and k_star for the same layers; got {sorted(self.layers)} and {sorted(self.k_star)}"
            )
        if self.v_star.ndim != 2:
            raise InputError(
                f"v_star has shape {tuple(self.v_star.shape)}; expected (n_facts, d_model)"
            )
        n, d = self.v_star.shape
        if n != len(self.facts):
            raise InputError(f"v_star has {n} rows for {len(self.facts)} facts; expected one each")
        for layer, (left, right) in self.layers.items():
            key = self.k_star[layer]
            if (
                left.ndim != 2
                or right.ndim != 2
                or left.shape[1] != right.shape[0]
                or left.shape[0] != d
            ):
                raise InputError(
                    f"layer {layer}: left {tuple(left.shape)} and right {tuple(right.shape)} do not fit; expected ({d}, r) and (r, d_ff)"
                )
            if key.shape != (n, right.shape[1]):
                raise InputError(
                    f"layer {layer}: k_star has shape {tuple(key.shape)}; expected {(n, right.shape[1])}"
                )
        for name, tensor in self._tensors().items():
            if tensor.dtype != torch.float32:
                raise InputError(
                    f"{name} is {tensor.dtype}; a delta is kept in float32: convert it with .float()"
                )
            if not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity; this update would break the model"
                )

    def __repr__(self) -> str:
        facts = counted(len(self.facts), "fact")
        return f"Delta({self.method}, {facts}, layers {sorted(self.layers)}, rank {self.rank}, {self.n_bytes:,} bytes)"

    def dense(self, layer: int) -> Tensor:
        """The update to one layer's down-projection, (d_model, d_ff) float32; raises LayerError for a layer it does not touch."""
        if layer not in self.layers:
            raise LayerError(
                f"this delta does not touch layer {layer}; it has {sorted(self.layers)}"
            )
        left, right = self.layers[layer]
        return left @ right

    @property
    def rank(self) -> int:
        """The largest number of columns of a left factor."""
        return max(left.shape[1] for left, _ in self.layers.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the factors, as they are saved."""
        return sum(
            x.numel() * x.element_size() for factors in self.layers.values() for x in factors
        )

    @property
    def digest(self) -> str:
        """sha256 (hex) of the tensors, as they are saved."""
        return hashlib.sha256(self._saved()).hexdigest()

    def inside(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """A `with` block in which a model carries this delta, as `applied` makes it."""
        return applied(lm, self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `edit.json` and `delta.safetensors` into a folder, made if absent; each file replaces an older one in one step.

        edit.json is written last and holds the tensors' sha256, so that an interrupted save is seen by `load`.
        Raises WorkspaceError when the folder cannot be written.
        """
        folder = Path(folder)
        tensors = self._saved()
        record: dict[str, Any] = {
            "format": _FORMAT,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "layers": sorted(self.layers),
            "facts": [fact.to_dict() for fact in self.facts],
            "config": dict(self.config),
            "convergence": [dict(c) for c in self.convergence],
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        }
        record["sha256"] = record_digest(record)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / _TENSORS, tensors)
            write_file(
                folder / _JSON, (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode()
            )
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise WorkspaceError(
                    f"the disk is full: no delta was written to {folder}; free some space and run this again"
                ) from None
            raise WorkspaceError(
                f"cannot write the delta to {folder}: {error.strerror}; choose a folder that can be written"
            ) from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Delta:
        """Read what `save` wrote; checksums, shapes, dtypes and finiteness are checked before anything is returned.

        Raises DamagedError when a file is missing, altered, or does not fit the other.
        """
        folder = Path(folder)
        advice = "restore it from a copy, or make the edit again"
        try:
            sizes = {name: _plain_size(folder / name) for name in (_JSON, _TENSORS)}
            if sizes[_JSON] > _MOST_JSON:
                raise DamagedError(
                    f"{folder / _JSON} has {sizes[_JSON]:,} bytes, and {_MOST_JSON:,} are the most; {advice}"
                )
            raw, found_tensors = (folder / _JSON).read_bytes(), file_digest(folder / _TENSORS)
        except OSError as error:
            name = Path(error.filename or folder).name
            raise DamagedError(
                f"cannot read {name} in {folder}: {error.strerror}; a saved delta is {_JSON} beside {_TENSORS}"
            ) from None
        except ValueError:
            raise DamagedError(
                f"cannot read {str(folder)!r}: it is no path; a saved delta is a folder"
            ) from None
        try:
            record = json.loads(raw)
            stated, checksum = record.pop("sha256"), record["tensors_sha256"]
            found = record_digest(record)  # of half a character there is none
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            raise DamagedError(f"{folder / _JSON} is not the record of a delta; {advice}") from None
        if found != stated:
            raise DamagedError(f"{folder / _JSON} does not match its checksum; {advice}")
        if found_tensors != checksum:
            raise DamagedError(
                f"{folder / _TENSORS} does not match the checksum in {_JSON}; {advice}"
            )
        if record.get("format") != _FORMAT:
            raise DamagedError(
                f"{folder} has format {record.get('format')!r:.40}; this version of factsmith reads {_FORMAT}: {advice}"
            )
        try:
            layers = record["layers"]
            if not isinstance(layers, list) or not all(
                type(layer) is int and layer >= 0 for layer in layers
            ):
                raise TypeError("its layers are a list of numbers from 0 on")
            facts = tuple(Fact.from_dict(fields) for fields in record["facts"])
            _check_header(folder / _TENSORS, layers, len(facts))
            named = safetensors.torch.load((folder / _TENSORS).read_bytes())
            if not isinstance(record["method"], str) or not isinstance(record["config"], dict):
                raise TypeError("its method is a name and its config a mapping of settings")
            if not isinstance(record["fingerprint"], str) or not all(
                isinstance(found, dict) for found in record["convergence"]
            ):
                raise TypeError("its fingerprint is a name and its convergence a list of mappings")
            return cls(
                layers={
                    layer: (named[f"left.{layer}"], named[f"right.{layer}"]) for layer in layers
                },
                k_star={layer: named[f"k_star.{layer}"] for layer in layers},
                v_star=named["v_star"],
                facts=facts,
                method=record["method"],
                config=record["config"],
                fingerprint=record["fingerprint"],
                convergence=tuple(record["convergence"]),
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            RecursionError,
            OSError,
            FactError,
            NumericsError,
            safetensors.SafetensorError,
        ) as error:
            raise DamagedError(
                f"{folder} matches its checksums but is not a delta: {str(error)[:300]}; {advice}"
            ) from None

    def _saved(self) -> bytes:
        """The tensors as a safetensors file; copies, since one tensor may stand in two places of a delta, and not of a file."""
        content: bytes = safetensors.torch.save(
            {name: tensor.clone() for name, tensor in self._tensors().items()}
        )
        return content

    def _tensors(self) -> dict[str, Tensor]:
        named = {"v_star": self.v_star}
        for layer, (left, right) in sorted(self.layers.items()):
            named |= {
                f"left.{layer}": left,
                f"right.{layer}": right,
                f"k_star.{layer}": self.k_star[layer],
            }
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}


def _plain_size(file: Path) -> int:
    """Bytes of a plain file; raises OSError for a pipe or device, which could be read without an end."""
    held = file.stat()
    if not stat.S_ISREG(held.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file", str(file))
    return held.st_size


def _check_header(file: Path, layers: list[int], n_facts: int) -> None:
    """Raises ValueError unless the header, read alone, is that of the tensors of a delta of so many facts in these layers."""
    with safetensors.safe_open(file, framework="pt") as held:
        shapes = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}
        dtypes = {held.get_slice(name).get_dtype() for name in shapes}
    parts = ("left", "right", "k_star")
    if set(shapes) != {
        "v_star",
        *(f"{part}.{layer}" for layer in layers for part in parts),
    } or dtypes != {"F32"}:
        raise ValueError(f"it holds other tensors than those of layers {sorted(layers)} in float32")
    fits = (
        all(len(shape) == 2 and shape[1] > 0 for shape in shapes.values())
        and shapes["v_star"][0] == n_facts
    )  # which may be none
    for layer in layers if fits else ():
        left, right, key = (shapes[f"{part}.{layer}"] for part in parts)
        fits = (
            fits
            and left == (shapes["v_star"][1], right[0])
            and right[0] > 0
            and key == (n_facts, right[1])
        )
    if not fits:
        raise ValueError(f"the shapes of its tensors are not those of one delta of {n_facts} facts")


def read_weights(lm: LanguageModel, layers: Iterable[int]) -> dict[int, Tensor]:
    """Copies of down-projections, {l: (d_model, d_ff)}, in the model's dtype and on its device: what to write back for an exact undo."""
    return {layer: _weight(lm, layer).detach().clone() for layer in sorted(set(layers))}


def write_weights(lm: LanguageModel, weights: Mapping[int, Tensor]) -> None:
    """Overwrite down-projections with {l: (d_model, d_ff)}; the one place in factsmith that changes a model's weights.

    Everything is checked before the first number is written. Raises LayerError, InputError (shape or dtype) or NumericsError
    (not finite), and then nothing has changed.
    """
    for layer, new in weights.items():
        old = _weight(lm, layer)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise InputError(
                f"layer {layer}: got weights {tuple(new.shape)} {new.dtype}; the model's down-projection is {tuple(old.shape)} {old.dtype}"
            )
        if not torch.isfinite(new).all():
            raise NumericsError(
                f"layer {layer}: the new weights hold NaN or infinity in {new.dtype}; nothing was written"
            )
    _copy(lm, weights)


def patched(base: Mapping[int, Tensor], deltas: Iterable[Delta]) -> dict[int, Tensor]:
    """base + Σ deltas for every layer of `base`, added in order in float32 (or wider) and rounded once to the base's dtype.

    The same base and the same deltas give the same bits, on every call. Raises LayerError when a delta touches a layer that
    `base` does not hold, InputError when its shape does not fit.
    """
    sums = {
        layer: weight.to(torch.promote_types(weight.dtype, torch.float32))
        for layer, weight in base.items()
    }
    for delta in deltas:
        for layer in delta.layers:
            if layer not in sums:
                raise LayerError(f"the delta edits layer {layer}; the base holds {sorted(sums)}")
            update = delta.dense(layer).to(sums[layer])
            if update.shape != sums[layer].shape:
                raise InputError(
                    f"layer {layer}: the delta is {tuple(update.shape)}, the model's down-projection {tuple(sums[layer].shape)}; "
                    "it was made for another model"
                )
            sums[layer] = sums[layer] + update
    return {layer: total.to(base[layer].dtype) for layer, total in sums.items()}


@contextmanager
def applied(lm: LanguageModel, delta: Delta | Iterable[Delta]) -> Iterator[None]:
    """Put one delta, or several on top of one another, into the model for the length of a `with` block.

    On the way out, exception or not, the weights are the same bits as before. Blocks may be nested; the inner one adds to what
    the outer one left. Shapes are checked, fingerprints are not (a delta may stand on others): that is the workbench's part.
    Raises LayerError, InputError or NumericsError when a delta does not fit, and then nothing has changed.
    """
    deltas = [delta] if isinstance(delta, Delta) else list(delta)
    base = read_weights(lm, (layer for d in deltas for layer in d.layers))
    new = patched(base, deltas)
    try:
        write_weights(lm, new)
        yield
    finally:
        _copy(lm, base)  # unchecked: whatever was there before goes back


def _weight(lm: LanguageModel, layer: int) -> Tensor:
    if not 0 <= layer < lm.n_layers:
        raise LayerError(
            f"layer {layer} does not exist; the model has layers 0 to {lm.n_layers - 1}"
        )
    return lm.ffn[layer].weight()


def _copy(lm: LanguageModel, weights: Mapping[int, Tensor]) -> None:
    with torch.no_grad():
        for layer, new in weights.items():
            _weight(lm, layer).copy_(new)


@contextmanager
def written(lm: LanguageModel, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Put down-projections {layer: (d_model, d_ff)} into the model for the length of a block; then the very bits of before are back.

    Raises what `write_weights` raises, and then nothing has changed.
    """
    base = read_weights(lm, weights)
    try:
        write_weights(lm, weights)
        yield
    finally:
        write_weights(lm, base)
