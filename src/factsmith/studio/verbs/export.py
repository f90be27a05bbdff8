"""The room Export and push, its first half: files for other programs.

Exports are written to `exports/NAME` in the workspace. `push` has the servers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ...core.errors import DamagedError, InputError
from ...core.files import make_folder
from ...core.progress import Progress
from ...core.tables import Table, counted
from ...keep.export.card import CARD
from ...keep.export.formats import FILES, check_export, check_saved
from ...keep.export.manifest import FILE, Manifest, read_manifest
from ...keep.export.record import size_text
from ...keep.export.single import SUFFIX
from ..arguments import Arguments
from ..desk import Desk, Place
from ..facts import option_words, program, quoted, shell
from ..names import checked_name, inside
from ..verb import Answer, Verb
from .ledger import NoArguments, naming

FormatName = Literal["adapter", "checkpoint", "patch", "gguf", "gguf-adapter"]

PURPOSES: Mapping[str, str] = {
    "adapter": "A LoRA for the base model, in the layout of PEFT: vLLM and transformers load it "
    "next to the base model. Kilobytes.",
    "checkpoint": "The whole model with its patches merged, in the layout of transformers.",
    "patch": "The patches alone, which another workspace of factsmith imports.",
    "gguf": "The base GGUF file with patched tensors, for llama.cpp.",
    "gguf-adapter": "A LoRA for llama.cpp, next to a base GGUF file. Kilobytes.",
}
"""{format: what it is for}."""

LARGEST_ARCHIVE = 500 * 10**6
"""Bytes of the files of an export that can be downloaded as one archive."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_LONGEST_CARD = 20_000


class ExportArguments(Arguments):
    """What to write."""

    name: str = Field(
        default="patched",
        title="Name",
        description="The name of the export in the workspace's folder exports.",
    )
    format: FormatName = Field(
        default="adapter",
        title="Format",
        description="What is written. It decides which programs can read the export.",
    )
    revision: str = Field(
        default="",
        title="Revision",
        description="Export the state at this revision. Empty: the one that is checked out.",
        json_schema_extra={"widget": "revision"},
    )
    dtype: Literal["", "float32", "float16", "bfloat16"] = Field(
        default="",
        title="Dtype",
        description="Of a checkpoint or an adapter. Empty: as the model is loaded; float32 for an "
        "adapter.",
        json_schema_extra={"advanced": True},
    )
    tensor_type: Literal["", "F16", "Q8_0", "BF16", "F32"] = Field(
        default="",
        title="GGUF type",
        description="Of the patched tensors in a GGUF file. Empty: F16.",
        json_schema_extra={"advanced": True},
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        title="Rank",
        description="The largest rank of an adapter; more is cut off. Empty: the exact rank.",
        json_schema_extra={"advanced": True},
    )
    base: str = Field(
        default="",
        title="Base model",
        description="The hub id of the base model to name in an adapter, as owner/name. Empty: "
        "where the model comes from.",
        json_schema_extra={"advanced": True},
    )
    verify: bool = Field(
        default=True,
        title="Read it back",
        description="Load the export in another process, and compare it with the patched model.",
        json_schema_extra={"advanced": True},
    )
    overwrite: bool = Field(
        default=False,
        title="Replace",
        description="Replace an earlier export of this name.",
        json_schema_extra={"advanced": True},
    )


# ── exports ───────────────────────────────────────────────────────────────────────────────────────


def _export(desk: Desk, arguments: ExportArguments, progress: Progress) -> Answer:
    if arguments.base and not _HUB_ID.fullmatch(arguments.base):
        raise InputError(
            f"base is {arguments.base[:80]!r}; give a hub id such as owner/name, or leave it out",
            argument="base",
        )
    if arguments.format == "gguf" and desk.lm.gguf is None:
        raise InputError(impossible(desk)["gguf"], argument="format")
    options = _options(arguments)
    target = _target(desk.folder, arguments)
    check_export(target, arguments.format, **options)
    revision = arguments.revision or None
    _check_patches(desk, arguments.format, revision)
    make_folder(target.parent)
    made = desk.bench.export(
        target, arguments.format, revision=revision, progress=progress, **options
    )
    return Answer(
        made.to_dict(),
        made.tables(),
        view={"export": _listed(target), "purpose": PURPOSES[arguments.format]},
    )


