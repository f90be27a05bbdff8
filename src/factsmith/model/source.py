"""Where a model comes from, and whether its files can be what its config says.

    source = find_source("owner/name@main")        # a bundled model, a folder, or a hub id
    config = read_config(source)                   # no file of the model is run
    check_sizes(source, raw)                       # before anything of that size is built

transformers builds what a config describes before it reads a weight. So the numbers of a config are
compared with the files first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from .. import atlas
from ..core.checks import check_text
from ..core.errors import InputError, ModelError, ModelNotFoundError, first_line
from .gguf_header import SUFFIX, is_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)

_LONGEST_HUB_ID = 96

_MOST_LAYERS = 10_000
"""Layers that are built without a look at the weights."""

_MOST = 10**9
"""The largest accepted size in a config."""

_SLACK = 1_000
"""How many times the numbers on disk a single matrix may have by the config."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that can be loaded.

    Attributes:
        name: What the user called it, with the revision if there is one.
        place: The folder or hub id that transformers gets.
        folder: The folder; None for a hub id.
        revision: The branch, tag or commit on the hub. None: the main one.
        trust_remote_code: Whether code that comes with the model may run.
        gguf: The GGUF file to convert first. None: transformers can load the model.
    """

    name: str
    place: str
    folder: Path | None
    revision: str | None
    trust_remote_code: bool
    gguf: Path | None = None

    @property
    def settings(self) -> str:
        """What holds the model's config, for messages."""
        return f"the {'config' if self.gguf else 'config.json'} of {self.name!r}"

    def options(self) -> dict[str, Any]:
        """Return the arguments that every loader of transformers gets.

        All are given each time: without a word on remote code, transformers asks on the terminal.
        """
        return {
            "local_files_only": self.folder is not None,
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }

    def refuses_code(self, error: Exception) -> ModelError | None:
        """Return our error if transformers refused to run code of the model; otherwise None."""
        if "trust_remote_code" not in str(error):
            return None
        return ModelError(
            f"{self.name!r} brings code of its own, which was not run. Read that code; if you "
            "trust it, load the model with trust_remote_code",
            argument="trust_remote_code",
        )


