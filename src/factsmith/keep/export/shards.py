"""A checkpoint of a model whose layers stay on disk: its files, with the edited matrices replaced.

    check_shards(lm, contents, dtype)          # whether that can be done
    save_shards(lm, contents, folder)          # inside `applied`

Files are copied as they are. Then each edited matrix is written over the old one, which has the
same size and place in its file. So no file is in memory, and never more than two layers are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ...core.errors import NumericsError, UnsupportedModelError
from ...core.progress import Progress, tell
from ...model.absent import Place, place_of
from ...model.language_model import LanguageModel
from ...model.quiet import quietly
from ...model.streamed import in_memory
from .contents import Contents
from .dtypes import dtype_name

_INDEX = "model.safetensors.index.json"
"""The file that says which file holds which tensor."""

_LENGTH = 8
"""Bytes at the beginning of a file that say how long its header is."""


def check_shards(lm: LanguageModel, contents: Contents, dtype: torch.dtype) -> None:
    """Check that the edited matrices can replace those in the model's files.

    Args:
        lm: The model.
        contents: What is exported.
        dtype: The dtype of the export.

    Raises:
        UnsupportedModelError: Neurons are appended, or the files have another dtype.
    """
    if contents.n_appended:
        raise UnsupportedModelError(
            f"the layers of {lm.name} stay on disk, and the patches append neurons, which changes "
            "the size of matrices in its files; load the model into memory, or export deltas "
            "that update weights",
            argument="deltas",
        )
    for place in _places(lm, contents).values():
        stored = _stored_dtype(place)
        if stored != dtype:
            raise UnsupportedModelError(
                f"the layers of {lm.name} stay on disk in {dtype_name(stored)}, and the export "
                f"would be in {dtype_name(dtype)}; load the model with the dtype of its files, and "
                "export it in that dtype",
                argument="dtype",
            )


def save_shards(
    lm: LanguageModel, contents: Contents, folder: Path, progress: Progress | None = None
) -> None:
    """Write the model's files with the matrices that it has now, and its tokenizer.

    Args:
        lm: The model, with the deltas applied.
        contents: What is exported.
        folder: Where to write.
        progress: Gets what is being done.

    Raises:
        NumericsError: A matrix that was read back differs.
    """
    places = _places(lm, contents)
    files = _files(Path(next(str(place.file) for place in places.values())))
    for done, file in enumerate(files):
        tell(progress, "copying the model's files", done, len(files))
        shutil.copyfile(file, folder / file.name)
    with quietly():
        lm.config.save_pretrained(folder)
        if getattr(lm.module, "generation_config", None) is not None:
            lm.module.generation_config.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    for done, (layer, place) in enumerate(sorted(places.items())):
        tell(progress, "writing edited matrices", done, len(places))
        copied = folder / Path(str(place.file)).name
        with in_memory(lm.layers[layer]):
            weight = place.module.get_parameter(place.name).detach().cpu().contiguous()
            with copied.open("r+b") as out:
                _overwrite(out, place.stored, weight)
            with safe_open(copied, framework="pt") as read:
                if not torch.equal(read.get_tensor(place.stored), weight):
                    raise NumericsError(
                        f"layer {layer}: the matrix that was read back from {copied.name} is not "
                        "the one that was written. Check the disk, and export again."
                    )


def _places(lm: LanguageModel, contents: Contents) -> dict[int, Place]:
    """Return where each edited down-projection is in the files."""
    places = {}
    for layer in contents.layers:
        place = place_of(lm.ffn[layer].down.get_parameter("weight"))
        if place is None or place.file is None:
            raise UnsupportedModelError(
                f"{lm.name} has layer {layer} in memory and others on disk; load all layers in one "
                "way to export a checkpoint",
                argument="device_map",
            )
        places[layer] = place
    return places


def _files(one: Path) -> list[Path]:
    """Return the files of a model: those with weights, and the index if there is one."""
    index = one.parent / _INDEX
    if not index.is_file():
        return [one]
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    return [*(one.parent / name for name in names), index]


def _stored_dtype(place: Place) -> torch.dtype:
    """Return the dtype that a tensor has in its file."""
    with safe_open(str(place.file), framework="pt") as file:
        dtype: torch.dtype = file.get_slice(place.stored)[:1].dtype
        return dtype


def _overwrite(file: BinaryIO, name: str, tensor: Tensor) -> None:
    """Write a tensor over the one of that name and size in a safetensors file."""
    length = int.from_bytes(file.read(_LENGTH), "little")
    header: dict[str, Any] = json.loads(file.read(length))
    begin, end = header[name]["data_offsets"]
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    assert len(data) == end - begin
    file.seek(_LENGTH + length + begin)
    file.write(data.data)
