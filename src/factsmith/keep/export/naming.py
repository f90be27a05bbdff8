"""The name of a model in the files of an export, which travel to other machines.

    name = portable_name(lm)
    name.text, name.revision, name.kind     # "owner/name", None, "hub"

A path is of one machine alone. So a model from a folder is named by its hub id, if the folder is in
the cache of the hub. Any other folder or file is named by its own name, without its parents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ... import atlas
from ...model.language_model import LanguageModel
from ...model.source import is_hub_id

_CACHED = "models--"
"""How the name of a model's folder in the hub's cache begins: models--owner--name."""


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """A name of a model that no machine's paths are in.

    Attributes:
        text: The name.
        revision: The branch, tag or commit of a hub id. None: not stated.
        kind: "hub": a hub id. "bundled": a bundled model. "folder" or "file": the name of the
            folder or GGUF file that it was loaded from. "memory": the name of its class. "given":
            a path that the caller chose.
    """

    text: str
    revision: str | None
    kind: Literal["hub", "bundled", "folder", "file", "memory", "given"]

    def __str__(self) -> str:
        """Return the name, with the revision if there is one."""
        return self.text if self.revision is None else f"{self.text}@{self.revision}"


def portable_name(lm: LanguageModel) -> ModelName:
    """Return the name of a model for the files of an export."""
    if lm.gguf is not None:
        return ModelName(text=lm.gguf.path.name, revision=None, kind="file")
    place = loaded_from(lm)
    if lm.name in atlas.names():
        return ModelName(text=lm.name, revision=None, kind="bundled")
    if not place:
        return ModelName(text=lm.name, revision=None, kind="memory")
    if Path(place).is_dir() or not is_hub_id(place):
        return _of_folder(Path(place))
    stated, _, revision = lm.name.partition("@")
    return ModelName(
        text=place, revision=revision if revision and stated == place else None, kind="hub"
    )


def loaded_from(lm: LanguageModel) -> str:
    """Return where a model was loaded from, a folder or a hub id; "" for one made in memory."""
    return str(getattr(lm.config, "_name_or_path", "") or "").strip()


def _of_folder(folder: Path) -> ModelName:
    """Return the name of a model from a folder."""
    full = folder.resolve()
    for name in atlas.names():
        if full == atlas.folder(name).resolve():
            return ModelName(text=name, revision=None, kind="bundled")
    for path in (folder.absolute(), full):
        if (cached := _in_cache(path)) is not None:
            return cached
    return ModelName(text=full.name or "model", revision=None, kind="folder")


def _in_cache(folder: Path) -> ModelName | None:
    """Return the hub id of a folder models--owner--name/snapshots/COMMIT; None for another one."""
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith(_CACHED):
        return None
    name = folder.parent.parent.name.removeprefix(_CACHED).replace("--", "/")
    return ModelName(text=name, revision=folder.name, kind="hub") if is_hub_id(name) else None
