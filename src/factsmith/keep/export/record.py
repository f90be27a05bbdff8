"""keep.export.record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.errors import InputError, UnsupportedModelError
from ...core.tables import Shown, Table, counted
from ...edit.delta import Delta, patched, read_weights
from ...model.language_model import LanguageModel, check_model
from .contents import Origin
from .folder import Format
from .readback import ReadBack

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- what there is to see -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AdapterLayer:
    """One layer of an adapter: the exact rank of its summed update Δ, the rank kept, and the error ‖Δ − BA‖ / ‖Δ‖ (Frobenius)."""

    layer: int
    rank: int
    kept: int
    error: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Export(Shown):
    """What was written.

    folder       where
    format       "checkpoint", "adapter" or "patch"
    dtype        of the tensors, such as "bfloat16"
    patches      how many deltas are in it, and `facts` they hold
    files        {name: bytes}; n_bytes is their sum
    model_bytes  bytes of the model's weights as they are loaded, to hold the files against
    layers       of an adapter: ranks and errors, layer by layer
    rank         of an adapter: r, the same for all layers (smaller ones are padded with zeros); 0 for other formats
    read_back    the comparison with the patched model; None when it was not asked for, and for patches (compared bit for bit)
    """

    folder: Path
    format: Format
    dtype: str
    patches: int
    facts: int
    files: Mapping[str, int]
    model_bytes: int
    layers: tuple[AdapterLayer, ...] = ()
    rank: int = 0
    read_back: ReadBack | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def tables(self) -> list[Table]:
        """What was written, how large it is beside the model, and how it was checked."""
        if self.format == "patch":
            checked = f"verified: {counted(self.patches, 'patch', 'es')} read back, every tensor equal bit for bit"
        else:
            checked = "not verified" if self.read_back is None else f"verified: {self.read_back}"
        of = "" if self.format == "checkpoint" else f" instead of {folder_size(self.model_bytes)}"
        holds = (
            f"{counted(self.patches, 'patch', 'es')}, {counted(self.facts, 'fact')}, {self.dtype}"
        )
        files = [(name, folder_size(size)) for name, size in self.files.items()]
        tables = [
            Table(
                f"{self.format} in {self.folder}: {holds}; {folder_size(self.n_bytes)}{of}",
                {"file": "<", "size": ">"},
                files,
            )
        ]
        if self.layers:
            columns = {"layer": ">", "rank": ">", "kept": ">", "‖Δ−BA‖/‖Δ‖": ">"}
            rows = [(str(x.layer), str(x.rank), str(x.kept), f"{x.error:.1e}") for x in self.layers]
            tables.append(Table(f"LoRA of rank {self.rank}, alpha {self.rank}", columns, rows))
        return [*tables, Table(checked, {})]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {
            **vars(self),
            "folder": str(self.folder.resolve()),
            "files": dict(self.files),
            "bytes": self.n_bytes,
            "layers": [vars(layer) for layer in self.layers],
            "read_back": None if self.read_back is None else vars(self.read_back),
        }


def checked_deltas(
    lm: LanguageModel, deltas: Delta | Iterable[Delta], origins: Sequence[Origin]
) -> list[Delta]:
    check_model(lm)
    if not lm.is_causal:
        raise UnsupportedModelError(
            f"{lm.name} is a masked language model; exports are of models that continue text"
        )
    found = [deltas] if isinstance(deltas, Delta) else list(deltas)
    if not found or not all(isinstance(delta, Delta) for delta in found):
        raise InputError(
            f"expected at least one Delta; got {[type(delta).__name__ for delta in found]}: there is no patch to export"
        )
    if origins and len(origins) != len(found):
        raise InputError(
            f"got {len(origins)} origins for {len(found)} deltas; expected one each, or none"
        )
    patched(
        read_weights(lm, {layer for delta in found for layer in delta.layers}), found
    )  # whether they fit at all
    return found


def dtype_named(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(
            f"dtype is {dtype!r}; expected torch.float32, torch.float16 or torch.bfloat16, or None for {default}"
        )
    return default if dtype is None else dtype


def described(
    folder: str | os.PathLike[str],
    format: Format,
    lm: LanguageModel,
    deltas: Sequence[Delta],
    files: dict[str, int],
    **more: Any,
) -> Export:
    size = sum(weight.numel() * weight.element_size() for weight in lm.module.parameters())
    facts = sum(len(delta.facts) for delta in deltas)
    return Export(
        folder=Path(folder),
        format=format,
        patches=len(deltas),
        facts=facts,
        files=files,
        model_bytes=size,
        **more,
    )


# ---- small things ---------------------------------------------------------------------------------------------------------------------


def equal_weights(a: Delta, b: Delta) -> bool:
    """Whether two deltas have the same tensors, bit for bit, and the same facts."""
    if (a.method, a.facts, a.fingerprint, set(a.layers)) != (
        b.method,
        b.facts,
        b.fingerprint,
        set(b.layers),
    ):
        return False
    pairs = [(a.v_star, b.v_star)]
    for layer in a.layers:
        pairs += [
            *zip(a.layers[layer], b.layers[layer], strict=True),
            (a.k_star[layer], b.k_star[layer]),
        ]
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


def file_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def folder_size(n: int) -> str:
    """A number of bytes as people say it."""
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n >= of:
            return f"{n / of:.1f} {unit}"
    return counted(n, "byte")
