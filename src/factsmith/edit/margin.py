"""The search for v_star in a few steps. Each step solves a linear model of the margins.

The margin of a context is log(p / (1 − p)), where p is the geometric mean of the probabilities of
the target's tokens. As a function of δ it is much closer to linear than p or −log p. One backward
pass gives the margins of all contexts and their gradients J, because each context has its own copy
of δ. The next step is the shortest s with

    m + J s ≥ goal    in every context,    and ‖s‖ ≤ radius.

The length of a step counts what it changes at the guard, the prompt "{} is a", by a quadratic model
of the KL term (equation 4 of ROME). So δ goes where the guard changes little.

For one context this is Newton's method, as in DeepFool (Moosavi-Dezfooli et al. 2016,
https://arxiv.org/abs/1511.04599). A step that raises the loss is taken back, and a shorter one is
tried from the same gradients. A search begins with the bare prompt alone. The other contexts come
in when the target is near.

Facts do not influence each other. Each has its own radius, clamp and early stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.language_model import LanguageModel
from ..model.replay import Replay, record
from .batches import Size, fitting_batches
from .guards import other_relations
from .keys import with_added
from .rows import RecordedRows
from .target import Targets

_FIRST_RADIUS = 5.0
"""Longest first step, in steps of Adam with the same lr, and at most half of the clamp."""

_SHORTER, _LONGER = 0.35, 1.5
"""The radius after a step that raised the loss, in lengths of that step, and the factor after one
that lowered it."""

_NEAR = 1.0
"""Nats. When the bare prompt's loss is below this value, the other contexts come in."""

_AIM = 0.7
"""The loss that a step aims at in every context, in units of stop_loss. The search stops when the
mean is below stop_loss."""

_SOFTNESS = 0.03
"""How much a step may fall short in contexts that ask for opposite changes: the weight of the
squared shortfall's inverse, in units of the mean ‖J‖²."""

_GUARD = 1.6
"""Cost of one nat of KL at the guard with kl_factor=1, where a step as long as the stream costs ½.
So with the authors' kl_factor, a nat costs 0.1. On SmolLM2 and the atlas this keeps the KL term at
or below what Adam leaves of it. More would cost other phrasings of the fact."""

_SAMPLES = 16
"""Gradients from which the guard's Fisher information is estimated. Each is one more column in one
forward and backward pass."""

_PATIENCE, _PROGRESS = 5, 0.95
"""A search is given up if this number of evaluations does not bring the loss below this part of
what it was."""


@dataclass
class _State:
    """Where the searches of n questions are. Tensors have a row for each question.

    Attributes:
        active: Whether a question is still searched.
        whole: Whether it asks all contexts. Before, it asks the bare prompt alone.
        delta: (n, d_model) δ to evaluate next.
        best: (n, d_model) the best δ so far.
        nll: (n,) its loss.
        radius: (n,) the longest next step.
        margins: (n, n_contexts) the margins at `best`.
        slopes: (n, n_contexts, d_model) their gradients.
        known: (n, n_contexts) whether margin and gradient are known.
        mark: (n,) the loss that the next evaluations are compared with.
        waited: (n,) how many evaluations that loss is old.
    """

    active: Tensor
    whole: Tensor
    delta: Tensor
    best: Tensor
    nll: Tensor
    radius: Tensor
    margins: Tensor
    slopes: Tensor
    known: Tensor
    mark: Tensor
    waited: Tensor

    @classmethod
    def start(cls, radius: Tensor, n_contexts: int, width: int) -> _State:
        """Return the state before the first evaluation, at δ = 0."""
        n, device = len(radius), radius.device
        zeros = torch.zeros(n, width, device=device, dtype=torch.float32)
        endless = torch.full((n,), float("inf"), device=device, dtype=torch.float32)
        return cls(
            active=torch.ones(n, dtype=torch.bool, device=device),
            whole=torch.full((n,), n_contexts == 1, device=device),
            delta=zeros,
            best=zeros.clone(),
            nll=endless,
            radius=radius.clone(),
            margins=torch.zeros(n, n_contexts, device=device, dtype=torch.float32),
            slopes=torch.zeros(n, n_contexts, width, device=device, dtype=torch.float32),
            known=torch.zeros(n, n_contexts, dtype=torch.bool, device=device),
            mark=endless.clone(),
            waited=torch.zeros(n, dtype=torch.long, device=device),
        )


