"""patch.layer_choice."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ..core.errors import InputError, LayerError
from ..core.fact import Fact
from ..core.tables import Shown, Table
from ..model.language_model import LanguageModel

Source: TypeAlias = Literal["workspace", "model", "preset", "trials", "depth"]

MIN_FACTS = 6
"""Fewer facts than this say too little about a layer: one failed edit would then weigh more than all but the worst layers differ."""


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """How the trial edits of one layer held: means over `trials` edits, by greedy exact match; None where nothing could be asked.

    efficacy        share of edited prompts answered with the target
    generalization  of other phrasings of them
    specificity     of other facts' prompts, near by subject or relation, whose answer stayed
    """

    layer: int
    trials: int
    efficacy: float
    generalization: float | None
    specificity: float | None

    def __post_init__(self) -> None:
        for share in (self.efficacy, self.generalization or 0, self.specificity or 0):
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise InputError(f"a share is a number from 0 to 1; got {share!r}")

    @classmethod
    def of(cls, layer: int, trials: Sequence[Trial]) -> LayerScore:
        """The means of some trials at a layer."""
        columns = zip(*trials, strict=True)
        efficacy, generalization, specificity = (
            [x for x in column if x is not None] for column in columns
        )
        return cls(
            layer=layer,
            trials=len(trials),
            efficacy=statistics.fmean(efficacy),
            generalization=statistics.fmean(generalization) if generalization else None,
            specificity=statistics.fmean(specificity) if specificity else None,
        )

    @property
    def score(self) -> float:
        """The harmonic mean of those three that there are, the field's one number: 0 as soon as one of them is."""
        parts = [x for x in (self.efficacy, self.generalization, self.specificity) if x is not None]
        return statistics.harmonic_mean(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields, the score included."""
        return {**vars(self), "score": self.score}


Trial: TypeAlias = tuple[float, float | None, float | None]
"""One edit's efficacy, generalization and specificity, each 0 to 1."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerChoice(Shown):
    """Layers to edit, and why.

    rome         the layer for ROME
    memit        consecutive layers for MEMIT, ascending; () where the source names none
    source       "workspace": measured before and kept there; "model": came with its config.json; "preset": published for a model of this
                 shape; "trials": measured now; "depth": nothing is known, a fixed share of the depth
    reason       the same in words
    fingerprint  of the model it is for
    scores       of the layers tried, by layer; () where none was
    effects      (n_layers,) average indirect effect of the MLPs around each layer at the last subject token; () where not traced
    window       neighbouring layers restored together for `effects`; None where not traced
    facts        the trial edits
    seed         of their choice
    quick        whether only the most promising layers were tried, with a few edits
    """

    rome: int
    memit: tuple[int, ...]
    source: Source
    reason: str
    fingerprint: str
    scores: tuple[LayerScore, ...] = ()
    effects: tuple[float, ...] = ()
    window: int | None = None
    facts: tuple[Fact, ...] = ()
    seed: int | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        for layer in (self.rome, *self.memit):
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
                raise InputError(f"a layer is a number counted from 0; got {layer!r}")
        if list(self.memit) != list(
            range(min(self.memit, default=0), min(self.memit, default=0) + len(self.memit))
        ):
            raise InputError(f"MEMIT's layers are consecutive and ascending; got {self.memit}")
        if self.source not in get_args(Source):
            raise InputError(f"source is one of {', '.join(get_args(Source))}; got {self.source!r}")

    def tables(self) -> list[Table]:
        """The choice with its reason, and what the trial edits measured at each layer."""
        title = f"ROME: layer {self.rome}; MEMIT: {', '.join(map(str, self.memit)) or 'not known'}; {self.reason}"
        columns = dict.fromkeys(
            ["layer", "trials", "efficacy", "generalization", "specificity", "score", "trace"], ">"
        )
        rows = []
        for row in self.scores:
            shares = (
                "" if x is None else f"{x:.3f}"
                for x in (row.efficacy, row.generalization, row.specificity, row.score)
            )
            rows.append(
                (
                    str(row.layer),
                    str(row.trials),
                    *shares,
                    f"{self.effects[row.layer]:.4f}" if self.effects else "",
                )
            )
        return [Table(title, columns if rows else {}, rows)]

    @property
    def trials(self) -> int:
        """The largest number of trial edits at one layer."""
        return max((score.trials for score in self.scores), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return {
            **vars(self),
            "memit": list(self.memit),
            "scores": [score.to_dict() for score in self.scores],
            "effects": list(self.effects),
            "facts": [fact.to_dict() for fact in self.facts],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerChoice:
        """The inverse of `to_dict`; raises InputError for anything else."""
        try:
            scores = [
                LayerScore(**{k: v for k, v in score.items() if k != "score"})
                for score in fields["scores"]
            ]
            return cls(
                **{
                    **fields,
                    "memit": tuple(fields["memit"]),
                    "scores": tuple(scores),
                    "effects": tuple(float(effect) for effect in fields["effects"]),
                    "facts": tuple(Fact.from_dict(fact) for fact in fields["facts"]),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"expected the fields of a LayerChoice; got something else: {error}"
            ) from None


# ── what is known about a model ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Layers that were published for models of one shape; `source` says where. memit is () where no range was."""

    name: str
    model_type: str
    n_layers: int
    d_model: int
    rome: int
    memit: tuple[int, ...]
    source: str


def _preset(
    name: str,
    model_type: str,
    n_layers: int,
    d_model: int,
    rome: int,
    memit: Iterable[int],
    source: str,
) -> Preset:
    return Preset(
        name=name,
        model_type=model_type,
        n_layers=n_layers,
        d_model=d_model,
        rome=rome,
        memit=tuple(memit),
        source=source,
    )


PRESETS = (
    _preset("GPT-2 medium", "gpt2", 24, 1024, 8, (), "kmeng01/rome hparams/ROME/gpt2-medium.json"),
    _preset("GPT-2 large", "gpt2", 36, 1280, 12, (), "kmeng01/rome hparams/ROME/gpt2-large.json"),
    _preset(
        "GPT-2 XL",
        "gpt2",
        48,
        1600,
        17,
        range(13, 18),
        "kmeng01/rome hparams/ROME and kmeng01/memit hparams/MEMIT, gpt2-xl.json",
    ),
    _preset(
        "GPT-J 6B",
        "gptj",
        28,
        4096,
        5,
        range(3, 9),
        "kmeng01/rome hparams/ROME and kmeng01/memit hparams/MEMIT, EleutherAI_gpt-j-6B.json",
    ),
    _preset(
        "GPT-NeoX 20B",
        "gpt_neox",
        44,
        6144,
        15,
        range(6, 11),
        "kmeng01/memit hparams/ROME/EleutherAI_gpt-neox-20b.json; arXiv 2210.07229",
    ),
    _preset(
        "Llama 7B, Llama-2 7B, Llama-3 8B or Llama-3.1 8B",
        "llama",
        32,
        4096,
        5,
        range(4, 9),
        "zjunlp/EasyEdit hparams/ROME and hparams/MEMIT, llama-7b.yaml; hparams/ROME/llama3-8b.yaml, hparams/AlphaEdit/llama3.1-8b.yaml; "
        "jianghoucheng/AlphaEdit hparams/MEMIT/Llama3-8B.json",
    ),
    _preset(
        "Mistral 7B",
        "mistral",
        32,
        4096,
        5,
        range(4, 9),
        "zjunlp/EasyEdit hparams/ROME and hparams/MEMIT, mistral-7b.yaml",
    ),
    _preset(
        "Qwen2 7B or Qwen2.5 7B",
        "qwen2",
        28,
        3584,
        5,
        range(4, 9),
        "zjunlp/EasyEdit hparams/ROME and hparams/MEMIT, qwen2.5-7b.yaml",
    ),
)
"""Published choices. Two sources disagree about Llama-2 13B, and the smaller Llama-3.2 only copy the 8B's numbers: left out."""


def find_preset(config: Any) -> Preset | None:
    """The preset for a transformers config, by model type, number of layers and width; names do not count."""
    text = config.get_text_config(decoder=True)
    shape = (
        text.model_type,
        getattr(text, "num_hidden_layers", None),
        getattr(text, "hidden_size", None),
    )
    return next(
        (
            preset
            for preset in PRESETS
            if (preset.model_type, preset.n_layers, preset.d_model) == shape
        ),
        None,
    )


def published(lm: LanguageModel, shipped: int | None = None) -> LayerChoice | None:
    """`shipped`, ROME's layer as it came with the model, else the model's preset, else None. Raises LayerError for a layer it has not."""
    if shipped is not None:
        if not 0 <= shipped < lm.n_layers:
            raise LayerError(
                f"{lm.name} came with layer {shipped} to edit, and has layers 0 to {lm.n_layers - 1}; name a layer"
            )
        reason = "it came with the model (config.json, factsmith)"
        return LayerChoice(
            rome=shipped, memit=(), source="model", reason=reason, fingerprint=lm.fingerprint
        )
    preset = find_preset(lm.config)
    if preset is None:
        return None
    reason = f"published for a model of this shape, {preset.name} ({preset.source})"
    return LayerChoice(
        rome=preset.rome,
        memit=preset.memit,
        source="preset",
        reason=reason,
        fingerprint=lm.fingerprint,
    )


def depth_choice(lm: LanguageModel, rome: int, why: str) -> LayerChoice:
    """The choice where nothing is known: `rome`, and for MEMIT the layers from the one below it to the third above, in the first third.

    That is how the published ranges lie around ROME's layer 5 of 28 or 32; every one of them ends at about a third of the depth.
    """
    last = max(rome, min(rome + 3, lm.n_layers // 3))
    reason = f"a fixed share of the depth: {why}"
    return LayerChoice(
        rome=rome,
        memit=tuple(range(max(0, rome - 1), last + 1)),
        source="depth",
        reason=reason,
        fingerprint=lm.fingerprint,
    )
