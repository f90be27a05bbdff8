"""How a model is loaded: its dtype, its devices, and its attention.

    how = loading_options(device="cuda:1", dtype="auto")
    how.dtype, how.device, how.device_map

Everything is checked before a weight is read.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..core.dtypes import DTYPES, SAVED_DTYPE
from ..core.errors import InputError, first_line

DISK = "disk"
"""The device map, or device, that keeps every layer in its file until it runs."""

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a model over devices, as transformers and accelerate name them."""


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a model is loaded.

    Attributes:
        dtype: The dtype of the weights; "auto" for that of the checkpoint.
        device: The device of all weights. None: `device_map` says where they go.
        device_map: As transformers takes it. None: all weights go to `device`. "disk": the layers
            stay in their files, and run on `device`.
        attention: The name of an implementation of attention. None: transformers chooses.
    """

    dtype: torch.dtype | str
    device: torch.device | None
    device_map: str | dict[str, Any] | None = None
    attention: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`."""
        spread = None if self.device_map == DISK else self.device_map
        given = {"device_map": spread, "attn_implementation": self.attention}
        return {"dtype": self.dtype} | {k: x for k, x in given.items() if x is not None}


def loading_options(
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> LoadingOptions:
    """Check how a model should be loaded.

    Args:
        device: "cpu", "cuda:1" and so on; "auto" and "disk" are the device maps of that name.
            None: the CPU.
        dtype: A floating-point dtype or its name; "auto" for that of the checkpoint. None: float32
            where the model is on the CPU, and otherwise "auto".
        device_map: Where the parts of the model go: "auto", or {path: device}. "disk": the layers
            stay in their files. The device then says where they run.
        attn_implementation: A name such as "eager" or "sdpa".

    Raises:
        InputError: There is no such dtype or device, or the package for a device map is missing.
    """
    on_disk = DISK in (device, device_map) if isinstance(device_map, (str, type(None))) else False
    if device is not None and device_map is not None and not on_disk:
        raise InputError(
            f"got device {str(device)!r} and device_map {device_map!r}; give one of them",
            argument="device_map",
        )
    wanted = _dtype(dtype)
    if attn_implementation is not None and not isinstance(attn_implementation, str):
        raise InputError(
            f"attn_implementation is {attn_implementation!r}; give a name, such as 'eager'",
            argument="attn_implementation",
        )
    argument = "device" if device_map is None else "device_map"
    if on_disk:
        place = _device("cpu" if device in (None, DISK) else device, "device")
        _check_accelerate(argument, DISK)
        return LoadingOptions(
            dtype=wanted or (torch.float32 if place.type == "cpu" else SAVED_DTYPE),
            device=place,
            device_map=DISK,
            attention=attn_implementation,
        )
    spread = device if device_map is None else device_map
    if isinstance(spread, Mapping) and not (spread and all(isinstance(k, str) for k in spread)):
        raise InputError(
            f"{argument} is {spread!r}; give {{path of a part: its device}}, such as "
            "{'': 'cpu'} for the whole model",
            argument=argument,
        )
    if isinstance(spread, Mapping) or (isinstance(spread, str) and spread in _MAPS):
        _check_accelerate(argument, spread)
        devices = list(spread.values()) if isinstance(spread, Mapping) else []
        places = {_device(place, argument).type for place in devices if place != "disk"}
        plain = places <= {"cpu"} if devices else not _has_accelerator()
        return LoadingOptions(
            dtype=wanted or (torch.float32 if plain else SAVED_DTYPE),
            device=None,
            device_map=dict(spread) if isinstance(spread, Mapping) else spread,
            attention=attn_implementation,
        )
    place = _device("cpu" if spread is None else spread, argument)
    default = torch.float32 if place.type == "cpu" else SAVED_DTYPE
    return LoadingOptions(dtype=wanted or default, device=place, attention=attn_implementation)


def _check_accelerate(argument: str, spread: Any) -> None:
    """Raise InputError if the package is missing that spreads a model."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError(
            f"{argument} {spread!r} needs the package accelerate, which is not installed; "
            "install it with `pip install accelerate`, or name one device: cpu, cuda, cuda:1 "
            "or mps",
            argument=argument,
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if dtype is None or dtype == SAVED_DTYPE:
        return dtype
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, (str, torch.dtype)) or name not in DTYPES:
        raise InputError(
            f"dtype is {dtype!r}; give {', '.join(DTYPES)}, or {SAVED_DTYPE} for the dtype of the "
            "checkpoint",
            argument="dtype",
        )
    return getattr(torch, name)  # type: ignore[no-any-return]


def _device(device: Any, argument: str) -> torch.device:
    """Return a device, after it was used."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        if reason.startswith("Expected one of"):  # torch lists twenty kinds of devices
            reason = "torch has no device of that name"
        raise InputError(
            f"device {str(device)!r} cannot be used ({reason}); give cpu, cuda, cuda:1 or mps, or "
            "auto to spread the model over all devices",
            argument=argument,
        ) from None
    return place


def _has_accelerator() -> bool:
    return (
        torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
    )


def check_attention(name: str, auto: Any, config: Any, options: LoadingOptions) -> None:
    """Check that a model has the implementation of attention that it should be loaded with.

    The model is built without its weights.

    Args:
        name: The model, for the error.
        auto: The class of transformers that loads it.
        config: Its config. It does not change.
        options: How it is loaded.

    Raises:
        InputError: The model lacks that implementation, or this machine does.
    """
    wanted = options.attention
    if wanted is None:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = [each for each in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in each]
    names = sorted({"eager", *names})
    if wanted in names and (why := _lack(auto, config, wanted)) is None:
        return
    usable = ", ".join(each for each in names if each != wanted and not _lack(auto, config, each))
    reason = "transformers has none of that name" if wanted not in names else why
    raise InputError(
        f"{name!r} cannot be loaded with attn_implementation {wanted!r} ({reason}); give one of "
        f"{usable}, or leave it out",
        argument="attn_implementation",
    )


def _lack(auto: Any, config: Any, wanted: str) -> str | None:
    """Return why a model cannot have an implementation of attention; None if it can."""
    try:
        with torch.device("meta"):
            built = auto.from_config(copy.deepcopy(config), attn_implementation=wanted)
    except (ValueError, ImportError, KeyError) as error:
        return first_line(error).split(". ")[0].rstrip(".")
    taken = getattr(built.config, "_attn_implementation", wanted)
    return None if taken == wanted else f"transformers would take {taken!r} instead"
