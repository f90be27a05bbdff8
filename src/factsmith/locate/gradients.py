"""locate.gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..model.ffn import FeedForward, Neurons
from ..model.language_model import LanguageModel
from ..model.replay import Replay, record
from ..model.trace import recording, replacing

Question: TypeAlias = tuple[list[int], list[int], list[int]]
"""What `LanguageModel.question` gives: token ids to run, columns that predict the target, the target's ids."""

# Variants climb together up to about this much working memory (what autograd keeps included); beyond it a batch is cut.
_BATCH_BYTES = 1024 * 2**20

_HEAD_ROWS = 256  # positions unembedded at once: a vocabulary's worth of numbers each

_NODES = 8  # points that stand for the whole Riemann sum where the gradient is smooth

LEAST = 3  # the authors count a neuron as shared only from this many prompts on


# ── one batch of prompts ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Bank:
    """What one bank does where targets are predicted: it writes coefficients @ neurons.values there.

    rows          (n,) positions, prompt * n_targets + place in the target
    coefficients  (n, d_ff), an expert's weighed by its routing
    first         index of the bank's first neuron in its layer
    """

    neurons: Neurons
    first: int
    rows: Tensor
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class _Asked:
    """Some prompts with targets of equally many tokens, run once.

    columns      (B, P) live columns that predict the target's P tokens
    targets      (B, P)
    banks        per layer, what its banks do there
    written      per layer (B, P, d_model), what all its neurons write there together
    probability  (B,) joint probability of the target
    likeliest    (B, P) the likeliest tokens there
    """

    replay: Replay
    columns: Tensor
    targets: Tensor
    banks: list[list[_Bank]]
    written: list[Tensor]
    probability: Tensor
    likeliest: Tensor

    @property
    def n_targets(self) -> int:
        return self.targets.shape[1]


def groups(lm: LanguageModel, questions: Sequence[Question]) -> Iterator[list[int]]:
    """Indices of questions that share a batch: alike in length, the same in the number of target tokens."""
    for n_targets in sorted({len(wanted) for _, _, wanted in questions}):
        own = [i for i, (_, _, wanted) in enumerate(questions) if len(wanted) == n_targets]
        for group in lm.groups([len(questions[i][0]) for i in own]):
            yield [own[i] for i in group]


@torch.no_grad()
def ask(lm: LanguageModel, questions: Sequence[Question]) -> _Asked:
    """Run the questions once, and read off what every bank does at the positions that predict the target."""
    n = len(questions)
    sequences = [ids for ids, _, _ in questions]
    # Where nothing looks ahead, what stands before the first predicting position is kept and never run again.
    pivots = [columns[0] for _, columns, _ in questions] if lm.is_causal else [0] * n
    batch = lm.align(sequences, pivots)
    start = batch.pivot if lm.is_causal else 0
    columns = torch.tensor(
        [[c - pivot for c in own] for (_, own, _), pivot in zip(questions, pivots, strict=True)],
        device=lm.device,
    )
    with recording({f.layer: f.down for f in lm.ffn if not f.n_experts}, copy=False) as calls:
        replay = record(lm, batch, start=start)
    targets = torch.tensor([wanted for _, _, wanted in questions], device=lm.device)
    banks = []
    for ffn in lm.ffn:
        if ffn.n_experts:
            found = _routed_banks(ffn, replay, columns)
        else:
            live = calls[ffn.layer][
                -1
            ].input  # calls before it, if any, ran what stands before the live columns
            at = _pick(live.reshape(n, -1, live.shape[-1])[:, -replay.n_live :], columns)
            found = [_Bank(ffn, 0, torch.arange(len(at), device=at.device), at)]
        banks.append(found)
    written = []
    for found in banks:
        total = found[0].coefficients.new_zeros(columns.numel(), lm.d_model)
        for bank in found:
            total.index_add_(0, bank.rows, bank.coefficients @ bank.neurons.values)
        written.append(total.view(*columns.shape, -1))
    at_targets = _probabilities(lm.head(_at(replay.hidden[-1], columns)))
    probability = (
        at_targets.gather(-1, targets.to(at_targets.device)[..., None])[..., 0].log().sum(-1).exp()
    )
    likeliest = at_targets.argmax(-1)
    return _Asked(replay, columns, targets, banks, written, probability, likeliest)


def _routed_banks(ffn: FeedForward, replay: Replay, columns: Tensor) -> list[_Bank]:
    """What experts, and the shared bank beside them, do at the given columns. (B, P)"""
    n = len(columns)
    routing = ffn.routing(lambda: replay.layer(ffn.layer, replay.hidden[ffn.layer]))

    def pick(values: Tensor) -> Tensor:
        return _pick(values.reshape(n, -1, *values.shape[1:])[:, -replay.n_live :], columns)

    experts, coefficients = (
        pick(routing.experts),
        pick(routing.coefficients * routing.weights[..., None].to(routing.coefficients)),
    )
    found = []
    for expert in sorted(set(experts.flatten().tolist())):
        if 0 <= expert < ffn.n_experts:  # an index past the end says: no expert
            rows, place = (experts == expert).nonzero(as_tuple=True)
            bank = ffn.experts[expert]
            found.append(_Bank(bank, expert * bank.d_ff, rows, coefficients[rows, place]))
    if ffn.shared is not None and routing.shared is not None and routing.shared_weight is not None:
        shared = pick(routing.shared * routing.shared_weight[:, None])
        first = ffn.n_experts * ffn.experts[0].d_ff
        found.append(
            _Bank(ffn.shared, first, torch.arange(len(shared), device=shared.device), shared)
        )
    return found


