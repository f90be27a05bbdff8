"""Tensors in one safetensors file with a checksum over all it holds, written in one step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from .errors import DamagedError, WorkspaceError
from .files import write_file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write them, replacing an older file; folders are made. Raises WorkspaceError, and leaves what was there then."""
    held = dict(tensors)
    described = {**metadata, "sha256": _checksum(held, metadata)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda temporary: safetensors.torch.save_file(held, temporary, described))
    except (OSError, safetensors.SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise WorkspaceError(f"cannot write {path}: {why}; choose a folder that can be written") from None


def read_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote. Raises DamagedError, with the advice, for a file that cannot be read or was altered."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedError(f"cannot read {path}: {error}; {advice}") from None
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise DamagedError(f"{path} does not match its checksum; {advice}")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
