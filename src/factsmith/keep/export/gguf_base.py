"""The GGUF file that an export changes or belongs to, and whether it is the workspace's model.

base = find_base(lm, layers, None)                # the file that the model was loaded from
base = find_base(lm, layers, "model.gguf")        # another one: compared with the model
base.header, base.names[5], base.weights[5]       # (d_model, d_ff) float32, dequantised
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...core.errors import FingerprintError, InputError, ModelError, UnsupportedModelError
from ...core.files import file_digest
from ...edit.delta import read_weights
from ...model.gguf_header import Header, TensorEntry, check_is_model, read_header
from ...model.language_model import LanguageModel
from .gguf_names import tensor_names
from .gguf_types import n_bytes_of
from .gguf_writing import entry_of, read_tensor

_LEAST_ERROR = 5e-3

_MOST_ERROR = 0.6
"""Two matrices that have nothing in common differ by 1.4 times their size."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A GGUF file of the model, without the patches.

    Attributes:
        header: Its head.
        sha256: The sha256 (hex) of the file.
        names: {layer: the name of its down-projection}, of the edited layers.
        weights: {layer: (d_model, d_ff) float32}, dequantised.
    """

    header: Header
    sha256: str
    names: dict[int, str]
    weights: dict[int, Tensor]


def base_file(lm: LanguageModel, base: str | os.PathLike[str] | None) -> Path:
    """Return the GGUF file of a model.

    Raises:
        InputError: when the model was loaded from something else, and no file is given.
    """
    if base is not None:
        path = Path(base)
        if not path.is_file():
            why = "that is a folder" if path.is_dir() else "there is no such file"
            raise InputError(
                f"base is {str(base)!r}: {why}. Give the GGUF file of the workspace's model.",
                argument="base",
            )
        return path
    if lm.gguf is None:
        raise InputError(
            f"{lm.name} was not loaded from a GGUF file, so there is no file to put the patch "
            "into. Give the GGUF file of this model as base, or export an adapter for llama.cpp "
            "(gguf-adapter), which needs none.",
            argument="base",
        )
    return lm.gguf.path


def find_base(
    lm: LanguageModel, layers: Iterable[int], base: str | os.PathLike[str] | None
) -> Base:
    """Return the GGUF file of a model, after a check that it is this model.

    Args:
        lm: The model, without patches.
        layers: The edited layers.
        base: The file. None: the one that the model was loaded from.

    Raises:
        InputError: when there is no such file.
        ModelError: when the file is damaged, or does not hold a model.
        UnsupportedModelError: when its names are not known, or a layer is of experts.
        FingerprintError: when it is another model, or has changed since the model was loaded.
    """
    path = base_file(lm, base)
    header = read_header(path)
    check_is_model(header)
    digest = file_digest(path)
    is_own = lm.gguf is not None and digest == lm.gguf.sha256
    if base is None and not is_own:
        raise FingerprintError(
            f"{path} has changed since the model was loaded from it. Put the file back as it was, "
            "or make another workspace for the new one."
        )
    names = tensor_names(lm, header.architecture, layers)
    weights = {}
    for layer, name in names.items():
        entry = entry_of(header, name)
        if entry is None:
            raise UnsupportedModelError(
                f"{path} has no tensor {name}, the down-projection of layer {layer}; llama.cpp "
                "stores this model in another way. Export a checkpoint."
            )
        check_whole(header, entry)
        shape = (lm.d_model, lm.ffn[layer].d_ff)
        if entry.shape != shape:
            raise _other_model(lm, path, f"{name} is {entry.shape} instead of {shape}")
        weights[layer] = read_tensor(header, entry)
        if not is_own:
            (expected,) = read_weights(lm, [layer]).values()
            check_near(lm, header, entry, weights[layer], expected)
    return Base(header=header, sha256=digest, names=names, weights=weights)


def check_whole(header: Header, entry: TensorEntry) -> None:
    """Check that a file holds a whole tensor.

    Raises:
        ModelError: when it ends before.
    """
    if header.data_start + entry.offset + n_bytes_of(entry) > header.n_bytes:
        raise ModelError(
            f"{header.path} is damaged: it ends before the end of the tensor {entry.name}; copy or "
            "download it again"
        )


def check_near(
    lm: LanguageModel, header: Header, entry: TensorEntry, weight: Tensor, matrix: Tensor
) -> None:
    """Check that a matrix of a file is the model's, except for what quantising loses.

    Args:
        lm: The model.
        header: The head of the file.
        entry: The tensor.
        weight: Its numbers.
        matrix: The model's matrix.

    Raises:
        FingerprintError: when it is not.
    """
    bits, expected = 8 * n_bytes_of(entry) / entry.n_numbers, matrix.detach().float().cpu()
    off = float((weight - expected).norm() / expected.norm().clamp_min(1e-30))
    # Quantising to b bits loses about 1.5 / 2^b of a matrix.
    allowed = min(max(4 / 2**bits, _LEAST_ERROR), _MOST_ERROR)
    if not off <= allowed:
        raise _other_model(
            lm,
            header.path,
            f"{entry.name} differs by {off:.2g} of its size, and "
            f"quantising to {bits:.2g} bits explains {allowed:.2g}",
        )


def _other_model(lm: LanguageModel, path: Path, why: str) -> FingerprintError:
    return FingerprintError(
        f"{path} is not {lm.name}: {why}. Give the GGUF file of the workspace's model, without "
        "patches.",
        argument="base",
    )
