"""What each layer adds to the stream at one token of each of some texts, in one pass of the model.

    scales = output_scales(lm)
    stream = read_stream(lm, rows, at, scales)             # rows of token ids, a token of each row
    stream.ffn[3], stream.fired[3]                         # what layer 3's FFN added, and how
    reading = read_logits(lm, head, stream.states[-1])     # how additions become logits
    directions, _, _ = reading.directions(head, ids)
    shares(lm.ffn[3], stream.fired[3][0], directions)      # each sub-update's share of a logit

The stream is the hidden state that runs through all layers. The final norm is linear once its
divisor is fixed at its value in this pass, so each addition has a share of every logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import whole_number
from ..core.errors import InputError
from ..model.ffn import FeedForward
from ..model.language_model import LanguageModel
from ..model.tokens import Batch
from ..model.trace import Call, first_tensor, get_slot, recording, replacing
from .unembedding import Unembedding

_HEAD_ROWS = 256
"""States read through the unembedding at a time: logits are the largest tensors of all."""


@dataclass(frozen=True, eq=False)
class Fired:
    """The coefficients of some of a layer's banks at n tokens, times their expert's weight.

    Attributes:
        places: (n, k) int64, which of the layer's banks. -1: none.
        m: (n, k, d_ff) float32.
    """

    places: Tensor
    m: Tensor

    def by_bank(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each bank with the rows and the slots of `m` that hold its coefficients."""
        for place in torch.unique(self.places).tolist():
            if place >= 0:
                yield place, *(self.places == place).nonzero(as_tuple=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stream:
    """The stream at n tokens, from the embedding up, in float32.

    Tensors are on the device of the embedding, the coefficients on that of their layer.

    Attributes:
        embedding: (n, d_model).
        states: (2 n_layers + 1, n, d_model): the embedding, then the stream after the attention
            and after the FFN of each layer.
        attention: One for each layer, (n, d_model): what the attention added.
        ffn: One for each layer, (n, d_model): what the FFN added.
        written: One for each layer, (n, d_model): the FFN's output, before a norm that follows it.
        factors: One for each layer, (n, d_model): what that norm multiplied the output by. Ones
            where no norm follows.
        fired: One for each layer. In a layer with experts: those chosen, then the shared bank.
    """

    embedding: Tensor
    states: Tensor
    attention: list[Tensor]
    ffn: list[Tensor]
    written: list[Tensor]
    factors: list[Tensor]
    fired: list[list[Fired]]


def check_position(position: object, n_tokens: int, name: str = "position") -> int:
    """Return the number of a token counted from the start.

    Args:
        position: The number. A negative number counts from the end.
        n_tokens: Number of tokens of the prompt.
        name: How an error names the position.

    Raises:
        InputError: when the prompt has no such token.
    """
    at = whole_number(position)
    if at is None or not -n_tokens <= at < n_tokens:
        raise InputError(
            f"{name} is {position!r}: the prompt has {n_tokens} tokens, so it must be a whole "
            f"number from 0 to {n_tokens - 1}, or a negative one that counts from the end",
            argument=name if name.isidentifier() else None,
        )
    return at % n_tokens


@torch.no_grad()
def read_stream(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    at: Sequence[int],
    scales: Mapping[int, Tensor],
) -> Stream:
    """Read the stream at one token of each row.

    Args:
        lm: The model.
        rows: Rows of token ids.
        at: For each row the number of the token.
        scales: `output_scales` of every layer.

    Raises:
        InputError: when a row is longer than the model's positions.
        UnsupportedModelError: when the model would see the padding of shorter rows.
    """
    batch = lm.align(rows, at)
    lm.check_batch(batch)
    seen = _run(lm, batch)
    before = get_slot(seen.entered[0][0], lm.slot)[:, batch.pivot].float()
    home = before.device
    embedding, states = before, torch.stack([before] * (2 * lm.n_layers + 1))
    attention, by_ffn, written, factors = [], [], [], []
    for ffn in lm.ffn:
        after = seen.after[ffn.layer].to(home)
        output = seen.written[ffn.layer].to(home)
        added, factor = _added(lm, ffn, seen, output, scales[ffn.layer].to(home))
        attention.append(after - added - before)
        by_ffn.append(added)
        written.append(output)
        factors.append(factor)
        states[2 * ffn.layer + 1], states[2 * ffn.layer + 2] = after - added, after
        before = after
    return Stream(
        embedding=embedding,
        states=states,
        attention=attention,
        ffn=by_ffn,
        written=written,
        factors=factors,
        fired=[
            _fired_experts(ffn, seen) if ffn.n_experts else [_fired(ffn, seen)] for ffn in lm.ffn
        ],
    )


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one forward pass leaves.

    Attributes:
        batch: The rows, aligned at their tokens.
        after: {layer: (n, d_model)}, the stream after the layer, at the tokens.
        written: {layer: (n, d_model)}, the FFN's output at the tokens.
        m: {layer: (n, d_ff)}, the coefficients of a dense layer at the tokens.
        entered: The calls of the first layer, and of each layer with a norm after its FFN.
        experts: {(layer, part): calls} of the parts of layers with experts.
    """

    batch: Batch
    after: dict[int, Tensor]
    written: dict[int, Tensor]
    m: dict[int, Tensor]
    entered: dict[int, list[Call]]
    experts: dict[tuple[int, str], list[Call]]


def _run(lm: LanguageModel, batch: Batch) -> _Pass:
    """Run the model once and keep what `read_stream` needs."""
    after: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    m: dict[int, Tensor] = {}

    def keep(kept: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
        def take(tensor: Tensor) -> Tensor:
            # Some families flatten (B, T), and models add to such tensors in place.
            at_pivot = tensor.reshape(batch.size, batch.width, -1)[:, batch.pivot]
            kept[layer] = at_pivot.to(torch.float32, copy=True)
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
    # Of the layers only the inputs are used, so their outputs are not copied.
    with (
        recording(again, copy=False) as entered,
        recording(routed) as experts,
        replacing(inputs, where="input"),
        replacing(outputs),
    ):
        lm.forward(batch)
    return _Pass(batch, after, written, m, entered, experts)


def _added(
    lm: LanguageModel, ffn: FeedForward, seen: _Pass, output: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what an FFN added to the stream, and what its output was multiplied by."""
    factor = scale.expand_as(output)
    if ffn.adds_directly:
        return output, factor
    call = seen.entered[ffn.layer][0]
    with replacing({ffn.module: torch.zeros_like}):
        without = first_tensor(lm.layers[ffn.layer](*call.args, **call.kwargs))
    up = seen.after[ffn.layer].to(output.device)
    added, scaled = up - without[:, seen.batch.pivot].float().to(output.device), factor * output
    # The quotient of the two is what the norm divided by.
    return added, factor * ((scaled * added).sum(-1) / scaled.square().sum(-1))[:, None]


def _fired(ffn: FeedForward, seen: _Pass) -> Fired:
    """Return the coefficients of a dense layer."""
    m = seen.m[ffn.layer]
    return Fired(torch.zeros(len(m), 1, dtype=torch.long, device=m.device), m[:, None])


def _fired_experts(ffn: FeedForward, seen: _Pass) -> list[Fired]:
    """Return the coefficients of the chosen experts of a layer, then those of its shared bank."""
    routing = ffn.routing_of({name: seen.experts[ffn.layer, name] for name in ffn.routing_parts()})
    batch = seen.batch
    at = torch.arange(batch.size, device=routing.experts.device) * batch.width + batch.pivot
    chosen = torch.where(
        (routing.experts >= 0) & (routing.experts < ffn.n_experts), routing.experts, -1
    )[at]
    fired = [Fired(chosen, (routing.weights[at][..., None] * routing.coefficients[at]).float())]
    if routing.shared is not None and routing.shared_weight is not None:
        shared = (routing.shared_weight[at][:, None] * routing.shared[at]).float()
        fired.append(Fired(torch.full_like(chosen[:, :1], ffn.n_experts), shared[:, None]))
    return fired


@dataclass(frozen=True, eq=False)
class Reading:
    """How n last hidden states become logits.

    Attributes:
        logits: (n, vocab), after any softcap.
        normed: (n, d_model) float32, the input of the unembedding, times the head's multiplier.
        size: (n,), what the final norm divides by.
    """

    logits: Tensor
    normed: Tensor
    size: Tensor

    def directions(
        self, head: Unembedding, ids: Tensor, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return how additions to the stream become the logit of a token.

        The logit is the sum of `addition @ direction` over all additions, plus a constant.

        Args:
            head: The model's unembedding.
            ids: The tokens, (n,).
            other: Tokens whose logits are subtracted, (n,). None: nothing is subtracted.

        Returns:
            The directions (n, d_model), the constants (n,), and the logits (n,) before any
            softcap.
        """
        rows = head.weight[ids].float()
        bias = self.size.new_zeros(len(ids)) if head.bias is None else head.bias[ids].float()
        if other is not None:
            rows = rows - head.weight[other].float()
            bias = bias if head.bias is None else bias - head.bias[other].float()
        directions = head.unfold(rows) / self.size[:, None]
        constants = (rows.double() @ head.shift.double()).float() + bias
        return directions, constants, (self.normed.double() * rows.double()).sum(-1).float() + bias


def read_logits(lm: LanguageModel, head: Unembedding, last: Tensor) -> Reading:
    """Send last hidden states (n, d_model) through the model's own final norm and unembedding."""
    with recording({"last": lm.module.get_output_embeddings()}, copy=False) as calls:
        logits = lm.head(last.to(lm.dtype))
    normed = calls["last"][0].input.reshape(last.shape).float() * head.multiplier
    folded = head.fold(last)
    return Reading(
        logits, normed, folded.square().sum(-1) / (folded * (normed - head.shift)).sum(-1)
    )


def shares(ffn: FeedForward, fired: Fired, directions: Tensor) -> Tensor:
    """Return what each sub-update adds along the direction of its token.

    Takes directions (n, d_model). Returns (n, k, d_ff), on the device of the coefficients.
    """
    directions = directions.to(fired.m)
    along = torch.zeros_like(fired.m)
    for place, row, slot in fired.by_bank():
        along[row, slot] = fired.m[row, slot] * (
            directions[row] @ ffn.banks[place].values.float().T
        )
    return along


def way_up(lm: LanguageModel, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read a token (n,) from states (s, n, d_model), through the model's own final norm.

    Returns:
        The token's ranks (s, n), 0 for the likeliest, its probabilities (s, n), and the likeliest
        token of each state (s, n), all on the CPU.
    """
    wanted = ids.expand(states.shape[:2]).flatten()
    parts = []
    for part, tokens in zip(
        torch.split(states.to(lm.dtype).flatten(0, 1), _HEAD_ROWS),
        torch.split(wanted, _HEAD_ROWS),
        strict=True,
    ):
        probabilities = lm.head(part).float().softmax(-1)
        p = probabilities.gather(1, tokens.to(probabilities.device)[:, None])
        parts.append(
            ((probabilities > p).sum(1).cpu(), p[:, 0].cpu(), probabilities.argmax(-1).cpu())
        )
    ranks, probability, likeliest = (
        torch.cat(each).view(states.shape[:2]) for each in zip(*parts, strict=True)
    )
    return ranks, probability, likeliest


def carrying_half(each: Tensor) -> Tensor:
    """Return how many of the shares (..., n) above zero make up half of their sum.

    The largest are counted first. 0 where no share is above zero.
    """
    each = each.double().clamp(min=0).sort(-1, descending=True).values
    total = each.sum(-1, keepdim=True)
    return torch.where(total[..., 0] > 0, (each.cumsum(-1) < total / 2).sum(-1) + 1, 0)
