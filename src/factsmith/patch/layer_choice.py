"""patch.layer_choice."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ..core.errors import InputError, LayerError
from ..core.fact import Fact
from ..core.tables import Shown, Table
from ..edit.configs import by_depth
from ..edit.published import published_layers
from ..model.language_model import LanguageModel

Source: TypeAlias = Literal["workspace", "model", "preset", "trials", "depth"]

MIN_FACTS = 6
"""Fewer facts than this say too little about a layer: one failed edit would then weigh more than
all but the worst layers differ.
"""


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """How the trial edits of one layer held: means over `trials` edits, by greedy exact match; None
    where nothing could be asked.

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
        """The harmonic mean of those three that there are, the field's one number: 0 as soon as one
        of them is.
        """
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
    source       "workspace": measured before and kept there; "model": came with its config.json;
    "preset": published for a model of this
                 shape; "trials": measured now; "depth": nothing is known, a fixed share of the
                 depth
    reason       the same in words
    fingerprint  of the model it is for
    scores       of the layers tried, by layer; () where none was
    effects      (n_layers,) average indirect effect of the MLPs around each layer at the last
    subject token; () where not traced window       neighbouring layers restored together for
    `effects`; None where not traced facts        the trial edits seed         of their choice quick
    whether only the most promising layers were tried, with a few edits
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


# ── what is known about a model
# ────────────────────────────────────────────────────────────────────────────────────────────


def published(lm: LanguageModel, shipped: int | None = None) -> LayerChoice | None:
    """`shipped`, ROME's layer as it came with the model, else the published layers, else None.

    Raises LayerError for a layer it has not.
    """
    if shipped is not None:
        if not 0 <= shipped < lm.n_layers:
            raise LayerError(
                f"{lm.name} came with layer {shipped} to edit, and has layers 0 to "
                f"{lm.n_layers - 1}; name a layer"
            )
        reason = "it came with the model (config.json, factsmith)"
        return LayerChoice(
            rome=shipped, memit=(), source="model", reason=reason, fingerprint=lm.fingerprint
        )
    layers = published_layers(lm)
    if layers is None:
        return None
    reason = f"published for a model of this shape, {layers.name} ({layers.source})"
    return LayerChoice(
        rome=layers.rome,
        memit=layers.memit,
        source="preset",
        reason=reason,
        fingerprint=lm.fingerprint,
    )


def depth_choice(lm: LanguageModel, rome: int, why: str) -> LayerChoice:
    """The choice where nothing is known: the layer `rome`, and for MEMIT the layers around it that
    `by_depth` gives.
    """
    reason = f"a fixed share of the depth: {why}"
    return LayerChoice(
        rome=rome,
        memit=by_depth(lm.n_layers, rome),
        source="depth",
        reason=reason,
        fingerprint=lm.fingerprint,
    )
