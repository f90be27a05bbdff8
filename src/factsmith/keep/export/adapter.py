"""keep.export.adapter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor

from ... import atlas
from ...core.checks import check_count, check_text
from ...core.errors import InputError, UnsupportedModelError
from ...core.files import write_file
from ...core.progress import Progress, tell
from ...edit.delta import Delta
from ...model.ffn import linear_matrix
from ...model.language_model import LanguageModel
from .contents import Origin
from .folder import as_json, describe, staged
from .readback import LIMITS, Job, ask, compare, read_back
from .record import AdapterLayer, Export, checked_deltas, described, dtype_named, file_name

if TYPE_CHECKING:
    pass


_RANK_TOLERANCE = torch.finfo(torch.float32).eps
"""Singular values of a layer's summed update below so much of the largest are rounding: 1.2e-7, the spacing of the float32 factors."""


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
    deltas = checked_deltas(lm, deltas, origins)
    narrowed = dtype_named(dtype, torch.float32)
    most = None if rank is None else check_count(rank, "rank", also="None for the exact rank")
    where = _base_name(lm, base)
    names = _module_names(lm, {layer for delta in deltas for layer in delta.layers})
    if verify and importlib.util.find_spec("peft") is None:
        raise InputError(
            'an adapter is read back by peft, which is not installed; install it with: pip install "factsmith[adapter]", or do not verify'
        )
    with staged(folder, overwrite) as staging:
        tell(progress, "compressing", 0, None)
        parts = {
            layer: _compressed(
                [d.layers[layer] for d in deltas if layer in d.layers], most, narrowed
            )
            for layer in names
        }
        r = max(part.left.shape[1] for part in parts.values())
        tensors = {}
        for layer, part in parts.items():
            key = f"base_model.model.{names[layer]}"
            pad = r - part.left.shape[1]
            tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(
                part.right, (0, 0, 0, pad)
            ).contiguous()
            tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(
                part.left, (0, pad)
            ).contiguous()
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
        safetensors.torch.save_file(
            tensors, staging / "adapter_model.safetensors", {"format": "pt"}
        )
        found = None
        if verify:
            tell(progress, "reading it back", 0, None)
            rough = {
                layer: part for layer, part in parts.items() if part.error > 10 * _RANK_TOLERANCE
            }
            questions = ask(
                lm,
                deltas,
                {layer: (part.left, part.right) for layer, part in parts.items()}
                if rough
                else None,
            )
            (heard,) = read_back(
                [Job(where, questions, dtype=file_name(lm.dtype), adapter=str(staging))]
            )
            exact = max(part.rank for part in parts.values())
            advice = (
                f"a rank of {exact} is exact"
                if r < exact
                else "write it in float32"
                if rough
                else ""
            )
            if not advice and any(ffn.n_experts for ffn in lm.ffn):
                advice = "beside layers with experts peft may take the name of this layer's matrix for theirs; export a checkpoint"
            found = compare(questions, heard, LIMITS[lm.dtype], advice)
        files = describe(
            staging, "adapter", lm, deltas, origins, None if found is None else vars(found)
        )
    layers = tuple(
        AdapterLayer(layer=layer, rank=part.rank, kept=part.left.shape[1], error=part.error)
        for layer, part in sorted(parts.items())
    )
    return described(
        folder,
        "adapter",
        lm,
        deltas,
        files,
        dtype=file_name(narrowed),
        layers=layers,
        rank=r,
        read_back=found,
    )


# ---- low rank -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The sum of a layer's updates: left (d_model, kept) and right (kept, d_ff) as they are written, its exact rank, and what was lost."""

    left: Tensor
    right: Tensor
    rank: int
    error: float


def _compressed(
    factors: Sequence[tuple[Tensor, Tensor]], most: int | None, dtype: torch.dtype
) -> _Part:
    """Σ leftᵢ rightᵢ as one product of its own rank, or of at most so large a one; no matrix is larger than the factors.

    With left = Q₁R₁ and rightᵀ = Q₂R₂ the sum is Q₁ (R₁R₂ᵀ) Q₂ᵀ, and the singular values of the small core are its own.
    """
    left = torch.cat([a for a, _ in factors], dim=1).double()
    right = torch.cat([b for _, b in factors], dim=0).double()
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    noise = (
        len(s)
        * torch.finfo(torch.float64).eps
        * torch.linalg.matrix_norm(r1)
        * torch.linalg.matrix_norm(r2)
    )  # all that is left of Δ − Δ
    s = torch.where(s > torch.maximum(_RANK_TOLERANCE * s[0], noise), s, 0.0)
    rank = max(1, int((s > 0).sum()))
    kept = rank if most is None else min(rank, most)
    root = s[
        :kept
    ].sqrt()  # shared out evenly, so that neither factor leaves the range of a narrow dtype
    new_left, new_right = (
        (q1 @ (u[:, :kept] * root)).to(dtype),
        ((root[:, None] * vh[:kept]) @ q2.T).to(dtype),
    )
    lost = _norm(
        torch.cat([left, -new_left.double()], dim=1), torch.cat([right, new_right.double()], dim=0)
    )
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
    name = (
        check_text(base, "base")
        if base is not None
        else str(getattr(lm.config, "_name_or_path", "") or "")
    )
    if not name.strip():
        raise InputError(
            f"{lm.name} was not loaded from a folder or the hub, so nothing says what the adapter belongs to; save the base model with "
            "save_pretrained and give its folder, or its hub id, as base"
        )
    name = str(atlas.folder(name)) if name in atlas.names() else name
    return str(Path(name).resolve()) if Path(name).is_dir() else name
