"""Settings as they were published, for the models they were published for; by shape, since names do not count.

    published(lm, "memit")        # (MemitConfig(layers=(3, 4, 5, 6, 7, 8), steps=25, ...), "kmeng01/memit hparams/MEMIT, ...")

They reproduce a paper's numbers on its model. For any other model `recommended` is better: these are lengths and weights in the units of
one model's activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.checks import whole_number
from ..core.errors import InputError, LayerError
from ..model.language_model import LanguageModel
from .configs import EditConfig
from .methods import find_method

Shape = tuple[str, int, int]
"""Model type, number of layers, width of the stream."""

_GPT2_M, _GPT2_L, _GPT2_XL = ("gpt2", 24, 1024), ("gpt2", 36, 1280), ("gpt2", 48, 1600)

_GPT_J, _LLAMA_8B, _MISTRAL_7B, _QWEN_7B = (
    ("gptj", 28, 4096),
    ("llama", 32, 4096),
    ("mistral", 32, 4096),
    ("qwen2", 28, 3584),
)

_ROME: dict[str, Any] = {
    "steps": 20,
    "lr": 0.5,
    "kl_factor": 0.0625,
    "weight_decay": 0.5,
    "clamp": 4.0,
}

_MEMIT: dict[str, Any] = {
    "steps": 20,
    "lr": 0.5,
    "kl_factor": 0.0625,
    "weight_decay": 0.5,
    "clamp": 0.75,
}

_XL: dict[str, Any] = {**_MEMIT, "layers": (13, 14, 15, 16, 17)}

_J: dict[str, Any] = {**_MEMIT, "layers": (3, 4, 5, 6, 7, 8), "steps": 25}

_8B: dict[str, Any] = {**_MEMIT, "layers": (4, 5, 6, 7, 8), "steps": 25, "lr": 0.1}

_NULL: dict[str, Any] = {"threshold": 0.02, "l2": 10.0}

PUBLISHED: dict[str, dict[Shape, tuple[dict[str, Any], str]]] = {
    "rome": {
        _GPT2_M: (
            {**_ROME, "layer": 8, "clamp": 3.0},
            "kmeng01/rome hparams/ROME/gpt2-medium.json",
        ),
        _GPT2_L: ({**_ROME, "layer": 12}, "kmeng01/rome hparams/ROME/gpt2-large.json"),
        _GPT2_XL: ({**_ROME, "layer": 17}, "kmeng01/rome hparams/ROME/gpt2-xl.json"),
        _GPT_J: ({**_ROME, "layer": 5}, "kmeng01/rome hparams/ROME/EleutherAI_gpt-j-6B.json"),
        _LLAMA_8B: (
            {**_ROME, "layer": 5, "steps": 25, "weight_decay": 1e-3},
            "zjunlp/EasyEdit hparams/ROME/llama3-8b.yaml",
        ),
    },
    "memit": {
        _GPT2_XL: ({**_XL, "moment_weight": 20_000.0}, "kmeng01/memit hparams/MEMIT/gpt2-xl.json"),
        _GPT_J: (
            {**_J, "moment_weight": 15_000.0},
            "kmeng01/memit hparams/MEMIT/EleutherAI_gpt-j-6B.json",
        ),
        _LLAMA_8B: (
            {**_8B, "moment_weight": 15_000.0},
            "jianghoucheng/AlphaEdit hparams/MEMIT/Llama3-8B.json",
        ),
        _MISTRAL_7B: (
            {**_8B, "moment_weight": 15_000.0},
            "zjunlp/EasyEdit hparams/MEMIT/mistral-7b.yaml",
        ),
        _QWEN_7B: (
            {**_8B, "moment_weight": 15_000.0},
            "zjunlp/EasyEdit hparams/MEMIT/qwen2.5-7b.yaml",
        ),
    },
    "emmet": {
        _GPT2_XL: (
            {**_XL, "layers": (17,), "moment_weight": 1_000.0, "ridge": 0.1},
            "scalable-model-editing/unified-model-editing",
        ),
        _GPT_J: (
            {**_J, "layers": (5,), "moment_weight": 1.0, "ridge": 0.1},
            "scalable-model-editing/unified-model-editing",
        ),
    },
    "alphaedit": {
        _GPT2_XL: ({**_XL, **_NULL}, "jianghoucheng/AlphaEdit hparams/AlphaEdit/gpt2-xl.json"),
        _GPT_J: (
            {**_J, **_NULL},
            "jianghoucheng/AlphaEdit hparams/AlphaEdit/EleutherAI_gpt-j-6B.json",
        ),
        _LLAMA_8B: ({**_8B, **_NULL}, "jianghoucheng/AlphaEdit hparams/AlphaEdit/Llama3-8B.json"),
    },
}
"""For each method and shape: the settings (scale="paper") and whose they are. r-ROME takes ROME's."""


def published(lm: LanguageModel, method: str) -> tuple[EditConfig, str]:
    """The settings published for a model of this shape, and whose they are.

    Raises InputError for an unknown method, or when none were published for such a model; the message names those that have some.
    """
    kind = find_method(method).config
    text = lm.config.get_text_config(decoder=True)
    shape = (text.model_type, lm.n_layers, lm.d_model)
    table = PUBLISHED["rome" if method == "r-rome" else method]
    if shape not in table:
        known = ", ".join(f"{family} of {n_layers} x {width}" for family, n_layers, width in table)
        raise InputError(
            f"no {method} settings were published for {lm.name} ({shape[0]}, {shape[1]} layers of width {shape[2]}), only for {known}; "
            "leave them out to use the recommended ones"
        )
    values, source = table[shape]
    return kind(**values), source


_EITHER = ("threshold", "energy")
"""Settings of which a method takes one or the other."""


def settings(
    lm: LanguageModel,
    method: str,
    layers: int | Sequence[int] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    paper: bool = False,
) -> Any:
    """A method's recommended settings with some layers or values changed; None when nothing is.

    paper: change those published for a model of this shape instead, whose layers they bring. Else layers that are not given stay open, for
    `propose` to choose. Of AlphaEdit's threshold and energy one that is given unsets the other. Raises InputError for an unknown method or
    setting, or where nothing was published; LayerError.
    """
    kind = find_method(method).config
    layers = _numbers(layers)
    if not layers and not changes and not paper:
        return None
    places = {"layer", "layers"} & {field.name for field in dataclasses.fields(kind)}
    known = {field.name for field in dataclasses.fields(kind)} - places
    if unknown := sorted(set(changes or {}) - known):
        where = (
            "; layers are not set but named: --layer" if {"layer", "layers"} & set(unknown) else ""
        )
        raise InputError(
            f"{method} has no setting {', '.join(unknown)}; expected some of {', '.join(sorted(known))}{where}"
        )
    values: dict[str, Any] = {**({} if paper else dict.fromkeys(places)), **(changes or {})}
    for one, other in (_EITHER, _EITHER[::-1]):
        if values.get(one) is not None:
            values.setdefault(other, None)
    config = dataclasses.replace(
        published(lm, method)[0] if paper else kind.recommended(lm), **values
    )
    return config.at(layers) if layers else config


def _numbers(layers: object) -> list[int] | None:
    """Layers as a file or a caller may give them; None or none: not given. Raises LayerError for what are no numbers of layers."""
    if layers is None:
        return None
    found = [
        whole_number(layer) for layer in (layers if isinstance(layers, (list, tuple)) else [layers])
    ]
    if (numbers := [layer for layer in found if layer is not None]) == found:
        return numbers
    raise LayerError(
        f"layers are numbers, counted from 0, such as 5 or [3, 4, 5]; got {layers!r:.60}"
    )
