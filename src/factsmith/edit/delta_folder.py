"""The folder of a saved delta: edit.json next to delta.safetensors, with checksums of both.

    write_delta_folder(folder, record, tensors)
    record, tensors = read_delta_folder(folder)

The record is written last and holds the sha256 of the tensors, so a reader sees an interrupted
save. Nothing in this file knows what a record means, except the layers and the number of facts.
These two decide which tensors the file must hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..core.errors import DamagedError, FactError, NumericsError, WorkspaceError
from ..core.files import file_digest, make_folder, record_digest, write_file

_FORMAT = 1

_MOST_JSON = 64 * 2**20
"""Largest accepted edit.json, in bytes."""

_JSON, _TENSORS = "edit.json", "delta.safetensors"

_ADVICE = "restore it from a copy, or make the edit again"


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as a safetensors file.

    They are copied, because a delta may use one tensor in two places, and a file may not.
    """
    content: bytes = safetensors.torch.save({name: x.clone() for name, x in tensors.items()})
    return content


def write_delta_folder(folder: Path, record: Mapping[str, Any], tensors: bytes) -> None:
    """Write both files. Each one replaces an older one in one step. A missing folder is made.

    Args:
        folder: The folder.
        record: JSON values. Format and checksums are added.
        tensors: The content of the tensor file.

    Raises:
        WorkspaceError: The folder cannot be written.
    """
    digest = hashlib.sha256(tensors).hexdigest()
    signed: dict[str, Any] = {"format": _FORMAT, **record, "tensors_sha256": digest}
    signed["sha256"] = record_digest(signed)
    text = json.dumps(signed, ensure_ascii=False, indent=2) + "\n"
    try:
        make_folder(folder)
        write_file(folder / _TENSORS, tensors)
        write_file(folder / _JSON, text.encode())
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WorkspaceError(
                f"the disk is full: no delta was written to {folder}; free some space and try again"
            ) from None
        raise WorkspaceError(
            f"cannot write the delta to {folder}: {error.strerror}; choose a folder that can be "
            "written"
        ) from None


def read_delta_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors, after all checksums, shapes and dtypes were checked.

    Raises:
        DamagedError: A file is missing or altered, or does not fit the other.
    """
    text, digest = _content(folder)
    record = _checked_record(folder, text, digest)
    with refusing_what_is_not_a_delta(folder):
        layers = record["layers"]
        if not isinstance(layers, list) or not all(type(x) is int and x >= 0 for x in layers):
            raise TypeError("its layers are not a list of whole numbers of at least 0")
        _check_header(folder / _TENSORS, layers, len(record["facts"]), stated_rows(record))
        return record, safetensors.torch.load((folder / _TENSORS).read_bytes())


@contextmanager
def refusing_what_is_not_a_delta(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with files that match their checksums into a DamagedError."""
    try:
        yield
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
            f"{folder} matches its checksums but is not a delta: {str(error)[:300]}; {_ADVICE}"
        ) from None


def _content(folder: Path) -> tuple[bytes, str]:
    """Return the text of edit.json, and the sha256 of the tensor file."""
    try:
        sizes = {name: _plain_size(folder / name) for name in (_JSON, _TENSORS)}
        if sizes[_JSON] > _MOST_JSON:
            raise DamagedError(
                f"{folder / _JSON} has {sizes[_JSON]:,} bytes; at most {_MOST_JSON:,} are "
                f"accepted; {_ADVICE}"
            )
        return (folder / _JSON).read_bytes(), file_digest(folder / _TENSORS)
    except OSError as error:
        name = Path(error.filename or folder).name
        raise DamagedError(
            f"cannot read {name} in {folder}: {error.strerror}; a saved delta is a folder with "
            f"{_JSON} and {_TENSORS}"
        ) from None
    except ValueError:  # a null character
        raise DamagedError(
            f"cannot read {str(folder)!r}: it is not a path; a saved delta is a folder"
        ) from None


