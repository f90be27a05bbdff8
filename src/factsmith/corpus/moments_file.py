"""The matrix of a second moment as a file holds it: whole, as a triangle, or packed.

moments_file("moments", 3)             # moments/layer3.safetensors
matrix = stored_matrix(tensors)        # (d_ff, d_ff), or an error that says what is wrong
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.artefact import FLOATS, stored
from .scan import Site

_DTYPES = (*FLOATS, torch.float16, torch.bfloat16)

_ASYMMETRY = 1e-3
"""The largest accepted difference from the transpose, relative to the largest entry."""


def moments_file(folder: str | os.PathLike[str], layer: int, site: Site = "coefficients") -> Path:
    """Return the file in which a folder keeps the second moment of a layer."""
    stem = "inputs" if site == "inputs" else "layer"
    return Path(folder) / f"{stem}{layer}.safetensors"


def stored_matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix of a file in any of the layouts.

    Raises:
        KeyError, ValueError: It cannot be a second moment.
    """
    if "packed" in tensors:
        return _unpack(tensors)
    if "triangle" in tensors:
        tensors = {"matrix": _whole(tensors)}
    n = tensors["matrix"].shape[0] if tensors["matrix"].ndim else 0
    matrix = stored(tensors, "matrix", (n or None, n or None), _DTYPES)
    if bool((matrix.diagonal() < 0).any()) or not bool((matrix.diagonal() > 0).any()):
        raise ValueError("its diagonal holds a negative number, or zeros alone")
    if bool((matrix - matrix.T).abs().max() > _ASYMMETRY * matrix.abs().max()):
        raise ValueError("its matrix is not symmetric")
    return matrix


def lower_triangle(matrix: Tensor) -> Tensor:
    """Return the lower triangle of a matrix (n, n), row by row, as (n (n + 1) / 2,) float32."""
    return matrix.cpu()[torch.ones(matrix.shape, dtype=torch.bool).tril()].float()


def _whole(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the symmetric matrix (n, n) float32 of a lower triangle.

    Raises:
        KeyError, ValueError: It is not a triangle.
    """
    triangle = stored(tensors, "triangle", (None,), (torch.float32,))
    n = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    if n * (n + 1) // 2 != len(triangle):
        raise ValueError(f"its triangle has {len(triangle)} entries, which no triangle has")
    matrix = torch.zeros(n, n)
    matrix[torch.ones(n, n, dtype=torch.bool).tril()] = triangle
    return matrix + matrix.tril(-1).T


def _unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix (d_ff, d_ff) float64 that `SecondMoment.save` packed.

    Raises:
        KeyError, ValueError: The two tensors do not fit.
    """
    scale = stored(tensors, "scale", (None,), (torch.float32,), least=0)
    n = len(scale)
    packed = stored(tensors, "packed", (n * (n + 1) // 2,), (torch.float16,))
    factor = torch.zeros(n, n, dtype=torch.float64)
    rows, columns = torch.tril_indices(n, n)
    factor[rows, columns] = packed.double()
    if bool((factor.diagonal() < 0).any()) or not bool((scale > 0).any()):
        raise ValueError("the diagonal of its factor holds a negative number, or zeros alone")
    factor *= scale.double()[:, None]
    return factor @ factor.T
