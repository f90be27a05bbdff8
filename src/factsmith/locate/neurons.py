"""Knowledge neurons: the few FFN neurons whose coefficients carry a fact's probability.

    found = knowledge_neurons(lm, ["The capital of France is", "France, whose capital is"], "Paris")
    found.refined                      # ((9, 417), ...): strong in most phrasings
    found.scores                       # (n_prompts, n_layers, n_neurons) integrated gradients
    found.baseline                     # the same refinement of the bare activations, to compare with

The score is equation 4-5 of Dai et al. 2022 (arXiv 2104.08696): integrated gradients of p(target) with respect to a neuron's
coefficient, all neurons of its layer scaled together, at the position that predicts. A layer writes the sum of its coefficients times
its values (plus a bias), so scaling the coefficients by alpha moves what it writes along one line, and the gradient for neuron i is its
value times the gradient g for what is written there:

    attribution_i = c_i * v_i . mean over alpha of g(alpha)

Only g is differentiated for, d_model numbers a layer and alpha, and only layers above the scaled one take part. All layers' variants
climb the model in one batch, and the vocabulary is read only where the target is predicted. Where the gradient is smooth in alpha, which is
checked, the sum over twenty points is taken from eight.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_items, check_number, check_text
from ..core.errors import InputError, NumericsError
from ..core.tables import Shown, Table, counted
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from .gradients import LEAST, ask, groups, mean_gradients

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class KnowledgeNeurons(Shown):
    """Which neurons carry one fact, asked for in one or more phrasings.

    A neuron is (layer, i), or (layer, expert, i) in a layer with experts (expert == n_experts: the shared bank). In the last dimension of
    `scores` the neuron (layer, expert, i) has index expert * d_ff + i; layers with fewer neurons than the widest end in zeros.

    prompts, target     what was asked, and the text whose probability was attributed
    target_ids          its tokens in each prompt
    predicted           in each prompt the likeliest token where each token of the target is predicted, as text
    probability         (n_prompts,) float32: p(target), joint over its tokens
    silent              (n_prompts, n_layers) float32: p(target) with all neurons of that layer silent where the target is predicted
    scores              (n_prompts, n_layers, n_neurons) float32 on the CPU: integrated gradients, `steps` points of a left Riemann sum
    activations         the same shape: the coefficients (an expert's weighed by its routing), averaged over the target's positions
    coarse              per prompt, the neurons with at least `threshold` times the prompt's largest score, strongest first
    refined             the neurons in the coarse sets of at least `share` of the prompts (and of 3, where there are 3), most shared first
    baseline_coarse     the same sets by activation, from `baseline_threshold`
    baseline            refined from these by `baseline_share`
    n_experts, d_ff     (n_layers,) routed experts a layer (0: none), and neurons a bank
    """

    prompts: tuple[str, ...]
    target: str
    target_ids: tuple[tuple[int, ...], ...]
    predicted: tuple[str, ...]
    is_correct: tuple[bool, ...]
    probability: Tensor
    silent: Tensor
    scores: Tensor
    activations: Tensor
    coarse: tuple[tuple[Neuron, ...], ...]
    refined: tuple[Neuron, ...]
    baseline_coarse: tuple[tuple[Neuron, ...], ...]
    baseline: tuple[Neuron, ...]
    steps: int
    threshold: float
    share: float
    baseline_threshold: float
    baseline_share: float
    n_experts: tuple[int, ...]
    d_ff: tuple[int, ...]

    @property
    def gaps(self) -> Tensor:
        """(n_prompts, n_layers) what the sum leaves of completeness: a layer's scores, summed, less p(target) - silent.

        Zero for an exact integral; a left Riemann sum of 20 points leaves some. It leaves much where p jumps along the way: in models with
        experts, when a layer above chooses others; with a norm behind the memory (as in Gemma 2), close to alpha = 0.
        """
        return self.scores.sum(-1) - (self.probability[:, None] - self.silent)

    def tables(self) -> list[Table]:
        """The strongest neurons, and in how many of the prompts each is strong."""
        p, refined = float(self.probability.mean()), set(self.refined)
        title = f"{counted(len(refined), 'neuron')} for {self.target.strip()!r} (p {p:.3f} over {counted(len(self.prompts), 'prompt')})"
        rows = []
        for neuron, score in self.top(len(refined) + 10):
            strong = sum(neuron in coarse for coarse in self.coarse)
            rows.append(
                (
                    " ".join(map(str, neuron)),
                    f"{score:.4f}",
                    str(strong),
                    "refined" if neuron in refined else "",
                )
            )
        return [
            Table(
                title,
                {
                    "neuron": "<",
                    "attribution": ">",
                    f"strong in, of {len(self.prompts)}": ">",
                    "": "<",
                },
                rows,
            )
        ]

    def top(self, n: int = 20) -> list[tuple[Neuron, float]]:
        """The n neurons with the largest score averaged over the prompts, with that average."""
        mean = self.scores.mean(0)
        strongest = mean.flatten().topk(min(n, mean.numel())).indices.tolist()
        places = [divmod(index, mean.shape[1]) for index in strongest]
        return [
            (_name(layer, flat, self.n_experts, self.d_ff), float(mean[layer, flat]))
            for layer, flat in places
        ]

    def of(self, neuron: Neuron) -> Tensor:
        """(n_prompts,) the scores of one neuron."""
        layer, *expert, i = neuron
        return self.scores[:, layer, (expert[0] if expert else 0) * self.d_ff[layer] + i]

    def with_share(self, share: float, baseline_share: float | None = None) -> KnowledgeNeurons:
        """The same record, refined by another share of the prompts."""
        baseline_share = share if baseline_share is None else baseline_share
        return dataclasses.replace(
            self,
            share=share,
            refined=refine(self.coarse, share),
            baseline_share=baseline_share,
            baseline=refine(self.baseline_coarse, baseline_share),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON-able values: sets and the strongest neurons, not the score of every neuron."""
        whole = {"scores", "activations"}
        plain = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name not in whole
        }
        return {**plain, "gaps": self.gaps.tolist(), "top": self.top()}

    def rows(self, n: int = 100) -> list[dict[str, Any]]:
        """The n strongest neurons as a table: their mean score, and in how many prompts they are strong."""
        refined, baseline = set(self.refined), set(self.baseline)
        return [
            {
                "layer": neuron[0],
                "expert": neuron[1] if len(neuron) == 3 else None,
                "neuron": neuron[-1],
                "attribution": score,
                "prompts": sum(neuron in coarse for coarse in self.coarse),
                "refined": neuron in refined,
                "baseline": neuron in baseline,
            }
            for neuron, score in self.top(n)
        ]


