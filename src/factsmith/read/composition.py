"""How one prediction is made: what each part of the model adds to the logit of a token.

    composition = compose(lm, "The currency of Bulgaria is the")   # the token that the model says
    composition.parts            # embedding, attention and FFN of each layer; they sum to the logit
    composition.strongest(10)    # the neurons that add most to it
    composition.half             # how many neurons carry half of what speaks for the token
    composition.ranks, composition.probabilities                   # of the token, layer by layer

This is direct logit attribution. The last hidden state is the sum of everything that was added to
the stream, and the final norm is linear once its divisor is fixed at its value in this pass. So
each addition has a share of the logit, and the shares sum to the logit. Geva et al. 2022 (arXiv
2203.14680) look at the same sub-updates mᵢ·vᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..core.checks import check_count
from ..core.errors import InputError
from ..core.progress import Progress, note
from ..core.tables import Shown, Table, counted, quoted
from ..corpus.scan import Bank
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from ..model.turns import asking
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
from .values import tokens_of

ContributionKind: TypeAlias = Literal["embedding", "attention", "ffn", "shift"]
"""What adds to a logit. "shift" is the final norm's shift with the unembedding's bias."""


@dataclass(frozen=True)
class Part:
    """What one part of the model adds to the logit.

    Attributes:
        kind: What the part is.
        layer: Its layer. None for the embedding and the shift.
        logit: What it adds.
    """

    kind: ContributionKind
    layer: int | None
    logit: float


@dataclass(frozen=True)
class Contribution:
    """What one sub-update adds to the logit.

    Attributes:
        neuron: (layer, i) or (layer, expert, i).
        coefficient: The neuron's coefficient, times its expert's weight.
        logit: What the sub-update adds.
        writes: The tokens that it promotes most, where they were looked up.
    """

    neuron: Neuron
    coefficient: float
    logit: float
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Composition(Shown):
    """A prediction as the sum of its parts, in a model with L layers.

    Attributes:
        prompt: The text.
        tokens: Its tokens, as text.
        position: The number of the token at which the prediction is made.
        target: The predicted token, as text.
        target_id: Its id.
        contrast: The token whose logit is subtracted, as text. None: none is.
        contrast_id: Its id.
        logit: The target's logit (less the contrast's), before any softcap.
        parts: What each part adds, from the embedding up. The sum is the logit.
        neurons: {bank: (coefficients (d_ff,), logits (d_ff,))}, float32. In a layer with experts
            only those that were chosen.
        ranks: (2 L + 1,) int64, the target's rank in the stream after the embedding, and after
            attention and FFN of each layer. 0 is the likeliest token.
        probabilities: (2 L + 1,) float32, its probability there, read through the model's own
            final norm and unembedding.
        writes: The tokens that the strongest sub-updates promote most.
    """

    prompt: str
    tokens: tuple[str, ...]
    position: int
    target: str
    target_id: int
    contrast: str | None
    contrast_id: int | None
    logit: float
    parts: tuple[Part, ...]
    neurons: Mapping[Bank, tuple[Tensor, Tensor]]
    ranks: Tensor
    probabilities: Tensor
    writes: Mapping[Neuron, tuple[str, ...]]

    def tables(self, k: int = 10) -> list[Table]:
        """Return what each part adds, and the k neurons that add most and take most."""
        n_neurons = sum(len(m) for m, _ in self.neurons.values())
        against = "" if self.contrast is None else f" above that of {self.contrast.strip()!r}"
        half = f"{counted(self.half, 'neuron')} of {n_neurons:,} carry half of what speaks for it"
        title = f"{self.prompt} {self.target.strip()}: logit {self.logit:z.2f}{against}; {half}"
        parts = []
        for row in self.rows():
            alone = "shift and bias" if row["part"] == "shift" else row["part"]
            name = alone if row["layer"] is None else f"layer {row['layer']} {row['part']}"
            after = (
                ("", "")
                if row["rank"] is None
                else (f"{row['rank'] + 1:,}", f"{row['probability']:z.1%}")
            )
            parts.append((name, f"{row['logit']:+z.2f}", *after))
        columns = {"neuron": "<", "coefficient": ">", "adds": ">", "what it writes": "<"}
        neurons = [
            (
                " ".join(map(str, c.neuron)),
                f"{c.coefficient:+z.2f}",
                f"{c.logit:+z.3f}",
                quoted(c.writes),
            )
            for c in self._both_ends(k)
        ]
        return [
            Table(title, {"part": "<", "adds": ">", "rank": ">", "probability": ">"}, parts),
            Table("the neurons that add most, and take most", columns, neurons),
        ]

    def strongest(self, k: int = 10, *, against: bool = False) -> list[Contribution]:
        """Return the k sub-updates that add most to the logit.

        With `against`, return the k that take most from it.
        """
        sign, k = -1 if against else 1, check_count(k, "k", "the number of sub-updates")
        contributions = []
        for bank, (coefficients, logits) in self.neurons.items():
            best = (sign * logits).topk(min(k, len(logits)))
            contributions += [
                Contribution(
                    (*bank, int(i)),
                    float(coefficients[i]),
                    float(logits[i]),
                    self.writes.get((*bank, int(i)), ()),
                )
                for value, i in zip(best.values, best.indices, strict=True)
                if value > 0
            ]
        return sorted(contributions, key=lambda c: -sign * c.logit)[:k]

    def _both_ends(self, k: int) -> list[Contribution]:
        """Return the k sub-updates that add most, then the k that take most."""
        return [*self.strongest(k), *self.strongest(k, against=True)]

    def rows(self) -> list[dict[str, Any]]:
        """Return the parts as rows of a table, from the embedding up.

        Rank and probability are those after the part, and None for the shift.
        """
        after = [*zip(self.ranks.tolist(), self.probabilities.tolist(), strict=True), (None, None)]
        return [
            {
                "layer": part.layer,
                "part": part.kind,
                "logit": part.logit,
                "rank": rank,
                "probability": probability,
            }
            for part, (rank, probability) in zip(self.parts, after, strict=True)
        ]

    def to_dict(self, k: int = 10) -> dict[str, Any]:
        """Return the record as JSON-able values, with the k neurons that add and take most."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "parts": self.rows(),
            "neurons": [
                {
                    "neuron": list(c.neuron),
                    "coefficient": c.coefficient,
                    "logit": c.logit,
                    "writes": list(c.writes),
                }
                for c in self._both_ends(k)
            ],
        }

    @property
    def half(self) -> int:
        """How many sub-updates carry half of what speaks for the target.

        The largest are counted first. 0 if no sub-update speaks for it.
        """
        return int(carrying_half(torch.cat([logits for _, logits in self.neurons.values()])))


