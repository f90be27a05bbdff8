"""Attribution patching: estimate every indirect effect of one prompt from a few gradient passes.

    quick = attribution_trace(lm, "The Space Needle is in the city of", "Space Needle")
    quick.effects                      # (n_tokens, n_layers) estimated gain of p(answer)
    quick.rank_correlation             # Spearman's, against the exact effects of a few tokens

To restore a state is to move it from its corrupted to its clean value. To first order p(answer)
gains that difference times the gradient (Nanda 2023; Syed et al. 2023, arXiv 2310.10348). In the
corrupted run the answer is lost and its probability is flat, so the gradient of that run alone is a
poor guide. The gradient is averaged on the straight way from the corrupted to the clean embeddings
(Hanna et al. 2024, arXiv 2403.17806). `passes` backward passes give all positions and layers.

The estimate ranks states. For their effects take `causal_trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.checks import check_count
from ..core.multiply import quick_products
from ..model.language_model import LanguageModel
from ..model.trace import replacing
from ..model.turns import asking
from .corruption import Corruption
from .kinds import CorruptionKind, Part, Restoration, TraceKind
from .records import CausalTrace
from .runs import Runs, answer_probability, record_runs
from .sweep import restored_scores


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttributionTrace(CausalTrace):
    """A `CausalTrace` with estimated scores: corrupted + first-order effect.

    An estimated score may lie outside [0, 1].

    Attributes:
        passes: Number of gradients averaged.
        checked: Number of states whose exact effect was computed too.
        rank_correlation: Spearman's rank correlation of estimated and exact effects over these
            states. None: no state was checked.
    """

    passes: int
    checked: int
    rank_correlation: float | None

    @property
    def is_estimate(self) -> bool:
        """Whether the scores are estimated by gradients: always."""
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        """How well the estimate ranks the checked states, as a sentence."""
        if self.rank_correlation is None:
            return ()
        return (
            f"estimate: its ranks correlate {self.rank_correlation:z.2f} with the exact map's, "
            f"on {self.checked} states",
        )


@asking(grad=True)
def attribution_trace(  # house: the promised public signature; the settings go into a Corruption
    lm: LanguageModel,
    prompt: str,
    subject: str,
    *,
    target: str | None = None,
    occurrence: int | None = None,
    kind: TraceKind = "state",
    corruption: CorruptionKind = "noise",
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
    """Estimate the indirect effect of every (token, layer) by gradients.

    The effects of a window's layers are added up. The other arguments are those of `causal_trace`.

    Args:
        passes: Number of gradients to average. They are taken at the middles of as many equal
            steps from the corrupted to the clean embeddings.
        check: Number of tokens whose effects are computed exactly as well: the subject's last
            token, the prompt's last token, then others drawn by `seed`.
        progress: Called with (gradients done, gradients to do).

    Raises:
        InputError: when `passes` or `check` is not accepted; and what `causal_trace` raises.
    """
    restoration = Restoration(kind, window)
    passes = check_count(passes, "passes", "the number of gradients to average")
    check = check_count(check, "check", "the number of tokens to check", least=0)
    settings = Corruption(corruption, samples, noise, noise_tensor, replacements, seed)
    runs = record_runs(lm, prompt, subject, settings, target=target, occurrence=occurrence)
    effects = _estimated_effects(runs, restoration, passes, progress)
    columns = _checked_columns(runs, check)
    exact, correlation = effects[:0], None
    if columns:
        exact = restored_scores(runs, restoration, columns) - runs.p_corrupted
        estimated = effects[[column - runs.columns.start for column in columns]]
        correlation = rank_correlation(estimated.flatten(), exact.flatten())
    return AttributionTrace(
        **runs.trace_fields(restoration, runs.p_corrupted + effects),
        passes=passes,
        checked=exact.numel(),
        rank_correlation=correlation,
    )


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors, or 0 if one of them is constant.

    Equal entries share their mean rank.
    """
    ranks = [
        (x[:, None] > x).double().sum(1) + 0.5 * (x[:, None] == x).double().sum(1) for x in (a, b)
    ]
    first, second = (r - r.mean() for r in ranks)
    scale = float(first.norm() * second.norm())
    return float(first @ second) / scale if scale else 0.0


def restored_sites(runs: Runs, part: Part | None) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the modules that a trace restores, and how far restoring moves their outputs.

    Args:
        runs: The recorded runs.
        part: The part that is restored in each layer. None: the layer's output.

    Returns:
        One module for each layer, and its clean minus its corrupted output,
        (samples, S, d_model).
    """
    lm = runs.lm
    if part is None:
        pairs = zip(runs.clean.hidden[1:], runs.corrupted.hidden[1:], strict=True)
        return list(lm.layers), [clean - corrupted for clean, corrupted in pairs]
    outputs = runs.part_outputs(part)
    sites = (
        [ffn.module for ffn in lm.ffn]
        if part == "mlp"
        else [module for module in lm.attention if module is not None]
    )
    return sites, [output[:1] - output[1:] for output in outputs]


def _estimated_effects(
    runs: Runs,
    restoration: Restoration,
    passes: int,
    progress: Callable[[int, int], object] | None,
) -> Tensor:
    """The first-order effects from the subject's first token on: (S, n_layers)."""
    sites, moved = restored_sites(runs, restoration.part)
    mean = [torch.zeros_like(m) for m in moved]
    for step in range(passes):
        for total, gradient in zip(
            mean, _gradients(runs, sites, (step + 0.5) / passes), strict=True
        ):
            total += gradient / passes
        if progress is not None:
            progress(step + 1, passes)
    each = torch.stack(
        [(m * g).sum(-1).mean(0).float().cpu() for m, g in zip(moved, mean, strict=True)], dim=1
    )  # (S, n_layers)
    # The runs also hold the answer's tokens except the last. They are no part of the prompt.
    each = each[: len(runs.columns)]
    spans = restoration.spans(runs.lm.n_layers)
    return torch.stack([each[:, span.start : span.stop].sum(1) for span in spans], dim=1)


def _checked_columns(runs: Runs, count: int) -> list[int]:
    """The tokens to check: the subject's last, the prompt's last, then others in random order."""
    first = [runs.prompt.span[1] - 1, runs.columns[-1]]
    others = [column for column in runs.columns if column not in first]
    np.random.RandomState(runs.corruption.seed).shuffle(others)
    return list(dict.fromkeys([*first, *others]))[:count]


@quick_products()
def _gradients(runs: Runs, sites: Sequence[nn.Module], share: float) -> list[Tensor]:
    """The gradient of p(answer) at each site's output: (samples, S, d_model).

    share: how far the embeddings are on the way from the corrupted to the clean ones.
    """
    live = runs.corrupted
    probes: list[Tensor] = []

    def probed(output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output).requires_grad_())
        return output + probes[-1]

    with torch.enable_grad(), replacing(dict.fromkeys(sites, probed)):
        hidden = live.resume(0, live.hidden[0] + share * (runs.clean.hidden[0] - live.hidden[0]))
        p = answer_probability(runs.lm, hidden, runs.answer_ids)
        gradients = torch.autograd.grad(p.sum(), probes)
    width = runs.lm.d_model
    return [g.reshape(live.batch.size, -1, width)[:, -live.n_live :] for g in gradients]
