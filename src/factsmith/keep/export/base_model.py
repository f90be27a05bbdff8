"""The base model that an adapter is loaded onto: its name, and whether it is the right model.

base = find_base_model(lm, "owner/name", check=True)
base.name        # for adapter_config.json: what the caller gave, or a name without a path
base.place       # where this machine has it
base.checked     # its fingerprint is that of the model that the patches are for
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from ... import atlas
from ...core.checks import check_text
from ...core.errors import FingerprintError, InputError, ModelError
from ...core.identity import same_model
from ...core.progress import Progress, tell
from ...model.language_model import LanguageModel
from ...model.load import load
from ...model.source import is_hub_id, runs_remote_code
from .dtypes import dtype_name
from .naming import loaded_from, portable_name

_UNASKED = "the export was not verified"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The base model of an adapter.

    Attributes:
        name: What the files of the adapter call it: a hub id, a path that the caller gave, or the
            name of a folder without its parents.
        revision: The branch, tag or commit of a hub id. None: the main one, or no hub id.
        place: Where it is loaded from to read the adapter back: a folder or a hub id.
        is_hub_id: Whether the name is a hub id.
        given: Whether the caller gave the name.
        checked: Whether the model of this name has the fingerprint that the patches are for, or is
            the one that was loaded.
        why: Why it was not checked, as a clause. "": it was.
        warnings: What the caller should know, in sentences.
    """

    name: str
    revision: str | None
    place: str
    is_hub_id: bool
    given: bool
    checked: bool
    why: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def standing(self) -> str:
        """Whether it was checked, in words."""
        if not self.checked:
            return f"not checked, because {self.why}"
        if not self.given:
            return "the model was loaded from it"
        return "it has the fingerprint that the patches are for"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**vars(self), "warnings": list(self.warnings)}


def find_base_model(
    lm: LanguageModel, base: str | None, *, check: bool, progress: Progress | None = None
) -> BaseModel:
    """Find the base model of an adapter, and compare its fingerprint where it is on this machine.

    Args:
        lm: The model that the patches are for, without them.
        base: The name to write: a hub id, a bundled model, or a folder. It is written as it was
            given. None: where the model was loaded from, without a path.
        check: Whether to load the model of a given name and to compare its fingerprint. Nothing is
            downloaded.
        progress: Gets what is being done.

    Raises:
        InputError: when base is empty or a file, or there is no name at all.
        FingerprintError: when the given name is of another model.
        ModelError: when a given folder cannot be loaded.
    """
    if base is not None and check_text(base, "base").strip():
        return _given(lm, base, check, progress)
    name = portable_name(lm)
    if name.kind == "memory" or base is not None:
        raise InputError(
            f"{lm.name} was not loaded from a folder or the hub, so nothing says which model the "
            "adapter belongs to. Save the base model with save_pretrained, and give its folder or "
            "its hub id as base."
            if base is None
            else "base is empty. Give the folder or the hub id of the base model.",
            argument="base",
        )
    return BaseModel(
        name=name.text,
        revision=name.revision,
        place=_own_place(lm),
        is_hub_id=name.kind == "hub",
        given=False,
        checked=True,
        warnings=() if name.kind == "hub" else (_vague(name.text, name.kind),),
    )


def _vague(name: str, kind: str) -> str:
    """Return a warning that a name alone does not say where a model is."""
    why, places = {
        "folder": ("it was loaded from a folder", "hub id"),
        "file": ("it was loaded from a GGUF file", "hub id"),
        "bundled": ("it comes with factsmith", "folder"),
    }[kind]
    return (
        f"adapter_config.json names the base model only {name!r}, because {why}. Programs that "
        f"load the base model by this name do not find it: give its {places} as base."
    )


def _given(lm: LanguageModel, base: str, check: bool, progress: Progress | None) -> BaseModel:
    """Return the base model of a name that the caller gave."""
    folder = _folder(base)
    stated, _, at = base.partition("@")
    is_hub = folder is None and is_hub_id(stated)
    name, revision = (stated, at or None) if is_hub else (base, None)
    loaded = _own_place(lm)
    place = folder
    if is_hub:
        same = (name, revision) == (loaded, portable_name(lm).revision)
        place = loaded if same else _cached(name, revision)
    why = ""
    if place is None:
        why = "the model of this name is not on this machine"
    elif place != loaded:
        why = _check_place(lm, base, place, is_hub, progress) if check else _UNASKED
    return BaseModel(
        name=name,
        revision=revision,
        place=place or loaded or name,
        is_hub_id=is_hub,
        given=True,
        checked=not why,
        why=why,
        warnings=tuple(_remarks(base, why)),
    )


def _remarks(base: str, why: str) -> list[str]:
    """Return the warnings on a name that the caller gave."""
    remarks = []
    if Path(base).is_absolute() or base.startswith("~"):
        remarks.append(
            f"adapter_config.json names the base model by a full path, {base}, which other "
            "machines may not have. Give its hub id as base if the adapter is to travel."
        )
    if why:
        remarks.append(
            f"Nothing says that {base!r} is the model that the patches are for: it was not "
            f"checked, because {why}."
        )
    return remarks


def _folder(base: str) -> str | None:
    """Return the full path of a folder or a bundled model; None for another name."""
    if base in atlas.names():
        return str(atlas.folder(base).resolve())
    try:
        path = Path(base).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user, a null character
        return None
    if is_file:
        raise InputError(
            f"base is {base!r}: that is a file. Give the folder or the hub id of the base model; "
            "peft cannot load an adapter onto a file.",
            argument="base",
        )
    return str(path.resolve()) if is_folder else None


def _cached(name: str, revision: str | None) -> str | None:
    """Return the folder of a hub id in the cache of this machine; None if it is not there."""
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # the hub accepts fewer names than `is_hub_id`
        return None
    return str(Path(config).parent) if isinstance(config, str) else None


def _own_place(lm: LanguageModel) -> str:
    """Return where a model was loaded from, a folder as a full path; "" for one in memory."""
    place = loaded_from(lm)
    return str(Path(place).resolve()) if place and Path(place).is_dir() else place


def _check_place(
    lm: LanguageModel, base: str, place: str, is_cache: bool, progress: Progress | None
) -> str:
    """Compare the fingerprint of a folder's model; return why it cannot be compared, or "".

    Raises:
        FingerprintError: when it is another model.
        ModelError: when the caller gave the folder and it cannot be loaded.
    """
    tell(progress, "checking the base model", 0, None)
    try:
        other = load(place, dtype=lm.dtype, trust_remote_code=runs_remote_code(lm))
    except ModelError:
        if not is_cache:
            raise
        return "its files in the cache of the hub cannot be loaded"
    if not same_model(other.fingerprint, lm.fingerprint):
        raise FingerprintError(
            f"base is {base!r}, whose fingerprint is {other.fingerprint[:10]} in "
            f"{dtype_name(lm.dtype)}; the patches are for {portable_name(lm)}, whose fingerprint "
            f"is {lm.fingerprint[:10]}. An adapter fits one model only: give the folder or the hub "
            "id of that model.",
            argument="base",
        )
    return ""
