"""How predictions are made, on average over many of them, layer by layer.

    average = refinement(lm, prompts)         # what the model says after each prompt
    average.composed, average.chance          # how often no neuron predicts what its layer predicts
    average.cases["composition"]              # how often the stream then predicts a third token
    average.ranks, average.probabilities, average.first    # of the answer, layer by layer
    average.half                              # sub-updates that carry half of each answer

Geva et al. 2021 (arXiv 2012.14913), section 5. `own_predictions` says what a layer and a neuron
predict by themselves. `chance` is the same measure with the layer's predictions dealt out over the
prompts: each prediction against the neurons of every prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_items, check_number
from ..core.errors import InputError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from ..model.turns import asking
from .own_predictions import OwnPredictions
from .stream import (
    Stream,
    carrying_half,
    check_position,
    read_logits,
    read_stream,
    shares,
    way_up,
)
from .unembedding import find_unembedding, output_scales
from .values import ValueTokens

CASES = ("residual", "ffn", "agreement", "composition")
"""What the stream predicts after a layer's FFN, as `Refinement.cases` counts it."""

_ROWS = 64
"""Prompts in a batch: each brings the coefficients of all layers."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Refinement(Shown):
    """n predictions of a model with L layers, layer by layer.

    Shares are float64. The stream has 2 L + 1 points: after the embedding, and after the attention
    and the FFN of each layer.

    Attributes:
        answers: (n,) int64, the token looked at: the one that the model says, or the first of the
            target.
        ranks: (n, 2 L + 1) int64, the answer's rank at each point. 0 is the likeliest token.
        probabilities: (n, 2 L + 1) float32, its probability there, read through the model's own
            final norm and unembedding.
        half: (n,) int64, how many of the `neurons` sub-updates carry half of what speaks for the
            answer, as `Composition.half`.
        neurons: The number of sub-updates of one prediction: of experts those chosen.
        among: Which neurons count, as shares of Σ |mᵢ|·‖vᵢ‖ in a layer. 1: all that are not at
            zero, 0: the strongest alone.
        composed: (len(among), L), the share of predictions in which no such neuron predicts what
            its layer predicts.
        chance: (len(among), L), the same with the layer's predictions dealt out over the prompts.
        counted: (len(among), L), how many neurons these are on average.
        half_of_layer: (n, L) int64, how many of a layer's sub-updates carry half of what speaks
            for the layer's own prediction.
        says: (L,), the share of predictions in which a layer's own prediction is the answer.
        cases: {case: (L,)}, the share of predictions in which the stream predicts, after the FFN:
            "residual" what it predicted before, "ffn" what the FFN predicts, "agreement" both,
            "composition" neither. They sum to 1.
        norm: Whether the own predictions of layers and neurons have the final norm folded in.
        model: The name that the model was loaded by.
    """

    answers: Tensor
    ranks: Tensor
    probabilities: Tensor
    half: Tensor
    neurons: int
    among: tuple[float, ...]
    composed: Tensor
    chance: Tensor
    counted: Tensor
    half_of_layer: Tensor
    says: Tensor
    cases: Mapping[str, Tensor]
    norm: bool
    model: str

    def tables(self) -> list[Table]:
        """Return one table: for each layer its own prediction, and how far the answer is."""
        title = (
            f"{len(self.answers):,} predictions of {self.model}; half of what speaks for the "
            f"answer: {int(self.half.median()):,} of {self.neurons:,} sub-updates"
        )
        median, first = self.quantiles(0.5)[0].tolist(), self.first.tolist()
        rows = [
            (
                str(layer),
                f"{float(self.composed[0, layer]):.1%}",
                f"{float(self.says[layer]):.1%}",
                *(f"{float(self.cases[case][layer]):.1%}" for case in self.cases),
                f"{median[2 * layer + 2]:,.0f}",
                f"{first[2 * layer + 2]:.1%}",
            )
            for layer in range(len(self.says))
        ]
        names = ("layer", "no neuron's", "says the answer", *self.cases, "median rank", "first")
        return [
            Table(
                title,
                dict.fromkeys(names, ">"),
                rows,
                "no neuron's: no neuron of the layer predicts what the layer predicts",
            )
        ]

    @property
    def first(self) -> Tensor:
        """(2 L + 1,), the share of predictions whose answer is the likeliest token at a point."""
        return (self.ranks == 0).double().mean(0)

    def quantiles(self, *which: float) -> Tensor:
        """Return quantiles of the answer's rank, (len(which), 2 L + 1). 0.5 is the median."""
        return self.ranks.double().quantile(torch.tensor(which, dtype=torch.float64), dim=0)

    def rows(self) -> list[dict[str, Any]]:
        """Return the averages as rows of a table, one for each layer."""
        median, first = self.quantiles(0.5)[0], self.first
        probability = self.probabilities.double().mean(0)
        rows = []
        for layer in range(len(self.says)):
            row: dict[str, Any] = {"layer": layer}
            for share, composed, chance in zip(
                self.among, self.composed[:, layer], self.chance[:, layer], strict=True
            ):
                row |= {f"composed {share:g}": float(composed), f"chance {share:g}": float(chance)}
            row |= {
                "half of layer": float(self.half_of_layer[:, layer].double().median()),
                "says": float(self.says[layer]),
            }
            row |= {case: float(shares[layer]) for case, shares in self.cases.items()}
            for name, at in (("attention", 2 * layer + 1), ("ffn", 2 * layer + 2)):
                row |= {
                    f"{name} rank": float(median[at]),
                    f"{name} first": float(first[at]),
                    f"{name} p": float(probability[at]),
                }
            rows.append(row)
        return rows


