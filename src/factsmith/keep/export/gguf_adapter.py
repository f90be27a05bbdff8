"""Exports as a LoRA for llama.cpp: the patches alone, for `llama-server --lora patch.gguf`.

    made = export_gguf_adapter(lm, deltas, "patch.gguf")

llama.cpp adds (alpha / rank) B A to a matrix. alpha is one number of the file, and the rank is that
of each B. As in a PEFT adapter, all layers get the rank of the largest, padded with zeros, and
alpha is this rank. So each B A counts once, also in programs that know only one rank.

    general.type = "adapter"      general.architecture = that of the model
    adapter.type = "lora"         adapter.lora.alpha = the rank
    general.name = "factsmith 5c1e02aa91f0"       the revision that was exported
    adapter.lora.task_name = "factsmith:5c1e..."  its whole id, which llama-server shows
    blk.5.ffn_down.weight.lora_a  (rank, d_ff)
    blk.5.ffn_down.weight.lora_b  (d_model, rank)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import InputError, NumericsError
from ...core.progress import Progress, tell
from ...edit.delta import Delta, read_weights
from ...model.gguf_header import Header, read_header
from ...model.gguf_reading import check_libraries
from ...model.language_model import LanguageModel
from ...model.turns import asking
from .adapter import check_rank
from .contents import Contents, Origin, check_no_neurons
from .gguf_base import base_file, find_base
from .gguf_names import architecture, tensor_names
from .gguf_writing import entry_of, read_tensor
from .inmemory import compare_in_memory
from .lowrank import LowRank, compress
from .manifest import ManifestBase, write_manifest
from .readback import LIMITS
from .record import AdapterLayer, Export
from .single import as_placed, check_file, check_not_base, staged_file

TASK = "factsmith:"
"""How the task name of an adapter begins; the id of the exported revision follows."""

_DTYPES = {torch.float32: "F32", torch.float16: "F16"}


@asking(grad=True, changes=True)
def export_gguf_adapter(  # house: public, and named like the other exports
    lm: LanguageModel,
    deltas: Delta | Iterable[Delta],
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base: str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    origins: Sequence[Origin] = (),
    progress: Progress | None = None,
) -> Export:
    """Write the deltas as a LoRA adapter for llama.cpp: a file of kilobytes.

    Args:
        lm: The model, without the deltas. It is unchanged afterwards, also after an exception.
        deltas: One delta or several, in the order in which they are added.
        folder: The new file, which ends in ".gguf".
        rank: The largest rank to write. What is beyond it is truncated by SVD. None: the exact
            rank.
        dtype: float32 or float16. None: float32.
        base: The GGUF file that the adapter is for; it is compared with the model, and says the
            name of the architecture. None: the one that the model was loaded from, or the name that
            the library gguf has for this type of model.
        verify: Whether to compare the answers of the model plus the adapter as it was written with
            those of the patched model.
        overwrite: Whether to replace an earlier export.
        origins: Where the deltas come from, one for each, for the manifest.
        progress: Gets what is being done.

    Raises:
        InputError: when there is no delta, a delta does not fit or appends neurons, or the file
            may not be replaced.
        FingerprintError: when the base file is not this model.
        UnsupportedModelError: when the model is masked, or llama.cpp has no name for its
            architecture or for a patched matrix.
        NumericsError: when what was written differs from the patches.
        ModelError: when the base file is damaged, or the library gguf is missing.
        WorkspaceError: when the file cannot be written. After every error everything is as it was
            before.
    """
    contents = Contents.of(lm, deltas, origins)
    check_no_neurons("gguf-adapter", contents.n_appended)
    factor_dtype, max_rank = check_factors(dtype), check_rank(rank)
    check_libraries()
    check_file(folder, overwrite)
    if lm.gguf is not None or base is not None:
        check_not_base(folder, base_file(lm, base))
    stated = None
    if base is not None:
        tell(progress, "reading the base file", 0, None)
        file = find_base(lm, contents.layers, base)
        arch, names = file.header.architecture, file.names
        stated = ManifestBase(
            name=file.header.path.name, bytes=file.header.n_bytes, sha256=file.sha256
        )
    else:
        arch = architecture(lm)
        names = tensor_names(lm, arch, contents.layers)
    with staged_file(folder, overwrite) as staging:
        target = staging / Path(folder).name
        tell(progress, "compressing", 0, None)
        products = {
            layer: compress(
                [d.layers[layer] for d in contents.deltas if layer in d.layers],
                max_rank,
                factor_dtype,
            )
            for layer in names
        }
        common = max(product.kept for product in products.values())
        fields = _described(contents)
        _write(
            target, arch, {names[layer]: each for layer, each in products.items()}, common, fields
        )
        tell(progress, "reading it back", 0, None)
        updates = read_updates(target, names)
        _check_updates(products, updates)
        comparison = None
        if verify:
            weights = {
                layer: (weight.float() + updates[layer].to(weight.device)).to(weight.dtype)
                for layer, weight in read_weights(lm, names).items()
            }
            limit = max(LIMITS[lm.dtype], LIMITS[factor_dtype])
            exact = max(product.rank for product in products.values())
            advice = f"A rank of {exact} is exact." if common < exact else "Write it in float32."
            # What was cut off is no fault of the file; the answers must be equal all the same.
            factors = {layer: (each.left, each.right) for layer, each in products.items()}
            comparison = compare_in_memory(
                lm, contents.deltas, weights, limit, advice, factors if common < exact else None
            )
        sizes = write_manifest(staging, "gguf-adapter", contents, comparison, stated)
    return Export.of(
        folder,
        "gguf-adapter",
        contents,
        as_placed(sizes, folder),
        dtype=_DTYPES[factor_dtype],
        layers=tuple(
            AdapterLayer(layer=layer, rank=each.rank, kept=each.kept, error=each.error)
            for layer, each in sorted(products.items())
        ),
        rank=common,
        read_back=comparison,
    )


def check_factors(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the factors; raises InputError for one that cannot be written."""
    if dtype is None:
        return torch.float32
    if dtype not in _DTYPES:
        raise InputError(
            f"dtype is {dtype!r}: an adapter for llama.cpp is in torch.float32 or torch.float16.",
            argument="dtype",
        )
    return dtype