def find_source(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Return where a model is.

    A name that is neither a bundled model nor a folder nor a GGUF file is a hub id: "owner/name" or
    "name", with "@revision" if one is wanted. A folder may also hold one GGUF file and no config.

    Raises:
        InputError: An argument has the wrong type, or a folder or file was given with a revision.
        ModelNotFoundError: It cannot be the name of a model.
    """
    name = check_text(os.fspath(name_or_path), "the model")
    if not isinstance(trust_remote_code, bool):
        raise InputError(
            f"trust_remote_code is {trust_remote_code!r}; give True or False",
            argument="trust_remote_code",
        )
    if revision is not None and not check_text(revision, "revision").strip():
        raise InputError("revision is empty; give a branch, a tag or a commit", argument="revision")
    folder = atlas.folder(name) if name in atlas.names() else _folder(name)
    gguf = _gguf_file(name, folder)
    if folder is not None or gguf is not None:
        if revision is not None:
            kind = "file" if folder is None else "folder"
            raise InputError(
                f"revision is {revision!r}, and {name!r} is a {kind}, which has no revisions; "
                "leave it out, or give a hub id",
                argument="revision",
            )
        if folder is not None and gguf is None:
            _check_folder(name, folder)
        return Source(
            name=name if folder is None or gguf is None else str(gguf),
            place=str(folder or gguf),
            folder=folder,
            revision=None,
            trust_remote_code=trust_remote_code,
            gguf=gguf,
        )
    place, at, stated = name.partition("@")
    if at and revision is None:
        revision = stated
    if (at and not revision) or not is_hub_id(place) or Path(place).exists():
        raise ModelNotFoundError(
            f"there is no model {name!r}: it is neither a folder nor a bundled model "
            f"({bundled()}).{_perhaps(name)} Give one of these, a folder with config.json, weights "
            "and tokenizer, a GGUF file, or a hub id such as owner/name"
        )
    return Source(
        name=place if revision is None else f"{place}@{revision}",
        place=place,
        folder=None,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _folder(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name.strip() and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user, a null character
        return None


def _gguf_file(name: str, folder: Path | None) -> Path | None:
    """Return the GGUF file that a name stands for: the file, or the only one in a folder.

    Raises:
        InputError: The folder holds several, and nothing that transformers loads.
        ModelNotFoundError: There is no file of this name, which ends as those of GGUF files do.
    """
    if folder is not None:
        files = sorted(each for each in folder.glob("*") if each.suffix.lower() == SUFFIX)
        if not files or (folder / "config.json").is_file():
            return None
        if len(files) > 1:
            names = ", ".join(each.name for each in files[:5])
            raise InputError(
                f"the folder {name!r} holds {len(files)} GGUF files ({names}); give one of them"
            )
        return files[0]
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path if is_gguf(path) else None
    except (OSError, RuntimeError, ValueError):
        return None
    if path.suffix.lower() == SUFFIX:
        raise ModelNotFoundError(
            f"there is no file {name!r}; give the path of a GGUF file, a folder, a bundled model "
            f"({bundled()}), or a hub id"
        )
    return None


def _check_folder(name: str, folder: Path) -> None:
    """Check that a folder holds a whole model."""
    if (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"the folder {name!r} holds an adapter of peft, which is a change of another model; "
            "load it with peft onto that model, call merge_and_unload(), save the result with "
            "save_pretrained, and give that folder"
        )
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"the folder {name!r} has no config.json; give a folder with a transformers model, "
            "its weights and its tokenizer"
        )


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id: "owner/name" or "name"."""
    return (
        _HUB_ID.fullmatch(name) is not None
        and len(name) <= _LONGEST_HUB_ID
        and ".." not in name
        and "--" not in name
    )


def _perhaps(name: str) -> str:
    near = get_close_matches(name, atlas.names(), 1, 0.75)
    return f" Perhaps {near[0]!r} is meant." if near else ""


def bundled() -> str:
    """Return the names of the bundled models, for an error."""
    return ", ".join(atlas.names()) or "none are installed"


def read_config(source: Source) -> Any:
    """Return the config of a model, after a check of its numbers.

    Raises:
        ModelNotFoundError: The hub has no such model, or cannot be reached.
        ModelError: The config cannot be used, the weights cannot be what it says, or the model
            needs code of its own.
    """
    options = source.options()
    try:
        raw, _ = PreTrainedConfig.get_config_dict(
            source.place,
            local_files_only=options["local_files_only"],
            revision=options["revision"],
        )
    except Exception as error:  # hub, network and JSON errors alike
        raise _no_config(source, error) from error
    check_sizes(source, raw)
    try:
        return AutoConfig.from_pretrained(source.place, **options)
    except Exception as error:  # validation errors, and code of the model
        raise source.refuses_code(error) or _no_config(source, error) from error


def _no_config(source: Source, error: Exception) -> ModelError:
    if source.folder is not None:
        return ModelError(f"the config.json of {source.name!r} cannot be used: {first_line(error)}")
    return ModelNotFoundError(
        f"there is no model {source.name!r}: there is no folder of that name and no bundled model "
        f"({bundled()}).{_perhaps(source.name)} As a hub id it was not found, or the hub cannot be "
        f"reached: {first_line(error).rstrip('.')}. Check the name and the network, or give a "
        "folder or a bundled model"
    )


# ── the numbers of a config ───────────────────────────────────────────────────────────────────────


def check_sizes(source: Source, config: Any, shapes: list[tuple[int, ...]] | None = None) -> None:
    """Check that the numbers of a config can be those of a model, and those of these weights.

    Args:
        source: The model.
        config: The config, as plain values.
        shapes: The shapes of all tensors. None: those of the folder's safetensors.

    Raises:
        ModelError: They cannot.
    """
    if not isinstance(config, Mapping):
        raise ModelError(
            f"{source.settings} cannot be used: it holds a "
            f"{type(config).__name__}; copy or download it again"
        )
    if config.get("quantization_config") and shapes is None:
        return  # such weights are packed, and the model is refused later in words of its own
    if shapes is None and source.folder is not None:
        shapes = _shapes(source, source.folder)
    for part in _parts(config):
        for key, value in part.items():
            name = str(key)
            if _LAYERS.fullmatch(name) and _is_count(value):
                _check_layers(source, name, value, shapes)
            elif _is_count(value) and value > _MOST and not _NO_SIZE.search(name):
                raise _absurd(source, name, value, f"at most {_MOST:,} is accepted")
        if shapes is not None:
            _check_matrices(source, part, shapes)


_LAYERS = re.compile(r"n_layers?|(num|n)_(\w+_)?layers|num_(hidden_)?layers|(\w+_)?layers")

_NO_SIZE = re.compile(r"theta|base|_id$|_ids$|index|seed|positions?|length|window|freq|tokens?$")

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")

_OTHERS = re.compile(
    r"vocab_size|(\w+_)?intermediate_size|n_inner|ffn_dim|ffn_hidden_size|d_ff|n_positions"
    r"|(\w+_)?num_attention_heads|(num|n)_(\w+_)?experts|n_head"
)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and the configs inside it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _shapes(source: Source, folder: Path) -> list[tuple[int, ...]] | None:
    """Return the shapes of all tensors on disk, from the headers; None without safetensors."""
    files = sorted(folder.glob("model*.safetensors"))
    shapes: list[tuple[int, ...]] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                shapes += [tuple(file.get_slice(name).get_shape()) for name in names]
        except (OSError, SafetensorError) as error:
            raise unreadable(source.name, error) from None
    return shapes if files else None


def unreadable(name: str, error: Exception) -> ModelError:
    """Return the error for weights that cannot be read."""
    return ModelError(
        f"the weights of {name!r} cannot be read ({type(error).__name__}: {first_line(error)}); "
        "copy or download them again"
    )


def _check_layers(
    source: Source, name: str, value: int, shapes: list[tuple[int, ...]] | None
) -> None:
    if shapes is None:
        if value > _MOST_LAYERS:
            raise _absurd(source, name, value, f"at most {_MOST_LAYERS:,} layers are accepted")
    elif value > max(len(shapes), 100):
        raise _absurd(source, name, value, f"the weights are {len(shapes):,} tensors")


def _check_matrices(source: Source, part: Mapping[str, Any], shapes: list[tuple[int, ...]]) -> None:
    """Check that no matrix of the config is many times larger than all weights on disk."""
    n_numbers = sum(_product(shape) for shape in shapes)
    widths = {name: part[name] for name in _WIDTHS if _is_count(part.get(name))}
    width = max(widths.values(), default=1)
    sizes = {name: x for name, x in part.items() if _OTHERS.fullmatch(str(name)) and _is_count(x)}
    for name, value in (sizes | widths).items():
        if value * (value if name in widths else width) > _SLACK * max(n_numbers, 10**6):
            raise _absurd(source, name, value, f"the weights are {n_numbers:,} numbers")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _absurd(source: Source, name: str, value: int, why: str) -> ModelError:
    return ModelError(
        f"{source.settings} says {name} = {value:,}, but {why}; copy or download the model again"
    )


def runs_remote_code(lm: Any) -> bool:
    """Return whether a model or its tokenizer is of a class that came with its files."""
    parts = (lm.module, lm.config, lm.tokenizer)
    return any(type(part).__module__.split(".")[0] == "transformers_modules" for part in parts)
