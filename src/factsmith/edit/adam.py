"""The search for v_star as in the papers: gradient descent on δ with Adam.

Facts do not influence each other. Each has its own loss, clamp and early stop, and leaves the batch
when it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .keys import with_added
from .questions import Places
from .rows import RecordedRows
from .target import Targets


class _Terms(NamedTuple):
    """Each question's loss and its terms, each (n,)."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    norm: Tensor


class AdamSearch(RecordedRows):
    """The search of the papers for one batch of questions, by gradient descent with Adam.

    Attributes:
        active: (n,) the questions that are still searched. What follows has a row for each of
            these.
        replay: The recorded pass.
        delta: (n, d_model) δ, float32 whatever the model computes in.
        guarded: (n, vocab) log-probabilities at the guards under δ = 0. None before the first step.
    """

    def __init__(self, *given: Any) -> None:
        """Record the pass. The arguments are those of `RecordedRows`."""
        super().__init__(*given)
        ((self.replay, _),) = self.passes
        self.passes = []  # rows that leave are freed
        self.delta = torch.zeros_like(self.v_initial)
        self.adam = _Adam(self.rate, self.delta)
        self.active = torch.arange(len(self.questions), device=self.delta.device)
        self.guarded: Tensor | None = None

    def run(self, progress: Callable[[int], object] | None = None) -> Targets:
        """Take steps until all questions are done. After each, report how many are."""
        for step in range(1, self.config.steps + 1):
            is_last = step == self.config.steps
            terms = self._evaluate(with_gradient=not is_last)
            self.check_finite(terms.loss, self.active.tolist(), step)
            watched = terms.loss if self.config.scale == "paper" else terms.nll
            reached = watched < self.config.stop_loss
            done = reached | is_last
            if done.any():
                self._record(done, reached, terms, step)
            self.report(progress)
            if done.all():
                break
            (gradient,) = torch.autograd.grad(terms.loss[~done].sum(), self.delta)
            del terms, watched  # they hold the graph
            self.delta = self.delta.detach()
            if done.any():
                stay = (~done).nonzero()[:, 0]
                self._keep(stay)
                gradient = gradient[stay]
            self._move(gradient)
        return self.targets()

    def _evaluate(self, *, with_gradient: bool) -> _Terms:
        """Run the layers above with δ added, and return the loss."""
        self.delta.requires_grad_()
        with torch.set_grad_enabled(with_gradient):
            rows = self.delta[self.places.owners.to(self.delta.device)]
            hidden = with_added(self.replay, self.layer, rows, self.site)  # (R, S, d_model)
            nll, log_p = self._read(hidden)
            before = log_p.detach() if self.guarded is None else self.guarded
            # KL(p_δ ‖ p₀)
            kl = F.kl_div(before, log_p, log_target=True, reduction="none").sum(-1)
            nll, kl = nll.to(self.delta.device), kl.to(self.delta.device)
            norm = self.delta.norm(dim=-1)
            loss = nll + self.config.kl_factor * kl + self.decay[self.active] * norm
        if self.guarded is None:
            self.guarded = log_p.detach().clone()
        return _Terms(loss, nll, kl, norm)

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Read the answers from last-layer states (R, S, d_model).

        Returns:
            The first term of each question's loss (n,), and the log-probabilities at the guards
            (n, vocab).
        """
        places = self.places
        rows, columns, guards = (
            index.to(hidden.device) for index in (places.rows, places.columns, places.guards)
        )
        # The head runs on these states only.
        states = torch.cat([hidden[rows, columns], hidden[guards, 0]])
        log_p = self.replay.logits(states).float().log_softmax(-1)
        targets, blank, shares = (
            index.to(log_p.device) for index in (places.targets, places.blank, places.shares)
        )
        nll = -log_p[: len(rows)].gather(1, targets[:, None])[:, 0]
        if len(blank):  # KL(p without the subject ‖ p_δ)
            without = places.without.to(log_p)
            kl = F.kl_div(log_p[blank], without, log_target=True, reduction="none").sum(-1)
            nll = nll.index_copy(0, blank, kl)
        nll = nll * shares
        owners = places.owners[places.rows].to(nll.device)
        sums = torch.zeros(len(places.guards), device=nll.device, dtype=torch.float32).index_add(
            0, owners, nll
        )
        return sums, log_p[len(rows) :]

    def _record(self, done: Tensor, reached: Tensor, terms: _Terms, step: int) -> None:
        """Store v_star and the numbers of the questions that are done."""
        active = self.active[done]
        self.v_star[active] += self.delta[done].detach()
        columns = [*terms, self.limit[self.active]]
        rows = torch.stack(columns, dim=1)[done].tolist()
        names = (*_Terms._fields, "limit")
        for i, good, row in zip(active.tolist(), reached[done].tolist(), rows, strict=True):
            numbers = dict(zip(names, row, strict=True))
            self.note(i, step, numbers, "loss" if good else "steps")

    def _keep(self, stay: Tensor) -> None:
        """Go on with some of the active questions only."""
        owners, device = self.places.owners, self.places.owners.device
        rows = torch.isin(owners, stay.to(device)).nonzero()[:, 0]
        self.replay = self.replay.keep(rows)
        self.adam.keep(stay)
        self.active, self.delta = self.active[stay], self.delta[stay]
        assert self.guarded is not None
        self.guarded = self.guarded[stay.to(self.guarded.device)]
        active = self.active.tolist()
        self.places = Places.of(
            [self.questions[i] for i in active], [self.without[i] for i in active], device
        )

    def _move(self, gradient: Tensor) -> None:
        """Take a step and shorten δ to its limit."""
        delta = self.delta + self.adam.update(gradient)
        shorten = (self.limit[self.active] / delta.norm(dim=-1)).clamp(max=1)
        self.delta = delta * shorten[:, None]


class _Adam:
    """Adam with a learning rate for each row, and rows that may leave.

    Kingma and Ba 2014, algorithm 1, with torch's defaults.
    """

    def __init__(self, rate: Tensor, like: Tensor) -> None:
        self.rate, self.steps = rate, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.rate, self.mean, self.square = self.rate[rows], self.mean[rows], self.square[rows]

    def update(self, gradient: Tensor) -> Tensor:
        """Return what to add to the parameters (n, d)."""
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        spread = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        return self.mean / spread * (-self.rate / (1 - 0.9**self.steps))[:, None]
