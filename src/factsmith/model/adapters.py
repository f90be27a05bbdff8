"""Adapters of peft: recognized and refused, because what is written of such a model is its adapter.

if (how := adapter_kind(module)) is not None:
    raise adapter_error(name, how)
"""

from __future__ import annotations

from typing import Any

from ..core.errors import UnsupportedModelError


def adapter_kind(module: Any) -> str | None:
    """Return the name of the first part of a model that peft put there; None if there is none."""
    for part in module.modules():
        for kind in type(part).__mro__:
            if kind.__module__.split(".")[0] == "peft":
                return type(part).__name__
    if getattr(module, "_hf_peft_config_loaded", False):
        return "adapter"
    return None


def adapter_error(name: str, how: str) -> UnsupportedModelError:
    """Return the error for a model that carries an adapter."""
    return UnsupportedModelError(
        f"{name} carries adapters of peft ({how}), so a patch would be solved for weights that are "
        "not saved with it. Merge them first: module = module.merge_and_unload(), and wrap the "
        "result; or take them off with unload(). Prompts that were tuned cannot be merged: wrap "
        "the base model"
    )