def _options(arguments: ExportArguments) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
        "tensor_type": arguments.tensor_type or None,
        "rank": arguments.rank,
        "base": arguments.base or None,
        "verify": arguments.verify,
        "overwrite": arguments.overwrite,
    }


def _target(workspace: Path, arguments: ExportArguments) -> Path:
    """Return where an export goes."""
    name = arguments.name
    if arguments.format in FILES and not name.endswith(SUFFIX):
        name += SUFFIX
    return inside(exports_folder(workspace), name, "name")


def _check_patches(desk: Desk, format: str, revision: str | None) -> None:
    """Check before the work that there are patches, and that the format can hold them."""
    with desk.ledger() as ledger:
        with naming("revision"):
            active = ledger.active(None if revision is None else ledger.resolve(revision))
        if not active:
            raise InputError(
                "no patch is in effect there, so there is nothing to export; choose another "
                "revision, or patch first",
                argument="revision",
            )
        check_saved(map(ledger.delta_folder, active), format)


def _exports(desk: Desk, arguments: NoArguments, progress: Progress) -> Answer:
    folder = exports_folder(desk.folder)
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    exports = [each for name in names if (each := _listed(folder / name)) is not None]
    rows = [(each["name"], each["format"], each["facts"], each["size"]) for each in exports]
    columns = {"export": "<", "format": "<", "holds": "<", "size": ">"}
    return Answer(
        {"exports": exports},
        [Table(counted(len(rows), "export"), columns, rows)],
        view={"exports": exports},
    )


def _listed(path: Path) -> dict[str, Any] | None:
    """Return what an export is; None where the path is no export."""
    manifest: Manifest | None = None
    with contextlib.suppress(DamagedError, OSError):
        if path.is_symlink() or path.name.startswith("."):
            return None
        if path.is_dir():
            manifest = read_manifest(path)
        elif path.suffix == SUFFIX:
            manifest = read_manifest(path.parent, f"{path.name}.{FILE}")
    if manifest is None:
        return None
    n_bytes = sum(file.bytes for file in manifest.files.values())
    card = path / CARD
    text = ""
    with contextlib.suppress(OSError, ValueError):
        text = card.read_text("utf-8")[:_LONGEST_CARD] if card.is_file() else ""
    return {
        "name": path.name,
        "path": str(path),
        "purpose": PURPOSES[manifest.factsmith],
        "format": manifest.factsmith,
        "facts": counted(sum(len(patch.facts) for patch in manifest.patches), "fact"),
        "revision": manifest.revision,
        "bytes": n_bytes,
        "size": size_text(n_bytes),
        "can_download": n_bytes <= LARGEST_ARCHIVE,
        "files": {name: size_text(file.bytes) for name, file in manifest.files.items()},
        "card": text,
    }


def exports_folder(workspace: Path) -> Path:
    """Return the folder of the exports of a workspace."""
    return workspace / "exports"


def _why_not(desk: Desk, values: Mapping[str, Any]) -> dict[str, str]:
    """Return why nothing can be written now, and which fields a format has no use for."""
    format = str(values.get("format") or "adapter")
    reasons = {}
    if len(why := impossible(desk)) == len(PURPOSES):
        reasons[""] = why[format]
    if format not in ("adapter", "gguf-adapter", "checkpoint"):
        reasons["dtype"] = f"A {format} has no dtype of its own."
    if format not in ("adapter", "gguf-adapter"):
        reasons["rank"] = "Only adapters have a rank."
    if format != "adapter":
        reasons["base"] = "Only an adapter names its base model."
    if format != "gguf":
        reasons["tensor_type"] = "Only a GGUF file has it."
    return reasons