class _Part:
    """The rows of one recorded pass, of which some run at a time."""

    def __init__(self, replay: Replay, rows: list[int]) -> None:
        self.replay, self.rows = replay, rows
        self.running, self.kept = list(rows), replay

    def keep(self, wanted: set[int]) -> list[int]:
        """Run these rows from now on. Return those that the pass has."""
        running = [row for row in self.rows if row in wanted]
        if running and running != self.running:
            picked = [i for i, row in enumerate(self.rows) if row in wanted]
            whole = len(picked) == len(self.rows)
            self.kept = self.replay if whole else self.replay.keep(torch.tensor(picked))
            self.running = running
        return running


@dataclass
class _Answers:
    """One evaluation of some rows of a pass.

    Attributes:
        rows: (R,) the rows.
        added: (R, d_model) each row's copy of δ.
        nll: (R,) −log p, the mean over the target's tokens. It holds the graph.
    """

    rows: Tensor
    added: Tensor
    nll: Tensor


class MarginSearch(RecordedRows):
    """The search for one batch of questions. All of them have a target."""

    def __init__(self, *given: Any) -> None:
        """Record the passes. The arguments are those of `RecordedRows`."""
        super().__init__(*given)
        self.guards = self._record_guards(given[0])
        with torch.no_grad():
            still = torch.zeros_like(self.v_initial)
            self.before = self._guard_logits(self.guards, still).log_softmax(-1)
        self.parts = [_Part(replay, rows) for replay, rows in self.passes]
        self.owners = self.places.owners.to(self.v_initial.device)
        self.contexts = self.places.contexts.to(self.v_initial.device)
        self.sampled = self._fisher_rows()
        self.others: Tensor | None = None
        if self.config.guards_relations:
            width = self.v_initial.shape[1]
            rows = other_relations(given[0], self.questions, self.layer, self.site, width)
            self.others = rows.to(self.v_initial)

    def groups(self, lm: LanguageModel, lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return the rows of each pass. Rows of similar width share one: little is padding."""
        sizes = [Size(1, length - pivot, length, 1) for length, pivot in lengths]
        return [sorted(rows) for rows in fitting_batches(sizes, lm, self.layer, memory=2**62)]

    def run(self, progress: Callable[[int], object] | None = None) -> Targets:
        """Take steps until all questions are done. After each, report how many are."""
        first = _FIRST_RADIUS * self.rate * self.v_initial.shape[-1] ** 0.5
        first = torch.minimum(first, self.limit / 2)  # the units of "paper" know no model
        state = _State.start(first, self.contexts.shape[1], self.v_initial.shape[-1])
        for step in range(1, self.config.steps + 1):
            answers = self._evaluate(state)
            nll = self._by_context(answers, state)  # (n, n_contexts)
            mean = nll.nanmean(dim=1)
            numbers = state.active.nonzero()[:, 0].tolist()
            self.check_finite(mean[state.active], numbers, step)
            lower = state.active & ~(mean >= state.nll)
            self._finish(state, mean, lower, step)
            self.report(progress)
            if not state.active.any():
                break
            lower &= state.active
            self._learn(state, answers, nll, lower)
            self._adapt(state, mean, lower)
            self._move(state, self._metric(state))
        self._note_guards()
        return self.targets()

    def _evaluate(self, state: _State) -> list[_Answers]:
        """Ask the contexts of all active questions: the bare prompt, or all."""
        contexts = self.contexts.tolist()
        whole = state.whole.tolist()
        wanted = {
            row
            for i in state.active.nonzero()[:, 0].tolist()
            for row in (contexts[i] if whole[i] else [contexts[i][self.bare]])
        }
        return [
            self._ask(part, rows, state.delta) for part in self.parts if (rows := part.keep(wanted))
        ]

    def _ask(self, part: _Part, rows: list[int], delta: Tensor) -> _Answers:
        """Run the layers above for some rows of a pass, with δ added."""
        index, places, replay = torch.tensor(rows), self.places, part.kept
        added = delta[self.owners[index.to(self.owners.device)]].requires_grad_()
        with torch.enable_grad():
            hidden = with_added(replay, self.layer, added, self.site)  # (R, S, d_model)
            local = torch.full((len(places.owners),), -1)
            local[index] = torch.arange(len(rows))
            local = local[places.rows.cpu()]
            asked = (local >= 0).nonzero()[:, 0]
            local, asked = local[asked].to(hidden.device), asked.to(hidden.device)
            columns = places.columns.to(hidden.device)[asked]
            logits = replay.logits(hidden[local, columns]).float()
            local, asked = local.to(logits.device), asked.to(logits.device)
            targets = places.targets.to(logits.device)[asked]
            nll = logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]
            # Shares are parts of a fact's mean. These are parts of a context's.
            nll = nll * places.shares.to(logits.device)[asked] * self.contexts.shape[1]
            sums = torch.zeros(len(rows), device=logits.device, dtype=torch.float32).index_add(
                0, local, nll
            )
        return _Answers(index.to(delta.device), added, sums.to(delta.device))

    def _by_context(self, answers: Sequence[_Answers], state: _State) -> Tensor:
        """Return −log p of each question in each context; NaN where nothing was asked."""
        nll = torch.full(
            (len(self.owners),), float("nan"), device=state.delta.device, dtype=torch.float32
        )
        for answer in answers:
            nll[answer.rows] = answer.nll.detach().nan_to_num(nan=float("inf"))
        return nll[self.contexts]

    def _finish(self, state: _State, mean: Tensor, lower: Tensor, step: int) -> None:
        """Store the targets of the questions that are done."""
        reached = state.whole & lower & (mean < self.config.stop_loss)
        stuck = state.whole & ~lower & (state.waited >= _PATIENCE)
        done = state.active & (reached | stuck | (step == self.config.steps))
        for i in done.nonzero()[:, 0].tolist():
            better = bool(lower[i])
            delta, nll = (state.delta[i], mean[i]) if better else (state.best[i], state.nll[i])
            self.v_star[i] += delta
            norm = float(delta.norm())
            numbers = {
                "loss": float(nll) + float(self.decay[i]) * norm,
                "nll": float(nll),
                "kl": 0.0,
                "norm": norm,
                "limit": float(self.limit[i]),
            }
            ending = "loss" if reached[i] else "stuck" if stuck[i] else "steps"
            self.note(i, step, numbers, ending)
        state.active = state.active & ~done

    def _learn(self, state: _State, answers: list[_Answers], nll: Tensor, lower: Tensor) -> None:
        """Read margins and gradients where the loss became lower. The graph is freed."""
        gradients = torch.zeros(
            len(self.owners), state.delta.shape[1], device=nll.device, dtype=torch.float32
        )
        while answers:
            answer = answers.pop()
            wanted = lower[self.owners[answer.rows]]
            if wanted.any():
                total = answer.nll[wanted].sum()
                (gradients[answer.rows],) = torch.autograd.grad(total, answer.added)
        fresh = lower[:, None] & ~nll.isnan()
        margins, rates = margins_of(nll)
        state.margins = torch.where(fresh, margins, state.margins)
        slopes = gradients[self.contexts] * rates[..., None]
        state.slopes = torch.where(fresh[..., None], slopes, state.slopes)
        state.known = state.known | fresh

    def _adapt(self, state: _State, mean: Tensor, lower: Tensor) -> None:
        """Accept or take back the last step, and adapt the radius and the contexts."""
        length = (state.delta - state.best).norm(dim=-1)
        radius = torch.where(lower, _LONGER * state.radius, _SHORTER * length)
        state.radius = torch.where(state.active, radius, state.radius)
        state.best = torch.where(lower[:, None], state.delta, state.best)
        state.nll = torch.where(lower, mean, state.nll)
        progress = state.nll < _PROGRESS * state.mark
        state.mark = torch.where(progress, state.nll, state.mark)
        state.waited = torch.where(progress, 0, state.waited + 1)
        near = (state.nll < _NEAR) | (state.waited >= _PATIENCE)
        switch = state.active & ~state.whole & near
        # The loss of all contexts is another quantity: nothing is comparable with it yet.
        state.nll = torch.where(switch, float("inf"), state.nll)
        state.mark = torch.where(switch, float("inf"), state.mark)
        state.waited = torch.where(switch, 0, state.waited)
        state.whole = state.whole | switch

    def _move(self, state: _State, metric: _Metric) -> None:
        """Choose the next δ: from the best one, the step of the linear model."""
        (goal,), _ = margins_of(torch.tensor([_AIM * self.config.stop_loss], dtype=torch.float32))
        # Without any goal the model ends here: nearer to 0 where the guard would change.
        rest = metric.solve(state.best[:, None])[:, 0]
        ascent = metric.solve(state.slopes)
        back = state.best - rest
        lacking = goal.to(state.margins) - state.margins + (state.slopes @ back[..., None])[..., 0]
        weights = nearest(state.slopes, lacking, state.known, ascent)
        step = (weights[..., None] * ascent).sum(1) - back
        step = step * (state.radius / step.norm(dim=-1).clamp(min=1e-30)).clamp(max=1)[:, None]
        delta = state.best + step
        norm = delta.norm(dim=-1).clamp(min=1e-30)
        state.delta = delta * (self.limit / norm).clamp(max=1)[:, None]

    def _record_guards(self, lm: LanguageModel) -> Replay:
        """Record the guards up to the subject token, which does not see what follows."""
        rows = [
            question.sequences[question.guard][: question.pivots[question.guard] + 1]
            for question in self.questions
        ]
        batch = lm.align(rows, [len(ids) - 1 for ids in rows])
        return record(lm, batch, start=batch.pivot, until=self.layer + 1)

    def _fisher_rows(self) -> Tensor:
        """Return G, (n, samples, d_model), for which the KL term is about ½ ‖G δ‖² for small δ.

        GᵀG estimates the Fisher information of the guard's prediction with respect to δ, from
        gradients g of random combinations of logits, for which E[g gᵀ] is that information.
        """
        n, width = self.v_initial.shape
        if not self.config.kl_factor:
            return torch.zeros(n, 0, width, device=self.v_initial.device, dtype=torch.float32)
        draw = torch.Generator()
        return torch.stack([self._sampled(i, draw.manual_seed(0)) for i in range(n)])

    def _metric(self, state: _State) -> _Metric:
        """Return what a step costs: its length, and the change that it makes at the guard.

        The KL term is evaluated at the best δ so far. One more row makes the model's gradient there
        equal to the measured one, if the KL term grows faster than the model says.
        """
        rows = self.sampled
        if self.config.kl_factor:
            added = state.best.detach().clone().requires_grad_()
            with torch.enable_grad():
                log_p = self._guard_logits(self.guards, added).log_softmax(-1)
                kl = F.kl_div(self.before, log_p, log_target=True, reduction="sum")
            (gradient,) = torch.autograd.grad(kl, added)
            modelled = ((rows @ state.best[..., None]).transpose(1, 2) @ rows)[:, 0]
            missing = gradient - modelled
            product = (missing * state.best).sum(-1)
            # Nearly orthogonal to δ, it says nothing about the way that δ came.
            least = 1e-2 * missing.norm(dim=-1) * state.best.norm(dim=-1)
            product = torch.where(product > least, product, float("inf"))
            row = product.rsqrt()[:, None] * missing
            rows = torch.cat([rows, row[:, None]], dim=1)
            if self.others is not None:
                rows = torch.cat([rows, self.others], dim=1)
        weight = (_GUARD * self.config.kl_factor) ** 0.5 * self.length
        return _Metric(rows * weight[:, None, None])

    def _sampled(self, i: int, draw: torch.Generator) -> Tensor:
        """Return gradients at question i's guard: (samples, d_model)."""
        replay = self.guards.keep(torch.full((_SAMPLES,), i))
        added = torch.zeros(
            _SAMPLES, self.v_initial.shape[1], device=self.v_initial.device, dtype=torch.float32
        )
        added.requires_grad_()
        with torch.enable_grad():
            logits = self._guard_logits(replay, added)
            p = logits.detach().softmax(-1)
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float32).to(p) * p.sqrt()
            noise = noise - p * noise.sum(-1, keepdim=True)
            total = (logits * noise).sum()
        (gradient,) = torch.autograd.grad(total, added)
        return gradient / math.sqrt(_SAMPLES)

    def _guard_logits(self, replay: Replay, delta: Tensor) -> Tensor:
        """Return the logits (R, vocab) at the guards, with δ added."""
        hidden = with_added(replay, self.layer, delta, self.site)
        return replay.logits(hidden[:, 0]).float()

    @torch.no_grad()
    def _note_guards(self) -> None:
        """Store KL(p_δ ‖ p₀) at the guards."""
        changes = self.v_star - self.v_initial
        after = self._guard_logits(self.guards, changes).log_softmax(-1)
        kl = F.kl_div(self.before, after, log_target=True, reduction="none").sum(-1)
        for ending, value in zip(self.convergence, kl.tolist(), strict=True):
            ending["kl"] = value
            ending["loss"] += self.config.kl_factor * value


