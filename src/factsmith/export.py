"""Exports: a patched model for programs that know nothing of factsmith, and patches for another workspace.

    made = export_adapter(lm, delta, "my-adapter")           # PEFT LoRA on the down-projections: kilobytes beside the untouched model
    made = export_checkpoint(lm, delta, "my-model")          # the whole model, merged, as `save_pretrained` writes it
    made = export_patch(lm, delta, "my-patch")               # the deltas themselves, with all that a workspace keeps of them
    for saved in read_patch("my-patch").patches:
        saved.delta, saved.origin.message

Every export is a folder with a `factsmith.json` that says what is in it. It is written beside its place, read back, and only then renamed
into it: it is there whole and checked, or not at all. Checkpoints and adapters are read back by plain transformers and peft in a process
of its own that never imports factsmith, and compared with the patched model in memory; patches are compared bit for bit.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .checks import check_count, check_text
from .edit.delta import Delta, applied, patched, read_weights
from .errors import InputError, NumericsError, UnsupportedModelError
from .files import write_file
from .folders import FORMATS, Format, Origin, as_json, describe, numbered, read_patch, staged
from .model.ffn import linear_matrix
from .model.load import ATLAS, LanguageModel, bundled, check_model, quietly
from .progress import Progress, tell
from .readback import LIMITS, Job, ReadBack, ask, compare, read_back
from .tables import Shown, Table, counted

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_RANK_TOLERANCE = torch.finfo(torch.float32).eps
"""Singular values of a layer's summed update below so much of the largest are rounding: 1.2e-7, the spacing of the float32 factors."""


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
        of = "" if self.format == "checkpoint" else f" instead of {_size(self.model_bytes)}"
        holds = f"{counted(self.patches, 'patch', 'es')}, {counted(self.facts, 'fact')}, {self.dtype}"
        files = [(name, _size(size)) for name, size in self.files.items()]
        tables = [Table(f"{self.format} in {self.folder}: {holds}; {_size(self.n_bytes)}{of}", {"file": "<", "size": ">"}, files)]
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


# ---- writing --------------------------------------------------------------------------------------------------------------------------


