"""Gradients of p(target) along the way on which a layer's neurons are scaled from silent to full.

    recorded = record_prompts(lm, [lm.question(prompt, target)])
    gradients, silent = mean_gradients(recorded, steps=20, every_point=False)
    gradients[3]         # (B, P, d_model) mean gradient of p for what layer 3 writes

`neurons.py` turns these gradients into attributions. B prompts share a batch; P is the number of
tokens of the target. Each prompt runs once. Then every (layer, prompt, alpha) is a variant: one
row that starts from what its layer writes, scaled by alpha, and climbs the layers above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..model.ffn import FeedForward
from ..model.language_model import LanguageModel
from ..model.neurons import Neurons
from ..model.replay import Replay, record
from ..model.trace import recording, replacing

Question: TypeAlias = tuple[list[int], list[int], list[int]]
"""From `LanguageModel.question`: token ids to run, columns that predict the target, its ids."""

BATCH_BYTES = 1024 * 2**20
"""Working memory of variants that climb together, with what autograd keeps."""

HEAD_ROWS = 256
"""Positions unembedded at once. Each gives as many numbers as the vocabulary has tokens."""

NODES = 8
"""Points that replace all points of the Riemann sum where the gradient is smooth."""


@dataclass(frozen=True, eq=False)
class BankWrites:
    """What one bank writes where targets are predicted: coefficients @ neurons.values.

    Attributes:
        neurons: The bank.
        first: Index of the bank's first neuron in its layer.
        rows: (n,) positions, prompt * n_targets + place in the target.
        coefficients: (n, d_ff) the coefficients, an expert's multiplied by its routing weight.
    """

    neurons: Neurons
    first: int
    rows: Tensor
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class RecordedPrompts:
    """Some prompts, run once. Their targets have equally many tokens.

    Attributes:
        replay: The recorded pass.
        columns: (B, P) live columns that predict the target's tokens.
        targets: (B, P) the target's tokens.
        banks: For each layer, what its banks write at these columns.
        written: For each layer, (B, P, d_model): what all its neurons write there together.
        probability: (B,) joint probability of the target.
        likeliest: (B, P) the likeliest tokens at these columns.
    """

    replay: Replay
    columns: Tensor
    targets: Tensor
    banks: list[list[BankWrites]]
    written: list[Tensor]
    probability: Tensor
    likeliest: Tensor

    @property
    def n_targets(self) -> int:
        """The number of tokens of each target."""
        return self.targets.shape[1]


def shared_batches(lm: LanguageModel, questions: Sequence[Question]) -> Iterator[list[int]]:
    """Yield the indices of questions that share a batch.

    They have the same number of target tokens, and similar lengths.
    """
    for n_targets in sorted({len(target) for _, _, target in questions}):
        alike = [i for i, (_, _, target) in enumerate(questions) if len(target) == n_targets]
        for group in lm.groups([len(questions[i][0]) for i in alike]):
            yield [alike[i] for i in group]


@torch.no_grad()
def record_prompts(lm: LanguageModel, questions: Sequence[Question]) -> RecordedPrompts:
    """Run some questions once, and read off what every bank writes where targets are predicted."""
    n = len(questions)
    # In a causal model the columns before the first predicting one never change: they stay cached.
    pivots = [columns[0] for _, columns, _ in questions] if lm.is_causal else [0] * n
    batch = lm.align([ids for ids, _, _ in questions], pivots)
    start = batch.pivot if lm.is_causal else 0
    columns = torch.tensor(
        [
            [column - pivot for column in predicting]
            for (_, predicting, _), pivot in zip(questions, pivots, strict=True)
        ],
        device=lm.device,
    )
    with recording({f.layer: f.down for f in lm.ffn if not f.n_experts}, copy=False) as calls:
        replay = record(lm, batch, start=start)
    targets = torch.tensor([target for _, _, target in questions], device=lm.device)
    banks: list[list[BankWrites]] = []
    for ffn in lm.ffn:
        if ffn.n_experts:
            banks.append(_routed_writes(ffn, replay, columns))
        else:
            # The last call of the projection is the one of the live columns.
            live = calls[ffn.layer][-1].input
            coefficients = _pick(live.reshape(n, -1, live.shape[-1])[:, -replay.n_live :], columns)
            rows = torch.arange(len(coefficients), device=coefficients.device)
            banks.append([BankWrites(ffn, 0, rows, coefficients)])
    written = []
    for of_layer in banks:
        total = of_layer[0].coefficients.new_zeros(columns.numel(), lm.d_model)
        for bank in of_layer:
            total.index_add_(0, bank.rows, bank.coefficients @ bank.neurons.values)
        written.append(total.view(*columns.shape, -1))
    at_targets = _probabilities(lm.head(_at(replay.hidden[-1], columns)))
    picked = at_targets.gather(-1, targets.to(at_targets.device)[..., None])[..., 0]
    return RecordedPrompts(
        replay=replay,
        columns=columns,
        targets=targets,
        banks=banks,
        written=written,
        probability=picked.log().sum(-1).exp(),
        likeliest=at_targets.argmax(-1),
    )


def _routed_writes(ffn: FeedForward, replay: Replay, columns: Tensor) -> list[BankWrites]:
    """What the experts and the shared bank write at the given columns (B, P)."""
    n = len(columns)
    routing = ffn.routing(lambda: replay.layer(ffn.layer, replay.hidden[ffn.layer]))

    def pick(values: Tensor) -> Tensor:
        return _pick(values.reshape(n, -1, *values.shape[1:])[:, -replay.n_live :], columns)

    experts = pick(routing.experts)
    weighted = routing.coefficients * routing.weights[..., None].to(routing.coefficients)
    coefficients = pick(weighted)
    writes = []
    for expert in sorted(set(experts.flatten().tolist())):
        if 0 <= expert < ffn.n_experts:  # an index beyond the end means: no expert
            rows, place = (experts == expert).nonzero(as_tuple=True)
            bank = ffn.experts[expert]
            writes.append(BankWrites(bank, expert * bank.d_ff, rows, coefficients[rows, place]))
    if ffn.shared is not None and routing.shared is not None and routing.shared_weight is not None:
        shared = pick(routing.shared * routing.shared_weight[:, None])
        first = ffn.n_experts * ffn.experts[0].d_ff
        rows = torch.arange(len(shared), device=shared.device)
        writes.append(BankWrites(ffn.shared, first, rows, shared))
    return writes


def _at(hidden: Tensor, columns: Tensor) -> Tensor:
    """Each row's entries at columns of its own: (R, S, ...), (R, P) -> (R, P, ...)."""
    columns = columns.to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], columns]


