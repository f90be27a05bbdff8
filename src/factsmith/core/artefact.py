"""Tensors in one safetensors file with a checksum, and checkpoints of long work in such a file.

    write_tensors(path, {"v_star": v_star}, {"format": "factsmith values 1"})
    tensors, metadata = read_tensors(path, "compute the values again")
    with believing(path, "a second moment", "compute it again"):
        count = stated_count(metadata, "count", least=1)
        matrix = stored(tensors, "matrix", (None, None), FLOATS)

A file is written in one step. Its checksum covers the tensors and the metadata. It shows damage,
and not who wrote the file: so every field and every tensor is checked for what it must be.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from .errors import (
    DamagedError,
    FingerprintError,
    InputError,
    LedgerError,
    WorkspaceError,
    first_line,
)
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
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # A header that safetensors accepts may name a dtype that torch does not have.
        raise DamagedError(f"cannot read {path}: {first_line(error)}; {advice}") from None
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
            f"{path} holds {metadata.get('format')!r:.60}; expected {wanted!r}: {advice}"
        )
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file without a check, and nothing for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


# ── what a file says ──────────────────────────────────────────────────────────────────────────────


@contextmanager
def believing(path: Path, contents: str, advice: str) -> Iterator[None]:
    """Turn what goes wrong with a file that matches its checksum into a DamagedError.

    Args:
        path: The file.
        contents: What it should be, such as "a second moment".
        advice: What the caller can do about it. It ends the error.
    """
    try:
        yield
    except LedgerError:
        raise
    except KeyError as error:
        problem = f"it has no {str(error.args[0] if error.args else error)[:80]!a}"
        raise DamagedError(f"{path} is not {contents}: {problem}; {advice}") from None
    except (
        ArithmeticError,  # NumericsError is one
        AttributeError,
        IndexError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,  # InputError is one
    ) as error:
        raise DamagedError(f"{path} is not {contents}: {problem_in(error)}; {advice}") from None


def problem_in(error: Exception) -> str:
    """Return a short line, fit to print, on what is wrong with a file."""
    return first_line(error)[:300].encode(errors="backslashreplace").decode()


FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int64,)

_LARGEST = 2**62

_LONGEST_DIGEST = 128


def stated_count(fields: Mapping[str, str], name: str, least: int = 0) -> int:
    """Return a whole number of the metadata; raises KeyError and ValueError."""
    text = fields[name]
    if not re.fullmatch("[0-9]{1,19}", text) or not least <= int(text) <= _LARGEST:
        raise ValueError(f"its {name} is {text[:40]!r}, and not a whole number of at least {least}")
    return int(text)


def stated_number(fields: Mapping[str, str], name: str) -> float:
    """Return a finite number of at least 0 of the metadata; raises KeyError and ValueError."""
    try:
        number = float(fields[name])
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"its {name} is {fields[name][:40]!r}, and not a number of at least 0")
    return number


def stated_digest(fields: Mapping[str, str], name: str) -> str:
    """Return a digest, or "", of the metadata; raises KeyError and ValueError."""
    text = fields[name]
    if len(text) > _LONGEST_DIGEST or not (text.isascii() and text.isprintable()):
        raise ValueError(f"its {name} is {text[:40]!a}, and not a digest")
    return text


def stored(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: Sequence[int | None],
    dtypes: Collection[torch.dtype],
    *,
    least: float | None = None,
    below: float | None = None,
) -> Tensor:
    """Return a tensor of a file, after a check; raises KeyError and ValueError.

    Args:
        tensors: The tensors of the file.
        name: Which one.
        shape: Its shape. None: any size of at least 1.
        dtypes: The dtypes that it may have.
        least: The smallest accepted entry.
        below: The smallest number that is too large.
    """
    tensor = tensors[name]
    fits = len(tensor.shape) == len(shape) and all(
        size > 0 if wanted is None else size == wanted
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(
            f"its {name} is {tuple(tensor.shape)} {tensor.dtype}; expected {wanted} "
            f"{' or '.join(map(str, dtypes))}"
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"its {name} holds NaN or infinity")
    if tensor.numel() and least is not None and bool(tensor.min() < least):
        raise ValueError(f"its {name} holds {tensor.min().item():g}, which is below {least:g}")
    if tensor.numel() and below is not None and bool(tensor.max() >= below):
        raise ValueError(f"its {name} holds {tensor.max().item():g}; expected less than {below:g}")
    return tensor


# ── writing and checkpoints ───────────────────────────────────────────────────────────────────────


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
                f"{self.path} holds {metadata.get('format')!r:.60}; expected "
                f"{self.made_from['format']!r}: choose another place, or delete it"
            )
        for key, wanted in self.made_from.items():
            stated = metadata.get(key)
            if key == "fingerprint" and same_model(str(stated), wanted):
                continue
            if stated != wanted:
                error = FingerprintError if key == "fingerprint" else InputError
                raise error(
                    f"{self.path} was made with {key} {str(stated)[:80]}, not {wanted}; "
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
