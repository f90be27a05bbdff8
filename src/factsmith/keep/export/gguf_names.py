"""The names that llama.cpp has for what an export changes: architectures and down-projections.

    architecture(lm)                            # "llama", as `general.architecture` has it
    tensor_names(lm, "llama", [5])              # {5: "blk.5.ffn_down.weight"}

Both come from the library gguf. A model that it does not know is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...core.errors import UnsupportedModelError
from ...model.language_model import LanguageModel
from .places import module_names

_ALSO = {"mistral": "llama", "phi": "phi2", "cohere": "command-r"}
"""{model type of transformers: architecture of llama.cpp}, where the two have other names."""

_PARTS = ("_text", "text")


def architecture(lm: LanguageModel) -> str:
    """Return the name of a model's architecture in GGUF files.

    Raises:
        UnsupportedModelError: when the library gguf knows none for this type of model.
    """
    from gguf import MODEL_ARCH_NAMES

    if lm.gguf is not None:
        return lm.gguf.architecture
    kind = str(lm.config.get_text_config().model_type)
    names = {_folded(name): name for name in MODEL_ARCH_NAMES.values()}
    for each in (_ALSO.get(kind, kind), *(kind.removesuffix(part) for part in _PARTS)):
        if (name := names.get(_folded(each))) is not None:
            return str(name)
    raise UnsupportedModelError(
        f"{lm.name} is a {kind} model, and the library gguf knows no architecture of that name, so "
        "the patch cannot be written for llama.cpp. Export a checkpoint, and convert it with "
        "llama.cpp; or give the GGUF file of this model as base.",
        argument="base",
    )


def tensor_names(lm: LanguageModel, arch: str, layers: Iterable[int]) -> dict[int, str]:
    """Return the name that a GGUF file has for each layer's down-projection.

    Raises:
        UnsupportedModelError: when the library gguf does not know the architecture, or has no name
            for such a matrix: one of experts, or one of another structure.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((key for key, name in MODEL_ARCH_NAMES.items() if name == arch), None)
    if number is None:
        raise UnsupportedModelError(
            f"The library gguf does not know the architecture {arch!r}. Update it "
            "(`pip install -U gguf`), or export a checkpoint."
        )
    known = get_tensor_name_map(number, lm.n_layers)
    names = {}
    for layer, place in module_names(lm, layers).items():
        name = known.get_name(place) or known.get_name(place.replace("language_model.", ""))
        if name != f"blk.{layer}.ffn_down":
            raise UnsupportedModelError(
                f"Layer {layer}: llama.cpp has no name for {place}, the matrix that the patch "
                f"changes ({arch}). Layers of experts and layers with matrices of their own "
                "cannot be exported as GGUF; export a checkpoint."
            )
        names[layer] = f"{name}.weight"
    return names


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
