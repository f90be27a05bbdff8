"""What every layer adds to the stream at one token of each of some texts, and what its memory does there: all layers in one pass.

scales = [behind(lm, layer) for layer in range(lm.n_layers)]
stream = read_stream(lm, rows, at, scales)             # rows of token ids, and which token of each
stream.ffn[3], stream.fired[3]                         # (n, d_model) added by layer 3's memory, and its coefficients
reading = read_logits(lm, head, stream.states[-1])     # how these additions become logits
shares(lm, 3, stream, reading.directions(head, ids))   # what each sub-update adds to the logit of a token
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.ffn import FeedForward
from ..model.language_model import LanguageModel
from ..model.trace import first_tensor, get_slot, recording, replacing
from .unembedding import Unembedding

_HEAD_ROWS = 256  # states read through the tail at a time: logits are the largest tensors of all


@dataclass(frozen=True, eq=False)
class Fired:
    """The coefficients of some of a layer's banks at n tokens, times their expert's weight.

    places  (n, k) int64, which of the layer's banks; -1: none
    m       (n, k, d_ff) float32
    """

    places: Tensor
    m: Tensor

    def by_bank(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(place, row, slot): for each bank where in `m` its coefficients are."""
        for place in torch.unique(self.places).tolist():
            if place >= 0:
                yield place, *(self.places == place).nonzero(as_tuple=True)


@dataclass(frozen=True, eq=False)
class Stream:
    """The way up at n tokens, in float32, where the embedding lies; the coefficients where their layer does.

    embedding  (n, d_model)
    attention  one a layer, (n, d_model): what attention added to the stream
    ffn        one a layer, (n, d_model): what the memory added to the stream
    written    one a layer, (n, d_model): what it put out, before a norm behind it
    behind     one a layer, (n, d_model): what that norm multiplied it by; ones where there is none
    fired      one a layer: of experts those that were chosen, then the shared bank
    states     (2 n_layers + 1, n, d_model): embedding, then behind attention and memory of every layer
    """

    embedding: Tensor
    attention: list[Tensor]
    ffn: list[Tensor]
    written: list[Tensor]
    behind: list[Tensor]
    fired: list[list[Fired]]
    states: Tensor


@torch.no_grad()
def read_stream(
    lm: LanguageModel, rows: Sequence[Sequence[int]], at: Sequence[int], scales: Sequence[Tensor]
) -> Stream:
    """What happens at one token of each row of token ids; scales: `behind` of every layer.

    Raises InputError for rows longer than the model's positions, UnsupportedModelError for padding it would see.
    """
    batch = lm.align(rows, at)
    lm.check_batch(batch)
    after: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    m: dict[int, Tensor] = {}

    def keep(found: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
        def take(tensor: Tensor) -> Tensor:
            at_pivot = tensor.reshape(batch.size, batch.width, -1)[
                :, batch.pivot
            ]  # some families flatten (B, T)
            found[layer] = at_pivot.to(
                torch.float32, copy=True
            )  # models add to such tensors in place
            return tensor

        return take

    outputs: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        layer: keep(after, i) for i, layer in enumerate(lm.layers)
    }
    outputs.update({ffn.module: keep(written, ffn.layer) for ffn in lm.ffn})
    inputs = {ffn.down: keep(m, ffn.layer) for ffn in lm.ffn if not ffn.n_experts}
    again = {i: lm.layers[i] for i in range(lm.n_layers) if i == 0 or not lm.ffn[i].adds_directly}
    routed = {
        (ffn.layer, name): part
        for ffn in lm.ffn
        if ffn.n_experts
        for name, part in ffn.routing_parts().items()
    }
    # What is kept of the layers is what goes in, and what comes out of experts' parts is kept as it was.
    with (
        recording(again, copy=False) as entered,
        recording(routed) as experts,
        replacing(inputs, where="input"),
        replacing(outputs),
    ):
        lm.forward(batch)
    before = get_slot(entered[0][0], lm.slot)[:, batch.pivot].float()
    home = before.device
    found = Stream(before, [], [], [], [], [], torch.stack([before] * (2 * lm.n_layers + 1)))
    for ffn, scale in zip(lm.ffn, scales, strict=True):
        out, up = written[ffn.layer].to(home), after[ffn.layer].to(home)
        added, factor = out, scale.to(home).expand_as(out)
        if not ffn.adds_directly:
            call = entered[ffn.layer][0]
            with replacing({ffn.module: torch.zeros_like}):
                without = first_tensor(lm.layers[ffn.layer](*call.args, **call.kwargs))
            added, scaled = up - without[:, batch.pivot].float().to(home), factor * out
            factor = (
                factor * ((scaled * added).sum(-1) / scaled.square().sum(-1))[:, None]
            )  # what the norm divided by
        found.written.append(out)
        found.behind.append(factor)
        found.ffn.append(added)
        found.attention.append(up - added - before)
        found.states[2 * ffn.layer + 1], found.states[2 * ffn.layer + 2] = up - added, up
        parts = (
            {name: experts[ffn.layer, name] for name in ffn.routing_parts()}
            if ffn.n_experts
            else None
        )
        if parts is None:
            found.fired.append(
                [
                    Fired(
                        torch.zeros(batch.size, 1, dtype=torch.long, device=m[ffn.layer].device),
                        m[ffn.layer][:, None],
                    )
                ]
            )
        else:
            routing = ffn.routing_of(parts)
            own = (
                torch.arange(batch.size, device=routing.experts.device) * batch.width + batch.pivot
            )
            chosen = torch.where(
                (routing.experts >= 0) & (routing.experts < ffn.n_experts), routing.experts, -1
            )[own]
            found.fired.append(
                [
                    Fired(
                        chosen,
                        (routing.weights[own][..., None] * routing.coefficients[own]).float(),
                    )
                ]
            )
            if routing.shared is not None and routing.shared_weight is not None:
                shared = (routing.shared_weight[own][:, None] * routing.shared[own]).float()
                found.fired[-1].append(
                    Fired(torch.full_like(chosen[:, :1], ffn.n_experts), shared[:, None])
                )
        before = up
    return found


