"""The layers and settings that were published, for the models that they were published for.

    rome, memit, name, source = published_layers(lm)        # 5, (3, 4, 5, 6, 7, 8), "GPT-J 6B", ...
    config, source = published_settings(lm, "memit")        # MemitConfig(layers=(3, 4, ...)), ...

A model is recognised by its type, its number of layers and its width. Its name does not count. Each
such shape has one row in `PUBLISHED`, and both functions read that row.

The settings reproduce a paper's numbers on the paper's model. Their lengths and weights are in the
units of that model's activations. For any other model use the `recommended` settings of a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.errors import InputError
from ..model.language_model import LanguageModel
from .configs import EditConfig
from .methods import find_method


class PublishedLayers(NamedTuple):
    """The layers that were published for a model.

    Attributes:
        rome: The layer for ROME.
        memit: Consecutive layers for MEMIT, in ascending order. Empty if none were published.
        name: The models of this shape, in words.
        source: Where the layers were published.
    """

    rome: int
    memit: tuple[int, ...]
    name: str
    source: str


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """What was published for the models of one shape: a row of `PUBLISHED`.

    Attributes:
        name: The models, in words.
        model_type: The type in the model's config.json.
        n_layers: Number of layers.
        d_model: Width of the stream.
        rome: The layer for ROME.
        memit: Consecutive layers for MEMIT, in ascending order. Empty if none were published.
        source: Where these layers were published.
        settings: {method: (settings, source)} for the methods whose full settings were published.
            ROME and MEMIT have no layers among them, because the row has these already.
    """

    name: str
    model_type: str
    n_layers: int
    d_model: int
    rome: int
    memit: tuple[int, ...]
    source: str
    settings: Mapping[str, tuple[Mapping[str, Any], str]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[str, int, int]:
        """Model type, number of layers and width."""
        return self.model_type, self.n_layers, self.d_model

    def config(self, method: str) -> tuple[EditConfig, str] | None:
        """Return a method's settings and their source, or None if nothing was published for it."""
        kind, name = find_method(method).config, "rome" if method == "r-rome" else method
        layers = {"rome": (self.rome,), "memit": self.memit}.get(name, ())
        if name in self.settings:
            values, source = self.settings[name]
        elif layers:
            values = {}
            source = f"layers from {self.source}; the other settings are the paper's defaults"
        else:
            return None
        config = kind(**values, scale="paper")
        return (config.at(layers) if layers else config), source


_SEARCH: dict[str, Any] = {"steps": 20, "lr": 0.5, "kl_factor": 0.0625, "weight_decay": 0.5}
_ROME: dict[str, Any] = {**_SEARCH, "clamp": 4.0}
_SPREAD: dict[str, Any] = {**_SEARCH, "clamp": 0.75}
_LONG: dict[str, Any] = {**_SPREAD, "steps": 25}
_SLOW: dict[str, Any] = {**_LONG, "lr": 0.1}
_NULL_SPACE: dict[str, Any] = {"threshold": 0.02, "l2": 10.0}
_EMMET_SOURCE = "scalable-model-editing/unified-model-editing"