class _Metric:
    """The cost of a step, ½ sᵀ (I + G ᵀG) s, for each question."""

    def __init__(self, rows: Tensor) -> None:
        """Take G, (n, samples, d_model)."""
        self.rows = rows.cpu().double()
        gram = self.rows @ self.rows.transpose(1, 2)
        self.inner: Tensor = torch.linalg.inv(
            torch.eye(gram.shape[1], dtype=gram.dtype).to(gram) + gram
        )

    def solve(self, vectors: Tensor) -> Tensor:
        """Return (I + Gᵀ G)⁻¹ v for vectors (n, c, d_model)."""
        exact = vectors.cpu().double()
        inner = (exact @ self.rows.transpose(1, 2)) @ self.inner
        return (exact - inner @ self.rows).to(vectors)


def margins_of(nll: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p / (1 − p)) for −log p, and its derivative with respect to −log p."""
    nll = nll.clamp(min=1e-6)
    # log(exp(x) − 1) = x + log(1 − exp(−x)), which does not overflow.
    return -(nll + torch.log(-torch.expm1(-nll))), 1 / torch.expm1(-nll)


def nearest(
    slopes: Tensor, wanted: Tensor, known: Tensor, ascent: Tensor | None = None, sweeps: int = 60
) -> Tensor:
    """Return λ ≥ 0 for which s = M⁻¹Jᵀλ is the cheapest step with J s ≥ wanted, softened.

    The cost of a step is ½ sᵀ M s. The dual problem min ½ λᵀ(J M⁻¹Jᵀ + ε I)λ − wantedᵀλ is solved
    by coordinate descent.

    Args:
        slopes: (n, c, d) J, the gradients of c margins.
        wanted: (n, c) by how much each margin should grow.
        known: (n, c) the margins that count.
        ascent: (n, c, d) the rows of J M⁻¹. None: M is the identity.
        sweeps: How often all coordinates are visited at most.

    Returns:
        (n, c) λ.
    """
    known = known.cpu()
    rows = slopes.cpu().double() * known[..., None]
    raised = rows if ascent is None else ascent.cpu().double() * known[..., None]
    gram = rows @ raised.transpose(1, 2)
    count = known.sum(1).clamp(min=1)
    ridge = _SOFTNESS * gram.diagonal(dim1=1, dim2=2).sum(1) / count
    gram = gram + torch.diag_embed(ridge[:, None].expand(-1, gram.shape[1]) + 1e-30)
    goal = torch.where(known, wanted.cpu().double(), 0.0)
    weights = torch.zeros_like(goal)
    rest = -goal  # the gradient of the dual problem
    diagonal = gram.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        largest = 0.0
        for c in range(goal.shape[1]):
            moved = (weights[:, c] - rest[:, c] / diagonal[:, c]).clamp(min=0) - weights[:, c]
            weights[:, c] += moved
            rest += gram[:, :, c] * moved[:, None]
            largest = max(largest, float((moved.abs() * diagonal[:, c].sqrt()).max()))
        if largest <= 1e-9 * float((weights * diagonal.sqrt()).abs().max()):
            break
    return weights.to(slopes)
