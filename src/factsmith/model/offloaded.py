"""Load a model so that its layers stay in their files, and take them over from accelerate.

    spread = disk_map(source, auto, config, device)        # as transformers takes a device map
    module = auto.from_pretrained(..., device_map=spread)
    streamed = take_over(module, name)                     # see `streamed`; None: all is in memory

transformers and accelerate know which tensor of which file is which weight. Their own hooks read a
weight when its part runs, and autograd keeps it. `streamed` reads whole layers ahead instead, and
lets go of them in backward passes too.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError, UnsupportedModelError
from ..core.progress import Progress, tell
from .absent import Fetch, stamp
from .running import RunnableModel
from .source import Source
from .streamed import Streamed
from .streamed_time import LOADING_PASSES
from .structure import module_lists

_DISK = "disk"


def disk_map(source: Source, auto: Any, config: Any, device: torch.device) -> dict[str, str]:
    """Return a device map with every layer on disk, and everything else on a device.

    Args:
        source: The model.
        auto: The class of transformers that loads it.
        config: Its config.
        device: The device on which layers run.

    Raises:
        UnsupportedModelError: The model has no list of layers.
    """
    with torch.device("meta"):
        module = auto.from_config(config, trust_remote_code=source.trust_remote_code)
    expected = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = _outermost(module_lists(module))
    chosen = [name for name, members in lists.items() if len(members) == expected]
    if not chosen:
        raise UnsupportedModelError(
            f"{source.name!r} has no list of {expected} layers (its lists: "
            f"{', '.join(lists) or 'none'}), so its layers cannot stay on disk; load it into memory"
        )
    return dict(_parts(module, "", set(chosen), str(device)))


def _outermost(lists: Mapping[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Return the lists that are in no other list."""
    return {
        name: members
        for name, members in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }


