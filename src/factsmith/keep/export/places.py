"""Where a model has its down-projections: the names of the modules that an adapter changes.

module_names(lm, [5])      # {5: "model.layers.5.mlp.down_proj"}
"""

from __future__ import annotations

from collections.abc import Iterable

from ...core.errors import UnsupportedModelError
from ...model.language_model import LanguageModel
from ...model.neurons import linear_matrix


def module_names(lm: LanguageModel, layers: Iterable[int]) -> dict[int, str]:
    """Return the name of each layer's down-projection in the model.

    Raises:
        UnsupportedModelError: when it is only a part of a module, so that no adapter fits it.
    """
    modules = {module: name for name, module in lm.module.named_modules()}
    names = {}
    for layer in sorted(layers):
        down = lm.ffn[layer].down
        if linear_matrix(down).home != lm.ffn[layer].home:
            raise UnsupportedModelError(
                f"Layer {layer}: the down-projection is a part of {modules[down]}, so it cannot "
                "have a LoRA adapter. Export a checkpoint."
            )
        names[layer] = modules[down]
    return names
