"""The layers of a GGUF file with appended neurons: their tensors, and the field of their width.

    wide = widening(lm, file, deltas, "F16")
    write_replaced(file.header, target, wide.changes, wide.fields)
    wide.width                              # llama.feed_forward_length is 1,600 instead of 1,536

The matrices of a layer with appended neurons are written in another type, as every patched matrix
is. In the other layers, blocks of zeros follow the numbers that are there. A file has one width for
all layers, or a list of them. llama.cpp reads a list only for the architectures whose files have
one, so the field keeps its kind.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import UnsupportedModelError
from ...edit.delta import Delta, patched
from ...model.appended import AppendedRows, by_layer
from ...model.gguf_header import Header, Listed, TensorEntry
from ...model.language_model import LanguageModel
from .gguf_base import Base, check_near, check_whole
from .gguf_names import Reader, readers, tensor_names
from .gguf_padding import Padding
from .gguf_types import block_of, type_name
from .gguf_writing import TYPES, Change, entry_of, quantised, read_tensor
from .record import Width
from .widths import MULTIPLE

_INTEGERS = {4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
"""{type of a field: its layout}, of whole numbers."""

_INSTEAD = "Export a checkpoint, and convert it with llama.cpp."

_OF_EXPERTS = ("_exps", "_shexp", "_gate_inp")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The tensors of a layer in a GGUF file.

    Attributes:
        layer: The layer.
        d_ff: Its width before.
        down: The name of its down-projection.
        readers: Its linears that read.
    """

    layer: int
    d_ff: int
    down: str
    readers: tuple[Reader, ...]


@dataclass(frozen=True, kw_only=True)
class Widening:
    """How a GGUF file changes.

    Attributes:
        changes: {name: what replaces or pads a tensor}.
        fields: {place in the file: the new bytes}.
        width: How wide the layers are, before and after.
        neurons: How many are appended, for each layer to which some are.
    """

    changes: Mapping[str, Change]
    fields: Mapping[int, bytes]
    width: Width
    neurons: tuple[tuple[Place, int], ...]

    def rows_in(self, header: Header) -> dict[int, AppendedRows]:
        """Return the appended neurons as a file holds them, by layer."""
        return {place.layer: _rows_in(header, place, n) for place, n in self.neurons}


def widening(lm: LanguageModel, file: Base, deltas: Sequence[Delta], kind: str) -> Widening:
    """Return how a GGUF file changes by deltas of which some append neurons.

    Args:
        lm: The model, without the deltas.
        file: Its GGUF file, with the down-projections of all layers that the deltas change.
        deltas: The deltas.
        kind: The type of the matrices that change.

    Raises:
        UnsupportedModelError: when llama.cpp cannot load such a file.
        FingerprintError: when the file is another model's.
        InputError, NumericsError: when a matrix cannot have the type.
    """
    header = file.header
    rows = by_layer([delta.appended for delta in deltas])
    down = patched(file.weights, deltas)
    places = _places(lm, header)
    neurons = {layer: len(each) for layer, each in rows.items()}
    after, fields = _widths(header, places, neurons, kind)
    changes: dict[str, Change] = {}
    for layer, place in places.items():
        more = after[layer] - place.d_ff
        if layer in rows:
            changes |= _replaced(lm, header, place, down[layer], rows[layer], more, kind)
            continue
        changes |= _padded(header, place, more)
        if layer in down:
            changes[place.down] = quantised(_columns(down[layer], more), kind)
    return Widening(
        changes=changes,
        fields=fields,
        width=Width.of(
            _field(header),
            [place.d_ff for place in places.values()],
            [after[layer] for layer in places],
        ),
        neurons=tuple((places[layer], n) for layer, n in neurons.items()),
    )


# ── the width ─────────────────────────────────────────────────────────────────────────────────────


def _field(header: Header) -> str:
    return f"{header.architecture}.feed_forward_length"