def _parts(module: nn.Module, path: str, lists: set[str], device: str) -> Iterator[tuple[str, str]]:
    """Yield each part of a module with its place: layers on disk, the others on the device."""
    if path in lists:
        yield from ((f"{path}.{name}", _DISK) for name, _ in module.named_children())
        return
    if not any(name.startswith(f"{path}.") or not path for name in lists):
        yield path, device
        return
    prefix = f"{path}." if path else ""
    yield from ((f"{prefix}{name}", device) for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        yield from _parts(child, f"{prefix}{name}", lists, device)


def take_over(module: nn.Module, name: str) -> Streamed | None:
    """Let `streamed` read the layers that accelerate has left on disk, or in the CPU's memory.

    Args:
        module: The model, as transformers has loaded it with a device map.
        name: Its name, for errors.

    Returns:
        The reader; None if all weights are in memory.

    Raises:
        UnsupportedModelError: Something other than layers is offloaded.
    """
    if not any(x.is_meta for x in module.parameters()):
        return None
    layers = [
        layer
        for members in _outermost(module_lists(module)).values()
        for layer in members
        if any(x.is_meta for x in layer.parameters())
    ]
    inside = {id(x) for layer in layers for x in layer.parameters()}
    for path, x in module.named_parameters():
        if x.is_meta and id(x) not in inside:
            raise UnsupportedModelError(
                f"{name}: {path} would be offloaded, and only layers can be; put it on a device in "
                "the device map",
                argument="device_map",
            )
    fetches = [_fetches(layer) for layer in layers]
    files = {file: stamp(file) for each in fetches for file in _files(each.values())}
    streamed = Streamed(files)
    devices = _devices(module)
    several = len(set(devices.values())) > 1
    for part in layers if several else [module]:
        _without_hooks(part)
    for layer, each in zip(layers, fetches, strict=True):
        streamed.add(layer, each)
        if several and layer in devices:
            _moving_inputs(layer, devices[layer])
    streamed.adopted_by(module)
    return streamed


def _fetches(layer: nn.Module) -> dict[tuple[nn.Module, str], Fetch]:
    """Return how each weight of a layer is read."""
    fetches = {}
    for part in layer.modules():
        for name, x in part.named_parameters(recurse=False):
            if not x.is_meta:
                fetches[part, name] = Fetch(partial(_same, x.detach()), x.device)
                continue
            hook: Any = part._hf_hook
            device = torch.device(hook.execution_device)
            index = getattr(getattr(hook.weights_map, "dataset", None), "index", {})
            entry = index.get(f"{getattr(hook.weights_map, 'prefix', '')}{name}", {})
            file = entry.get("safetensors_file")
            read, stored = partial(hook.weights_map.__getitem__, name), entry.get("weight_name", "")
            fetches[part, name] = Fetch(read, device, file, stored)
    return fetches


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _files(fetches: Any) -> Iterator[str]:
    yield from (fetch.file for fetch in fetches if fetch.file is not None)


def _devices(module: nn.Module) -> dict[nn.Module, torch.device]:
    """Return the device of each part that accelerate runs."""
    hooks = {part: getattr(part, "_hf_hook", None) for part in module.modules()}
    return {
        part: torch.device(hook.execution_device)
        for part, hook in hooks.items()
        if hook is not None and hook.execution_device is not None
    }


def _without_hooks(module: nn.Module) -> None:
    """Take accelerate's hooks off a module and its parts. No weight is read."""
    from accelerate.hooks import (
        remove_hook_from_module,
    )

    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.offload = False  # otherwise the removal reads the weights
    remove_hook_from_module(module, recurse=True)


def _moving_inputs(layer: nn.Module, device: torch.device) -> None:
    """Let a layer get its inputs on its device."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(layer, AlignDevicesHook(device))


@contextmanager
def reporting(streamed: Streamed, progress: Progress | None) -> Generator[None, None, None]:
    """Report the layers that the dry run of a model reads, for the length of a block."""
    done, total = itertools.count(1), round(LOADING_PASSES * len(streamed.layers))
    step = "checking the layers on disk"
    streamed.watch = lambda: tell(progress, step, min(next(done), total), total)
    try:
        yield
    finally:
        streamed.watch = None


def check_streamed(lm: RunnableModel, streamed: Streamed) -> None:
    """Check that what stays on disk are layers, and that streaming can serve them.

    Args:
        lm: The model, with its structure.
        streamed: The reader.

    Raises:
        UnsupportedModelError: They are not layers, or layers with experts.
    """
    routed = [ffn.layer for ffn in lm.ffn if ffn.n_experts]
    known = set(map(id, lm.layers))
    if routed or not any(id(layer) in known for layer in streamed.layers):
        what = f"layers {routed} with experts" if routed else "parts that are not its layers"
        raise UnsupportedModelError(
            f"{lm.name}: {what} would stay on disk, which works for plain layers only; load the "
            "model into memory",
            argument="device_map",
        )


def check_source(source: Source, device_map: Any) -> None:
    """Check that the layers of a model can stay in its files.

    Raises:
        InputError: It is a GGUF file.
    """
    wants = device_map == _DISK or (
        isinstance(device_map, Mapping) and _DISK in map(str, device_map.values())
    )
    if wants and source.gguf is not None:
        raise InputError(
            f"{source.name!r} is a GGUF file, and layers are read from safetensors files only; "
            "load it without a device map, or convert it and give the folder",
            argument="device_map",
        )


def offload_error(name: str, error: Exception) -> UnsupportedModelError | None:
    """Return our error if transformers cannot leave parts on disk; otherwise None."""
    if "is on the meta device" in str(error):
        return UnsupportedModelError(
            f"the device map of {name!r} puts something on disk that has to be in memory; only "
            "whole layers can be on disk, so put embeddings, norms and the unembedding on a device",
            argument="device_map",
        )
    if "offload_folder" not in str(error):
        return None
    return UnsupportedModelError(
        f"the layers of {name!r} cannot stay on disk: they are read from safetensors files in the "
        "form in which the model has them, and these files are pickled, or have another form, as "
        "those of mixtures of experts have. Load the model into memory; pickled weights can be "
        "saved again with save_pretrained, and loaded from that folder",
        argument="device_map",
    )