@dataclass(frozen=True, eq=False)
class Reading:
    """How n last hidden states become logits.

    logits  (n, vocab), after any softcap
    normed  (n, d_model) float32, what the unembedding takes, times the head's multiplier
    size    (n,) what the final norm divides by
    """

    logits: Tensor
    normed: Tensor
    size: Tensor

    def directions(
        self, head: Unembedding, ids: Tensor, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How additions to the stream become the logit of a token (n,), less another's: addition @ direction, and a constant beside them.

        Returns directions (n, d_model), the constants (n,), and the logits (n,), before any softcap.
        """
        rows, bias = (
            head.weight[ids].float(),
            self.size.new_zeros(len(ids)) if head.bias is None else head.bias[ids].float(),
        )
        if other is not None:
            rows, bias = (
                rows - head.weight[other].float(),
                bias if head.bias is None else bias - head.bias[other].float(),
            )
        directions = unfold(head, rows) / self.size[:, None]
        constants = (rows.double() @ head.shift.double()).float() + bias
        return directions, constants, (self.normed.double() * rows.double()).sum(-1).float() + bias


def unfold(head: Unembedding, rows: Tensor) -> Tensor:
    """The other side of `head.fold`: head.fold(values) @ row is values @ unfold(head, row), for rows of the matrix (..., d_model)."""
    rows = rows.float() * head.scale
    return rows - rows.mean(-1, keepdim=True) if head.centres else rows


def read_logits(lm: LanguageModel, head: Unembedding, last: Tensor) -> Reading:
    """The model's own tail on last hidden states (n, d_model), with the divisor of its norm held at what it is for them."""
    with recording({"last": lm.module.get_output_embeddings()}, copy=False) as calls:
        logits = lm.head(last.to(lm.dtype))
    normed = calls["last"][0].input.reshape(last.shape).float() * head.multiplier
    folded = head.fold(last)
    return Reading(
        logits, normed, folded.square().sum(-1) / (folded * (normed - head.shift)).sum(-1)
    )


def shares(ffn: FeedForward, fired: Fired, directions: Tensor) -> Tensor:
    """What each sub-update adds along a direction of its own token, (n, d_model): (n, k, d_ff), where the coefficients lie."""
    directions = directions.to(fired.m)
    found = torch.zeros_like(fired.m)
    for place, row, slot in fired.by_bank():
        found[row, slot] = fired.m[row, slot] * (
            directions[row] @ ffn.banks[place].values.float().T
        )
    return found


def way_up(lm: LanguageModel, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a token (n,) stands in states (s, n, d_model) read through the model's own tail.

    Returns its ranks (s, n), 0 for the likeliest, its probabilities (s, n), and the likeliest token of each state (s, n), on the CPU.
    """
    wanted = ids.expand(states.shape[:2]).flatten()
    found = []
    for part, own in zip(
        torch.split(states.to(lm.dtype).flatten(0, 1), _HEAD_ROWS),
        torch.split(wanted, _HEAD_ROWS),
        strict=True,
    ):
        probabilities = lm.head(part).float().softmax(-1)
        p = probabilities.gather(1, own.to(probabilities.device)[:, None])
        found.append(
            ((probabilities > p).sum(1).cpu(), p[:, 0].cpu(), probabilities.argmax(-1).cpu())
        )
    ranks, probability, likeliest = (
        torch.cat(parts).view(states.shape[:2]) for parts in zip(*found, strict=True)
    )
    return ranks, probability, likeliest


def carrying_half(each: Tensor) -> Tensor:
    """How many of the shares (..., n) above zero it takes to make up half of their sum; 0 where none is above zero."""
    each = each.double().clamp(min=0).sort(-1, descending=True).values
    total = each.sum(-1, keepdim=True)
    return torch.where(total[..., 0] > 0, (each.cumsum(-1) < total / 2).sum(-1) + 1, 0)
