"""edit.search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import InputError, NumericsError
from ..core.fact import Fact
from ..model.address import check_dense_layer
from ..model.language_model import LanguageModel
from ..model.replay import Replay, record
from .keys import Site, above, check_contexts, down, read_keys, read_stream
from .questions import (
    Asked,
    Question,
    question_batches,
    said_without,
    search_memory,
    tokenize_facts,
)
from .target import TENSORS, TargetConfig, Targets


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
    """Search v_star for every fact by gradient descent on what one layer puts out. ROME, equation 4; MEMIT, equation 16.

        L(δ) = meanᵪ −log p(target | context + prompt) / |target| + kl_factor · KL(p_δ ‖ p₀ | "{} is a") + weight_decay · ‖δ‖ / ‖v₀‖²

    contexts  templates with one `{}` for the prompt; "{}" itself must be among them (it gives v₀)
    site      "ffn": δ is added to the down-projection's output (ROME). "stream": to the layer's output, where the edits of this layer and
              those below it arrive together (MEMIT)
    memory    bytes that the activations of one batch may take; more facts than fit are done one batch after another. None: half of what is
              free on a GPU, else 1 GiB
    progress  called with the number of facts done, after every batch

    The model is untouched. Raises SubjectError when a prompt names its subject twice, LayerError, InputError for contexts without "{}",
    UnsupportedModelError for a mixture-of-experts layer, NumericsError when the loss is not finite.
    """
    layer, contexts = check_dense_layer(layer, lm.ffn), check_contexts(contexts)
    questions = [tokenize_facts(lm, fact, contexts) for fact in facts]
    found: dict[int, tuple[Targets, int]] = {}
    for group in question_batches(
        [question.size for question in questions],
        lm,
        layer,
        search_memory(lm) if memory is None else memory,
    ):
        part = run_search(
            [questions[i] for i in group], lm, layer, config, contexts.index("{}"), site
        )
        found.update((i, (part, row)) for row, i in enumerate(group))
        if progress is not None:
            progress(len(found))
    each = [found[i] for i in range(len(facts))]
    return Targets(
        **{name: torch.stack([getattr(part, name)[row] for part, row in each]) for name in TENSORS},
        convergence=tuple(part.convergence[row] for part, row in each),
        facts=tuple(facts),
        layer=layer,
        site=site,
    )


@torch.no_grad()
def known_targets(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    v_star: Tensor,
    *,
    site: Site = "ffn",
) -> Targets:
    """What `find_targets` gives for targets v_star (n, d_model) that were found before: keys and outputs are read, nothing is searched.

    The model need not be the one that they were found on: keys and v_initial are those of the model as it is. Errors as `find_targets`,
    InputError too for another shape.
    """
    check_dense_layer(layer, lm.ffn)
    if v_star.shape != (len(facts), lm.d_model):
        raise InputError(
            f"v_star has shape {tuple(v_star.shape)}; expected ({len(facts)}, {lm.d_model}): a target for each fact"
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


class _Adam:
    """Adam with a row for each fact: its own learning rate, and it may leave. Kingma and Ba, algorithm 1, with torch's defaults."""

    def __init__(self, rate: Tensor, like: Tensor) -> None:
        self.rate, self.mean, self.square, self.steps = (
            rate,
            torch.zeros_like(like),
            torch.zeros_like(like),
            0,
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.rate, self.mean, self.square = self.rate[rows], self.mean[rows], self.square[rows]

    def update(self, gradient: Tensor) -> Tensor:
        """What to add to the parameters (n, d)."""
        self.steps += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        spread = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        return self.mean / spread * (-self.rate / (1 - 0.9**self.steps))[:, None]


def run_search(
    questions: Sequence[Question],
    lm: LanguageModel,
    layer: int,
    config: TargetConfig,
    bare: int,
    site: Site,
) -> Targets:
    """`find_targets` for one batch; `bare` is the index of the context "{}"."""
    batch = lm.align(
        [s for q in questions for s in q.sequences], [p for q in questions for p in q.pivots]
    )
    replay = record(lm, batch, start=batch.pivot, until=layer + 1)
    without = [said_without(lm, question) for question in questions]
    asked = Asked.of(questions, without, batch.input_ids.device)
    keys, outputs = down(replay, layer)
    keys, ffn_initial = (
        keys[asked.contexts.to(keys.device)],
        outputs[asked.contexts[:, bare].to(outputs.device)],
    )
    stream = replay.hidden[layer + 1][:, 0]
    stream = stream[asked.contexts[:, bare].to(stream.device)].float()  # (n, d_model)
    v_initial = stream if site == "stream" else ffn_initial
    lr, decay, limit = _scales(config, v_initial, stream)
    v_star = v_initial.clone()
    convergence: list[dict[str, Any]] = [{} for _ in questions]

    delta = torch.zeros_like(v_initial)  # float32, whatever the model computes in
    adam = _Adam(lr, delta)
    active = torch.arange(len(questions), device=delta.device)
    guarded: Tensor | None = None  # (n, vocab) log-probabilities under δ = 0
    for step in range(1, config.steps + 1):
        delta.requires_grad_()
        with torch.set_grad_enabled(step < config.steps):  # nothing follows the last evaluation
            terms, log_p = _loss(replay, layer, delta, site, asked, guarded, config, decay[active])
        loss, nll, kl, norm = terms
        if guarded is None:
            guarded = log_p.detach().clone()
        del log_p  # it holds on to the logits of the whole batch
        if not torch.isfinite(loss).all():
            names = [
                questions[i].fact.subject
                for i, x in zip(active.tolist(), loss, strict=True)
                if not torch.isfinite(x)
            ]
            raise NumericsError(
                f"the loss of {names} is not finite at step {step}; lower lr, or check the model's weights for NaN"
            )
        watched = loss if config.scale == "paper" else nll
        reached = watched < config.stop_loss
        done = reached | (step == config.steps)
        if done.any():
            v_star[active[done]] += delta[done].detach()
            rows = torch.stack([loss, nll, kl, norm, limit[active]], dim=1)[done].tolist()
            for i, good, row in zip(
                active[done].tolist(), reached[done].tolist(), rows, strict=True
            ):
                numbers = dict(zip(("loss", "nll", "kl", "norm", "limit"), row, strict=True))
                convergence[i] = {"steps": step, **numbers, "stopped": "loss" if good else "steps"}
        if done.all():
            break
        (gradient,) = torch.autograd.grad(loss[~done].sum(), delta)
        del terms, loss, nll, kl, norm, watched
        delta = delta.detach()
        if done.any():
            stay = (~done).nonzero()[:, 0]
            replay = replay.keep(
                torch.isin(asked.owners, stay.to(asked.owners.device)).nonzero()[:, 0]
            )
            adam.keep(stay)
            active, delta, gradient, guarded = (
                active[stay],
                delta[stay],
                gradient[stay],
                guarded[stay.to(guarded.device)],
            )
            asked = Asked.of(
                [questions[i] for i in active.tolist()],
                [without[i] for i in active.tolist()],
                batch.input_ids.device,
            )
        delta = delta + adam.update(gradient)
        delta = delta * (limit[active] / delta.norm(dim=-1)).clamp(max=1)[:, None]
    return Targets(
        v_star=v_star,
        v_initial=v_initial,
        k_star=keys.mean(1),
        k_prompt=keys[:, bare],
        ffn_initial=ffn_initial,
        convergence=tuple(convergence),
        facts=tuple(question.fact for question in questions),
        layer=layer,
        site=site,
    )


def _loss(
    replay: Replay,
    layer: int,
    delta: Tensor,
    site: Site,
    asked: Asked,
    guarded: Tensor | None,
    config: TargetConfig,
    decay: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Each fact's loss and its terms, NLL, KL and ‖δ‖, each (n,), and the guards' log-probabilities (n, vocab).

    guarded: those under δ = 0; None when δ is.
    """
    hidden = above(replay, layer, delta[asked.owners.to(delta.device)], site)  # (R, S, d_model)
    nll, log_p = _read(replay, hidden, asked)
    kl = F.kl_div(
        log_p.detach() if guarded is None else guarded, log_p, log_target=True, reduction="none"
    ).sum(-1)  # KL(p_δ ‖ p₀)
    nll, kl, norm = nll.to(delta.device), kl.to(delta.device), delta.norm(dim=-1)
    return (nll + config.kl_factor * kl + decay * norm, nll, kl, norm), log_p


def _read(replay: Replay, hidden: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Mean NLL of the target tokens (n,) (KL, of a fact to be forgotten) and log-probabilities at the guard (n, vocab).

    hidden: last-layer states (R, S, d_model).
    """
    rows, columns, guards = (x.to(hidden.device) for x in (asked.rows, asked.columns, asked.guards))
    states = torch.cat(
        [hidden[rows, columns], hidden[guards, 0]]
    )  # the head runs on these and nothing else
    log_p = replay.logits(states).float().log_softmax(-1)
    tokens = len(rows)
    targets, blank, shares = (
        x.to(log_p.device) for x in (asked.targets, asked.blank, asked.shares)
    )
    nll = -log_p[:tokens].gather(1, targets[:, None])[:, 0]
    if len(
        blank
    ):  # KL(without the subject ‖ now): zero when the subject makes no difference any more
        kl = F.kl_div(log_p[blank], asked.without.to(log_p), log_target=True, reduction="none").sum(
            -1
        )
        nll = nll.index_copy(0, blank, kl)
    nll = nll * shares
    facts = asked.owners[asked.rows].to(nll.device)
    return torch.zeros(len(asked.guards), device=nll.device).index_add(0, facts, nll), log_p[
        tokens:
    ]


def _scales(
    config: TargetConfig, v_initial: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Learning rate, factor of ‖δ‖ in the loss, and largest ‖δ‖, each (n,), from v₀ and the layer's output (n, d_model)."""
    if config.scale == "paper":
        norm = v_initial.norm(dim=-1)
        return torch.full_like(norm, config.lr), config.weight_decay / norm**2, config.clamp * norm
    norm = stream.norm(dim=-1)  # of the layer's output at the subject: what δ has to turn round
    limit = config.clamp * norm / 2
    return config.lr * norm / stream.shape[-1] ** 0.5, config.weight_decay / (10 * limit), limit