def _widths(
    header: Header, places: Mapping[int, Place], neurons: Mapping[int, int], kind: str
) -> tuple[dict[int, int], dict[int, bytes]]:
    """Return the new width of each layer, and the bytes of the field that change.

    Args:
        header: The head of the file.
        places: The layers.
        neurons: How many are appended to each.
        kind: The type of the matrices that change.
    """
    now = {layer: place.d_ff for layer, place in places.items()}
    value = header.fields.get(_field(header))
    start, end = header.spans.get(_field(header), (0, 0))
    if isinstance(value, Listed) and value.type in _INTEGERS and value.count > max(now):
        layout = _INTEGERS[value.type]
        after = {
            layer: _up(width + neurons[layer], header, [places[layer]], kind)
            if layer in neurons
            else width
            for layer, width in now.items()
        }
        size = struct.calcsize(layout)
        first = end - value.count * size
        return after, {first + n * size: struct.pack(layout, after[n]) for n in neurons}
    if type(value) is not int or set(now.values()) != {value}:
        raise UnsupportedModelError(
            f"{header.path} has {value!r:.40} as {_field(header)}, and its layers have "
            f"{sorted(set(now.values()))} neurons, so no neurons can be appended. {_INSTEAD}"
        )
    width = _up(value + max(neurons.values()), header, list(places.values()), kind)
    layout = _layout(header, start)
    content = struct.pack(layout, width)
    return dict.fromkeys(places, width), {end - len(content): content}


def _layout(header: Header, start: int) -> str:
    """Return the layout of a field that begins at a place: its type follows its key."""
    with header.path.open("rb") as file:
        file.seek(start)
        (n_bytes,) = struct.unpack("<Q", file.read(8))
        file.seek(start + 8 + n_bytes)
        (kind,) = struct.unpack("<I", file.read(4))
    if kind not in _INTEGERS:
        raise UnsupportedModelError(
            f"{header.path} has {_field(header)} as a field of type {kind}, which is no whole "
            f"number of 4 or 8 bytes. {_INSTEAD}"
        )
    return _INTEGERS[kind]