_PLAIN = (
    "prompt",
    "tokens",
    "position",
    "target",
    "target_id",
    "contrast",
    "contrast_id",
    "logit",
    "half",
)
"""Attributes that are JSON-able as they are."""


@asking()
def compose(
    lm: LanguageModel,
    prompt: str,
    target: str | None = None,
    *,
    contrast: str | None = None,
    position: int = -1,
    top: int = 10,
    tokens: int = 5,
    progress: Progress | None = None,
) -> Composition:
    """Break the prediction at one token of a prompt down into what each part adds.

    Args:
        lm: The model.
        prompt: The text.
        target: Text whose first token is explained. None: the token that the model says.
        contrast: Text whose first token's logit is subtracted. The shares then say why the model
            predicts the target and not this.
        position: The number of the token that predicts. A negative number counts from the end.
        top: Of how many sub-updates that add most, and take most, to look up the tokens.
        tokens: Number of tokens to look up for each.
        progress: Gets a note where only the first of several tokens of a text is explained.

    Raises:
        InputError: when the prompt is empty, the position is outside it, a number is below 1,
            a target has no token, or target and contrast begin with the same token.
        UnsupportedModelError: as `find_unembedding` and `output_scale`.
    """
    check_model(lm)
    top = check_count(top, "top", "the number of sub-updates to look up")
    tokens = check_count(tokens, "tokens", "the number of tokens of each sub-update")
    ids = lm.prompt_ids(prompt)
    at = check_position(position, len(ids))
    head, scales = find_unembedding(lm), output_scales(lm)
    stream = read_stream(lm, [ids], [at], scales)
    reading = read_logits(lm, head, stream.states[-1])
    wanted = (
        int(reading.logits[0].argmax())
        if target is None
        else _first_token(lm, prompt, target, "target", progress)
    )
    other = None if contrast is None else _first_token(lm, prompt, contrast, "contrast", progress)
    if other == wanted:
        both = lm.tokenizer.decode([wanted])
        raise InputError(
            f"{target or both!r} and {contrast!r} begin with the same token, {both!r}, so "
            "their logits are the same. Move what they have in common into the prompt.",
            argument="contrast",
        )
    chosen = torch.tensor([wanted])
    direction, constant, logit = reading.directions(
        head, chosen, None if other is None else torch.tensor([other])
    )
    parts, neurons = _shares_by_part(lm, stream, direction)
    ranks, probabilities, _ = way_up(lm, stream.states, chosen)
    composition = Composition(
        prompt=prompt,
        tokens=tuple(lm.tokenizer.decode([i]) for i in ids),
        position=at,
        target=lm.tokenizer.decode([wanted]),
        target_id=wanted,
        contrast=None if other is None else lm.tokenizer.decode([other]),
        contrast_id=other,
        logit=float(logit),
        parts=(*parts, Part("shift", None, float(constant))),
        neurons=neurons,
        ranks=ranks[:, 0],
        probabilities=probabilities[:, 0],
        writes={},
    )
    looked_up = composition._both_ends(top)
    negative = [c.coefficient < 0 for c in looked_up]
    written = tokens_of(lm, head, scales, [c.neuron for c in looked_up], negative, tokens)
    return replace(composition, writes=_words(looked_up, written))


