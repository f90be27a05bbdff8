"""The record of an export: what was written, how large it is, and how it was checked.

made = export_adapter(lm, delta, "my-adapter")
made.n_bytes, made.rank, made.read_back.difference
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.tables import Shown, Table, counted
from .base_model import BaseModel
from .contents import Contents
from .manifest import Format
from .readback import ReadBack


@dataclass(frozen=True, kw_only=True)
class AdapterLayer:
    """One layer of an adapter.

    Attributes:
        layer: Its number.
        rank: The exact rank of its summed update Δ.
        kept: The rank that was written.
        error: ‖Δ − BA‖ / ‖Δ‖ (Frobenius), where BA is what was written.
    """

    layer: int
    rank: int
    kept: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Width:
    """How wide the layers of an export are.

    Attributes:
        entry: Where its config or its header has the width, such as "intermediate_size".
        before: The width of the model without patches; a list if each layer has its own.
        after: The width in the export.
    """

    entry: str
    before: int | list[int]
    after: int | list[int]

    @classmethod
    def of(cls, entry: str, before: Sequence[int], after: Sequence[int]) -> Width:
        """Return the change of each layer's width, as one number if all have the same."""
        alike = len(set(before)) == len(set(after)) == 1
        return cls(
            entry=entry,
            before=before[0] if alike else list(before),
            after=after[0] if alike else list(after),
        )

    def __str__(self) -> str:
        """Return the change in one line."""
        return f"{self.entry} is {_sizes(self.after)} instead of {_sizes(self.before)}"


def _sizes(width: int | list[int]) -> str:
    return ", ".join(f"{each:,}" for each in ([width] if isinstance(width, int) else width))


@dataclass(frozen=True, kw_only=True, repr=False)
class Export(Shown):
    """An export that was written.

    Attributes:
        folder: Where it is: a folder, or the file of a single one.
        format: "checkpoint", "adapter", "patch", "gguf" or "gguf-adapter".
        dtype: The dtype of its tensors, such as "bfloat16". Of a GGUF file: the type of those that
            were replaced, such as "F16".
        patches: How many deltas it holds.
        facts: How many facts these hold.
        files: {name: bytes} of every file.
        model_bytes: The size of the model's weights in memory, to compare the files with.
        layers: For an adapter of either kind: ranks and errors of each layer.
        rank: For such an adapter: r, the same for all layers; smaller ones are padded with zeros. 0
            for other formats.
        neurons: How many neurons the patches append.
        width: For a checkpoint or a GGUF file with such neurons: how wide its layers are.
        read_back: The comparison with the patched model. None: it was not asked for, or the export
            is a patch, which is always compared bit for bit.
        base: For an adapter that peft loads: its base model, and whether it was compared.
        revision: The id of the revision that was exported. None: no workspace was.
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
    neurons: int = 0
    width: Width | None = None
    read_back: ReadBack | None = None
    base: BaseModel | None = None
    revision: str | None = None

    @classmethod
    def of(
        cls,
        folder: str | os.PathLike[str],
        format: Format,
        contents: Contents,
        files: Mapping[str, int],
        **more: Any,
    ) -> Export:
        """Return the record of an export that holds some contents; `more` are other fields."""
        return cls(
            folder=Path(folder),
            format=format,
            patches=len(contents.deltas),
            facts=contents.n_facts,
            neurons=contents.n_appended,
            files=files,
            model_bytes=contents.model_bytes,
            revision=None if contents.state is None else contents.state.revision,
            **more,
        )

    @property
    def n_bytes(self) -> int:
        """The size of all files together."""
        return sum(self.files.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know, in sentences."""
        return () if self.base is None else self.base.warnings

    def tables(self) -> list[Table]:
        """Return what was written, how large it is next to the model, and how it was checked."""
        neurons = [counted(self.neurons, "neuron")] if self.neurons else []
        holds = ", ".join(
            [
                counted(self.patches, "patch", "es"),
                counted(self.facts, "fact"),
                *neurons,
                self.dtype,
            ]
        )
        size = size_text(self.n_bytes)
        if self.format not in ("checkpoint", "gguf"):
            size += f" instead of {size_text(self.model_bytes)}"
        files = [(name, size_text(n_bytes)) for name, n_bytes in self.files.items()]
        title = f"{self.format} in {self.folder}: {holds}; {size}"
        tables = [Table(title, {"file": "<", "size": ">"}, files)]
        if self.layers:
            columns = {"layer": ">", "rank": ">", "kept": ">", "‖Δ−BA‖/‖Δ‖": ">"}
            rows = [(str(x.layer), str(x.rank), str(x.kept), f"{x.error:.1e}") for x in self.layers]
            tables.append(Table(f"LoRA of rank {self.rank}, alpha {self.rank}", columns, rows))
        if self.width is not None:
            tables.append(Table(str(self.width), {}))
        tables.append(Table(self._checked(), {}))
        if self.base is not None and self.base.checked:  # otherwise a warning says so
            tables.append(Table(f"base model {self.base.name}: {self.base.standing}", {}))
        return [*tables, *(Table(warning, {}) for warning in self.warnings)]

    def _checked(self) -> str:
        if self.format == "patch":
            patches = counted(self.patches, "patch", "es")
            return f"verified: {patches} read back, every tensor equal bit for bit"
        if self.format == "gguf":
            same = "every other tensor and every field is the base file's, byte for byte"
            if self.width is not None:
                same += ", followed by zeros up to the new width"
            return f"verified: {same}" + ("" if self.read_back is None else f"; {self.read_back}")
        return "not verified" if self.read_back is None else f"verified: {self.read_back}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            **vars(self),
            "folder": str(self.folder.resolve()),
            "files": dict(self.files),
            "bytes": self.n_bytes,
            "layers": [vars(layer) for layer in self.layers],
            "width": None if self.width is None else vars(self.width),
            "read_back": None if self.read_back is None else vars(self.read_back),
            "base": None if self.base is None else self.base.to_dict(),
            "warnings": list(self.warnings),
        }


def size_text(n_bytes: int) -> str:
    """Return a size for people, such as "1.5 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return counted(n_bytes, "byte")
