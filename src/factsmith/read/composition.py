"""How a prediction is put together: what every sub-update, attention and the embedding add to one token's logit.

    found = compose(lm, "The currency of Bulgaria is the")      # of the token the model says; or target=" lev"
    found.parts                                                  # embedding, each attention and each memory, signed: they sum to the logit
    found.strongest(10)                                          # the neurons that move it most
    found.half                                                   # how many of them carry half of what speaks for it
    found.ranks, found.probabilities                             # of the token, from layer to layer

Direct logit attribution: the last hidden state is a sum of everything that was added to the stream, and the final norm is linear once its
divisor is fixed at what it was in this pass. So every addition has a share of the logit, and the shares sum to it. Geva et al. 2022
(arXiv 2203.14680) look at the same sub-updates mᵢ·vᵢ; 2021 (arXiv 2012.14913) ask whether a layer says what any one of its memories says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checks import check_count, whole_number
from ..core.errors import InputError
from ..core.tables import Shown, Table, counted, quoted
from ..corpus.scan import Bank
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import target_ids
from .stream import carrying_half, read_logits, read_stream, shares, way_up
from .unembedding import behind, find_unembedding
from .values import tokens_of

Kind = Literal["embedding", "attention", "ffn", "shift"]


@dataclass(frozen=True)
class Part:
    """What one part of the model adds to the logit; layer None: the embedding, or the final norm's shift with the unembedding's bias."""

    kind: Kind
    layer: int | None
    logit: float


@dataclass(frozen=True)
class Contribution:
    """One sub-update: the neuron, its coefficient (times its expert's weight), what it adds to the token's logit, and the tokens that it
    promotes most, where they were looked up."""

    neuron: Neuron
    coefficient: float
    logit: float
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Composition(Shown):
    """A prediction taken apart.

    prompt         the text
    tokens         its tokens as text
    position       which of them the prediction is made at
    target         the token predicted, as text, and `target_id`
    contrast       the token whose logit is taken off, as text, and `contrast_id`; None: the logit alone
    logit          of the target (less the contrast's), before any softcap
    parts          what every part adds to it, from the embedding up; their sum is the logit
    neurons        {bank: (coefficients (d_ff,), logits (d_ff,))}, float32; of experts those that were chosen
    ranks          (2 n_layers + 1,) int64, rank of the target (0: the likeliest) in the stream: embedding, behind each attention and memory
    probabilities  (2 n_layers + 1,) float32, its probability there, read through the model's own tail
    writes         the tokens that the strongest sub-updates promote most
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
        """What every part adds, with the target's way up; then the k neurons that add most to it, and the k that take most."""
        against = "" if self.contrast is None else f" above that of {self.contrast.strip()!r}"
        half = f"{counted(self.half, 'neuron')} of {sum(len(m) for m, _ in self.neurons.values()):,} carry half of what speaks for it"
        title = f"{self.prompt} {self.target.strip()}: logit {self.logit:.2f}{against}; {half}"
        parts = []
        for row in self.rows():
            alone = "shift and bias" if row["part"] == "shift" else row["part"]
            name = alone if row["layer"] is None else f"layer {row['layer']} {row['part']}"
            behind = (
                ("", "")
                if row["rank"] is None
                else (f"{row['rank'] + 1:,}", f"{row['probability']:.1%}")
            )
            parts.append((name, f"{row['logit']:+.2f}", *behind))
        columns = {"neuron": "<", "coefficient": ">", "adds": ">", "what it writes": "<"}
        neurons = [
            (
                " ".join(map(str, c.neuron)),
                f"{c.coefficient:+.2f}",
                f"{c.logit:+.3f}",
                quoted(c.writes),
            )
            for c in (*self.strongest(k), *self.strongest(k, against=True))
        ]
        return [
            Table(title, {"part": "<", "adds": ">", "rank": ">", "probability": ">"}, parts),
            Table("the neurons that add most, and take most", columns, neurons),
        ]

    def strongest(self, k: int = 10, *, against: bool = False) -> list[Contribution]:
        """The k sub-updates that add most to the logit, or (against) take most from it."""
        sign, k = -1 if against else 1, check_count(k, "k", "the number of sub-updates")
        found = []
        for bank, (coefficients, logits) in self.neurons.items():
            best = (sign * logits).topk(min(k, len(logits)))
            found += [
                Contribution(
                    (*bank, int(i)),
                    float(coefficients[i]),
                    float(logits[i]),
                    self.writes.get((*bank, int(i)), ()),
                )
                for value, i in zip(best.values, best.indices, strict=True)
                if value > 0
            ]
        return sorted(found, key=lambda c: -sign * c.logit)[:k]

    def rows(self) -> list[dict[str, Any]]:
        """The parts as a table, from the embedding up; rank and probability are those behind the part, None for the shift."""
        way_up = [*zip(self.ranks.tolist(), self.probabilities.tolist(), strict=True), (None, None)]
        return [
            {
                "layer": part.layer,
                "part": part.kind,
                "logit": part.logit,
                "rank": rank,
                "probability": probability,
            }
            for part, (rank, probability) in zip(self.parts, way_up, strict=True)
        ]

    def to_dict(self, k: int = 10) -> dict[str, Any]:
        """The record as plain JSON-able values: of the neurons the k that add most, then the k that take most."""
        named = (
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
        neurons = [*self.strongest(k), *self.strongest(k, against=True)]
        return {
            **{name: getattr(self, name) for name in named},
            "parts": self.rows(),
            "neurons": [
                {
                    "neuron": list(c.neuron),
                    "coefficient": c.coefficient,
                    "logit": c.logit,
                    "writes": list(c.writes),
                }
                for c in neurons
            ],
        }

    @property
    def half(self) -> int:
        """How many of the sub-updates that speak for the target it takes to make up half of what they add; 0 when none does."""
        return int(carrying_half(torch.cat([logits for _, logits in self.neurons.values()])))


@torch.no_grad()
def compose(
    lm: LanguageModel,
    prompt: str,
    target: str | None = None,
    *,
    contrast: str | None = None,
    position: int = -1,
    top: int = 10,
    tokens: int = 5,
) -> Composition:
    """Take the prediction at one token of a prompt apart.

    target    text whose first token is looked at; None: the token the model says
    contrast  text whose first token's logit is taken off, so that shares say why the one and not the other
    position  which token of the prompt predicts (negative: from its end)
    top       of how many of the sub-updates that add most, and that take most, the tokens they promote are looked up, so many `tokens` each

    Raises InputError for an empty prompt, a position outside it, a count below 1, or a target without a token; UnsupportedModelError as
    `find_unembedding`.
    """
    check_model(lm)
    top, tokens = (
        check_count(top, "top", "the number of sub-updates to look up"),
        check_count(tokens, "tokens", "the number of tokens of each sub-update"),
    )
    ids = lm.prompt_ids(prompt)
    at = whole_number(position)
    if at is None or not -len(ids) <= at < len(ids):
        raise InputError(
            f"position is one of the prompt's {len(ids)} tokens, 0 to {len(ids) - 1}, or negative from its end; got {position!r}"
        )
    at %= len(ids)
    head = find_unembedding(lm)
    scales = [behind(lm, layer) for layer in range(lm.n_layers)]
    stream = read_stream(lm, [ids], [at], scales)
    reading = read_logits(lm, head, stream.states[-1])
    wanted = (
        int(reading.logits[0].argmax())
        if target is None
        else target_ids(lm.tokenizer, prompt, target)[0]
    )
    other = None if contrast is None else target_ids(lm.tokenizer, prompt, contrast)[0]
    if other == wanted:
        both = lm.tokenizer.decode([wanted])
        raise InputError(
            f"{target or both!r} and {contrast!r} begin with the same token, {both!r}, so there is nothing between them at this place; put "
            "what they have in common into the prompt"
        )
    chosen = torch.tensor([wanted])
    direction, constant, logit = reading.directions(
        head, chosen, None if other is None else torch.tensor([other])
    )

    def share(added: Tensor) -> float:
        return float(added[0].double() @ direction[0].double().to(added.device))

    parts = [Part("embedding", None, share(stream.embedding))]
    neurons: dict[Bank, tuple[Tensor, Tensor]] = {}
    for ffn, attention, memory, factor, fired in zip(
        lm.ffn, stream.attention, stream.ffn, stream.behind, stream.fired, strict=True
    ):
        parts += [
            Part("attention", ffn.layer, share(attention)),
            Part("ffn", ffn.layer, share(memory)),
        ]
        for banks in fired:
            added = shares(ffn, banks, direction.to(factor.device) * factor)[0].cpu()
            for slot, place in enumerate(banks.places[0].tolist()):
                if place >= 0:
                    neurons[(ffn.layer, place) if ffn.n_experts else (ffn.layer,)] = (
                        banks.m[0, slot].cpu(),
                        added[slot],
                    )
    parts.append(Part("shift", None, float(constant)))
    ranks, probabilities, _ = way_up(lm, stream.states, chosen)
    found = Composition(
        prompt=prompt,
        tokens=tuple(lm.tokenizer.decode([i]) for i in ids),
        position=at,
        target=lm.tokenizer.decode([wanted]),
        target_id=wanted,
        contrast=None if other is None else lm.tokenizer.decode([other]),
        contrast_id=other,
        logit=float(logit),
        parts=tuple(parts),
        neurons=neurons,
        ranks=ranks[:, 0],
        probabilities=probabilities[:, 0],
        writes={},
    )
    looked_up = [*found.strongest(top), *found.strongest(top, against=True)]
    written = tokens_of(
        lm,
        head,
        scales,
        [c.neuron for c in looked_up],
        [c.coefficient < 0 for c in looked_up],
        tokens,
    )
    return replace(
        found,
        writes={
            c.neuron: tuple(token for token, _ in own)
            for c, own in zip(looked_up, written, strict=True)
        },
    )