def _up(width: int, header: Header, places: Sequence[Place], kind: str) -> int:
    """Return the next width that can be cut into the blocks of each down-projection."""
    blocks = [block_of(_entry(header, place.down).type) for place in places]
    multiple = math.lcm(MULTIPLE, block_of(kind), *blocks)
    return -(-width // multiple) * multiple


# ── the tensors ───────────────────────────────────────────────────────────────────────────────────


def _places(lm: LanguageModel, header: Header) -> dict[int, Place]:
    """Return the tensors of all layers without experts, after checks of their shapes.

    Raises:
        UnsupportedModelError: when the file stores the model in another way.
    """
    arch = header.architecture
    layers = [ffn.layer for ffn in lm.ffn if not ffn.n_experts]
    if len(layers) < lm.n_layers and f"{arch}.expert_feed_forward_length" not in header.fields:
        raise UnsupportedModelError(
            f"{header.path} has one width for experts and for layers without them, so no neurons "
            f"can be appended. {_INSTEAD}"
        )
    places = {}
    for layer, down in tensor_names(lm, arch, layers).items():
        place = Place(
            layer=layer, d_ff=lm.ffn[layer].d_ff, down=down, readers=readers(lm, arch, layer)
        )
        _check_shapes(header, place, lm.d_model)
        places[layer] = place
    return places


def _check_shapes(header: Header, place: Place, d_model: int) -> None:
    """Check that a layer's tensors have the model's shapes, and that no others have its width."""
    shapes: dict[str, tuple[int, ...]] = {place.down: (d_model, place.d_ff)}
    for reader in place.readers:
        n = len(reader.halves) * place.d_ff
        shapes[f"{reader.name}.weight"] = (n, d_model)
        if entry_of(header, f"{reader.name}.bias") is not None:
            shapes[f"{reader.name}.bias"] = (n,)
    for name, shape in shapes.items():
        entry = _entry(header, name)
        check_whole(header, entry)
        if entry.shape != shape:
            raise UnsupportedModelError(
                f"{header.path} has {name} of shape {entry.shape}; expected {shape}: llama.cpp "
                f"stores this model in another way. {_INSTEAD}"
            )
    for each in header.tensors:
        others = each.name.startswith(f"blk.{place.layer}.ffn_") and each.name not in shapes
        experts = any(part in each.name for part in _OF_EXPERTS)
        if others and not experts and place.d_ff in each.shape and place.d_ff != d_model:
            raise UnsupportedModelError(
                f"{header.path} has {each.name}, with a number for each neuron of layer "
                f"{place.layer}, so no neurons can be appended. {_INSTEAD}"
            )


def _entry(header: Header, name: str) -> TensorEntry:
    entry = entry_of(header, name)
    if entry is None:
        raise UnsupportedModelError(
            f"{header.path} has no tensor {name}: llama.cpp stores this model in another way. "
            f"{_INSTEAD}"
        )
    return entry


def _columns(down: Tensor, n: int) -> Tensor:
    """Return a down-projection with n columns of zeros."""
    return torch.nn.functional.pad(down, (0, n))


def _replaced(
    lm: LanguageModel,
    header: Header,
    place: Place,
    down: Tensor,
    rows: AppendedRows,
    more: int,
    kind: str,
) -> dict[str, Change]:
    """Return the tensors of a layer with appended neurons, and zeros up to its new width."""
    zeros, tensors = more - len(rows), rows.tensors()
    columns = _columns(torch.cat([down, rows.values.T], 1), zeros)
    changes: dict[str, Change] = {place.down: quantised(columns, kind)}
    for reader in place.readers:
        entry = _entry(header, f"{reader.name}.weight")
        whole = read_tensor(header, entry)
        check_near(lm, header, entry, whole, reader.matrix())
        keys = [_columns(tensors[half.keys].T, zeros).T for half in reader.halves]
        changes[entry.name] = quantised(_extended(whole, keys), kind)
        if (biased := entry_of(header, f"{reader.name}.bias")) is not None:
            none = torch.zeros(len(rows))
            biases = [_columns(tensors.get(half.biases, none), zeros) for half in reader.halves]
            plain = type_name(biased.type)
            extended = _extended(read_tensor(header, biased), biases)
            changes[biased.name] = quantised(extended, plain if plain in TYPES else "F32")
    return changes


def _extended(whole: Tensor, new: Sequence[Tensor]) -> Tensor:
    """Return a tensor with new rows after each of its parts."""
    parts = zip(whole.chunk(len(new)), new, strict=True)
    return torch.cat([piece for pair in parts for piece in pair])


def _padded(header: Header, place: Place, more: int) -> dict[str, Change]:
    """Return the tensors of a layer with zeros up to its new width."""
    if not more:
        return {}
    down = _entry(header, place.down)
    changes: dict[str, Change] = {
        place.down: Padding.of(down, (down.shape[0], down.shape[1] + more))
    }
    for reader in place.readers:
        parts = len(reader.halves)
        for name in (f"{reader.name}.weight", f"{reader.name}.bias"):
            if (entry := entry_of(header, name)) is not None:
                shape = (entry.shape[0] + parts * more, *entry.shape[1:])
                changes[name] = Padding.of(entry, shape, parts)
    return changes


def _rows_in(header: Header, place: Place, n: int) -> AppendedRows:
    """Return the appended neurons of a layer as a file holds them."""
    these = slice(place.d_ff, place.d_ff + n)
    named = {"values": _read(header, place.down).T[these].contiguous()}
    for reader in place.readers:
        parts = len(reader.halves)
        keys = _read(header, f"{reader.name}.weight").chunk(parts)
        for half, matrix in zip(reader.halves, keys, strict=True):
            named[half.keys] = matrix[these].contiguous()
        if entry_of(header, f"{reader.name}.bias") is not None:
            biases = _read(header, f"{reader.name}.bias").chunk(parts)
            for half, vector in zip(reader.halves, biases, strict=True):
                named[half.biases] = vector[these].contiguous()
    return AppendedRows(facts=(0,) * n, **named)


def _read(header: Header, name: str) -> Tensor:
    return read_tensor(header, _entry(header, name))
