"""Linear reads that recognise a fact's subject: plain tensors, no model.

    examples = Examples(subjects=subjects, weights=weights, groups=groups, strangers=strangers, ...)
    read = recognise(examples, mean, covariance)
    read.of(x)                          # (tokens, n): about 1 at a fact's subject, 0 elsewhere
    read.floor, read.ceiling            # below the floor a neuron is silent, above the ceiling full
    read.record(i)                      # what is known about the read of fact i

Inputs x are what enters a feed-forward layer. A read is a(x) = w·x + w₀. Each fact has its own:

    min ‖w‖²_M + 1/(ρ z̄²) · (Σ (1 − a(x))²₊ over its own inputs + Σ a(x)²₊ over hard strangers)

so own inputs are asked to read 1 or more, and strangers 0 or less. M is the covariance of ordinary
text, plus `SCATTER` times what must not matter: the scatter of a subject's inputs over contexts,
and that of its counterfeits. z̄² is the mean square of the own inputs under M⁻¹, so no constant
depends on a model's scale. The first hard strangers are those that read highest under Fisher's
discriminant, w ∝ M⁻¹(x̄ − μ). Each further round keeps the strangers that still count, and adds
those that read highest now.

The squared hinge is minimised by a few ridge solves (`edit/hinge.py`).

The cost for each fact is `ROUNDS` products with all strangers, and a dozen solves of about a
hundred unknowns. Facts are taken in blocks, so the memory is that of the strangers, in float32,
twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError
from ..corpus.factors import cholesky, whitened
from .hinge import hinge

SCATTER = 3.0
"""Weight of the scatter over contexts and counterfeits in the metric. The covariance has 1."""

SLACK = 0.3
"""ρ: how much a violation is forgiven, in units of the mean square of the own inputs. On the atlas,
0.1 to 0.3 let the fewest unseen subjects in; 1 is too soft."""

EDITED = 30.0
"""How much more the other facts' subjects count than other strangers. They will be asked about, and
a near name must not carry a fact: the Georgian and the Bulgarian Orthodox Church."""

HARDEST = 24
"""Strangers that a round adds for each fact. 48 let as many unseen subjects in."""

ROUNDS = 3
"""How often the strangers that read highest are added. The fourth round changes little."""

FLOOR, CEILING = 0.6, 0.8
"""Where a read starts to count, and where it counts fully, if the own inputs read that high."""

LOWEST_CEILING = 0.65
"""The lowest ceiling, for a fact whose own inputs read lower than `CEILING` in some context."""

_BLOCK = 256
"""Facts that are solved together."""

_ROWS = 16_384
"""Strangers that are read together."""

HELD_OUT = 4
"""One of so many tokens of ordinary text is held out, to measure the rate of false firing."""

_TAIL = 16
"""The highest reads of the held-out text. The rate of false firing is extrapolated from them."""

_NEVER = -1e9
"""A read that is never among the highest."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """Inputs of a layer that reads are made from.

    Attributes:
        subjects: (n, c, d) the input at each fact's subject, in c contexts.
        weights: (c,) the weight of each context, with sum 1.
        groups: (n,) int64, equal for facts of one subject: these are no strangers to each other.
        strangers: (m, d) inputs elsewhere. Those of ordinary text come first. The own inputs of
            the other facts are added to them.
        counterfeits: (n, q, d) inputs at subjects that end like a fact's own. They count for the
            metric. As strangers they only count if `strangers` has them too.
        known: (k, 2) int64: pairs of a stranger and a fact that it is no stranger to.
        n_text: The number of strangers that are ordinary text.
        spread: (d, d) the `scatter` of other subjects over their contexts, plus that of their
            counterfeits. A few facts alone do not show what must not matter. None: the facts do.
        n_spread: The number of these subjects.
    """

    subjects: Tensor
    weights: Tensor
    groups: Tensor
    strangers: Tensor
    counterfeits: Tensor
    known: Tensor
    n_text: int = 0
    spread: Tensor | None = None
    n_spread: int = 0

    def __post_init__(self) -> None:
        n, c, d = self.subjects.shape
        shapes = {
            "weights": (self.weights, (c,)),
            "groups": (self.groups, (n,)),
            "strangers": (self.strangers, (len(self.strangers), d)),
            "counterfeits": (self.counterfeits, (n, self.counterfeits.shape[1], d)),
            "known": (self.known, (len(self.known), 2)),
        }
        for name, (tensor, expected) in shapes.items():
            if tuple(tensor.shape) != expected:
                raise InputError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")
        if not n or not c:
            raise InputError(f"subjects has shape {(n, c, d)}; expected at least one fact")
        for name in ("subjects", "strangers", "counterfeits"):
            if not torch.isfinite(getattr(self, name)).all():
                raise NumericsError(
                    f"{name} holds NaN or infinity. The model does not compute finite states for "
                    "these prompts."
                )

    @property
    def centres(self) -> Tensor:
        """The weighted mean of each fact's own inputs, (n, d) float64."""
        return torch.einsum("ncd,c->nd", self.subjects.double(), self.weights.double())