def _checked_record(folder: Path, text: bytes, tensors_digest: str) -> dict[str, Any]:
    """Return the record, after checks of both checksums and of its format."""
    try:
        record: dict[str, Any] = json.loads(text)
        stated, stated_of_tensors = record.pop("sha256"), record["tensors_sha256"]
        digest = record_digest(record)  # raises a ValueError for a lone surrogate
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise DamagedError(f"{folder / _JSON} is not the record of a delta; {_ADVICE}") from None
    if digest != stated:
        raise DamagedError(f"{folder / _JSON} does not match its checksum; {_ADVICE}")
    if tensors_digest != stated_of_tensors:
        raise DamagedError(f"{folder / _TENSORS} does not match the checksum in {_JSON}; {_ADVICE}")
    if record.get("format") != _FORMAT:
        raise DamagedError(
            f"{folder} has format {record.get('format')!r:.40}; this version of factsmith reads "
            f"format {_FORMAT}; {_ADVICE}"
        )
    return record


def _plain_size(file: Path) -> int:
    """Return the bytes of a plain file; a pipe or a device could be read without an end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a plain file", str(file))
    return status.st_size


def appended_prefix(layer: int) -> str:
    """Return how the names of a layer's appended tensors begin."""
    return f"appended.{layer}."


def stated_rows(record: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Return the fact of each appended row, by layer, as the record states them.

    Raises:
        TypeError: They are not lists of whole numbers by layer.
    """
    stated = record.get("appended", {})
    if not isinstance(stated, dict) or not all(
        layer.isdecimal()
        and isinstance(facts, list)
        and facts
        and all(type(x) is int and x >= 0 for x in facts)
        for layer, facts in stated.items()
    ):
        raise TypeError("its appended rows are not lists of whole numbers by layer")
    return {int(layer): tuple(facts) for layer, facts in stated.items()}


def stated_neurons(folder: Path) -> int:
    """Return how many neurons a saved delta appends, as its record states it; no tensor is read.

    Raises:
        DamagedError: The record cannot be read.
    """
    with refusing_what_is_not_a_delta(folder):
        record = json.loads((folder / _JSON).read_bytes())
        if not isinstance(record, dict):
            raise TypeError("its record is not a mapping")
        return sum(map(len, stated_rows(record).values()))


def tensors_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _check_header(
    file: Path, layers: list[int], n_facts: int, appended: Mapping[int, tuple[int, ...]]
) -> None:
    """Check names, dtypes and shapes of the tensors in the header, before any tensor is read."""
    with safetensors.safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        dtypes = {tensors.get_slice(name).get_dtype() for name in names}
    rows = {
        name: (layer, shape)
        for name, shape in shapes.items()
        for layer in appended
        if name.startswith(appended_prefix(layer))
    }
    shapes = {name: shape for name, shape in shapes.items() if name not in rows}
    parts = ("left", "right", "k_star")
    expected = {"v_star", *(f"{part}.{layer}" for layer in layers for part in parts)}
    if set(shapes) != expected or dtypes != {"F32"}:
        raise ValueError(f"it holds other tensors than those of layers {sorted(layers)} in float32")
    if not all(len(shape) == 2 and shape[1] > 0 for shape in shapes.values()):
        raise ValueError("the shapes of its tensors are not all those of matrices with columns")
    n_rows, d_model = shapes["v_star"]
    fits = [n_rows == n_facts]  # both may be 0
    for layer in layers:
        left, right, key = (shapes[f"{part}.{layer}"] for part in parts)
        fits += [left == (d_model, right[0]), right[0] > 0, key == (n_facts, right[1])]
    for layer, shape in rows.values():  # AppendedRows checks them one by one
        fits.append(shape[0] <= len(appended[layer]) and shape[1:] in ((), (d_model,)))
    if not all(fits):
        raise ValueError(f"the shapes of its tensors are not those of one delta of {n_facts} facts")