def _pick(values: Tensor, columns: Tensor) -> Tensor:
    """The same with one row for each position: (B, S, ...), (B, P) -> (B * P, ...)."""
    return _at(values, columns).flatten(0, 1)


def mean_gradients(
    recorded: RecordedPrompts, steps: int, every_point: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the mean gradient of p(target) for what each layer writes where it is predicted.

    The mean is over alpha = 0, 1/steps, ... (steps - 1)/steps. Where the gradient is smooth in
    alpha, `NODES` points give the same mean. Otherwise every point is taken: in the first layer of
    most models, and with ReLU.

    Args:
        recorded: The prompts.
        steps: Number of points.
        every_point: Take every point in every layer.

    Returns:
        For each layer the mean gradient, (B, P, d_model), and p(target) at alpha = 0,
        (B, n_layers).
    """
    lm, n = recorded.replay.lm, recorded.replay.batch.size
    low = recorded.probability.new_zeros(n, lm.n_layers)
    mean: dict[int, Tensor] = {}
    # The (layer, prompt) pairs whose mean is not known yet.
    unknown = torch.ones(lm.n_layers, n, dtype=torch.bool)
    if not every_point and steps > 2 * NODES:
        # p jumps where a router above chooses other experts, and a few points would miss that.
        first = max((f.layer for f in lm.ffn if f.n_experts), default=0)
        smooth = torch.arange(lm.n_layers)[first:]
        alphas, mixing = _quadrature(steps, NODES)
        layers, rows = smooth.repeat_interleave(n), torch.arange(n).repeat(len(smooth))
        sums = _gradient_sums(recorded, layers, rows, alphas, mixing, low)
        for layer, parts in sums.items():
            mean[layer] = parts[0]
            unknown[layer] = ~_fades(parts).cpu()
    if bool(unknown.any()):
        layers, rows = unknown.nonzero(as_tuple=True)
        alphas = torch.arange(steps, dtype=torch.float64) / steps
        mixing = torch.full((1, steps), 1 / steps, dtype=torch.float64)
        sums = _gradient_sums(recorded, layers, rows, alphas, mixing, low)
        for layer, parts in sums.items():
            again = unknown[layer].to(parts.device)[:, None, None]
            mean[layer] = torch.where(again, parts[0], mean.get(layer, parts[0]))
    return [mean[layer] for layer in range(lm.n_layers)], low


def _quadrature(steps: int, n: int) -> tuple[Tensor, Tensor]:
    """Nodes whose weighted values give the mean over alpha = 0, 1/steps, ... (steps - 1)/steps.

    This is Gauss-Radau quadrature with these points as the measure: exact for polynomials up to
    degree 2n - 2.

    Returns:
        (n,) nodes in [0, 1), the first 0; and (n, n) weights. Row k, summed with a function's
        values at the nodes, gives its k-th coefficient in the polynomials that are orthonormal
        over the points. Row 0 gives the mean.
    """
    k = torch.arange(1, n, dtype=torch.float64)
    # The Jacobi matrix of Gram's polynomials, over 0 .. steps - 1: its off-diagonal.
    off = k * ((steps**2 - k**2) / (4 * (4 * k**2 - 1))).sqrt()
    middle = (steps - 1) / 2
    before, now = 0.0, 1.0  # monic polynomials at 0, up to degree n - 1
    for square in [0.0, *(off[:-1] ** 2).tolist()]:
        before, now = now, -middle * now - square * before
    jacobi = (
        torch.diag(torch.full((n,), middle, dtype=torch.float64))
        + torch.diag(off, 1)
        + torch.diag(off, -1)
    )
    # The last entry that makes 0 an eigenvalue.
    jacobi[-1, -1] = -(float(off[-1]) ** 2) * before / now
    nodes, vectors = torch.linalg.eigh(jacobi)
    nodes[0] = 0
    return nodes / steps, vectors * vectors[0]


def _fades(parts: Tensor) -> Tensor:
    """(B,) whether coefficients (n, B, P, d_model) in ever higher polynomials shrink fast.

    If they shrink geometrically, the mean is settled. A jump or a kink leaves coefficients that
    shrink slowly: they are small at the end only if they are small in the middle too.
    """
    size = parts.flatten(2).norm(dim=-1)  # (n, B)
    half, largest = len(size) // 2, size.amax(0)
    middle, end = size[half - 1 : half + 1].amax(0), size[-2:].amax(0)
    fades: Tensor = (end < 2e-3 * largest) & ((end < 0.1 * middle) | (end < 1e-6 * largest))
    return fades


def _gradient_sums(
    recorded: RecordedPrompts,
    layers: Tensor,
    rows: Tensor,
    alphas: Tensor,
    mixing: Tensor,
    low: Tensor,
) -> dict[int, Tensor]:
    """Weighted sums over alpha of the gradients for what layers write.

    Args:
        recorded: The prompts.
        layers: (N,) the layer of each pair, ascending.
        rows: (N,) the prompt of each pair.
        alphas: (n,) the points, the first 0.
        mixing: (K, n) the weights of each sum.
        low: (B, n_layers) gets p at alpha = 0.

    Returns:
        {layer: (K, B, P, d_model)}; zero for prompts without a pair.
    """
    replay, lm = recorded.replay, recorded.replay.lm
    sums: dict[int, Tensor] = {}
    points = torch.arange(len(alphas)).repeat(len(layers))
    layers, rows = layers.repeat_interleave(len(alphas)), rows.repeat_interleave(len(alphas))
    for part in _climbs_together(replay, layers):
        row, point = rows[part], points[part]
        leaves, final = _climb(recorded, layers[part], 1 - alphas[point], row)
        states = _at(final, recorded.columns[row.to(recorded.columns.device)])
        targets = recorded.targets[row.to(recorded.targets.device)]
        probability, slope = _answer_gradient(lm, states, targets)
        gradients = torch.autograd.grad(states, list(leaves.values()), slope)
        for layer, g in zip(leaves, gradients, strict=True):
            of_layer = layers[part] == layer
            wide = g if g.dtype == torch.float64 else g.float()  # (variants, P, d_model)
            if layer not in sums:
                sums[layer] = wide.new_zeros(len(mixing), replay.batch.size, *wide.shape[1:])
            weights = mixing[:, point[of_layer]].to(wide)
            weighted = weights[:, :, None, None] * wide
            sums[layer].index_add_(1, row[of_layer].to(wide.device), weighted)
        at_zero = point == 0
        low[row[at_zero], layers[part][at_zero]] = probability[at_zero].to(low)
    return sums


def _climbs_together(replay: Replay, layers: Tensor) -> Iterator[slice]:
    """Runs of variants that fit into memory together, given the layer where each one starts."""
    d_ff = max(bank.d_ff for ffn in replay.lm.ffn for bank in ffn.banks)
    # Kept for the gradient in one layer: each live column several times in d_model and in d_ff,
    # and the row's keys and values.
    per_layer = replay.hidden[0].element_size() * (
        replay.n_live * (12 * replay.lm.d_model + 6 * d_ff)
        + 4 * replay.batch.width * replay.lm.d_model
    )
    start, used = 0, 0
    for i, layer in enumerate(layers.tolist()):
        cost = per_layer * (replay.lm.n_layers - layer)
        if used and used + cost > BATCH_BYTES:
            yield slice(start, i)
            start, used = i, 0
        used += cost
    yield slice(start, len(layers))


@torch.enable_grad()
def _climb(
    recorded: RecordedPrompts, layers: Tensor, less: Tensor, rows: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Run variants in which one layer's neurons are scaled by 1 - less.

    Args:
        recorded: The prompts.
        layers: (R,) the scaled layer of each variant, ascending.
        less: (R,) how much is taken off.
        rows: (R,) the prompt of each variant.

    Returns:
        {layer: (variants of the layer, P, d_model)} the leaves: what is added to what that layer
        writes at the predicting columns. And the last hidden states (R, S, d_model).
    """
    replay, lm = recorded.replay, recorded.replay.lm
    leaves: dict[int, Tensor] = {}
    hidden = replay.hidden[0][:0]
    for layer in range(int(layers[0]), lm.n_layers):
        # Variants [:below] are on their way; variants [below:upto] start in this layer.
        below, upto = int((layers < layer).sum()), int((layers <= layer).sum())
        starting = rows[below:upto]
        if len(starting):
            written = recorded.written[layer]
            factor = less[below:upto].to(written)
            leaf = -factor[:, None, None] * written[starting.to(written.device)]
            leaves[layer] = leaf.requires_grad_()
            columns = recorded.columns[starting.to(recorded.columns.device)]
        if len(starting) and not lm.ffn[layer].adds_directly:
            # A norm or a multiplier acts on what is written, before it reaches the stream. So the
            # layer itself runs, with the leaf added to its memory's output.
            fresh = replay.hidden[layer][starting.to(replay.hidden[layer].device)]
            add = _adding(leaves[layer], columns, replay.n_live, upto)
            with replacing({lm.ffn[layer].module: add}):
                hidden = replay.layer(
                    layer, torch.cat([hidden.to(fresh.device), fresh]), rows[:upto]
                )
            continue
        if below:
            hidden = replay.layer(layer, hidden, rows[:below])
        if len(starting):
            above = replay.hidden[layer + 1]
            fresh = above[starting.to(above.device)]
            hidden = torch.cat([hidden.to(fresh.device), _added(fresh, leaves[layer], columns)])
    return leaves, hidden


def _added(hidden: Tensor, extra: Tensor, columns: Tensor) -> Tensor:
    """(R, S, d) with (R, P, d) added at each row's columns (R, P)."""
    if hidden.shape == extra.shape:  # every live column predicts
        return hidden + extra.to(hidden.device)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden.index_put(
        (rows, columns.to(hidden.device)), extra.to(hidden.device), accumulate=True
    )


def _adding(extra: Tensor, columns: Tensor, n_live: int, size: int) -> Callable[[Tensor], Tensor]:
    """Change a part's output over `size` rows: add `extra` at the columns of the last rows."""

    def change(output: Tensor) -> Tensor:  # (size, columns, d_model), or (size * columns, d_model)
        shaped = output.reshape(size, -1, output.shape[-1])
        before, live = shaped[:, : shaped.shape[1] - n_live], shaped[:, shaped.shape[1] - n_live :]
        live = torch.cat(
            [live[: size - len(extra)], _added(live[size - len(extra) :], extra, columns)]
        )
        return torch.cat([before, live], dim=1).view(output.shape)

    return change


def _answer_gradient(lm: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Joint probability of the targets, (R,), and its gradient, (R, P, d_model).

    hidden: (R, P, d_model) last-layer states at the positions that predict targets (R, P).
    """
    joint: list[Tensor] = []
    slopes: list[Tensor] = []
    each = max(1, HEAD_ROWS // targets.shape[1])
    for states, wanted in zip(torch.split(hidden, each), torch.split(targets, each), strict=True):
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = lm.head(states)  # (r, P, vocab)
        wanted = wanted.to(logits.device)[..., None]
        with torch.no_grad():
            slope = _probabilities(logits)
            p = slope.gather(-1, wanted)[..., 0].log().sum(-1).exp()
            # dp/d logits = p (1[target] - softmax), in place: this is the largest tensor of all.
            slope.mul_(-p[:, None, None]).scatter_add_(
                -1, wanted, p[:, None, None].expand(wanted.shape)
            )
            joint.append(p)
            slopes += torch.autograd.grad(logits, states, slope.to(logits.dtype))
    return torch.cat(joint), torch.cat(slopes)


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax over the vocabulary, in float32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