@dataclass(frozen=True, eq=False, kw_only=True)
class Recognised:
    """A linear read for each of n facts. The median of its own inputs reads 1.

    Attributes:
        weights: (n, d) float64, w.
        offsets: (n,) float64, w₀.
        floor: (n,) the read from which on a neuron is active.
        ceiling: (n,) the read from which on it is fully active.
        lowest: (n,) the lowest read of the own inputs.
        closest: (n,) int64, the fact with another subject that reads highest; -1 if there is none.
        closest_read: (n,) its read.
        strangers_over: (n,) int64, strangers that still read above the floor, `HARDEST` at most.
        false_firing: (n,) the expected share of ordinary tokens that read above the floor. It is
            extrapolated from the highest reads of held-out text. NaN with too little text.
    """

    weights: Tensor
    offsets: Tensor
    floor: Tensor
    ceiling: Tensor
    lowest: Tensor
    closest: Tensor
    closest_read: Tensor
    strangers_over: Tensor
    false_firing: Tensor

    def of(self, inputs: Tensor) -> Tensor:
        """Return the reads (tokens, n) float64 of inputs (tokens, d)."""
        return inputs.double() @ self.weights.T + self.offsets

    def firing(self, inputs: Tensor, known: Tensor | None = None) -> tuple[Tensor, float]:
        """Return how often reads reach their floors on inputs (tokens, d), such as held-out text.

        `known` (k, 2) has pairs of a token and a fact that may fire there.

        Returns:
            The share of tokens for each fact (n,), and the share on which any fact fires.
        """
        counts = torch.zeros(len(self.offsets), dtype=torch.int64)
        tokens = 0
        pairs = _Pairs(known)
        for first in range(0, len(inputs), _ROWS):
            over = self.of(inputs[first : first + _ROWS]) >= self.floor
            row, fact = pairs.within(first, first + len(over))
            over[row, fact] = False
            counts += over.sum(0)
            tokens += int(over.any(1).sum())
        return counts / max(1, len(inputs)), tokens / max(1, len(inputs))

    def alike(self) -> list[tuple[int, int]]:
        """Return pairs of a fact and another one whose subject it cannot be told apart from."""
        over = (self.closest_read >= self.floor) & (self.closest >= 0)
        return [(i, int(self.closest[i])) for i in over.nonzero()[:, 0].tolist()]

    def record(self, i: int) -> dict[str, Any]:
        """Return what is known about the read of fact i, for its record."""
        record: dict[str, Any] = {
            "lowest_own_read": float(self.lowest[i]),
            "strangers_over_floor": int(self.strangers_over[i]),
        }
        if torch.isfinite(self.false_firing[i]):
            record["false_firing"] = float(self.false_firing[i])
        if self.closest[i] >= 0:
            record["closest_read"] = float(self.closest_read[i])
            if self.closest_read[i] >= self.floor[i]:
                record["not_told_apart_from"] = int(self.closest[i])
        return record


