"""keep.export.checkpoint."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import NumericsError
from ...core.files import write_file
from ...core.progress import Progress, tell
from ...edit.delta import Delta, applied
from ...model.language_model import LanguageModel
from ...model.load import quietly
from .contents import Origin
from .folder import as_json, describe, staged
from .readback import LIMITS, Job, ask, compare, read_back
from .record import Export, checked_deltas, described, dtype_named, file_name


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
    deltas = checked_deltas(lm, deltas, origins)
    narrowed = dtype_named(dtype, lm.dtype)
    with staged(folder, overwrite) as staging:
        questions = ask(lm, deltas) if verify else None
        with applied(lm, deltas):
            tell(progress, "writing the model", 0, None)
            _save_model(lm, staging, narrowed)
        found = None
        if questions is not None:
            tell(progress, "reading it back", 0, None)
            (heard,) = read_back([Job(str(staging), questions)])
            advice = "" if narrowed == lm.dtype else f"write it in {file_name(lm.dtype)}"
            found = compare(questions, heard, max(LIMITS[lm.dtype], LIMITS[narrowed]), advice)
        files = describe(
            staging, "checkpoint", lm, deltas, origins, None if found is None else vars(found)
        )
    return described(
        folder, "checkpoint", lm, deltas, files, dtype=file_name(narrowed), read_back=found
    )


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
                    raise NumericsError(
                        f"{name} has numbers too large for {file_name(dtype)}; write it in bfloat16 or float32"
                    )
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
        write_file(
            file,
            as_json(_renamed(json.loads(file.read_bytes()), file_name(lm.dtype), file_name(dtype))),
        )


def _renamed(config: Any, old: str, new: str) -> Any:
    """A config in which a dtype, also of a part, is another."""
    if not isinstance(config, dict):
        return config
    return {
        key: new if key in ("dtype", "torch_dtype") and value == old else _renamed(value, old, new)
        for key, value in config.items()
    }
