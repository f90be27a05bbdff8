"""Exports as a checkpoint: the whole model, with the patches merged into its weights.

made = export_checkpoint(lm, delta, "my-model", dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained("my-model")      # needs neither factsmith nor a base model
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import NumericsError
from ...core.files import write_file
from ...core.progress import Progress, tell
from ...edit.delta import Delta, applied
from ...model.language_model import LanguageModel
from ...model.quiet import quietly
from ...model.source import runs_remote_code
from ...model.streamed import streamed_of
from ...model.turns import asking
from .card import Card, write_card
from .contents import Contents, Origin
from .dtypes import check_dtype, dtype_name
from .manifest import as_json, write_manifest
from .questions import ask
from .readback import LIMITS, Job, check_job
from .record import Export
from .shards import check_shards, save_shards
from .staging import staged
from .widths import find_widths


@asking(grad=True, changes=True)
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
    """Write the model with the deltas merged into it, and its tokenizer, as `save_pretrained` does.

    Args:
        lm: The model, without the deltas. It is unchanged afterwards, also after an exception.
        deltas: One delta or several, in the order in which they are added.
        folder: A new folder to write into.
        dtype: float32, float16 or bfloat16. None: the dtype that the model is loaded in.
        verify: Whether to load the folder in a separate process and compare its answers and logits
            with those of the patched model. Where the layers stay on disk, each written matrix is
            read again instead.
        overwrite: Whether to replace an earlier export in the folder.
        origins: Where the deltas come from, one for each, for the manifest.
        progress: Gets what is being done.

    Raises:
        InputError: when there is no delta, a delta does not fit, or the folder holds other files.
        UnsupportedModelError: when the model is masked, or a layer cannot be edited.
        NumericsError: when a weight is too large for the dtype, or the export that was read back
            differs from the patched model.
        ModelError: when the export cannot be loaded back.
        WorkspaceError: when the folder cannot be written. After every error the folder is as it
            was before.
    """
    contents = Contents.of(lm, deltas, origins)
    written_dtype = check_dtype(dtype, lm.dtype)
    widths = find_widths(lm, contents.appended) if contents.appended else None
    padding = None if widths is None else widths.padding(lm)
    streamed = streamed_of(lm.module)
    if streamed is not None:
        verify = False  # another process would load the whole model; `save_shards` compares
        check_shards(lm, contents, written_dtype)
    with staged(folder, overwrite) as staging:
        questions = ask(lm, contents.deltas) if verify else None
        with contextlib.ExitStack() as stack:
            tell(progress, "writing the model", 0, None)
            stack.enter_context(applied(lm, contents.deltas, padding=padding))
            if widths is not None:
                stack.enter_context(widths.in_config(lm.config))
            if streamed is None:
                _save_model(lm, staging, written_dtype)
            else:
                with _same_config(lm):
                    save_shards(lm, contents, staging, progress)
        comparison = None
        if questions is not None:
            tell(progress, "reading it back", 0, None)
            limit = max(LIMITS[lm.dtype], LIMITS[written_dtype])
            advice = "" if written_dtype == lm.dtype else f"Write it in {dtype_name(lm.dtype)}."
            job = Job(str(staging), questions, trust_remote_code=runs_remote_code(lm))
            comparison = check_job(job, limit, advice)
        n_asked = None if comparison is None else comparison.prompts
        write_card(
            staging, Card("checkpoint", contents, dtype_name(written_dtype), read_back=n_asked)
        )
        files = write_manifest(staging, "checkpoint", contents, comparison)
    return Export.of(
        folder,
        "checkpoint",
        contents,
        files,
        dtype=dtype_name(written_dtype),
        width=None if widths is None else widths.width,
        read_back=comparison,
    )


def _save_model(lm: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
    """Save model and tokenizer in a dtype."""
    state = None if dtype == lm.dtype else _cast_state(lm, dtype)
    with _same_config(lm), quietly():
        lm.module.save_pretrained(folder, state_dict=state)
        lm.tokenizer.save_pretrained(folder)
    if dtype != lm.dtype:
        file = folder / "config.json"
        config = _renamed(json.loads(file.read_bytes()), dtype_name(lm.dtype), dtype_name(dtype))
        write_file(file, as_json(config))


def _cast_state(lm: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the model's state in a dtype; raise NumericsError for a weight it cannot hold."""
    # Tied weights are one tensor under several names. `save_pretrained` sees that they are tied
    # only while they are one tensor, so each is cast once.
    cast: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    for name, weight in lm.module.state_dict().items():
        key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)
        if key not in cast:
            cast[key] = weight.to("cpu", dtype) if weight.dtype == lm.dtype else weight
            if not bool(cast[key].isfinite().all()):
                raise NumericsError(
                    f"{name} has numbers too large for {dtype_name(dtype)}. Write it in bfloat16 "
                    "or float32.",
                    argument="dtype",
                )
        state[name] = cast[key]
    return state


@contextmanager
def _same_config(lm: LanguageModel) -> Iterator[None]:
    """Undo what `save_pretrained` changes in the model's config."""
    config = lm.module.config
    before = {name: copy.copy(getattr(config, name, None)) for name in ("dtype", "architectures")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _renamed(config: Any, old: str, new: str) -> Any:
    """Return a config in which one dtype is another, also in its parts."""
    if not isinstance(config, dict):
        return config
    return {
        key: new if key in ("dtype", "torch_dtype") and value == old else _renamed(value, old, new)
        for key, value in config.items()
    }