def _at(hidden: Tensor, columns: Tensor) -> Tensor:
    """Each row's entries at its own columns: (R, S, ...), (R, P) -> (R, P, ...)."""
    columns = columns.to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], columns]


def _pick(values: Tensor, columns: Tensor) -> Tensor:
    """The same, one row a position: (B, S, ...), (B, P) -> (B * P, ...)."""
    return _at(values, columns).flatten(0, 1)


# ── the integral ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def mean_gradients(asked: _Asked, steps: int, every_point: bool) -> tuple[list[Tensor], Tensor]:
    """The gradient of p(target) for what each layer writes where the target is predicted, averaged over alpha, and p at alpha = 0.

    Gives n_layers × (B, P, d_model) and (B, n_layers). Where the gradient is smooth along the way, _NODES points give the average over all
    `steps`; where it is not, as in most models' first layer or with ReLU, every point is taken.
    """
    lm, n = asked.replay.lm, asked.replay.batch.size
    low = asked.probability.new_zeros(n, lm.n_layers)
    mean: dict[int, Tensor] = {}
    open_pairs = torch.ones(
        lm.n_layers, n, dtype=torch.bool
    )  # (layer, prompt) whose average is not known yet
    if not every_point and steps > 2 * _NODES:
        # A router above makes p jump; few points would not notice.
        first = max((f.layer for f in lm.ffn if f.n_experts), default=0)
        smooth = torch.arange(lm.n_layers)[first:]
        alphas, mixing = _quadrature(steps, _NODES)
        for layer, parts in _moments(
            asked,
            smooth.repeat_interleave(n),
            torch.arange(n).repeat(len(smooth)),
            alphas,
            mixing,
            low,
        ).items():
            mean[layer] = parts[0]
            open_pairs[layer] = ~_fades(parts).cpu()
    if bool(open_pairs.any()):
        layers, rows = open_pairs.nonzero(as_tuple=True)
        alphas = torch.arange(steps, dtype=torch.float64) / steps
        for layer, parts in _moments(
            asked, layers, rows, alphas, torch.full((1, steps), 1 / steps, dtype=torch.float64), low
        ).items():
            again = open_pairs[layer].to(parts.device)[:, None, None]
            mean[layer] = torch.where(again, parts[0], mean.get(layer, parts[0]))
    return [mean[layer] for layer in range(lm.n_layers)], low


def _quadrature(steps: int, n: int) -> tuple[Tensor, Tensor]:
    """n nodes in [0, 1), the first 0, that give averages over the points 0, 1/steps, ... (steps - 1)/steps; and (n, n) what to sum.

    Gauss-Radau quadrature for these points as a measure: exact for polynomials up to degree 2n - 2. Row k of the second, summed with a
    function's values at the nodes, gives its k-th coefficient in the polynomials that are orthonormal over the points; row 0 its average.
    """
    k = torch.arange(1, n, dtype=torch.float64)
    off = (
        k * ((steps**2 - k**2) / (4 * (4 * k**2 - 1))).sqrt()
    )  # of the Jacobi matrix of Gram's polynomials, over 0 .. steps - 1
    middle = (steps - 1) / 2
    before, now = 0.0, 1.0  # monic polynomials at 0, up to degree n - 1
    for square in [0.0, *(off[:-1] ** 2).tolist()]:
        before, now = now, -middle * now - square * before
    jacobi = (
        torch.diag(torch.full((n,), middle, dtype=torch.float64))
        + torch.diag(off, 1)
        + torch.diag(off, -1)
    )
    jacobi[-1, -1] = (
        -(float(off[-1]) ** 2) * before / now
    )  # the last entry that makes 0 an eigenvalue
    nodes, vectors = torch.linalg.eigh(jacobi)
    nodes[0] = 0
    return nodes / steps, vectors * vectors[0]


def _fades(parts: Tensor) -> Tensor:
    """(B,) whether coefficients (n, B, P, d_model) in ever higher polynomials shrink geometrically, so that the average is settled.

    What a jump or a kink leaves shrinks slowly: at the end it is small only where it was small in the middle too.
    """
    size = parts.flatten(2).norm(dim=-1)  # (n, B)
    half, largest = len(size) // 2, size.amax(0)
    middle, end = size[half - 1 : half + 1].amax(0), size[-2:].amax(0)
    fades: Tensor = (end < 2e-3 * largest) & ((end < 0.1 * middle) | (end < 1e-6 * largest))
    return fades