@asking()
def refinement(  # house: a promised public signature
    lm: LanguageModel,
    prompts: Iterable[str],
    targets: Iterable[str] | None = None,
    *,
    positions: Iterable[int] | None = None,
    among: Sequence[float] = (1.0, 0.5, 0.0),
    norm: bool = False,
    values: ValueTokens | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Refinement:
    """Break many predictions down, some dozens in one pass, and average them by layer.

    Args:
        lm: The model.
        prompts: The texts. A text may be given many times.
        targets: For each prompt the text whose first token is looked at. None: the token that the
            model says.
        positions: For each prompt the number of the token that predicts; a negative number counts
            from the end. None: the last token.
        among: Which neurons count for `composed`: the fewest that carry such a share of
            Σ |mᵢ|·‖vᵢ‖. 1: all, 0: the strongest alone.
        norm: Fold the final norm into what layers and neurons predict by themselves. False: the
            bare projection of the paper.
        values: The model's values, of all layers, if they were read before. They decide on `norm`.
        batch_tokens: Padded tokens in one forward pass.
        progress: Gets the number of predictions done.

    Raises:
        InputError: when there are no prompts, lists differ in length, a position is outside its
            prompt, a target has no token, or `values` are of another model or not of all layers.
        UnsupportedModelError: as `compose`.
    """
    check_model(lm)
    kept = tuple(
        check_number(share, "a share in among", least=0, most=1)
        for share in check_items(among, "among", "shares from 0 to 1")
    )
    if not kept:
        raise InputError(
            "among is empty: it must hold at least one share from 0 to 1", argument="among"
        )
    budget = check_count(batch_tokens, "batch_tokens")
    asked = _asked(lm, prompts, targets, positions)
    scales = output_scales(lm)
    own_predictions = OwnPredictions(lm, among=kept, norm=norm, values=values, scales=scales)
    each = _read_each(lm, asked, own_predictions, scales, budget, progress)
    composed, chance, counted = own_predictions.result(len(asked.rows))
    return Refinement(
        answers=each.answers,
        ranks=each.ranks,
        probabilities=each.probabilities,
        half=each.half,
        neurons=each.neurons,
        among=kept,
        composed=composed,
        chance=chance,
        counted=counted,
        half_of_layer=each.half_of_layer,
        says=(each.by_layer == each.answers[:, None]).double().mean(0),
        cases=_cases(each.likeliest, each.by_layer),
        norm=own_predictions.norm,
        model=lm.name,
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """The predictions to break down.

    Attributes:
        rows: For each its token ids.
        at: For each the number of the token that predicts.
        tokens: (n,), the tokens looked at. None: what the model says.
    """

    rows: list[list[int]]
    at: list[int]
    tokens: Tensor | None


def _asked(
    lm: LanguageModel,
    prompts: Iterable[str],
    targets: Iterable[str] | None,
    positions: Iterable[int] | None,
) -> _Asked:
    """Check what the caller asks for, and tokenize it."""
    texts = check_items(prompts, "prompts", "texts")
    ends = [-1] * len(texts)
    if positions is not None:
        ends = check_items(positions, "positions", "whole numbers, one for each prompt")
    wanted = None
    if targets is not None:
        wanted = check_items(targets, "targets", "texts, one for each prompt")
    if not texts or len(ends) != len(texts) or (wanted is not None and len(wanted) != len(texts)):
        given = f"{len(texts)} prompts, {len(ends)} positions" + (
            "" if wanted is None else f", {len(wanted)} targets"
        )
        raise InputError(f"got {given}; give at least one prompt, and as many of each")
    rows, at = [], []
    for text, end in zip(texts, ends, strict=True):
        ids = lm.prompt_ids(text)
        at.append(check_position(end, len(ids), "a position"))
        rows.append(ids[: at[-1] + 1] if lm.is_causal else ids)
    if wanted is None:
        return _Asked(rows, at, None)
    tokens = [
        target_ids(lm, text, target, gap=gap)[0]
        for text, target, gap in zip(texts, wanted, lm.gaps(texts, wanted), strict=True)
    ]
    return _Asked(rows, at, torch.tensor(tokens))


class _Each:
    """What is read of each prediction: the attributes of `Refinement` of these names, and more.

    Attributes:
        likeliest: (n, 2 L + 1) int64, the likeliest token at each point of the stream.
        by_layer: (n, L) int64, what each layer predicts by itself.
    """

    def __init__(self, n: int, n_layers: int) -> None:
        points = 2 * n_layers + 1
        self.answers = torch.zeros(n, dtype=torch.long)
        self.half = torch.zeros(n, dtype=torch.long)
        self.half_of_layer = torch.zeros(n, n_layers, dtype=torch.long)
        self.ranks = torch.zeros(n, points, dtype=torch.long)
        self.probabilities = torch.zeros(n, points, dtype=torch.float32)
        self.likeliest = torch.zeros(n, points, dtype=torch.long)
        self.by_layer = torch.zeros(n, n_layers, dtype=torch.long)
        self.neurons = 0


def _read_each(
    lm: LanguageModel,
    asked: _Asked,
    own_predictions: OwnPredictions,
    scales: Mapping[int, Tensor],
    budget: int,
    progress: Progress | None,
) -> _Each:
    """Read all predictions, batch by batch, and count the own predictions of layers."""
    head, each = find_unembedding(lm), _Each(len(asked.rows), lm.n_layers)
    done = 0
    for part in _batches(lm, asked.rows, budget):
        rows, at = [asked.rows[i] for i in part], [asked.at[i] for i in part]
        stream = read_stream(lm, rows, at, scales)
        reading = read_logits(lm, head, stream.states[-1])
        answers = reading.logits.argmax(-1).cpu() if asked.tokens is None else asked.tokens[part]
        directions, _, _ = reading.directions(head, answers)
        speaking = _shares_of_all(lm, stream, directions)
        each.answers[part], each.half[part] = answers, carrying_half(speaking)
        each.ranks[part], each.probabilities[part], each.likeliest[part] = (
            t.T for t in way_up(lm, stream.states, answers)
        )
        by_layer = own_predictions.predictions(stream)
        each.by_layer[part] = by_layer
        each.half_of_layer[part] = own_predictions.add(stream, by_layer)
        each.neurons = speaking.shape[1]
        done += len(part)
        tell(progress, "predictions", done, len(asked.rows))
    return each


def _batches(lm: LanguageModel, rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Return the numbers of rows in batches of similar length, at most `_ROWS` each."""
    return [
        group[start : start + _ROWS]
        for group in lm.groups([len(ids) for ids in rows], budget)
        for start in range(0, len(group), _ROWS)
    ]


def _shares_of_all(lm: LanguageModel, stream: Stream, directions: Tensor) -> Tensor:
    """Return what every sub-update of all layers adds along each prediction's direction.

    Takes directions (n, d_model). Returns (n, neurons) on the CPU.
    """
    along = []
    for ffn, factor, fired in zip(lm.ffn, stream.factors, stream.fired, strict=True):
        along += [
            shares(ffn, some, directions.to(factor.device) * factor).flatten(1).cpu()
            for some in fired
        ]
    return torch.cat(along, 1)


def _cases(likeliest: Tensor, by_layer: Tensor) -> dict[str, Tensor]:
    """Return `Refinement.cases`.

    Args:
        likeliest: (n, 2 L + 1), the likeliest token at each point of the stream.
        by_layer: (n, L), what each layer predicts by itself.
    """
    before, after = likeliest[:, 1::2], likeliest[:, 2::2]
    same_before, same_own = after == before, after == by_layer
    cases = (
        same_before & ~same_own,
        same_own & ~same_before,
        same_before & same_own,
        ~same_before & ~same_own,
    )
    return {name: case.double().mean(0) for name, case in zip(CASES, cases, strict=True)}