def knowledge_neurons(
    lm: LanguageModel,
    prompts: str | Sequence[str],
    target: str,
    *,
    steps: int = 20,
    threshold: float = 0.2,
    share: float = 0.7,
    baseline_threshold: float = 0.5,
    every_point: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> KnowledgeNeurons:
    """Attribute p(target) to the FFN neurons of every layer: Dai et al. 2022, section 3 (arXiv 2104.08696).

    prompts             one prompt, or several phrasings of one fact, the subject filled in; each ends where the target begins. For a masked
                        language model each has [MASK] in the target's place, once for each of its tokens
    target              of one or more tokens: their joint probability is attributed, all positions that predict them scaled together
    steps               points of the left Riemann sum: alpha = 0, 1/steps, ... (steps - 1)/steps
    threshold           part of a prompt's largest score, over all layers, from which a neuron is in its coarse set
    share               part of the prompts whose coarse sets a refined neuron is in; with three prompts or more, of three at least
    baseline_threshold  the threshold for the activation baseline (the authors' 0.5)
    every_point         take all `steps` points in every layer. Else layers along whose way the gradient is smooth take 8 points that give
                        the same sum: measured, to 1e-5 of the layer's scores
    progress            called with (prompts done, prompts to do)

    Scores and gradients are computed in the model's dtype. Raises InputError (arguments, prompts too long), UnsupportedModelError,
    and NumericsError when p(target) is zero or not finite. The model is not changed.
    """
    check_model(lm)
    expected = "one prompt, or a list of at least one"
    prompts = [
        check_text(p, "a prompt")
        for p in (
            [prompts]
            if isinstance(prompts, str)
            else check_items(prompts, "prompts", "texts", also="one text")
        )
    ]
    if not prompts:
        raise InputError(f"no prompt was given; expected {expected}")
    target = check_text(target, "the target")
    steps = check_count(steps, "steps", "the number of points of the integral")
    for name, value in (
        ("threshold", threshold),
        ("share", share),
        ("baseline_threshold", baseline_threshold),
    ):
        check_number(value, name, above=0, most=1)
    if left := [p for p in prompts if "{}" in p]:
        raise InputError(f"prompt {left[0]!r} has a place left open; fill the subject in first")

    questions = [lm.question(p, target) for p in prompts]
    widest = max(sum(bank.d_ff for bank in ffn.banks) for ffn in lm.ffn)
    scores = torch.zeros(len(prompts), lm.n_layers, widest)
    activations = torch.zeros_like(scores)
    probability, silent = torch.zeros(len(prompts)), torch.zeros(len(prompts), lm.n_layers)
    predicted = [""] * len(prompts)
    is_correct = [False] * len(prompts)
    done = 0
    for group in groups(lm, questions):
        asked = ask(lm, [questions[i] for i in group])
        for row, i in enumerate(group):
            if not (
                math.isfinite(p := float(asked.probability[row]))
                and p > torch.finfo(torch.float32).tiny
            ):
                raise NumericsError(
                    f"p({target!r}) after {prompts[i]!r} is {p}; expected a positive number to attribute. "
                    "Choose a target the model gives some probability, or load the model in float32"
                )
            predicted[i] = lm.tokenizer.decode(asked.likeliest[row].tolist())
            is_correct[i] = asked.likeliest[row].tolist() == questions[i][2]
        gradients, low = mean_gradients(asked, steps, every_point)
        probability[group], silent[group] = asked.probability.float().cpu(), low.float().cpu()
        for layer, banks in enumerate(asked.banks):
            for bank in banks:
                rows = torch.tensor(group)[bank.rows.cpu() // asked.n_targets]
                here = slice(bank.first, bank.first + bank.coefficients.shape[1])
                g = gradients[layer].flatten(0, 1)[
                    bank.rows.to(gradients[layer].device)
                ]  # (n, d_model)
                attributed = bank.coefficients * (g.to(bank.coefficients) @ bank.neurons.weight())
                scores[:, layer, here].index_add_(0, rows, attributed.float().cpu())
                activations[:, layer, here].index_add_(
                    0, rows, bank.coefficients.float().cpu() / asked.n_targets
                )
        done += len(group)
        if progress is not None:
            progress(done, len(prompts))

    n_experts, d_ff = tuple(f.n_experts for f in lm.ffn), tuple(f.banks[0].d_ff for f in lm.ffn)
    coarse = _coarse(scores, threshold, n_experts, d_ff)
    baseline_coarse = _coarse(activations, baseline_threshold, n_experts, d_ff)
    return KnowledgeNeurons(
        prompts=tuple(prompts),
        target=target,
        target_ids=tuple(tuple(wanted) for _, _, wanted in questions),
        predicted=tuple(predicted),
        is_correct=tuple(is_correct),
        probability=probability,
        silent=silent,
        scores=scores,
        activations=activations,
        coarse=coarse,
        refined=refine(coarse, share),
        baseline_coarse=baseline_coarse,
        baseline=refine(baseline_coarse, share),
        steps=steps,
        threshold=threshold,
        share=share,
        baseline_threshold=baseline_threshold,
        baseline_share=share,
        n_experts=n_experts,
        d_ff=d_ff,
    )


def refine(coarse: Sequence[Sequence[Neuron]], share: float) -> tuple[Neuron, ...]:
    """The neurons in at least `share` of the coarse sets, and in 3 of them where there are 3; most shared first, then by place."""
    counts = Counter(neuron for neurons in coarse for neuron in neurons)
    # Rounded first: 0.7 * 10 is a little more than 7 in binary.
    needed = max(math.ceil(round(share * len(coarse), 9)), min(LEAST, len(coarse)))
    kept = [(-count, neuron) for neuron, count in counts.items() if count >= needed]
    return tuple(neuron for _, neuron in sorted(kept))


def refine_relation(
    records: Sequence[KnowledgeNeurons],
    *,
    share: float = 0.7,
    low: float = 2,
    high: float = 5,
    step: float = 0.05,
    rounds: int = 6,
) -> tuple[KnowledgeNeurons, ...]:
    """Refine the facts of one relation by one common share, so that they have `low` to `high` neurons each on average.

    As in the authors' code: from `share` on, `step` less while the facts have too few neurons, `step` more while too many, at most `rounds`
    times. The activation baseline gets a share of its own in the same way. Raises InputError for an empty list.
    """
    if not records:
        raise InputError(
            "no records were given; expected the knowledge neurons of at least one fact of the relation"
        )

    def settled(sets: Callable[[KnowledgeNeurons], Sequence[Sequence[Neuron]]]) -> float:
        now = share
        for _ in range(rounds):
            mean = sum(len(refine(sets(r), now)) for r in records) / len(records)
            if low <= mean <= high:
                break
            now = round(now + (step if mean > high else -step), 9)
        return now

    shares = settled(lambda r: r.coarse), settled(lambda r: r.baseline_coarse)
    return tuple(r.with_share(*shares) for r in records)


def _coarse(
    scores: Tensor, threshold: float, n_experts: Sequence[int], d_ff: Sequence[int]
) -> tuple[tuple[Neuron, ...], ...]:
    """Per prompt the neurons with at least `threshold` times its largest score, strongest first; none when no score is positive."""
    found = []
    for own in scores:
        strong = ((own >= threshold * own.max()) & (own > 0)).nonzero()
        order = own[strong[:, 0], strong[:, 1]].argsort(descending=True, stable=True)
        found.append(
            tuple(_name(layer, flat, n_experts, d_ff) for layer, flat in strong[order].tolist())
        )
    return tuple(found)


def _name(layer: int, flat: int, n_experts: Sequence[int], d_ff: Sequence[int]) -> Neuron:
    """The neuron at an index of the last dimension of the scores; a shared bank may be wider than the experts before it."""
    if not n_experts[layer]:
        return layer, flat
    expert = min(flat // d_ff[layer], n_experts[layer])
    return layer, expert, flat - expert * d_ff[layer]
