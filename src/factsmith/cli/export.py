"""Export: a workspace's patched model for other programs, or its patches for another workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import InputError
from .common import Device, Json, Where, line, opened, print_result, progress, show_tables

_DTYPES = ("float32", "float16", "bfloat16")


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What `factsmith export --format patch` wrote.")
    ],
    moments: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Second moments, if patches are solved again.",
            show_default="the workspace's, or the model's",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Also against facts that are here, and when a fact does not take."
        ),
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Commit another workspace's patches here; they are solved again for the patches that are here already.

    \b
    Example:
      factsmith import their-patch -w my-workspace
    """
    with progress() as tell, opened(None, workspace or Path(), device, tell) as (_, bench):
        assert bench is not None
        from ..corpus.moments_store import load_moments

        given = None if moments is None else load_moments(moments)
        made = bench.import_patches(folder, moments=given, force=force, progress=tell)

    def show(console: Console) -> None:
        for revision in made:
            line(console, "committed", f"{revision.id[:10]} {revision.message}")
        if not made:
            line(console, "nothing", "to take in: every fact is in effect already")

    print_result({"revisions": [revision.to_dict() for revision in made]}, show, as_json)


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder to write into.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="checkpoint: the model, merged; adapter: PEFT LoRA for the base model; patch: for another workspace.",
        ),
    ] = "checkpoint",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16.",
            show_default="as the model is loaded; an adapter float32",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Of an adapter, at most; what is more is truncated by SVD.",
            show_default="the exact rank",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Base model to note in an adapter, a folder or hub id.",
            show_default="where the model is from",
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
    """Write the patched model, or its patches, for programs that know nothing of factsmith.

    What is written is loaded back in a process of its own and compared with the patched model before it is kept.

    \b
    Examples:
      factsmith export my-adapter --format adapter
      factsmith export my-model --dtype bfloat16 -w my-workspace
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"--dtype is {dtype!r}; expected float32, float16 or bfloat16")
    with progress() as tell, opened(None, workspace or Path(), device, tell) as (_, bench):
        assert bench is not None
        import torch

        made = bench.export(
            folder,
            format,
            dtype=None if dtype is None else getattr(torch, dtype),
            rank=rank,
            base=base,
            verify=not no_verify,
            overwrite=overwrite,
            progress=tell,
        )
    print_result(made.to_dict(), show_tables(made.tables()), as_json)
