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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import whole_number
from ..errors import InputError
from ..model.ffn import Neuron, get_slot
from ..model.load import LanguageModel, check_model
from ..model.scan import Bank, banks, scan
from ..model.tokens import Batch, target_ids
from ..model.trace import recording, replacing
from .values import Unembedding, behind, find_unembedding

Kind = Literal["embedding", "attention", "ffn", "shift"]


@dataclass(frozen=True)
class Part:
    """What one part of the model adds to the logit; layer None: the embedding, or the final norm's shift with the unembedding's bias."""

    kind: Kind
    layer: int | None
    logit: float


@dataclass(frozen=True)
class Contribution:
    """One sub-update: the neuron, its coefficient (times its expert's weight), and what it adds to the token's logit."""

    neuron: Neuron
    coefficient: float
    logit: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Composition:
    """A prediction taken apart.

    prompt         the text
    tokens         its tokens as text
    position       which of them the prediction is made at
    target         the token predicted, as text, and `target_id`
    contrast_id    the token whose logit is taken off; None: the logit alone
    logit          of the target (less the contrast's), before any softcap
    parts          what every part adds to it, from the embedding up; their sum is the logit
    neurons        {bank: (coefficients (d_ff,), logits (d_ff,))}, float32; of experts those that were chosen
    ranks          (2 n_layers + 1,) int64, rank of the target (0: the likeliest) in the stream: embedding, behind each attention and memory
    probabilities  (2 n_layers + 1,) float32, its probability there, read through the model's own tail
    """

    prompt: str
    tokens: tuple[str, ...]
    position: int
    target: str
    target_id: int
    contrast_id: int | None
    logit: float
    parts: tuple[Part, ...]
    neurons: Mapping[Bank, tuple[Tensor, Tensor]]
    ranks: Tensor
    probabilities: Tensor

    def strongest(self, k: int = 10, *, against: bool = False) -> list[Contribution]:
        """The k sub-updates that add most to the logit, or (against) take most from it."""
        sign = -1 if against else 1
        found = []
        for bank, (coefficients, logits) in self.neurons.items():
            best = (sign * logits).topk(min(k, len(logits)))
            found += [
                Contribution((*bank, int(i)), float(coefficients[i]), float(logits[i]))
                for value, i in zip(best.values, best.indices, strict=True)
                if value > 0
            ]
        return sorted(found, key=lambda c: -sign * c.logit)[:k]

    @property
    def half(self) -> int:
        """How many of the sub-updates that speak for the target it takes to make up half of what they add; 0 when none does."""
        each = torch.cat([logits for _, logits in self.neurons.values()]).clamp(min=0).double().sort(descending=True).values
        return 0 if not float(each.sum()) else int((each.cumsum(0) < each.sum() / 2).sum()) + 1


@torch.no_grad()
def compose(lm: LanguageModel, prompt: str, target: str | None = None, *, contrast: str | None = None, position: int = -1) -> Composition:
    """Take the prediction at one token of a prompt apart.

    target    text whose first token is looked at; None: the token the model says
    contrast  text whose first token's logit is taken off, so that shares say why the one and not the other
    position  which token of the prompt predicts (negative: from its end)

    Raises InputError for an empty prompt, a position outside it, or a target without a token; UnsupportedModelError as `find_unembedding`.
    """
    check_model(lm)
    ids = lm.prompt_ids(prompt)
    at = whole_number(position)
    if at is None or not -len(ids) <= at < len(ids):
        raise InputError(
            f"position is one of the prompt's {len(ids)} tokens, 0 to {len(ids) - 1}, or negative from its end; got {position!r}"
        )
    at %= len(ids)
    batch = lm.batch([prompt])
    lm.check_batch(batch)
    head = find_unembedding(lm)
    stream = _stream(lm, batch, at)
    logits = lm.head(stream.last)
    wanted = int(logits.argmax()) if target is None else target_ids(lm.tokenizer, prompt, target)[0]
    other = None if contrast is None else target_ids(lm.tokenizer, prompt, contrast)[0]
    read = _read(lm, head, stream.last, wanted, other)
    parts = [Part("embedding", None, read.share(stream.embedding))]
    neurons: dict[Bank, tuple[Tensor, Tensor]] = {}
    for layer in range(lm.n_layers):
        parts += [Part("attention", layer, read.share(stream.attention[layer])), Part("ffn", layer, read.share(stream.ffn[layer]))]
    every = banks(lm)
    for bank, coefficients in _coefficients(lm, ids, prompt, at).items():
        values = every[bank].values
        shares = coefficients.to(values.device) * (values.float() @ (read.direction * stream.behind[bank[0]]).to(values.device))
        neurons[bank] = (coefficients.cpu(), shares.cpu())
    parts.append(Part("shift", None, read.constant))
    states = torch.stack(stream.states)
    probabilities = lm.head(states).float().softmax(-1)
    own = probabilities[:, wanted]
    return Composition(
        prompt=prompt,
        tokens=tuple(lm.tokenizer.decode([i]) for i in ids),
        position=at,
        target=lm.tokenizer.decode([wanted]),
        target_id=wanted,
        contrast_id=other,
        logit=read.total,
        parts=tuple(parts),
        neurons=neurons,
        ranks=(probabilities > own[:, None]).sum(1).cpu(),
        probabilities=own.cpu(),
    )