PUBLISHED = (
    PublishedModel(
        name="GPT-2 medium",
        model_type="gpt2",
        n_layers=24,
        d_model=1024,
        rome=8,
        memit=(),
        source="kmeng01/rome hparams/ROME/gpt2-medium.json",
        settings={"rome": ({**_ROME, "clamp": 3.0}, "kmeng01/rome hparams/ROME/gpt2-medium.json")},
    ),
    PublishedModel(
        name="GPT-2 large",
        model_type="gpt2",
        n_layers=36,
        d_model=1280,
        rome=12,
        memit=(),
        source="kmeng01/rome hparams/ROME/gpt2-large.json",
        settings={"rome": (_ROME, "kmeng01/rome hparams/ROME/gpt2-large.json")},
    ),
    PublishedModel(
        name="GPT-2 XL",
        model_type="gpt2",
        n_layers=48,
        d_model=1600,
        rome=17,
        memit=(13, 14, 15, 16, 17),
        source="kmeng01/rome hparams/ROME and kmeng01/memit hparams/MEMIT, gpt2-xl.json",
        settings={
            "rome": (_ROME, "kmeng01/rome hparams/ROME/gpt2-xl.json"),
            "memit": (
                {**_SPREAD, "moment_weight": 20_000.0},
                "kmeng01/memit hparams/MEMIT/gpt2-xl.json",
            ),
            "emmet": (
                {**_SPREAD, "layers": (17,), "moment_weight": 1_000.0, "ridge": 0.1},
                _EMMET_SOURCE,
            ),
            "alphaedit": (
                {**_SPREAD, **_NULL_SPACE, "layers": (13, 14, 15, 16, 17)},
                "jianghoucheng/AlphaEdit hparams/AlphaEdit/gpt2-xl.json",
            ),
        },
    ),
    PublishedModel(
        name="GPT-J 6B",
        model_type="gptj",
        n_layers=28,
        d_model=4096,
        rome=5,
        memit=(3, 4, 5, 6, 7, 8),
        source="kmeng01/rome hparams/ROME and kmeng01/memit hparams/MEMIT, "
        "EleutherAI_gpt-j-6B.json",
        settings={
            "rome": (_ROME, "kmeng01/rome hparams/ROME/EleutherAI_gpt-j-6B.json"),
            "memit": (
                {**_LONG, "moment_weight": 15_000.0},
                "kmeng01/memit hparams/MEMIT/EleutherAI_gpt-j-6B.json",
            ),
            "emmet": (
                {**_LONG, "layers": (5,), "moment_weight": 1.0, "ridge": 0.1},
                _EMMET_SOURCE,
            ),
            "alphaedit": (
                {**_LONG, **_NULL_SPACE, "layers": (3, 4, 5, 6, 7, 8)},
                "jianghoucheng/AlphaEdit hparams/AlphaEdit/EleutherAI_gpt-j-6B.json",
            ),
        },
    ),
    PublishedModel(
        name="GPT-NeoX 20B",
        model_type="gpt_neox",
        n_layers=44,
        d_model=6144,
        rome=15,
        memit=(6, 7, 8, 9, 10),
        source="kmeng01/memit hparams/ROME/EleutherAI_gpt-neox-20b.json; arXiv 2210.07229",
    ),
    PublishedModel(
        name="Llama 7B, Llama-2 7B, Llama-3 8B or Llama-3.1 8B",
        model_type="llama",
        n_layers=32,
        d_model=4096,
        rome=5,
        memit=(4, 5, 6, 7, 8),
        source="zjunlp/EasyEdit hparams/ROME and hparams/MEMIT, llama-7b.yaml; "
        "hparams/ROME/llama3-8b.yaml, hparams/AlphaEdit/llama3.1-8b.yaml; "
        "jianghoucheng/AlphaEdit hparams/MEMIT/Llama3-8B.json",
        settings={
            "rome": (
                {**_ROME, "steps": 25, "weight_decay": 1e-3},
                "zjunlp/EasyEdit hparams/ROME/llama3-8b.yaml",
            ),
            "memit": (
                {**_SLOW, "moment_weight": 15_000.0},
                "jianghoucheng/AlphaEdit hparams/MEMIT/Llama3-8B.json",
            ),
            "alphaedit": (
                {**_SLOW, **_NULL_SPACE, "layers": (4, 5, 6, 7, 8)},
                "jianghoucheng/AlphaEdit hparams/AlphaEdit/Llama3-8B.json",
            ),
        },
    ),
    PublishedModel(
        name="Mistral 7B",
        model_type="mistral",
        n_layers=32,
        d_model=4096,
        rome=5,
        memit=(4, 5, 6, 7, 8),
        source="zjunlp/EasyEdit hparams/ROME and hparams/MEMIT, mistral-7b.yaml",
        settings={
            "memit": (
                {**_SLOW, "moment_weight": 15_000.0},
                "zjunlp/EasyEdit hparams/MEMIT/mistral-7b.yaml",
            ),
        },
    ),
    PublishedModel(
        name="Qwen2 7B or Qwen2.5 7B",
        model_type="qwen2",
        n_layers=28,
        d_model=3584,
        rome=5,
        memit=(4, 5, 6, 7, 8),
        source="zjunlp/EasyEdit hparams/ROME and hparams/MEMIT, qwen2.5-7b.yaml",
        settings={
            "memit": (
                {**_SLOW, "moment_weight": 15_000.0},
                "zjunlp/EasyEdit hparams/MEMIT/qwen2.5-7b.yaml",
            ),
        },
    ),
)
"""A row for each shape. Llama-2 13B is left out, because two sources disagree about it. The smaller
Llama-3.2 models are left out, because their sources only copy the numbers of the 8B model."""


def published_layers(lm: LanguageModel) -> PublishedLayers | None:
    """Return the layers that were published for a model of this shape, or None."""
    row = _row(lm)
    return None if row is None else PublishedLayers(row.rome, row.memit, row.name, row.source)


def published_settings(lm: LanguageModel, method: str) -> tuple[EditConfig, str]:
    """Return the settings that were published for a model of this shape, and their source.

    If only the layers were published, the other settings are the defaults of the method's class
    with scale="paper", and the source says so. r-ROME takes the settings of ROME.

    Raises:
        InputError: The method does not exist, or nothing was published for such a model. The
            message names the models for which something was.
    """
    find_method(method)
    row = _row(lm)
    answer = None if row is None else row.config(method)
    if answer is None:
        model_type, n_layers, d_model = _shape(lm)
        rows = [row for row in PUBLISHED if row.config(method) is not None]
        known = ", ".join(f"{row.model_type} of {row.n_layers} x {row.d_model}" for row in rows)
        raise InputError(
            f"no {method} settings were published for {lm.name} ({model_type}, {n_layers} layers "
            f"of width {d_model}), only for {known}. Use the recommended settings instead.",
            argument="paper",
        )
    return answer


def _shape(lm: LanguageModel) -> tuple[str, int, int]:
    text = lm.config.get_text_config(decoder=True)
    return text.model_type, lm.n_layers, lm.d_model


def _row(lm: LanguageModel) -> PublishedModel | None:
    shape = _shape(lm)
    return next((row for row in PUBLISHED if row.shape == shape), None)
