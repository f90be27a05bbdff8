"""The names that llama.cpp has for what an export changes: architectures and down-projections.

    architecture(lm)                            # "llama", as `general.architecture` has it
    tensor_names(lm, "llama", [5])              # {5: "blk.5.ffn_down.weight"}
    readers(lm, "llama", 5)                     # blk.5.ffn_gate and blk.5.ffn_up

Both come from the library gguf. A model that it does not know is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...core.errors import UnsupportedModelError
from ...model.language_model import LanguageModel
from ...model.neurons import Matrix
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
    known, names = _known(lm, arch), {}
    for layer, place in module_names(lm, layers).items():
        name = _name(known, place)
        if name != f"blk.{layer}.ffn_down":
            raise UnsupportedModelError(
                f"Layer {layer}: llama.cpp has no name for {place}, the matrix that the patch "
                f"changes ({arch}). Layers of experts and layers with matrices of their own "
                "cannot be exported as GGUF; export a checkpoint."
            )
        names[layer] = f"{name}.weight"
    return names


@dataclass(frozen=True, kw_only=True)
class Half:
    """One of the matrices that a linear of a layer holds: the keys, the gate or the up-projection.

    Attributes:
        keys: The name that appended rows have for its rows, such as "gate_keys".
        biases: The name that they have for its biases.
        matrix: Where it is in the model.
    """

    keys: str
    biases: str
    matrix: Matrix


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A linear that reads the input of a layer, as a GGUF file has it.

    Attributes:
        name: Its name without ".weight", such as "blk.5.ffn_gate".
        halves: What it holds, in the order in which it lies there.
    """

    name: str
    halves: tuple[Half, ...]

    def matrix(self) -> Tensor:
        """Return the model's matrix, (n, d_model), a view."""
        first = self.halves[0].matrix
        return Matrix(first.module, first.name, transposed=first.transposed).read()


def readers(lm: LanguageModel, arch: str, layer: int) -> tuple[Reader, ...]:
    """Return the linears of a layer that read its input.

    Raises:
        UnsupportedModelError: when the library gguf does not know the architecture, or has no name
            for one of them.
    """
    known, ffn = _known(lm, arch), lm.ffn[layer]
    if ffn._gate is None:
        named = [("keys", "biases", ffn._up)]
    else:
        named = [("gate_keys", "gate_biases", ffn._gate), ("up_keys", "up_biases", ffn._up)]
    places = {module: name for name, module in lm.module.named_modules()}
    halves: dict[nn.Module, list[Half]] = {}
    for keys, biases, matrix in named:
        assert matrix is not None
        half = Half(keys=keys, biases=biases, matrix=matrix)
        halves.setdefault(matrix.module, []).append(half)
    made = []
    for module, each in halves.items():
        name = _name(known, places[module])
        kinds = sorted(half.matrix.rows for half in each)
        if name not in (f"blk.{layer}.ffn_gate", f"blk.{layer}.ffn_up") or "even" in kinds:
            raise UnsupportedModelError(
                f"Layer {layer}: llama.cpp has no name for {places[module]}, to which the patches "
                f"append neurons ({arch}). Export a checkpoint."
            )
        in_order = tuple(sorted(each, key=lambda half: half.matrix.rows))
        made.append(Reader(name=name, halves=in_order))
    return tuple(made)


def _known(lm: LanguageModel, arch: str) -> Any:
    """Return the names that the library gguf has for the tensors of an architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((key for key, name in MODEL_ARCH_NAMES.items() if name == arch), None)
    if number is None:
        raise UnsupportedModelError(
            f"The library gguf does not know the architecture {arch!r}. Update it "
            "(`pip install -U gguf`), or export a checkpoint."
        )
    return get_tensor_name_map(number, lm.n_layers)


def _name(known: Any, place: str) -> str | None:
    """Return the name of a module in GGUF files; None if there is none."""
    name = known.get_name(place) or known.get_name(place.replace("language_model.", ""))
    return None if name is None else str(name)


def _folded(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
