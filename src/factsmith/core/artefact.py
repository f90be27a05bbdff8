"""Tensors in one safetensors file with a checksum, and checkpoints of long work in such a file.

    write_tensors(path, {"v_star": v_star}, {"format": "factsmith values 1"})
    tensors, metadata = read_tensors(path, "compute the values again")

A file is written in one step. Its checksum covers the tensors and the metadata.
"""

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
from .files import make_folder, write_file
from .identity import same_model


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata in one step, and make the folder if it is missing.

    Raises:
        WorkspaceError: when the file cannot be written; an older one is left unchanged.
    """
    tensors = dict(tensors)
    described = {**metadata, "sha256": _checksum(tensors, metadata)}
    try:
        make_folder(path.parent)
        write_file(
            path, lambda temporary: safetensors.torch.save_file(tensors, temporary, described)
        )
    except (OSError, safetensors.SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise WorkspaceError(
            f"cannot write {path}: {why}; choose a folder that can be written"
        ) from None


def read_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata that `write_tensors` wrote.

    Args:
        path: The file.
        advice: What the caller can do about a damaged file. It ends the error.
    Raises:
        DamagedError: when the file cannot be read or was altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise DamagedError(f"cannot read {path}: {error}; {advice}") from None
    if metadata.pop("sha256", None) != _checksum(tensors, metadata):
        raise DamagedError(f"{path} does not match its checksum; {advice}")
    return tensors, metadata


def read_artefact(
    path: Path, contents: str, wanted: str, maker: str, advice: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file in a known format.

    Args:
        path: The file, in a folder that should hold it.
        contents: What it holds, such as "triggers".
        wanted: Its format, such as "factsmith triggers 1".
        maker: The function that writes it.
        advice: What the caller can do about a damaged file. It ends the error.
    Raises:
        DamagedError: when the file is missing, was altered, or has another format.
    """
    if not path.is_file():
        raise DamagedError(
            f"no {contents} in {path.parent}; expected {path.name}, as {maker} writes it"
        )
    tensors, metadata = read_tensors(path, advice)
    if metadata.get("format") != wanted:
        raise DamagedError(
            f"{path} holds {metadata.get('format')!r}; expected {wanted!r}: {advice}"
        )
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file without a check, and nothing for one that cannot be read."""
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
"""Least time between two checkpoints."""

_SHARE = 20
"""Least time between two checkpoints, as a multiple of the time that the last one took to write."""


class Checkpoint:
    """The file of unfinished work, which belongs to the work that it was made from."""

    def __init__(self, path: Path, made_from: Mapping[str, str]) -> None:
        """Name the file and the work.

        Args:
            path: The file.
            made_from: What the work is made from, with "format" and "fingerprint" among the fields.
                The file of other work is refused.
        """
        self.path, self.made_from = path, dict(made_from)
        self.due = time.monotonic() + _SECONDS

    def load(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Return what `save` wrote, and None where there is no file.

        Raises:
            DamagedError: when the file is damaged or has another format.
            FingerprintError: when it belongs to another model.
            InputError: when the work was made from something else.
        """
        if not self.path.is_file():
            return None
        tensors, metadata = read_tensors(self.path, "delete it and begin again")
        if metadata.get("format") != self.made_from["format"]:
            raise DamagedError(
                f"{self.path} holds {metadata.get('format')!r}; expected "
                f"{self.made_from['format']!r}: choose another place, or delete it"
            )
        for key, wanted in self.made_from.items():
            stated = metadata.get(key)
            if key == "fingerprint" and same_model(str(stated), wanted):
                continue
            if stated != wanted:
                error = FingerprintError if key == "fingerprint" else InputError
                raise error(
                    f"{self.path} was made with {key} {stated}, not {wanted}; "
                    "choose another place, or delete it"
                )
        return tensors, metadata

    def save(self, state: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, str]]]) -> None:
        """Write the state, its tensors and its progress, if the last checkpoint is old enough."""
        began = time.monotonic()
        if began < self.due:
            return
        tensors, progress = state()
        write_tensors(self.path, tensors, {**self.made_from, **progress})
        self.due = time.monotonic() + max(_SECONDS, _SHARE * (time.monotonic() - began))

    def remove(self) -> None:
        """Delete the file: the work is finished."""
        self.path.unlink(missing_ok=True)
