"""Export: a workspace's patched model for other programs, or its patches for another workspace."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InputError
from ..core.tables import counted
from ..keep.ledger import Ledger
from . import completing
from .models import opened_workspace, read_moments
from .options import Device, Json, MomentsAgain, Where
from .printing import print_result
from .waiting import progress

_DTYPES = ("float32", "float16", "bfloat16")


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `factsmith export --format patch` wrote.")
    ],
    moments: MomentsAgain = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also commit facts that contradict those in effect, or that do not take.",
        ),
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Commit the patches that another workspace exported.

    They are solved again where this workspace already has patches.

    \b
    Example:
      factsmith import their-patch -w my-workspace
    """
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(progress())
        tell("checking the arguments", 0, None)
        from ..keep.export.folder import check_patch

        with Ledger(workspace or Path()) as ledger:
            check_patch(folder, ledger.fingerprint)
        given = read_moments(moments, tell)
        bench = stack.enter_context(opened_workspace(workspace, device, tell))
        revisions = bench.import_patches(folder, moments=given, force=force, progress=tell)
    lines = [("committed", f"{revision.id[:10]} {revision.message}") for revision in revisions]
    if revisions:
        report = revisions[-1].report
        lost = report["lost"]
        what = "all hold" if not lost else f"{report['asked'] - len(lost):,} hold"
        lines.append(("asked", f"{counted(report['asked'], 'fact')} in effect: {what}"))
        lines += [("lost:", words) for words in lost]
    nothing = [("nothing", "to commit: everything in it is already in effect")]
    result = {"revisions": [revision.to_dict() for revision in revisions]}
    print_result(result, [], as_json, lines or nothing)


def export(  # house: Typer reads one parameter for each option
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A new folder to write into; for GGUF a new file.gguf. With several revisions, a "
            "folder for all of them.",
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            autocompletion=completing.formats,
            help="checkpoint: the patched model. adapter: a PEFT LoRA for the base model. "
            "patch: for another workspace. gguf: the base GGUF file, patched. "
            "gguf-adapter: a LoRA for llama.cpp.",
        ),
    ] = "checkpoint",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16.",
            show_default="as the model is loaded; float32 for an adapter",
        ),
    ] = None,
    tensor_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Type of the patched tensors in a GGUF file: F16, Q8_0, BF16 or F32.",
            show_default="F16",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Largest rank of an adapter. More is cut off by SVD.",
            show_default="the exact rank",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Base model to name in an adapter: a hub id or a folder, written as given. For "
            "GGUF: the file of the base model.",
            show_default="the model's hub id, or the name of its folder",
        ),
    ] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            autocompletion=completing.revisions,
            help="Export the state at this revision; the checkout stays. May be repeated: each "
            "is written into FOLDER under the first 12 digits of its id.",
            show_default="the one that is checked out",
        ),
    ] = None,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify", help="Do not load it back and compare it with the patched model."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.")
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write the patched model, an adapter, or the patches.

    Other programs can use them without factsmith. The result is read back and compared with the
    patched model before it is kept. A GGUF file keeps all but the patched tensors, byte for byte.

    \b
    Examples:
      factsmith export my-adapter --format adapter
      factsmith export my-model --dtype bfloat16 -w my-workspace
      factsmith export patched.gguf --format gguf
      factsmith export adapters -f adapter --revision 5c1e02 --revision 77a0d4
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"--dtype is {dtype!r}; expected {', '.join(_DTYPES)}")
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(progress())
        tell("checking the arguments", 0, None)
        import torch

        from ..keep.export.formats import check_export

        options: dict[str, Any] = {
            "dtype": None if dtype is None else getattr(torch, dtype),
            "tensor_type": tensor_type,
            "rank": rank,
            "base": base,
            "verify": not no_verify,
            "overwrite": overwrite,
        }
        references = revision or []
        several = len(references) > 1
        check_export(folder, format, several=several, **options)
        with Ledger(workspace or Path()) as ledger:
            _check_revisions(ledger, references, format)
        bench = stack.enter_context(opened_workspace(workspace, device, tell))
        if several:
            exports = bench.export_several(folder, references, format, **options, progress=tell)
        else:
            at = references[0] if references else None
            exports = (bench.export(folder, format, revision=at, **options, progress=tell),)
    tables = [table for each in exports for table in each.tables()]
    records = [each.to_dict() for each in exports]
    print_result({"exports": records} if several else records[0], tables, as_json)


def _check_revisions(ledger: Ledger, references: list[str], format: str) -> None:
    """Check before a model is loaded that each revision has patches that the format can hold."""
    from ..keep.export.formats import check_saved
    from ..keep.exporting import distinct_revisions

    for identity in distinct_revisions(ledger, references) if references else [None]:
        active = ledger.active(identity)
        if not active:
            where = "the workspace" if identity is None else f"revision {identity[:12]}"
            raise InputError(
                f"{where} carries no patch to export; `factsmith log` lists the patches"
            )
        check_saved(map(ledger.delta_folder, active), format)
