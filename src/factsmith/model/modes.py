"""The state in which a module runs: its modes, its outputs, and what is wrapped around it.

    module = unwrapped(module)     # the transformers model inside DataParallel, torch.compile ...
    with_plain_weights(module)     # tensors that torch.inference_mode made are made again
    modes.settle(module)           # evaluation mode, plain outputs, not compiled, not trained
    modes.restore()                # as before

A user may have called `train()`, switched outputs on in the config, or compiled parts since the
model was wrapped. The settled state differs for the length of a pass only.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import nn

from ..core.errors import UnsupportedModelError
from .absent import place_of

_OUTPUTS = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}
"""Entries of a config that say what a pass returns, and what factsmith reads."""

_COMPILED = "_torchdynamo_orig_callable"
"""Where a compiled function keeps the one that it was made from."""


class Modes:
    """What was changed on some modules, to change it back."""

    def __init__(self) -> None:
        self.changed: list[tuple[Any, str, Any]] = []
        self.parts: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = (
            weakref.WeakKeyDictionary()
        )
        self.settled: list[nn.Module] = []

    def settle(self, module: nn.Module) -> None:
        """Put a module into evaluation mode, with plain outputs, not compiled, and not trained."""
        if any(module is other for other in self.settled):
            return
        self.settled.append(module)
        for part in self._parts(module):
            state = vars(part)
            if state["training"]:
                self._set(part, "training", False)
            for weight in state["_parameters"].values():
                if weight is not None and weight.requires_grad:
                    self._set(weight, "requires_grad", False)
            if hasattr(state.get("_compiled_call_impl"), _COMPILED):
                self._set(part, "_compiled_call_impl", None)
            if hasattr(state.get("forward"), _COMPILED):
                self._set(part, "forward", getattr(state["forward"], _COMPILED))
        for config in _configs(module):
            for name, wanted in _OUTPUTS.items():
                if getattr(config, name, wanted) != wanted:
                    self._set(config, name, wanted)

    def restore(self) -> None:
        """Change back what `settle` changed."""
        while self.changed:
            holder, name, value = self.changed[-1]
            # transformers refuses outputs that the attention in use cannot give. A file may still
            # ask for them. They stay off then.
            with contextlib.suppress(ValueError):
                setattr(holder, name, value)
            self.changed.pop()
        self.settled.clear()

    def _set(self, holder: Any, name: str, value: Any) -> None:
        self.changed.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def _parts(self, module: nn.Module) -> list[nn.Module]:
        """Return all modules in a module. They are listed again if it is in training mode."""
        known = self.parts.get(module)
        if known is None or module.training:
            self.parts[module] = known = [weakref.ref(part) for part in module.modules()]
        return [part for reference in known if (part := reference()) is not None]


def _configs(module: nn.Module) -> list[Any]:
    """Return the configs that a module reads when it runs."""
    config: Any = getattr(module, "config", None)
    inner = getattr(getattr(module, "base_model", None), "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    distinct: list[Any] = []
    for each in (config, inner, text):
        if each is not None and not any(each is other for other in distinct):
            distinct.append(each)
    return distinct


def unwrapped(module: Any) -> Any:
    """Return the transformers model inside wrappers that share its weights.

    Such are torch.compile, DataParallel and DistributedDataParallel.

    Raises:
        UnsupportedModelError: A wrapper has the weights in pieces.
    """
    while isinstance(module, nn.Module):
        if "FullyShardedDataParallel" in {kind.__name__ for kind in type(module).__mro__}:
            raise UnsupportedModelError(
                "the model is wrapped by FullyShardedDataParallel, which cuts its weights into "
                "pieces, so they cannot be read or edited; give a model that is whole"
            )
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        if isinstance(module, parallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            break
    return module


def check_weights(name: str, module: nn.Module) -> None:
    """Check that all weights and buffers are whole, and on a device.

    Raises:
        UnsupportedModelError: Some are not.
    """
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta and place_of(tensor) is None:
            raise UnsupportedModelError(
                f"{name} has weights that are on no device ({path} is offloaded or was never "
                "loaded), so they cannot be read or edited; load the model on the CPU, on devices "
                'that hold all of it, or with factsmith.load(..., device_map="disk")'
            )
        if hasattr(tensor, "full_tensor"):  # a DTensor
            raise UnsupportedModelError(
                f"{name} has weights in pieces on several devices ({path} is a "
                f"{type(tensor).__name__}), so they cannot be read or edited; load the model "
                "without a tensor-parallel plan"
            )


def with_plain_weights(module: nn.Module) -> None:
    """Make each tensor that was made in `torch.inference_mode` again, as an ordinary one.

    Such a tensor cannot be written, and counts no versions. One tensor at a time is in memory
    twice. Tensors that modules share stay shared.
    """
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for part in module.modules():
        held: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    places.setdefault(id(tensor), []).append((tensors, name))
    for shared in places.values():
        tensors, name = shared[0]
        with torch.inference_mode(False), torch.no_grad():
            plain = tensors[name].clone()
            if isinstance(tensors[name], nn.Parameter):
                plain = nn.Parameter(plain, requires_grad=False)
        for tensors, name in shared:
            tensors[name] = plain
