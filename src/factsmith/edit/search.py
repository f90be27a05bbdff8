"""The search for v_star, the output at the subject token that makes the model assert a fact.

    targets = find_targets(lm, facts, layer, config, contexts)                   # ROME
    targets = find_targets(lm, facts, layer, config, contexts, site="stream")    # the MEMIT family
    targets.v_star, targets.k_star, targets.convergence

The site "ffn" is the output of the down-projection, and "stream" is the output of the whole layer.

A batch holds a row for each fact in each context, and one for each fact's guard. The last token of
the subject is in the same column of all rows. The columns before it do not change, so they live in
the key/value cache. The layers up to the edited one do not change either. So a gradient step runs
only the layers above, on the columns from the subject on, and reads logits only where a target
token is due.

Facts do not influence each other. Each has its own loss, clamp and early stop, and leaves the batch
when it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import InputError, NumericsError
from ..core.fact import Fact
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from ..model.replay import record
from ..model.turns import asking
from .batches import fitting_batches, search_memory
from .contexts import check_contexts
from .keys import Site, read_down, read_keys, read_stream, with_added
from .questions import Places, Question, log_probs_without_subject, tokenize_facts
from .target import TargetConfig, Targets


@asking(grad=True)
def find_targets(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    config: TargetConfig,
    contexts: Sequence[str],
    *,
    site: Site = "ffn",
    memory: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Targets:
    """Search v_star for each fact by gradient descent on δ, what is added to one layer's output.

    The loss is that of ROME, equation 4, and MEMIT, equation 16:

        L(δ) = meanᵪ −log p(target | context + prompt) / |target|
             + kl_factor · KL(p_δ ‖ p₀ | "{} is a") + weight_decay · ‖δ‖ / ‖v₀‖²

    For a fact without a target the first term is KL(p without the subject ‖ p_δ), so that the
    subject makes no difference any more. The model is untouched.

    Args:
        lm: The model.
        facts: The facts.
        layer: The layer where δ is added.
        config: How the search runs.
        contexts: Templates with one `{}` for the prompt. The bare "{}", which gives v₀, is one.
        site: "ffn": δ is added to the output of the down-projection. "stream": to the layer's
            output, where the edits of this layer and of those below it arrive together.
        memory: Bytes that the activations of one batch may take. Facts that do not fit go into
            further batches. None: half of a GPU's free memory, or 1 GiB on a CPU.
        progress: Called with the number of facts done, after each batch.

    Raises:
        SubjectError: A prompt does not contain its subject exactly once.
        LayerError: The model does not have the layer.
        InputError: The bare "{}" is not among the contexts.
        UnsupportedModelError: The layer is a mixture of experts.
        NumericsError: The loss is not finite.
    """
    layer, contexts = check_dense_layer(layer, lm.ffn), check_contexts(contexts)
    questions = tokenize_facts(lm, facts, contexts)
    memory = search_memory(lm) if memory is None else memory
    rows: dict[int, tuple[Targets, int]] = {}
    for batch in fitting_batches([question.size for question in questions], lm, layer, memory):
        asked, bare = [questions[i] for i in batch], contexts.index("{}")
        targets = _Search(lm, asked, layer, config, site, bare).run()
        rows.update((i, (targets, row)) for row, i in enumerate(batch))
        if progress is not None:
            progress(len(rows))
    return Targets.gathered([rows[i] for i in range(len(facts))])


@asking()
def known_targets(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    v_star: Tensor,
    *,
    site: Site = "ffn",
) -> Targets:
    """Return what `find_targets` returns, for targets that are known already. Nothing is searched.

    The model may differ from the one that the targets were searched on. Keys and v_initial are read
    from the present model.

    Args:
        lm: The model.
        facts: The facts.
        layer: The layer of the targets.
        contexts: As for `find_targets`.
        v_star: (n, d_model) the targets.
        site: The place in the layer.

    Raises:
        InputError: v_star has another shape. Otherwise as `find_targets`.
    """
    check_dense_layer(layer, lm.ffn)
    if v_star.shape != (len(facts), lm.d_model):
        raise InputError(
            f"v_star has shape {tuple(v_star.shape)}; expected ({len(facts)}, {lm.d_model}), a "
            "target for each fact",
            argument="v_star",
        )
    keys = read_keys(lm, facts, layer, contexts)
    k_prompt = keys[:, list(contexts).index("{}")]
    weight, bias = lm.ffn[layer].weight(), lm.ffn[layer].bias
    ffn_initial = (k_prompt.to(weight) @ weight.T).float() + (0 if bias is None else bias.float())
    return Targets(
        v_star=v_star.to(ffn_initial),
        v_initial=read_stream(lm, facts, layer) if site == "stream" else ffn_initial,
        k_star=keys.mean(1),
        k_prompt=k_prompt,
        ffn_initial=ffn_initial,
        convergence=({},) * len(facts),
        facts=tuple(facts),
        layer=layer,
        site=site,
    )


class _Terms(NamedTuple):
    """Each question's loss and its terms, each (n,)."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    norm: Tensor


