"""Attribution patching: a first estimate of every indirect effect of one prompt from a few gradient passes.

    quick = attribution_trace(lm, "The Space Needle is in the city of", "Space Needle")
    quick.effects                      # (n_tokens, n_layers) estimated gain of p(answer)
    quick.rank_correlation             # Spearman's, against the exact effects of the states of a few tokens

Restoring a state moves it from its corrupted to its clean value; to first order p(answer) gains that difference times the gradient (Nanda
2023; Syed et al. 2023, arXiv 2310.10348). One gradient at the corrupted run is a poor guide, since there the answer is lost and its
probability flat. So the gradient is averaged along the straight way from the corrupted to the clean embeddings (Hanna et al. 2024,
arXiv 2403.17806): `passes` backward passes give all positions and layers. The estimate ranks; for numbers take `causal_trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.checks import check_count
from ..model.language_model import LanguageModel
from ..model.trace import replacing
from .kinds import CausalTrace, Corruption, Kind, check_map, window_spans
from .runs import Runs, answer_probability, record_runs


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttributionTrace(CausalTrace):
    """A `CausalTrace` whose scores are estimates: corrupted + first-order effect, which may leave [0, 1].

    passes            gradients averaged
    checked           states whose exact effect was computed too
    rank_correlation  Spearman's rank correlation of estimated and exact effects over these; None when nothing was checked
    """

    passes: int
    checked: int
    rank_correlation: float | None


def attribution_trace(
    lm: LanguageModel,
    prompt: str,
    subject: str,
    *,
    target: str | None = None,
    kind: Kind = "state",
    corruption: Corruption = "noise",
    replacements: Sequence[str] | None = None,
    window: int = 10,
    samples: int = 10,
    noise: float | None = None,
    noise_tensor: Tensor | np.ndarray[Any, Any] | None = None,
    seed: int = 1,
    passes: int = 5,
    check: int = 3,
    progress: Callable[[int, int], object] | None = None,
) -> AttributionTrace:
    """Estimate the indirect effect of every (token, layer) by gradients; the arguments are those of `causal_trace`, and

    passes    gradients to average, at the middles of as many equal steps from the corrupted to the clean embeddings
    check     tokens whose effects are computed exactly as well: the subject's last, the prompt's last, then others drawn by `seed`

    The effects of a window's layers are added up. Raises what `causal_trace` raises, and InputError for `passes` or `check`.
    """
    window = check_map(kind, window, None)
    passes = check_count(passes, "passes", "the number of gradients to average")
    check = check_count(check, "check", "the number of tokens to check", least=0)
    runs = record_runs(
        lm,
        prompt,
        subject,
        target=target,
        corruption=corruption,
        replacements=replacements,
        samples=samples,
        noise=noise,
        noise_tensor=noise_tensor,
        seed=seed,
    )
    sites, moved = _sites(runs, kind)
    gradient = [torch.zeros_like(m) for m in moved]
    for step in range(passes):
        for total, own in zip(
            gradient, _gradients(runs, sites, (step + 0.5) / passes), strict=True
        ):
            total += own / passes
        if progress is not None:
            progress(step + 1, passes)
    each = torch.stack(
        [(m * g).sum(-1).mean(0).float().cpu() for m, g in zip(moved, gradient, strict=True)], dim=1
    )  # (S, n_layers)
    spans = window_spans(lm.n_layers, window if kind != "state" else 1)
    start, stop = runs.subject_span
    # The runs also hold the answer's tokens but the last, which are no part of the prompt.
    each = each[: len(runs.tokens) - start]
    effects = torch.stack([each[:, span.start : span.stop].sum(1) for span in spans], dim=1)

    others = [
        t for t in range(start, len(runs.tokens)) if t not in (stop - 1, len(runs.tokens) - 1)
    ]
    np.random.RandomState(seed).shuffle(others)
    columns = list(dict.fromkeys([stop - 1, len(runs.tokens) - 1, *others]))[:check]
    exact = runs.scores(kind, columns, window=window) - runs.p_corrupted if columns else effects[:0]
    estimated = effects[[t - start for t in columns]]
    return AttributionTrace(
        **runs.described(kind, runs.p_corrupted + effects, window=window),
        passes=passes,
        checked=exact.numel(),
        rank_correlation=rank_correlation(estimated.flatten(), exact.flatten())
        if columns
        else None,
    )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties at their mean rank; 0 when one of them is constant."""
    ranks = [
        (x[:, None] > x).double().sum(1) + 0.5 * (x[:, None] == x).double().sum(1) for x in (a, b)
    ]
    first, second = (r - r.mean() for r in ranks)
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale else 0.0


def _sites(runs: Runs, kind: Kind) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules restored, one a layer, and how far restoring moves each one's output: (samples, S, d_model)."""
    lm = runs.lm
    if kind == "state":
        pairs = zip(runs.clean.hidden[1:], runs.corrupted.hidden[1:], strict=True)
        return list(lm.layers), [clean - corrupted for clean, corrupted in pairs]
    runs.check_part(kind)
    sites = (
        [ffn.module for ffn in lm.ffn]
        if kind == "mlp"
        else [part for part in lm.attention if part is not None]
    )
    return sites, [out[:1] - out[1:] for out in runs.outputs[kind]]


def _gradients(runs: Runs, sites: Sequence[nn.Module], share: float) -> list[Tensor]:
    """The gradient of p(answer) at each site's output, (samples, S, d_model), with the embeddings `share` of the way to the clean ones."""
    live = runs.corrupted
    probes: list[Tensor] = []

    def probed(output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output).requires_grad_())
        return output + probes[-1]

    with torch.enable_grad(), replacing(dict.fromkeys(sites, probed)):
        hidden = live.resume(0, live.hidden[0] + share * (runs.clean.hidden[0] - live.hidden[0]))
        found = torch.autograd.grad(
            answer_probability(runs.lm, hidden, runs.answer_ids).sum(), probes
        )
    return [g.reshape(live.batch.size, -1, runs.lm.d_model)[:, -live.n_live :] for g in found]
