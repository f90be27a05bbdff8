"""Exports as a PEFT LoRA adapter: the patches alone, to load onto the untouched base model.

    made = export_adapter(lm, deltas, "my-adapter")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("gpt2"), "my-adapter")

The deltas of each layer are summed, and the sum is written as the product B A of its own rank
(`lowrank`). alpha equals r, so PEFT adds B A unscaled.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch

from ...core.checks import check_count
from ...core.errors import InputError
from ...core.files import write_file
from ...core.progress import Progress, tell
from ...edit.delta import Delta
from ...model.language_model import LanguageModel
from ...model.neurons import linear_matrix
from ...model.source import runs_remote_code
from ...model.turns import asking
from .base_model import BaseModel, find_base_model
from .card import Card, write_card
from .contents import Contents, Origin, check_no_neurons
from .dtypes import check_dtype, dtype_name
from .lowrank import LowRank, compress
from .manifest import as_json, write_manifest
from .places import module_names
from .questions import ask
from .readback import LIMITS, Job, ReadBack, check_job
from .record import AdapterLayer, Export
from .staging import staged


@asking(grad=True, changes=True)
def export_adapter(  # house: public, and promised with these names
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
    """Write the deltas as a PEFT LoRA adapter on the down-projections: a file of kilobytes.

    Singular values below 1.2e-7 of the largest, the spacing of float32, are left out. Servers know
    only one r, so all layers have that of the largest one, padded with zeros.

    Args:
        lm: The model, without the deltas. It is unchanged afterwards, also after an exception.
        deltas: One delta or several, in the order in which they are added.
        folder: A new folder to write into.
        rank: The largest rank to write. What is beyond it is truncated by SVD, and `Export.layers`
            says how much that loses. None: the exact rank.
        dtype: The dtype of the factors. None: float32, whatever the model's is, because the file
            is small and exact then.
        base: The base model's hub id or folder for adapter_config.json, which holds it as it is
            given. None: where the model was loaded from, without a path (`BaseModel`).
        verify: Whether to load the adapter with peft in a separate process and compare its answers
            and logits with those of the patched model. All answers must be equal, also if the rank
            is truncated.
        overwrite: Whether to replace an earlier export in the folder.
        origins: Where the deltas come from, one for each, for the manifest.
        progress: Gets what is being done.

    Raises:
        InputError: when there is no delta, a delta does not fit or appends neurons, the folder
            holds other files, nothing says what the base model is, or peft is not installed.
        FingerprintError: when base is another model; it is compared if it is on this machine.
        UnsupportedModelError: when the model is masked, or a layer cannot have an adapter.
        NumericsError: when the adapter that was read back differs from the patched model.
        ModelError: when the adapter cannot be loaded back.
        WorkspaceError: when the folder cannot be written. After every error the folder is as it
            was before.
    """
    contents = Contents.of(lm, deltas, origins)
    check_no_neurons("adapter", contents.n_appended)
    factor_dtype = check_dtype(dtype, torch.float32)
    max_rank = check_rank(rank)
    names = module_names(lm, contents.layers)
    if verify:
        check_peft()
    base_model = find_base_model(lm, base, check=verify, progress=progress)
    with staged(folder, overwrite) as staging:
        tell(progress, "compressing", 0, None)
        products = {
            layer: compress(
                [d.layers[layer] for d in contents.deltas if layer in d.layers],
                max_rank,
                factor_dtype,
            )
            for layer in names
        }
        _write_adapter(staging, lm, names, products, base_model)
        comparison = None
        if verify:
            tell(progress, "reading it back", 0, None)
            comparison = _read_back(contents, products, base_model, staging)
        write_card(
            staging,
            Card(
                "adapter",
                contents,
                dtype_name(factor_dtype),
                base=base_model,
                read_back=None if comparison is None else comparison.prompts,
                rank=_common_rank(products),
            ),
        )
        files = write_manifest(staging, "adapter", contents, comparison, named=base_model)
    return Export.of(
        folder,
        "adapter",
        contents,
        files,
        dtype=dtype_name(factor_dtype),
        layers=tuple(
            AdapterLayer(layer=layer, rank=each.rank, kept=each.kept, error=each.error)
            for layer, each in sorted(products.items())
        ),
        rank=_common_rank(products),
        read_back=comparison,
        base=base_model,
    )


def check_rank(rank: int | None) -> int | None:
    """Return the largest rank to write; raises InputError for one that is no count."""
    if rank is None:
        return None
    return check_count(rank, "rank", "the largest rank to write", also="None for the exact rank")


def _common_rank(products: Mapping[int, LowRank]) -> int:
    return max(product.kept for product in products.values())


def _write_adapter(
    folder: Path,
    lm: LanguageModel,
    names: Mapping[int, str],
    products: Mapping[int, LowRank],
    base: BaseModel,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    r = _common_rank(products)
    tensors = {}
    for layer, product in products.items():
        key = f"base_model.model.{names[layer]}"
        padding = r - product.kept
        tensors[f"{key}.lora_A.weight"] = torch.nn.functional.pad(
            product.right, (0, 0, 0, padding)
        ).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.nn.functional.pad(
            product.left, (0, padding)
        ).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(linear_matrix(lm.ffn[layer].down).transposed for layer in names),
        "target_modules": [names[layer] for layer in sorted(names)],
        "inference_mode": True,
    }
    write_file(folder / "adapter_config.json", as_json(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _read_back(
    contents: Contents, products: Mapping[int, LowRank], base: BaseModel, folder: Path
) -> ReadBack:
    """Compare the adapter, loaded onto its base model, with the patched model in memory.

    A truncated or rounded adapter is compared with what its own factors give.
    """
    lm = contents.lm
    is_rough = any(product.is_rough for product in products.values())
    factors = {layer: (product.left, product.right) for layer, product in products.items()}
    questions = ask(lm, contents.deltas, factors if is_rough else None)
    exact = max(product.rank for product in products.values())
    if _common_rank(products) < exact:
        advice = f"A rank of {exact} is exact."
    elif is_rough:
        advice = "Write it in float32."
    elif any(ffn.n_experts for ffn in lm.ffn):
        advice = (
            "In a model with experts peft may take the name of this layer's matrix for that of "
            "the experts; export a checkpoint."
        )
    else:
        advice = ""
    job = Job(
        base.place,
        questions,
        dtype=dtype_name(lm.dtype),
        adapter=str(folder),
        revision=base.revision if base.place == base.name else _revision(lm, base.place),
        trust_remote_code=runs_remote_code(lm),
    )
    return check_job(job, LIMITS[lm.dtype], advice)


def _revision(lm: LanguageModel, place: str) -> str | None:
    """Return the revision of the model's own place; None for a folder, and the main one."""
    name, _, revision = lm.name.partition("@")
    return revision if revision and name == place else None


def check_peft() -> None:
    """Raise InputError unless peft is installed, which reads an adapter back."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "An adapter is read back by peft, which is not installed. Install it with `pip install "
            '"factsmith[adapter]"`, or export without verifying.',
            argument="verify",
        )