class _Search:
    """The search for one batch of questions.

    Attributes:
        questions: All questions of the batch.
        active: (n,) those of them that are still searched. What follows has a row for each of
            these.
        replay: The recorded pass.
        places: Where its answers are read.
        delta: (n, d_model) δ, float32 whatever the model computes in.
        guarded: (n, vocab) log-probabilities at the guards under δ = 0. None before the first step.
        v_star: The targets of all questions, v₀ until a question is done.
        convergence: How each question's search ended.
    """

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[Question],
        layer: int,
        config: TargetConfig,
        site: Site,
        bare: int,
    ) -> None:
        """Record the pass and read what the layer gives today; `bare` is the index of "{}"."""
        self.questions, self.layer, self.config, self.site = questions, layer, config, site
        sequences = [ids for question in questions for ids in question.sequences]
        pivots = [pivot for question in questions for pivot in question.pivots]
        batch = lm.align(sequences, pivots)
        self.replay = record(lm, batch, start=batch.pivot, until=layer + 1)
        self.without = [log_probs_without_subject(lm, question) for question in questions]
        self.places = Places.of(questions, self.without, batch.input_ids.device)
        keys, outputs = read_down(self.replay, layer)
        stream = self.replay.hidden[layer + 1][:, 0]
        contexts, prompts = self.places.contexts, self.places.contexts[:, bare]
        self.keys = keys[contexts.to(keys.device)]  # (n, n_contexts, d_ff)
        self.k_prompt = self.keys[:, bare]
        self.ffn_initial = outputs[prompts.to(outputs.device)]  # (n, d_model)
        stream = stream[prompts.to(stream.device)].float()  # (n, d_model)
        self.v_initial = stream if site == "stream" else self.ffn_initial
        rate, self.decay, self.limit = _scales(config, self.v_initial, stream)
        self.v_star = self.v_initial.clone()
        self.convergence: list[dict[str, Any]] = [{} for _ in questions]
        self.delta = torch.zeros_like(self.v_initial)
        self.adam = _Adam(rate, self.delta)
        self.active = torch.arange(len(questions), device=self.delta.device)
        self.guarded: Tensor | None = None

    def run(self) -> Targets:
        """Take steps until all questions are done."""
        for step in range(1, self.config.steps + 1):
            is_last = step == self.config.steps
            terms = self._evaluate(with_gradient=not is_last)
            self._check_finite(terms.loss, step)
            watched = terms.loss if self.config.scale == "paper" else terms.nll
            reached = watched < self.config.stop_loss
            done = reached | is_last
            if done.any():
                self._record(done, reached, terms, step)
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
        return self._targets()

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

    def _check_finite(self, loss: Tensor, step: int) -> None:
        finite = torch.isfinite(loss)
        if not finite.all():
            pairs = zip(self.active.tolist(), finite.tolist(), strict=True)
            subjects = [self.questions[i].fact.subject for i, good in pairs if not good]
            raise NumericsError(
                f"the loss of {subjects} is not finite at step {step}. Lower lr, or check the "
                "model's weights for NaN.",
                argument="lr",
            )

    def _record(self, done: Tensor, reached: Tensor, terms: _Terms, step: int) -> None:
        """Store v_star and the numbers of the questions that are done."""
        active = self.active[done]
        self.v_star[active] += self.delta[done].detach()
        columns = [*terms, self.limit[self.active]]
        rows = torch.stack(columns, dim=1)[done].tolist()
        names = (*_Terms._fields, "limit")
        for i, good, row in zip(active.tolist(), reached[done].tolist(), rows, strict=True):
            numbers = dict(zip(names, row, strict=True))
            stopped = "loss" if good else "steps"
            self.convergence[i] = {"steps": step, **numbers, "stopped": stopped}
            if left_out := self.questions[i].left_out:
                self.convergence[i]["contexts_left_out"] = left_out

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

    def _targets(self) -> Targets:
        return Targets(
            v_star=self.v_star,
            v_initial=self.v_initial,
            k_star=self.keys.mean(1),
            k_prompt=self.k_prompt,
            ffn_initial=self.ffn_initial,
            convergence=tuple(self.convergence),
            facts=tuple(question.fact for question in self.questions),
            layer=self.layer,
            site=self.site,
        )


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


def _scales(
    config: TargetConfig, v_initial: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each fact's learning rate, factor of ‖δ‖ in the loss, and largest ‖δ‖, each (n,).

    Args:
        config: The settings.
        v_initial: (n, d_model) v₀.
        stream: (n, d_model) the layer's output at the subject, which δ has to outweigh.
    """
    if config.scale == "paper":
        norm = v_initial.norm(dim=-1)
        return torch.full_like(norm, config.lr), config.weight_decay / norm**2, config.clamp * norm
    norm = stream.norm(dim=-1)
    limit = config.clamp * norm / 2
    return config.lr * norm / stream.shape[-1] ** 0.5, config.weight_decay / (10 * limit), limit