def _offered(desk: Desk) -> dict[str, list[tuple[str, str]]]:
    """Return the formats with what each is for, and why it cannot be written now."""
    reasons = impossible(desk)
    labels = {
        name: f"{purpose} Not now: {reasons[name]}" if name in reasons else purpose
        for name, purpose in PURPOSES.items()
    }
    return {"format": [(name, f"{name}: {label}") for name, label in labels.items()]}


def impossible(desk: Desk) -> dict[str, str]:
    """Return {format: why it cannot be written now}."""
    reasons: dict[str, str] = {}
    with desk.ledger() as ledger:
        folders = [ledger.delta_folder(patch) for patch in ledger.active()]
    if not folders:
        return dict.fromkeys(PURPOSES, "No patch is in effect. Patch a fact first.")
    for format in ("adapter", "gguf-adapter"):
        try:
            check_saved(folders, format)
        except InputError as error:
            reasons[format] = str(error)
    if importlib.util.find_spec("peft") is None:
        reasons.setdefault(
            "adapter",
            "peft, which reads it back, is not installed: pip install 'factsmith[adapter]'.",
        )
    if desk.lm.gguf is None:
        reasons["gguf"] = "The workspace's model does not come from a GGUF file."
    elif importlib.util.find_spec("gguf") is None:
        reasons["gguf"] = "The library gguf is not installed: pip install 'factsmith[gguf]'."
    return reasons


# ── the same as code and as a command ─────────────────────────────────────────────────────────────


def _place_of(arguments: ExportArguments, place: Place) -> str:
    name = checked_name(arguments.name, "name")
    suffix = SUFFIX if arguments.format in FILES and not name.endswith(SUFFIX) else ""
    return str(exports_folder(Path(place.workspace)) / f"{name}{suffix}")


def _export_in_python(arguments: ExportArguments, place: Place) -> str:
    options: list[str] = [f", revision={quoted(arguments.revision)}"] if arguments.revision else []
    options += [f", dtype=torch.{arguments.dtype}"] if arguments.dtype else []
    for name in ("tensor_type", "rank", "base"):
        if value := getattr(arguments, name):
            options.append(f", {name}={quoted(value)}")
    options += [] if arguments.verify else [", verify=False"]
    options += [", overwrite=True"] if arguments.overwrite else []
    target, format = quoted(_place_of(arguments, place)), quoted(arguments.format)
    return program(
        place,
        f"made = bench.export({target}, {format}{''.join(options)})",
        "print(json.dumps(made.to_dict()))",
        uses="import torch\n" if arguments.dtype else "",
    )


def _export_command(arguments: ExportArguments, place: Place) -> list[str]:
    words = option_words(
        [
            ("--format", arguments.format),
            ("--revision", arguments.revision),
            ("--dtype", arguments.dtype),
            ("--tensor-type", arguments.tensor_type),
            ("--rank", arguments.rank),
            ("--base", arguments.base),
            ("--no-verify", not arguments.verify),
            ("--overwrite", arguments.overwrite),
            ("-w", place.workspace),
        ]
    )
    return [shell("export", _place_of(arguments, place), *words)]


EXPORTS = Verb(
    "exports",
    "Exports",
    "List the exports of this workspace, and save them.",
    NoArguments,
    _exports,
    lambda arguments, place: (
        "import json\nfrom pathlib import Path\n\n"
        f"folder = Path({quoted(str(exports_folder(Path(place.workspace))))})\n"
        "print(json.dumps(sorted(each.name for each in folder.glob('*'))))\n"
    ),
    lambda arguments, place: [],
    kind="instant",
    needs_form=False,
    template="answers/exports.html",
)
EXPORT = Verb(
    "export",
    "Write an export",
    "Write the patched model, an adapter or the patches as files for other programs.",
    ExportArguments,
    _export,
    _export_in_python,
    _export_command,
    kind="write",
    button="Write",
    options=_offered,
    disabled=_why_not,
    template="answers/export.html",
)
EXPORTING = (EXPORTS, EXPORT)