def _first_token(
    lm: LanguageModel, prompt: str, text: str, argument: str, progress: Progress | None
) -> int:
    """Return the first token of a text that continues a prompt, with a note if it has more."""
    ids = target_ids(lm, prompt, text)
    if len(ids) > 1:
        first = lm.tokenizer.decode(ids[:1])
        note(
            progress,
            f"{text!r} is {len(ids)} tokens; only the first, {first!r}, is explained",
            argument=argument,
        )
    return ids[0]


def _shares_by_part(
    lm: LanguageModel, stream: Stream, direction: Tensor
) -> tuple[list[Part], dict[Bank, tuple[Tensor, Tensor]]]:
    """Return what each part and each sub-update adds along a direction (1, d_model)."""

    def share(added: Tensor) -> float:
        return float(added[0].double() @ direction[0].double().to(added.device))

    parts = [Part("embedding", None, share(stream.embedding))]
    neurons: dict[Bank, tuple[Tensor, Tensor]] = {}
    for ffn, attention, added, factor, fired in zip(
        lm.ffn, stream.attention, stream.ffn, stream.factors, stream.fired, strict=True
    ):
        parts += [
            Part("attention", ffn.layer, share(attention)),
            Part("ffn", ffn.layer, share(added)),
        ]
        for banks in fired:
            along = shares(ffn, banks, direction.to(factor.device) * factor)[0].cpu()
            for slot, place in enumerate(banks.places[0].tolist()):
                if place >= 0:
                    bank: Bank = (ffn.layer, place) if ffn.n_experts else (ffn.layer,)
                    neurons[bank] = (banks.m[0, slot].cpu(), along[slot])
    return parts, neurons


def _words(
    contributions: Sequence[Contribution], written: Sequence[Sequence[tuple[str, float]]]
) -> dict[Neuron, tuple[str, ...]]:
    """Return the tokens of each sub-update by neuron, without their scores."""
    return {
        c.neuron: tuple(token for token, _ in tokens)
        for c, tokens in zip(contributions, written, strict=True)
    }