def export(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    format: str = "checkpoint",
    *,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
    base: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """One of the three formats by its name; an option that the format does not take raises InputError, as does an unknown format."""
    kept: dict[str, Any] = {"overwrite": overwrite, "origins": origins, "progress": progress}
    if format == "adapter":
        return export_adapter(lm, deltas, folder, rank=rank, dtype=dtype, base=base, verify=verify, **kept)
    if rank is not None or base is not None:
        raise InputError(f"rank and base are options of an adapter; a {format} takes neither")
    if format == "checkpoint":
        return export_checkpoint(lm, deltas, folder, dtype=dtype, verify=verify, **kept)
    if format != "patch":
        raise InputError(f"format is {format!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if dtype is not None:
        raise InputError(f"a patch is kept in float32 as it was made; got dtype {dtype}")
    return export_patch(lm, deltas, folder, **kept)


def export_checkpoint(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """The model with the deltas merged into it, as `save_pretrained` writes it, tokenizer too; it needs no base model and no factsmith.

    lm         the model without the deltas; as before when this returns, exception or not
    dtype      float32, float16 or bfloat16; None: as the model is loaded
    verify     load the folder in a process of its own, and compare it with the patched model
    overwrite  replace an earlier export
    origins    where the deltas come from, one each, noted in factsmith.json

    Raises InputError (no delta, a folder that holds something else), WorkspaceError (it cannot be written), NumericsError (a weight too
    large for the dtype, or what was read back is not the patched model), ModelError (it could not be loaded), UnsupportedModelError; then
    nothing is left in the folder's place but what was there.
    """
    deltas = _checked(lm, deltas, origins)
    narrowed = _dtype(dtype, lm.dtype)
    with staged(folder, overwrite) as staging:
        questions = ask(lm, deltas) if verify else None
        with applied(lm, deltas):
            tell(progress, "writing the model", 0, None)
            _save_model(lm, staging, narrowed)
        found = None
        if questions is not None:
            tell(progress, "reading it back", 0, None)
            (heard,) = read_back([Job(str(staging), questions)])
            advice = "" if narrowed == lm.dtype else f"write it in {_name(lm.dtype)}"
            found = compare(questions, heard, max(LIMITS[lm.dtype], LIMITS[narrowed]), advice)
        files = describe(staging, "checkpoint", lm, deltas, origins, None if found is None else vars(found))
    return _export(folder, "checkpoint", lm, deltas, files, dtype=_name(narrowed), read_back=found)


def export_adapter(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """The deltas as a PEFT LoRA adapter on the down-projections: a file of kilobytes, loaded onto the untouched base model.

    Deltas on one layer are summed and their factors recompressed (QR, then SVD of the small core) to the rank of the sum: singular values
    below 1.2e-7 of the largest, the spacing of float32, are left out. alpha is r, so that BA is added as it is. All layers have one r, the
    largest, with zeros where there was less to say: servers know no other.

    rank   at most so large; None: the exact rank. What is larger is truncated by SVD, and `Export.layers` says what that lost
    dtype  of the factors; None: float32, whatever the model's, since it is little and exact
    base   the base model's folder or hub id as it is written into adapter_config.json; None: where the model was loaded from

    The other arguments and errors are those of `export_checkpoint`; reading back needs peft. An adapter whose answers are no longer those
    of the patched model is refused, also when it is the rank that was too small.
    """
    deltas = _checked(lm, deltas, origins)
    narrowed = _dtype(dtype, torch.float32)
    most = None if rank is None else check_count(rank, "rank", "1 or more, or None for the exact rank")
    where = _base_name(lm, base)
    names = _module_names(lm, {layer for delta in deltas for layer in delta.layers})
    if verify and importlib.util.find_spec("peft") is None:
        raise InputError(
            'an adapter is read back by peft, which is not installed; install it with: pip install "factsmith[adapter]", or do not verify'
        )
    with staged(folder, overwrite) as staging:
        tell(progress, "compressing", 0, None)
        parts = {layer: _compressed([d.layers[layer] for d in deltas if layer in d.layers], most, narrowed) for layer in names}
        r = max(part.left.shape[1] for part in parts.values())
        tensors = {}
        for layer, part in parts.items():
            key = f"base_model.model.{names[layer]}"
            pad = r - part.left.shape[1]
            tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(part.right, (0, 0, 0, pad)).contiguous()
            tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(part.left, (0, pad)).contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": where,
            "r": r,
            "lora_alpha": r,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(linear_matrix(lm.ffn[layer].down).transposed for layer in names),
            "target_modules": [names[layer] for layer in sorted(names)],
            "inference_mode": True,
        }
        write_file(staging / "adapter_config.json", as_json(config))
        safetensors.torch.save_file(tensors, staging / "adapter_model.safetensors", {"format": "pt"})
        found = None
        if verify:
            tell(progress, "reading it back", 0, None)
            rough = {layer: part for layer, part in parts.items() if part.error > 10 * _RANK_TOLERANCE}
            questions = ask(lm, deltas, {layer: (part.left, part.right) for layer, part in parts.items()} if rough else None)
            (heard,) = read_back([Job(where, questions, dtype=_name(lm.dtype), adapter=str(staging))])
            exact = max(part.rank for part in parts.values())
            advice = f"a rank of {exact} is exact" if r < exact else "write it in float32" if rough else ""
            if not advice and any(ffn.n_experts for ffn in lm.ffn):
                advice = "beside layers with experts peft may take the name of this layer's matrix for theirs; export a checkpoint"
            found = compare(questions, heard, LIMITS[lm.dtype], advice)
        files = describe(staging, "adapter", lm, deltas, origins, None if found is None else vars(found))
    layers = tuple(
        AdapterLayer(layer=layer, rank=part.rank, kept=part.left.shape[1], error=part.error) for layer, part in sorted(parts.items())
    )
    return _export(folder, "adapter", lm, deltas, files, dtype=_name(narrowed), layers=layers, rank=r, read_back=found)


def export_patch(
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """The deltas for another workspace of the same model: 0001/, 0002/ ... as `Delta.save` writes them, in their order, and a manifest.

    They are read back by `read_patch` and compared bit for bit. Arguments and errors as of `export_checkpoint`.
    """
    deltas = _checked(lm, deltas, origins)
    with staged(folder, overwrite) as staging:
        tell(progress, "writing the patches", 0, len(deltas))
        for i, delta in enumerate(deltas):
            delta.save(staging / numbered(i))
        files = describe(staging, "patch", lm, deltas, origins)
        again = [saved.delta for saved in read_patch(staging, fingerprint=lm.fingerprint).patches]
        for ours, theirs in zip(deltas, again, strict=True):
            if not _equal(ours, theirs):
                raise NumericsError("a patch read back is not the one that was written; nothing was kept: please report it")
    return _export(folder, "patch", lm, deltas, files, dtype="float32")


def _checked(lm: LanguageModel, deltas: Delta | Iterable[Delta], origins: Sequence[Origin]) -> list[Delta]:
    check_model(lm)
    if not lm.is_causal:
        raise UnsupportedModelError(f"{lm.name} is a masked language model; exports are of models that continue text")
    found = [deltas] if isinstance(deltas, Delta) else list(deltas)
    if not found or not all(isinstance(delta, Delta) for delta in found):
        raise InputError(f"expected at least one Delta; got {[type(delta).__name__ for delta in found]}: there is no patch to export")
    if origins and len(origins) != len(found):
        raise InputError(f"got {len(origins)} origins for {len(found)} deltas; expected one each, or none")
    patched(read_weights(lm, {layer for delta in found for layer in delta.layers}), found)  # whether they fit at all
    return found


def _dtype(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected torch.float32, torch.float16 or torch.bfloat16, or None for {default}")
    return default if dtype is None else dtype


def _export(
    folder: str | os.PathLike[str], format: Format, lm: LanguageModel, deltas: Sequence[Delta], files: dict[str, int], **more: Any
) -> Export:
    size = sum(weight.numel() * weight.element_size() for weight in lm.module.parameters())
    facts = sum(len(delta.facts) for delta in deltas)
    return Export(folder=Path(folder), format=format, patches=len(deltas), facts=facts, files=files, model_bytes=size, **more)


def _save_model(lm: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
    """`save_pretrained` of model and tokenizer in a dtype; raises NumericsError for a weight that it cannot hold."""
    config = lm.module.config
    before = {name: copy.copy(getattr(config, name, None)) for name in ("dtype", "architectures")}
    state = None
    if dtype != lm.dtype:
        # Tied weights are one tensor under several names: `save_pretrained` sees that only while they are one.
        cast_once: dict[tuple[Any, ...], Tensor] = {}
        state = {}
        for name, weight in lm.module.state_dict().items():
            key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
            if key not in cast_once:
                cast_once[key] = weight.to("cpu", dtype) if weight.dtype == lm.dtype else weight
                if not bool(cast_once[key].isfinite().all()):
                    raise NumericsError(f"{name} has numbers too large for {_name(dtype)}; write it in bfloat16 or float32")
            state[name] = cast_once[key]
    try:
        with quietly():
            lm.module.save_pretrained(folder, state_dict=state)
            lm.tokenizer.save_pretrained(folder)
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    if dtype != lm.dtype:
        file = folder / "config.json"
        write_file(file, as_json(_renamed(json.loads(file.read_bytes()), _name(lm.dtype), _name(dtype))))


def _renamed(config: Any, old: str, new: str) -> Any:
    """A config in which a dtype, also of a part, is another."""
    if not isinstance(config, dict):
        return config
    return {key: new if key in ("dtype", "torch_dtype") and value == old else _renamed(value, old, new) for key, value in config.items()}


# ---- low rank -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The sum of a layer's updates: left (d_model, kept) and right (kept, d_ff) as they are written, its exact rank, and what was lost."""

    left: Tensor
    right: Tensor
    rank: int
    error: float


def _compressed(factors: Sequence[tuple[Tensor, Tensor]], most: int | None, dtype: torch.dtype) -> _Part:
    """Σ leftᵢ rightᵢ as one product of its own rank, or of at most so large a one; no matrix is larger than the factors.

    With left = Q₁R₁ and rightᵀ = Q₂R₂ the sum is Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the singular values of the small core are its own.
    """
    left = torch.cat([a for a, _ in factors], dim=1).double()
    right = torch.cat([b for _, b in factors], dim=0).double()
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    noise = (
        len(s) * torch.finfo(torch.float64).eps * torch.linalg.matrix_norm(r1) * torch.linalg.matrix_norm(r2)
    )  # all that is left of Δ − Δ
    s = torch.where(s > torch.maximum(_RANK_TOLERANCE * s[0], noise), s, 0.0)
    rank = max(1, int((s > 0).sum()))
    kept = rank if most is None else min(rank, most)
    root = s[:kept].sqrt()  # shared out evenly, so that neither factor leaves the range of a narrow dtype
    new_left, new_right = (q1 @ (u[:, :kept] * root)).to(dtype), ((root[:, None] * vh[:kept]) @ q2.T).to(dtype)
    lost = _norm(torch.cat([left, -new_left.double()], dim=1), torch.cat([right, new_right.double()], dim=0))
    norm = float(torch.linalg.vector_norm(s))
    return _Part(left=new_left, right=new_right, rank=rank, error=lost / norm if norm else 0.0)


def _norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖ (Frobenius), from the factors."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T))


def _module_names(lm: LanguageModel, layers: Iterable[int]) -> dict[int, str]:
    """The name of each layer's down-projection in the model; raises UnsupportedModelError where an adapter cannot stand beside it."""
    names = {module: name for name, module in lm.module.named_modules()}
    found = {}
    for layer in sorted(layers):
        down, weight = lm.ffn[layer].down, lm.ffn[layer].weight()
        whole = linear_matrix(down).read()
        if (whole.data_ptr(), whole.shape) != (weight.data_ptr(), weight.shape):
            raise UnsupportedModelError(
                f"layer {layer}: the down-projection is part of {names[down]}, so no LoRA adapter can stand beside it; export a checkpoint"
            )
        found[layer] = names[down]
    return found


def _base_name(lm: LanguageModel, base: str | None) -> str:
    """What an adapter is to be loaded onto: a folder, whole, or a hub id. Raises InputError where the model has neither."""
    name = check_text(base, "base") if base is not None else str(getattr(lm.config, "_name_or_path", "") or "")
    if not name.strip():
        raise InputError(
            f"{lm.name} was not loaded from a folder or the hub, so nothing says what the adapter belongs to; save the base model with "
            "save_pretrained and give its folder, or its hub id, as base"
        )
    name = str(ATLAS / name) if name in bundled() else name
    return str(Path(name).resolve()) if Path(name).is_dir() else name


# ---- small things ---------------------------------------------------------------------------------------------------------------------


def _equal(a: Delta, b: Delta) -> bool:
    """Whether two deltas have the same tensors, bit for bit, and the same facts."""
    if (a.method, a.facts, a.fingerprint, set(a.layers)) != (b.method, b.facts, b.fingerprint, set(b.layers)):
        return False
    pairs = [(a.v_star, b.v_star)]
    for layer in a.layers:
        pairs += [*zip(a.layers[layer], b.layers[layer], strict=True), (a.k_star[layer], b.k_star[layer])]
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(n: int) -> str:
    """A number of bytes as people say it."""
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n >= of:
            return f"{n / of:.1f} {unit}"
    return counted(n, "byte")
