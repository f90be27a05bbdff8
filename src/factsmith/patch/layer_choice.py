"""The layers to edit, and why: a record, and the choices that cost no work.

    choice = published(lm)                 # what was published for a model of this shape, or None
    choice.rome, choice.memit, choice.reason

`layers` measures where nothing was published.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ..core.checks import whole_number
from ..core.errors import InputError, LayerError
from ..core.fact import Fact
from ..core.tables import Shown, Table
from ..edit.configs import by_depth
from ..edit.published import published_layers
from ..model.address import check_dense
from ..model.language_model import LanguageModel

Source: TypeAlias = Literal["workspace", "model", "preset", "trials", "depth"]

Trial: TypeAlias = tuple[float, float | None, float | None]
"""One edit's efficacy, generalization and specificity, each 0 to 1. None: nothing was asked."""

MIN_FACTS = 6
"""Fewer facts than this say too little about a layer. One failed edit would then weigh more than
all but the worst layers differ.
"""


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """How the trial edits of one layer held, by greedy exact match.

    Attributes:
        layer: The layer.
        trials: Number of trial edits that the means are over.
        efficacy: Share of edited prompts answered with the target.
        generalization: The same for other phrasings of them. None: there were none.
        specificity: Share of other facts' prompts, near by subject or relation, whose answer
            stayed. None: there were none.

    Raises InputError for a share outside [0, 1].
    """

    layer: int
    trials: int
    efficacy: float
    generalization: float | None
    specificity: float | None

    def __post_init__(self) -> None:
        for share in (self.efficacy, self.generalization, self.specificity):
            if share is None and share is not self.efficacy:
                continue
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise InputError(f"a share is {share!r:.40}; expected a number from 0 to 1")
        for number in (self.layer, self.trials):
            if whole_number(number) is None or number < 0:
                raise InputError(f"a layer or its trials is {number!r:.40}; expected a count")

    @classmethod
    def of(cls, layer: int, trials: Sequence[Trial]) -> LayerScore:
        """Return the means of some trials at a layer."""
        columns = zip(*trials, strict=True)
        efficacy, generalization, specificity = (
            [share for share in column if share is not None] for column in columns
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
        """The harmonic mean of the shares that there are, the field's one number.

        It is 0 as soon as one of them is.
        """
        shares = (self.efficacy, self.generalization, self.specificity)
        return statistics.harmonic_mean([share for share in shares if share is not None])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the score included."""
        return {**vars(self), "score": self.score}


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerChoice(Shown):
    """Layers to edit, and why.

    Attributes:
        rome: The layer for ROME.
        memit: Consecutive layers for MEMIT, ascending; () where the source names none.
        source: "workspace": measured before and kept there. "model": came with its config.json.
            "preset": published for a model of this shape. "trials": measured now. "depth": a fixed
            share of the depth, since nothing is known.
        reason: The same in words.
        fingerprint: Of the model that the choice is for.
        scores: Of the layers that were tried, by layer; () where none was.
        effects: (n_layers,) average indirect effect of the MLPs around each layer at the last
            subject token; () where nothing was traced.
        window: Neighbouring layers restored together for `effects`. None: nothing was traced.
        facts: The trial edits.
        seed: Of their choice.
        quick: Whether only the most promising layers were tried, with a few edits.

    Raises InputError for fields that do not fit together.
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
                raise InputError(f"a layer is {layer!r}; expected a number counted from 0")
        first = min(self.memit, default=0)
        if list(self.memit) != list(range(first, first + len(self.memit))):
            raise InputError(
                f"MEMIT's layers are {self.memit}; expected consecutive layers, in ascending order"
            )
        if self.source not in get_args(Source):
            raise InputError(
                f"source is {self.source!r:.40}; expected one of {', '.join(get_args(Source))}"
            )
        if not isinstance(self.reason, str) or not isinstance(self.fingerprint, str):
            raise InputError("reason and fingerprint must be texts")
        for number in (self.window, self.seed):
            if number is not None and whole_number(number) is None:
                raise InputError(f"window or seed is {number!r:.40}; expected a number or None")
        if not isinstance(self.quick, bool):
            raise InputError(f"quick is {self.quick!r:.40}; expected True or False")
        if not all(math.isfinite(effect) for effect in self.effects):
            raise InputError("effects holds NaN or infinity; expected finite numbers")
        if self.effects and any(score.layer >= len(self.effects) for score in self.scores):
            raise InputError("scores names a layer that effects does not have")

    def tables(self) -> list[Table]:
        """The choice with its reason, and what the trial edits measured at each layer."""
        memit = ", ".join(map(str, self.memit)) or "not known"
        title = f"ROME: layer {self.rome}; MEMIT: {memit}; {self.reason}"
        names = ["layer", "trials", "efficacy", "generalization", "specificity", "score", "trace"]
        rows = [self._row(score) for score in self.scores]
        chosen = [index for index, score in enumerate(self.scores) if score.layer == self.rome]
        return [Table(title, dict.fromkeys(names, ">") if rows else {}, rows, bold=chosen)]

    def _row(self, row: LayerScore) -> tuple[str, ...]:
        shares = (row.efficacy, row.generalization, row.specificity, row.score)
        effect = f"{self.effects[row.layer]:z.4f}" if self.effects else ""
        cells = ("" if share is None else f"{share:z.3f}" for share in shares)
        return (str(row.layer), str(row.trials), *cells, effect)

    @property
    def trials(self) -> int:
        """The largest number of trial edits at one layer."""
        return max((score.trials for score in self.scores), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **vars(self),
            "memit": list(self.memit),
            "scores": [score.to_dict() for score in self.scores],
            "effects": list(self.effects),
            "facts": [fact.to_dict() for fact in self.facts],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerChoice:
        """Make a choice from what `to_dict` gave; raises InputError for anything else."""
        try:
            scores = [{k: v for k, v in each.items() if k != "score"} for each in fields["scores"]]
            return cls(
                **{
                    **fields,
                    "memit": tuple(fields["memit"]),
                    "scores": tuple(LayerScore(**each) for each in scores),
                    "effects": tuple(float(effect) for effect in fields["effects"]),
                    "facts": tuple(Fact.from_dict(fact) for fact in fields["facts"]),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"these are not the fields of a LayerChoice: {error}") from None


def published(lm: LanguageModel, shipped: int | None = None) -> LayerChoice | None:
    """Return the layers that came with a model or were published for its shape; None for neither.

    Args:
        lm: The model.
        shipped: ROME's layer as it came with the model. It goes first.

    Raises:
        LayerError: The model does not have the shipped layer.
    """
    if shipped is not None:
        if not 0 <= shipped < lm.n_layers:
            raise LayerError(
                f"{lm.name} came with layer {shipped} to edit, and has layers 0 to "
                f"{lm.n_layers - 1}; name a layer",
                argument="layer",
            )
        return LayerChoice(
            rome=shipped,
            memit=(),
            source="model",
            reason="it came with the model (config.json, factsmith)",
            fingerprint=lm.fingerprint,
        )
    layers = published_layers(lm)
    if layers is None:
        return None
    return LayerChoice(
        rome=layers.rome,
        memit=layers.memit,
        source="preset",
        reason=f"published for a model of this shape, {layers.name} ({layers.source})",
        fingerprint=lm.fingerprint,
    )


def first_choice(lm: LanguageModel) -> LayerChoice:
    """Return layers that are good enough to start with, for a model that nothing is known about.

    ROME gets the dense layer nearest to a sixth of the depth, and MEMIT the dense ones around it
    (`by_depth`). This costs no work and depends on no facts. `benchmarks/layers.py` compares it
    with an exhaustive sweep, and with choices that read the model.

    Raises:
        UnsupportedModelError: No layer is dense.
    """
    check_dense(lm.ffn)
    dense = [layer for layer in range(lm.n_layers) if not lm.ffn[layer].n_experts]
    rome = min(dense, key=lambda layer: abs(layer - lm.n_layers // 6))
    choice = depth_choice(lm, rome, "")
    memit = [rome]
    for step in (-1, 1):  # a run ends where a layer is a mixture of experts
        while (layer := memit[-1 if step > 0 else 0] + step) in {*choice.memit} & {*dense}:
            memit.insert(len(memit) if step > 0 else 0, layer)
    return dataclasses.replace(
        choice,
        memit=tuple(memit),
        reason=f"a first choice by depth, about a sixth of the {lm.n_layers} layers, where the "
        "published ones lie; `factsmith layers` measures it by trial edits",
    )


def depth_choice(lm: LanguageModel, rome: int, why: str) -> LayerChoice:
    """Return the choice where nothing is known: layer `rome`, and around it those of `by_depth`."""
    return LayerChoice(
        rome=rome,
        memit=by_depth(lm.n_layers, rome),
        source="depth",
        reason=f"a fixed share of the depth: {why}",
        fingerprint=lm.fingerprint,
    )