def _described(contents: Contents) -> dict[str, str]:
    """Return the fields that say what the file holds, so that a served file can be recognised.

    llama-server shows the task name of each adapter.
    """
    fingerprint = {"factsmith.base_fingerprint": contents.lm.fingerprint}
    state = contents.state
    if state is None:
        return {"general.name": "factsmith", **fingerprint}
    patches = ",".join(str(origin.revision) for origin in contents.origins)
    return {
        "general.name": f"factsmith {state.revision[:12]}",
        "adapter.lora.task_name": f"{TASK}{state.revision}",
        "factsmith.revision": state.revision,
        "factsmith.patches": patches,
        **fingerprint,
    }


def _write(
    target: Path,
    arch: str,
    products: Mapping[str, LowRank],
    rank: int,
    fields: Mapping[str, str],
) -> None:
    """Write the file, all factors padded to one rank; raises OSError."""
    from gguf import GGUFType, GGUFWriter

    writer = GGUFWriter(target, arch)
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        for key, text in fields.items():
            writer.add_string(key, text)
        for name, product in products.items():
            padding = rank - product.kept
            right = torch.nn.functional.pad(product.right, (0, 0, 0, padding)).contiguous()
            left = torch.nn.functional.pad(product.left, (0, padding)).contiguous()
            writer.add_tensor(f"{name}.lora_a", right.numpy())
            writer.add_tensor(f"{name}.lora_b", left.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_updates(file: Path, names: Mapping[int, str]) -> dict[int, Tensor]:
    """Return what an adapter adds to each matrix, as llama.cpp computes it: (alpha / rank) B A.

    Args:
        file: The adapter.
        names: {layer: the name of its down-projection}.

    Returns:
        {layer: (d_model, d_ff) float32}.

    Raises:
        NumericsError: when a tensor is missing.
    """
    header = read_header(file)
    alpha = float(header.fields["adapter.lora.alpha"])
    updates = {}
    for layer, name in names.items():
        a, b = (_factor(header, f"{name}.lora_{side}") for side in "ab")
        updates[layer] = (alpha / b.shape[1] * (b.double() @ a.double())).float()
    return updates


def _factor(header: Header, name: str) -> Tensor:
    entry = entry_of(header, name)
    if entry is None:
        raise NumericsError(
            f"The adapter that was written lacks {name}. Nothing was kept; please report this."
        )
    return read_tensor(header, entry)


def _check_updates(products: Mapping[int, LowRank], updates: Mapping[int, Tensor]) -> None:
    """Raise NumericsError unless the file holds the products that were written."""
    for layer, product in products.items():
        expected = product.left.double() @ product.right.double()
        off = float((updates[layer].double() - expected).norm())
        if not off <= 1e-6 * float(expected.norm()):
            raise NumericsError(
                f"Layer {layer}: the adapter that was read back differs from the patch. Nothing "
                "was kept; please report this."
            )