def _moments(
    asked: _Asked, layers: Tensor, rows: Tensor, alphas: Tensor, mixing: Tensor, low: Tensor
) -> dict[int, Tensor]:
    """Sums over alpha of the gradients for what layers write, by layer: (K, B, P, d_model), zero for prompts not asked for.

    layers, rows: (N,) the layer and prompt of each pair, layers ascending; alphas: (n,), the first 0; mixing: (K, n) the weights in each
    sum. p at alpha = 0 goes into `low` (B, n_layers).
    """
    replay, lm = asked.replay, asked.replay.lm
    sums: dict[int, Tensor] = {}
    points = torch.arange(len(alphas)).repeat(len(layers))
    layers, rows = layers.repeat_interleave(len(alphas)), rows.repeat_interleave(len(alphas))
    for part in expert_parts(replay, layers):
        of, point = rows[part], points[part]
        leaves, final = _climb(asked, layers[part], 1 - alphas[point], of)
        states = _at(final, asked.columns[of.to(asked.columns.device)])
        probability, gradient = _answer(lm, states, asked.targets[of.to(asked.targets.device)])
        found = torch.autograd.grad(states, list(leaves.values()), gradient)
        for layer, g in zip(leaves, found, strict=True):
            here = layers[part] == layer
            wide = g if g.dtype == torch.float64 else g.float()  # (variants, P, d_model)
            if layer not in sums:
                sums[layer] = wide.new_zeros(len(mixing), replay.batch.size, *wide.shape[1:])
            weights = mixing[:, point[here]].to(wide)
            sums[layer].index_add_(1, of[here].to(wide.device), weights[:, :, None, None] * wide)
        start = point == 0
        low[of[start], layers[part][start]] = probability[start].to(low)
    return sums


def expert_parts(replay: Replay, layers: Tensor) -> Iterator[slice]:
    """Runs of variants whose climbs fit into memory together; a variant that starts lower passes through more layers."""
    d_ff = max(bank.d_ff for ffn in replay.lm.ffn for bank in ffn.banks)
    # Kept for the gradient in one layer: each live column some times in d_model and d_ff, and the row's keys and values.
    per_layer = replay.hidden[0].element_size() * (
        replay.n_live * (12 * replay.lm.d_model + 6 * d_ff)
        + 4 * replay.batch.width * replay.lm.d_model
    )
    start, used = 0, 0
    for i, layer in enumerate(layers.tolist()):
        cost = per_layer * (replay.lm.n_layers - layer)
        if used and used + cost > _BATCH_BYTES:
            yield slice(start, i)
            start, used = i, 0
        used += cost
    yield slice(start, len(layers))


@torch.enable_grad()
def _climb(
    asked: _Asked, layers: Tensor, less: Tensor, rows: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """Variants in which one layer's neurons are scaled by 1 - less (R,): their leaves and last hidden states (R, S, d_model).

    layers, rows: (R,) the scaled layer, ascending, and the recorded prompt of each variant. The leaves, one a layer, are what is added to
    what that layer writes at the columns that predict: (variants of the layer, P, d_model).
    """
    replay, lm = asked.replay, asked.replay.lm
    leaves: dict[int, Tensor] = {}
    hidden = replay.hidden[0][:0]
    for layer in range(int(layers[0]), lm.n_layers):
        below, here = int((layers < layer).sum()), int((layers <= layer).sum())
        own = rows[below:here]
        if len(own):
            written = asked.written[layer]
            factor = less[below:here].to(written)
            leaves[layer] = (
                -factor[:, None, None] * written[own.to(written.device)]
            ).requires_grad_()
            columns = asked.columns[own.to(asked.columns.device)]
        if len(own) and not lm.ffn[layer].adds_directly:
            # A norm or a multiplier stands between what is written and the stream: the layer itself takes it from there.
            fresh = replay.hidden[layer][own.to(replay.hidden[layer].device)]
            add = _adding(leaves[layer], columns, replay.n_live, here)
            with replacing({lm.ffn[layer].module: add}):
                hidden = replay.layer(
                    layer, torch.cat([hidden.to(fresh.device), fresh]), rows[:here]
                )
            continue
        if below:
            hidden = replay.layer(layer, hidden, rows[:below])
        if len(own):
            above = replay.hidden[layer + 1]
            fresh = above[own.to(above.device)]
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
    """A change of a part's output over `size` rows: `extra` is added at the columns of the last rows."""

    def change(output: Tensor) -> Tensor:  # (size, columns, d_model), or (size * columns, d_model)
        shaped = output.reshape(size, -1, output.shape[-1])
        before, live = shaped[:, : shaped.shape[1] - n_live], shaped[:, shaped.shape[1] - n_live :]
        live = torch.cat(
            [live[: size - len(extra)], _added(live[size - len(extra) :], extra, columns)]
        )
        return torch.cat([before, live], dim=1).view(output.shape)

    return change


def _answer(lm: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Joint probability of the targets, (R,), and its gradient, (R, P, d_model).

    hidden: (R, P, d_model) last-layer states at the positions that predict targets (R, P).
    """
    joint: list[Tensor] = []
    slopes: list[Tensor] = []
    each = max(1, _HEAD_ROWS // targets.shape[1])
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