def recognise(
    examples: Examples,
    mean: Tensor,
    covariance: Tensor,
    *,
    progress: Callable[[int], object] | None = None,
) -> Recognised:
    """Return a linear read for each fact, as at the top of this file.

    Args:
        examples: The facts' own inputs, and the strangers.
        mean: (d,) the mean input over ordinary text.
        covariance: (d, d) its covariance.
        progress: Called with the number of facts done.

    Raises:
        InputError, NumericsError: The covariance is not one, or an input is not finite.
    """
    solver = _Solver(examples, mean, covariance)
    for turn in range(ROUNDS):
        solver.round(turn, progress)
    return solver.result()


def separability(examples: Examples, mean: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Return how well a layer tells subjects apart. Layers are compared by the difference.

    The reads are made from every other context and counterfeit, and measured on the rest.

    Returns:
        The share of the other own inputs that reach the ceiling, and the share of the other
        counterfeits that reach the floor.
    """
    subjects, false = examples.subjects, examples.counterfeits
    n, d = len(subjects), subjects.shape[-1]
    half = Examples(
        subjects=subjects[:, ::2],
        weights=examples.weights[::2] / examples.weights[::2].sum(),
        groups=examples.groups,
        strangers=torch.cat([examples.strangers, false[:, ::2].reshape(-1, d)]),
        counterfeits=false[:, ::2],
        known=examples.known,
        n_text=examples.n_text,
        spread=examples.spread,
        n_spread=examples.n_spread,
    )
    read = recognise(half, mean, covariance)

    def reads(inputs: Tensor) -> Tensor:
        return torch.einsum("ncd,nd->nc", inputs.double(), read.weights) + read.offsets[:, None]

    kept, missed = reads(subjects[:, 1::2]), reads(false[:, 1::2])
    return (
        float((kept >= read.ceiling[:, None]).double().mean()) if kept.numel() else 1.0,
        float((missed >= read.floor[:, None]).double().mean()) if n and missed.numel() else 0.0,
    )


def scatter(inputs: Tensor) -> Tensor:
    """Return the covariance of inputs (n, c, d) around the mean of each row, pooled over the rows.

    Returns:
        (d, d) float64; zeros if there are no inputs.
    """
    n, c, d = inputs.shape
    total = torch.zeros(d, d, dtype=torch.float64, device=inputs.device)
    if not c:
        return total
    for first in range(0, n, _BLOCK):
        block = inputs[first : first + _BLOCK].double()
        block = (block - block.mean(1, keepdim=True)).reshape(-1, d)
        total += block.T @ block
    return total / (n * c)


# ── the solve ─────────────────────────────────────────────────────────────────────────────────────


class _Pairs:
    """Pairs of a row and a fact."""

    def __init__(self, pairs: Tensor | None) -> None:
        pairs = torch.zeros(0, 2, dtype=torch.int64) if pairs is None else pairs
        self.pairs = pairs[pairs[:, 0].argsort()]
        self.rows = self.pairs[:, 0].contiguous()

    def within(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the pairs of rows first to stop: rows, counted from first, and facts."""
        low, high = torch.searchsorted(self.rows, torch.tensor([first, stop])).tolist()
        return self.pairs[low:high, 0] - first, self.pairs[low:high, 1]


class _Solver:
    """The reads of all facts, in the space where the metric M is the identity.

    Attributes:
        read: (n, d) and (n,) the present reads: u and the offset.
        kept: (n, k) int64, the strangers in the system of each fact that still count; padded.
        counts: (n, k) whether they do.
    """

    def __init__(self, examples: Examples, mean: Tensor, covariance: Tensor) -> None:
        self.examples, self.mean = examples, mean.double()
        n = len(examples.subjects)
        spread = scatter(examples.subjects) + scatter(examples.counterfeits)
        if examples.spread is not None:
            total = n + examples.n_spread
            spread = (n * spread + examples.n_spread * examples.spread.double()) / total
        self.factor = cholesky(covariance.double() + SCATTER * spread)
        self.centres = self._white(examples.centres)
        bare = self._white(examples.subjects[:, int(examples.weights.argmax())])
        # The other facts' subjects, on the bare prompt and on average, are strangers too.
        self.pool = torch.cat(
            [self._white(examples.strangers).float(), bare.float(), self.centres.float()]
        )
        self.pairs = _Pairs(self._known(len(examples.strangers)))
        self.held_out = min(examples.n_text, len(examples.strangers)) // HELD_OUT
        self.scale = float(self.centres.square().sum(1).mean())
        length = self.centres.square().sum(1, keepdim=True).clamp_min(1e-12 * self.scale + 1e-300)
        self.read = (self.centres / length, self.centres.new_zeros(n))
        self.kept = torch.zeros(n, 0, dtype=torch.int64)
        self.counts = torch.zeros(n, 0, dtype=torch.bool)

    def _white(self, inputs: Tensor) -> Tensor:
        """Return inputs in the space of the metric, with their dtype."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        parts = [
            whitened(rows.double() - self.mean, self.factor).to(inputs.dtype)
            for rows in torch.split(flat, _ROWS)
        ]
        return torch.cat(parts).view(inputs.shape) if parts else flat.view(inputs.shape)

    def _known(self, base: int) -> Tensor:
        """Return the pairs that are no strangers. The facts' own inputs begin at row `base`."""
        groups = self.examples.groups.tolist()
        members: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        n = len(groups)
        pairs = [
            (base + place * n + i, j)
            for place in range(2)
            for i, group in enumerate(groups)
            for j in members[group]
        ]
        return torch.cat([self.examples.known.cpu(), torch.tensor(pairs)])

    def hardest(self, k: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the highest reads (n, k) of strangers first to stop, highest first, and which."""
        u, offset = (each.float() for each in self.read)
        values = u.new_full((len(u), 0), 0.0)
        places = torch.zeros(len(u), 0, dtype=torch.int64, device=u.device)
        for start in range(first, stop, _ROWS):
            rows = self.pool[start : min(stop, start + _ROWS)]
            reads = torch.addmm(offset[:, None], u, rows.T)
            row, fact = self.pairs.within(start, start + len(rows))
            reads[fact, row] = _NEVER
            high, place = reads.topk(min(k, len(rows)), 1)
            values, places = torch.cat([values, high], 1), torch.cat([places, place + start], 1)
            values, order = values.topk(min(k, values.shape[1]), 1)
            places = places.gather(1, order)
        return values, places

    def round(self, turn: int, progress: Callable[[int], object] | None) -> None:
        """Solve again, with the strangers that still count and those that read highest now."""
        high, places = self.hardest(HARDEST, self.held_out, len(self.pool))
        candidates = torch.cat([self.kept, places], 1)
        live = torch.cat([self.counts, high > _NEVER / 2], 1)
        self.kept, live = _compact(candidates, live)
        parts = []
        for first in range(0, len(candidates), _BLOCK):
            if progress is not None:
                progress((turn * len(candidates) + first) // ROUNDS)
            parts.append(self._solved(slice(first, first + _BLOCK), live))
        u, offset, counts = (torch.cat(part) for part in zip(*parts, strict=True))
        self.read, self.counts = (u, offset), counts

    def _solved(self, block: slice, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, the offset, and which strangers count, for a block of facts."""
        subjects = self._white(self.examples.subjects[block].double())
        n, c, d = subjects.shape
        strangers = self.pool[self.kept[block]].double()
        # The mean of ordinary text is a stranger. It is 0 in this space.
        rows = torch.cat([subjects, strangers, subjects.new_zeros(n, 1, d)], 1)
        wanted = torch.cat([subjects.new_ones(n, c), subjects.new_zeros(n, rows.shape[1] - c)], 1)
        usable = torch.cat([live.new_ones(n, c), live[block], live.new_ones(n, 1)], 1)
        # The constant feature is as long as the own inputs, so that w₀ costs little.
        bias = scale = self.scale
        edited = self.kept[block] >= len(self.examples.strangers)
        slack = torch.full_like(wanted, SLACK * scale)
        slack[:, c:-1] /= torch.where(edited, EDITED, 1.0)
        beta = hinge(rows @ rows.transpose(1, 2) + bias, wanted, usable, slack)
        u = (beta[:, None] @ rows)[:, 0]
        return u, bias * beta.sum(1), (beta[:, c:-1] != 0)

    def result(self) -> Recognised:
        """Return the reads, scaled so that own inputs read 1, and what they let in.

        The median counts. A subject that begins a text may hardly be read there, as the first token
        of many models is unlike all others.
        """
        examples = self.examples
        u, offset = self.read
        weights = torch.linalg.solve_triangular(self.factor.T, u.T, upper=True).T
        offsets = offset - weights @ self.mean
        reads = self._own_reads(weights, offsets)
        level = reads.median(1).values
        if not (level > 0).all():
            bad = int((level <= 0).nonzero()[0, 0])
            raise NumericsError(
                f"the subject of fact {bad} cannot be told apart from other subjects in this "
                f"layer: half of its own inputs read {level[bad]:.3g} or less. Choose another "
                "layer, or leave the fact out."
            )
        self.read = (u / level[:, None], offset / level)
        lowest = (reads / level[:, None]).min(1).values
        ceiling = lowest.clamp(LOWEST_CEILING, CEILING)
        floor = ceiling - (CEILING - FLOOR)
        base, n = len(examples.strangers), len(level)
        highest, _ = self.hardest(HARDEST, 0, len(self.pool))
        top, place = self.hardest(1, base, len(self.pool))
        closest = torch.where(top[:, 0] > _NEVER / 2, (place[:, 0] - base) % n, -1)
        return Recognised(
            weights=weights / level[:, None],
            offsets=offsets / level,
            floor=floor,
            ceiling=ceiling,
            lowest=lowest,
            closest=closest,
            closest_read=torch.where(closest >= 0, top[:, 0].double(), 0.0),
            strangers_over=(highest >= floor[:, None]).sum(1),
            false_firing=self._rate(floor),
        )

    def _own_reads(self, weights: Tensor, offsets: Tensor) -> Tensor:
        """Return the reads of the facts' own inputs, (n, c) float64."""
        blocks = [slice(i, i + _BLOCK) for i in range(0, len(weights), _BLOCK)]
        reads = [
            torch.einsum("ncd,nd->nc", self.examples.subjects[b].double(), weights[b])
            for b in blocks
        ]
        return torch.cat(reads) + offsets[:, None]

    def _rate(self, floor: Tensor) -> Tensor:
        """Return the expected share of ordinary tokens that read above the floor.

        Beyond the `_TAIL` highest reads, the share falls off exponentially, as fast as among them.
        """
        total = self.held_out
        if total < 2 * _TAIL:
            return torch.full_like(floor, float("nan"))
        high, _ = self.hardest(_TAIL, 0, total)
        high = high.double()
        start = high[:, -1]
        fall = (high - start[:, None]).mean(1).clamp_min(1e-9)
        rate: Tensor = _TAIL / total * ((start - floor) / fall).clamp_max(0).exp()
        return rate


def _compact(candidates: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the live candidates of each row once, at its front, and which places hold one.

    Args:
        candidates: (n, k) int64, at least 0.
        live: (n, k) which of them count.
    """
    last = torch.iinfo(torch.int64).max
    ordered, _ = torch.where(live, candidates, last).sort(1)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    holding = first & (ordered != last)
    order = (~holding).long().argsort(dim=1, stable=True)
    ordered, holding = ordered.gather(1, order), holding.gather(1, order)
    width = int(holding.sum(1).max()) if len(holding) else 0
    ordered, holding = ordered[:, :width], holding[:, :width]
    return torch.where(holding, ordered, 0), holding
