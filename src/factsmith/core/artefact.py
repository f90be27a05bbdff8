"""Tensors in one safetensors file with a checksum over all it holds, written in one step; and checkpoints of long work in such a file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from .errors import DamagedError, FingerprintError, InputError, WorkspaceError
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
        raise WorkspaceError(
            f"cannot write {path}: {why}; choose a folder that can be written"
        ) from None


def read_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote. Raises DamagedError, with the advice, for a file that cannot be read or was altered."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedError(f"cannot read {path}: {error}; {advice}") from None
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise DamagedError(f"{path} does not match its checksum; {advice}")
    return tensors, metadata


def read_artefact(
    path: Path, what: str, wanted: str, maker: str, advice: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_tensors` of a file in a folder that holds such things in a known format, as `maker` writes them. Raises DamagedError."""
    if not path.is_file():
        raise DamagedError(
            f"no {what} in {path.parent}; expected {path.name}, as {maker} writes it"
        )
    tensors, metadata = read_tensors(path, advice)
    if metadata.get("format") != wanted:
        raise DamagedError(
            f"{path} holds {metadata.get('format')!r}; expected {wanted!r}: {advice}"
        )
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_tensors` described the file by, unchecked; nothing for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_SECONDS = 60.0
"""Between checkpoints, at least; and twenty times as long as the last one took to write."""


class Checkpoint:
    """The file of unfinished work. What the work was made from is checked before anything is taken from the file."""

    def __init__(self, path: Path, made_from: Mapping[str, str]) -> None:
        """made_from: "format" and "fingerprint" among them, by which the file is told from others."""
        self.path, self.made_from = path, dict(made_from)
        self.due = time.monotonic() + _SECONDS

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What `save` wrote; None where there is no file. Raises DamagedError, FingerprintError or InputError for one of other work."""
        if not self.path.is_file():
            return None
        tensors, metadata = read_tensors(self.path, "delete it, and begin again")
        if metadata.get("format") != self.made_from["format"]:
            raise DamagedError(
                f"{self.path} holds no {self.made_from['format']}; choose another place, or delete it"
            )
        for key, wanted in self.made_from.items():
            if metadata.get(key) != wanted:
                error = FingerprintError if key == "fingerprint" else InputError
                raise error(
                    f"{self.path} was made with {key} {metadata.get(key)}, not {wanted}; choose another place, or delete it"
                )
        return tensors, metadata

    def save(self, state: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, str]]]) -> None:
        """Write what there is, tensors and how far the work is, if it is time to."""
        began = time.monotonic()
        if began < self.due:
            return
        tensors, stand = state()
        write_tensors(self.path, tensors, {**self.made_from, **stand})
        self.due = time.monotonic() + max(_SECONDS, 20 * (time.monotonic() - began))

    def remove(self) -> None:
        """Take the file away: the work is finished."""
        self.path.unlink(missing_ok=True)