@dataclass(frozen=True, eq=False)
class _Stream:
    """One position's way up: what was added where, each (d_model,) float32, and what its memory's output was multiplied by."""

    embedding: Tensor
    attention: list[Tensor]
    ffn: list[Tensor]
    behind: list[Tensor]
    states: list[Tensor]  # embedding, then behind attention and memory of every layer
    last: Tensor


def _stream(lm: LanguageModel, batch: Batch, at: int) -> _Stream:
    parts = {("in", 0): lm.layers[0], **{("layer", i): layer for i, layer in enumerate(lm.layers)}}
    parts.update({("ffn", ffn.layer): ffn.module for ffn in lm.ffn})
    with recording(parts) as calls:
        lm.forward(batch)
    before = get_slot(calls["in", 0][0], lm.slot)[0, at].float()
    found = _Stream(before, [], [], [], [before.to(lm.dtype)], before)
    for ffn in lm.ffn:
        after = calls["layer", ffn.layer][0].output[0, at].float().to(before.device)
        added = calls["ffn", ffn.layer][0].output.reshape(batch.width, -1)[at].float().to(before.device)
        scale = behind(lm, ffn.layer).to(before.device)
        if not ffn.adds_directly:
            with replacing({ffn.module: torch.zeros_like}), recording({"layer": lm.layers[ffn.layer]}, stop=True) as without:
                lm.forward(batch)
            put_out, added = scale * added, after - without["layer"][0].output[0, at].float().to(before.device)
            scale = scale * (put_out @ added) / (put_out @ put_out)  # what the norm divided by
        found.behind.append(scale)
        found.ffn.append(added)
        found.attention.append(after - added - before)
        found.states.extend([(after - added).to(lm.dtype), after.to(lm.dtype)])
        before = after
    return _Stream(found.embedding, found.attention, found.ffn, found.behind, found.states, before)


@dataclass(frozen=True, eq=False)
class _Read:
    """How one state's additions become one logit: addition @ direction, and a constant beside them."""

    direction: Tensor  # (d_model,)
    constant: float
    total: float

    def share(self, added: Tensor) -> float:
        return float(added.double() @ self.direction.double().to(added.device))


def _read(lm: LanguageModel, head: Unembedding, last: Tensor, wanted: int, other: int | None) -> _Read:
    """The reading of the wanted token's logit, less the other's, with the norm's divisor as it is for this state."""
    with recording({"last": lm.module.get_output_embeddings()}, copy=False) as calls:
        lm.head(last.to(lm.dtype))
    normed = calls["last"][0].input.reshape(-1).float() - head.shift
    folded = head.fold(last.to(head.scale))
    size = (folded @ folded) / (folded @ normed)
    row, bias = head.weight[wanted].float(), 0.0 if head.bias is None else float(head.bias[wanted])
    if other is not None:
        row, bias = row - head.weight[other].float(), bias - (0.0 if head.bias is None else float(head.bias[other]))
    direction = row * head.scale
    direction = (direction - direction.mean() if head.centres else direction) / size
    constant = float(head.shift.double() @ row.double()) + bias
    return _Read(direction, constant, float((normed + head.shift).double() @ row.double()) + bias)


def _coefficients(lm: LanguageModel, ids: Sequence[int], prompt: str, at: int) -> dict[Bank, Tensor]:
    """Each bank's coefficients (d_ff,) at one token, times its expert's weight; of experts those that were chosen."""
    dense = [ffn.layer for ffn in lm.ffn if not ffn.n_experts]
    found = {bank: own.m[at].float() for bank, own in scan(lm, [ids], dense).items()} if dense else {}
    for ffn in lm.ffn:
        if not ffn.n_experts:
            continue
        routing = lm.routing(prompt, ffn.layer)
        for expert, weight, m in zip(routing.experts[at].tolist(), routing.weights[at], routing.coefficients[at], strict=True):
            if 0 <= expert < ffn.n_experts:
                found[ffn.layer, expert] = (weight * m).float()
        if routing.shared is not None and routing.shared_weight is not None:
            found[ffn.layer, ffn.n_experts] = (routing.shared_weight[at] * routing.shared[at]).float()
    return found
