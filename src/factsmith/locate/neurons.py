"""Knowledge neurons: the few FFN neurons whose coefficients carry a fact's probability.

    neurons = knowledge_neurons(lm, ["The capital of France is", "The French capital is"], "Paris")
    neurons.refined                    # ((9, 417), ...): strong in most phrasings
    neurons.scores                     # (n_prompts, n_layers, n_neurons) integrated gradients
    neurons.baseline                   # the same refinement of the activations, for comparison

The score is equation 4-5 of Dai et al. 2022 (arXiv 2104.08696): integrated gradients of p(target)
with respect to a neuron's coefficient, at the position that predicts. All neurons of a layer are
scaled together. A layer writes the sum of its coefficients times its values (plus a bias). So
scaling the coefficients by alpha moves what it writes along one line, and the gradient for neuron i
is its value times the gradient g for what is written:

    attribution_i = c_i * v_i . mean over alpha of g(alpha)

So only g is computed by backward passes: d_model numbers for each layer and alpha. Only the layers
above the scaled one take part. The variants of all layers climb the model in one batch, and only
the positions that predict the target are unembedded. Where the gradient is smooth in alpha, which
is checked, eight points replace the sum over twenty.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_items, check_number, check_text
from ..core.errors import InputError, NumericsError
from ..core.slots import literal
from ..core.tables import Shown, Table, counted
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from ..model.subject import count_prompt_slots
from ..model.turns import asking
from .gradients import Question, RecordedPrompts, mean_gradients, record_prompts, shared_batches

LEAST_PROMPTS = 3
"""A refined neuron is strong in at least so many prompts, as in the authors' code."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class KnowledgeNeurons(Shown):
    """The neurons that carry one fact, located with one phrasing of it or several.

    A neuron is (layer, i), or (layer, expert, i) in a layer with experts; expert == n_experts is
    the shared bank. In the last dimension of `scores` the neuron (layer, expert, i) has the index
    expert * d_ff + i. Layers with fewer neurons than the widest end in zeros.

    Attributes:
        prompts: The phrasings, each a text that ends where the target begins.
        target: The text whose probability was attributed.
        target_ids: Its tokens in each prompt.
        predicted: For each prompt, the likeliest token at each of the target's places, as text.
        is_correct: For each prompt, whether these are the target's tokens.
        probability: (n_prompts,) float32 p(target), joint over its tokens.
        silent: (n_prompts, n_layers) float32 p(target) with all neurons of that layer silent where
            the target is predicted.
        scores: (n_prompts, n_layers, n_neurons) float32 on the CPU: integrated gradients, by
            `steps` points of a left Riemann sum.
        activations: The same shape: the coefficients, averaged over the target's positions. An
            expert's coefficient is multiplied by its routing weight.
        coarse: For each prompt, the neurons with at least `threshold` times the prompt's largest
            score, strongest first.
        refined: The neurons in the coarse sets of at least `share` of the prompts (and of three,
            if there are three), most shared first.
        baseline_coarse: The same sets by activation, with `baseline_threshold`.
        baseline: The neurons refined from these by `baseline_share`.
        steps: Points of the Riemann sum.
        threshold: See `coarse`.
        share: See `refined`.
        baseline_threshold: See `baseline_coarse`.
        baseline_share: See `baseline`.
        n_experts: (n_layers,) number of routed experts; 0 for none.
        d_ff: (n_layers,) number of neurons of a bank.
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
        """(n_prompts, n_layers) the error of the sum: a layer's scores - (p(target) - silent).

        It is zero for an exact integral, and small for a left Riemann sum of 20 points. It is
        large where p jumps on the way: in a model with experts, if a layer above chooses others;
        with a norm after the memory (as in Gemma 2), close to alpha = 0.
        """
        return self.scores.sum(-1) - (self.probability[:, None] - self.silent)

    def tables(self, n: int | None = None) -> list[Table]:
        """Return the strongest neurons, and in how many prompts each is strong.

        Args:
            n: Number of neurons. None: ten more than the refined set has.
        """
        refined, n_prompts = set(self.refined), len(self.prompts)
        rows = [
            (
                str(neuron[0]),
                ":".join(map(str, neuron[1:])),
                _in_digits(score),
                str(self.count_strong(neuron)),
                "refined" if neuron in refined else "",
            )
            for neuron, score in self.top(len(refined) + 10 if n is None else n)
        ]
        columns = ("layer", "neuron", "attribution", f"strong in, of {n_prompts}")
        return [
            Table(
                f"p({self.target.strip()}) after {self.prompts[0]!r}: "
                f"{float(self.probability[0]):z.3f}; "
                f"{counted(len(refined), 'refined neuron')} from {counted(n_prompts, 'prompt')}",
                {**dict.fromkeys(columns, ">"), "": "<"},
                rows,
            )
        ]

    def top(self, n: int = 20) -> list[tuple[Neuron, float]]:
        """Return the n neurons with the largest mean score over the prompts, and that mean."""
        mean = self.scores.mean(0)
        strongest = mean.flatten().topk(min(n, mean.numel())).indices.tolist()
        places = [divmod(index, mean.shape[1]) for index in strongest]
        return [
            (_neuron_at(layer, flat, self.n_experts, self.d_ff), float(mean[layer, flat]))
            for layer, flat in places
        ]

    def of(self, neuron: Neuron) -> Tensor:
        """Return the scores of one neuron: (n_prompts,)."""
        layer, *expert, i = neuron
        return self.scores[:, layer, (expert[0] if expert else 0) * self.d_ff[layer] + i]

    def count_strong(self, neuron: Neuron) -> int:
        """Return the number of prompts whose coarse set holds a neuron."""
        return sum(neuron in coarse for coarse in self.coarse)

    def with_share(self, share: float, baseline_share: float | None = None) -> KnowledgeNeurons:
        """Return the same record, refined by another share of the prompts.

        Args:
            share: The new share.
            baseline_share: The new share of the baseline. None: the same.
        """
        baseline_share = share if baseline_share is None else baseline_share
        return dataclasses.replace(
            self,
            share=share,
            refined=refine(self.coarse, share),
            baseline_share=baseline_share,
            baseline=refine(self.baseline_coarse, baseline_share),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON: the sets and the strongest neurons.

        The scores of all neurons are left out.
        """
        whole = {"scores", "activations"}
        plain = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
            if name not in whole
        }
        return {**plain, "gaps": self.gaps.tolist(), "top": self.top()}

    def rows(self, n: int = 100) -> list[dict[str, Any]]:
        """Return the n strongest neurons as a table: one row for each neuron."""
        refined, baseline = set(self.refined), set(self.baseline)
        return [
            {
                "layer": neuron[0],
                "expert": neuron[1] if len(neuron) == 3 else None,
                "neuron": neuron[-1],
                "attribution": score,
                "prompts": self.count_strong(neuron),
                "refined": neuron in refined,
                "baseline": neuron in baseline,
            }
            for neuron, score in self.top(n)
        ]


def _in_digits(score: float) -> str:
    """Return a score with four decimals; one that would read as 0 with two digits: "5.4e-12"."""
    return f"{score:.1e}" if 0 < abs(score) < 5e-5 else f"{score:z.4f}"


@asking(grad=True)
def knowledge_neurons(  # house: the promised public signature
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
    """Attribute p(target) to the FFN neurons of every layer.

    Dai et al. 2022, section 3 (arXiv 2104.08696). Scores and gradients are computed in the model's
    dtype. The model is not changed.

    Args:
        lm: The model.
        prompts: One prompt, or several phrasings of one fact, with the subject filled in. Each
            ends where the target begins. For a masked language model each has [MASK] in the
            target's place, once for each of its tokens.
        target: The text to attribute, of one or more tokens. Their joint probability is
            attributed, and all positions that predict them are scaled together.
        steps: Points of the left Riemann sum: alpha = 0, 1/steps, ... (steps - 1)/steps.
        threshold: Part of a prompt's largest score, over all layers, from which a neuron is in its
            coarse set.
        share: Part of the prompts whose coarse sets hold a refined neuron. With three prompts or
            more, it is in three of them at least.
        baseline_threshold: The threshold of the activation baseline (0.5 in the authors' code).
        every_point: Take all `steps` points in every layer. Otherwise a layer whose gradient is
            smooth on the way takes 8 points, with the same sum to 1e-5 of the layer's scores.
        progress: Called with (prompts done, prompts to do).

    Raises:
        InputError: when an argument is not accepted, or a prompt is too long.
        UnsupportedModelError: when the model cannot run the prompts.
        NumericsError: when p(target) is zero or not finite.
    """
    check_model(lm)
    texts = _check_prompts(prompts)
    target = check_text(target, "the target")
    steps = check_count(steps, "steps", "the number of points of the integral")
    check_number(threshold, "threshold", above=0, most=1)
    check_number(share, "share", above=0, most=1)
    check_number(baseline_threshold, "baseline_threshold", above=0, most=1)

    gaps = lm.gaps(texts, [target] * len(texts))
    questions = [lm.question(text, target, gap) for text, gap in zip(texts, gaps, strict=True)]
    attributions = _Attributions(lm, texts, target, questions)
    done = 0
    for group in shared_batches(lm, questions):
        recorded = record_prompts(lm, [questions[i] for i in group])
        attributions.check(group, recorded)
        gradients, silent = mean_gradients(recorded, steps, every_point)
        attributions.add(group, recorded, gradients, silent)
        done += len(group)
        if progress is not None:
            progress(done, len(texts))

    n_experts, d_ff = tuple(f.n_experts for f in lm.ffn), tuple(f.banks[0].d_ff for f in lm.ffn)
    coarse = _coarse(attributions.scores, threshold, n_experts, d_ff)
    baseline_coarse = _coarse(attributions.activations, baseline_threshold, n_experts, d_ff)
    return KnowledgeNeurons(
        **attributions.fields(),
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
    """Return the neurons in many of the coarse sets, most shared first, then by place.

    Args:
        coarse: The coarse set of each prompt.
        share: Part of the sets that hold a refined neuron. Where there are three sets or more, it
            is in three at least.
    """
    counts = Counter(neuron for neurons in coarse for neuron in neurons)
    # Rounded first, because 0.7 * 10 is a little more than 7 in binary.
    needed = max(math.ceil(round(share * len(coarse), 9)), min(LEAST_PROMPTS, len(coarse)))
    kept = [(-count, neuron) for neuron, count in counts.items() if count >= needed]
    return tuple(neuron for _, neuron in sorted(kept))


@asking(grad=True)
def refine_relation(
    records: Sequence[KnowledgeNeurons],
    *,
    share: float = 0.7,
    low: float = 2,
    high: float = 5,
    step: float = 0.05,
    rounds: int = 6,
) -> tuple[KnowledgeNeurons, ...]:
    """Refine the facts of one relation by one common share.

    As in the authors' code, the share falls by `step` while the facts have fewer than `low` neurons
    on average, and rises by `step` while they have more than `high`. The activation baseline gets a
    share of its own in the same way.

    Args:
        records: The knowledge neurons of each fact.
        share: The share to begin with.
        low: Smallest accepted mean number of neurons.
        high: Largest accepted mean number of neurons.
        step: How much the share changes in one round.
        rounds: Number of rounds, at most.

    Raises:
        InputError: when there is no record.
    """
    if not records:
        raise InputError(
            "records is empty. Give the knowledge neurons of at least one fact of the relation.",
            argument="records",
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


class _Attributions:
    """The fields of `KnowledgeNeurons` that are filled group by group."""

    def __init__(
        self, lm: LanguageModel, prompts: list[str], target: str, questions: Sequence[Question]
    ) -> None:
        n_prompts = len(prompts)
        self.lm, self.prompts, self.target, self.questions = lm, prompts, target, questions
        widest = max(sum(bank.d_ff for bank in ffn.banks) for ffn in lm.ffn)
        self.scores = torch.zeros(n_prompts, lm.n_layers, widest, dtype=torch.float32)
        self.activations = torch.zeros_like(self.scores)
        self.probability = torch.zeros(n_prompts, dtype=torch.float32)
        self.silent = torch.zeros(n_prompts, lm.n_layers, dtype=torch.float32)
        self.predicted = [""] * n_prompts
        self.is_correct = [False] * n_prompts

    def check(self, group: Sequence[int], recorded: RecordedPrompts) -> None:
        """Raise a NumericsError unless every prompt gives the target a positive probability."""
        for i, p in zip(group, recorded.probability.tolist(), strict=True):
            if not (math.isfinite(p) and p > torch.finfo(torch.float32).tiny):
                raise NumericsError(
                    f"p({self.target!r}) after {self.prompts[i]!r} is {p}. Only a positive number "
                    "can be attributed: choose a target that the model gives some probability, or "
                    "load the model in float32.",
                    argument="target",
                )

    def add(
        self,
        group: Sequence[int],
        recorded: RecordedPrompts,
        gradients: Sequence[Tensor],
        silent: Tensor,
    ) -> None:
        """Add the attributions of some prompts.

        Args:
            group: Which prompts they are.
            recorded: The same prompts, run once.
            gradients: For each layer the mean gradient for what it writes, (B, P, d_model).
            silent: (B, n_layers) p(target) with the layer's neurons silent.
        """
        self.probability[group] = recorded.probability.float().cpu()
        self.silent[group] = silent.float().cpu()
        for i, likeliest in zip(group, recorded.likeliest.tolist(), strict=True):
            self.predicted[i] = self.lm.tokenizer.decode(likeliest)
            self.is_correct[i] = likeliest == self.questions[i][2]
        for layer, banks in enumerate(recorded.banks):
            for bank in banks:
                rows = torch.tensor(group)[bank.rows.cpu() // recorded.n_targets]
                neurons = slice(bank.first, bank.first + bank.coefficients.shape[1])
                gradient = gradients[layer].flatten(0, 1)
                g = gradient[bank.rows.to(gradient.device)]  # (n, d_model)
                attributed = bank.coefficients * (g.to(bank.coefficients) @ bank.neurons.weight())
                self.scores[:, layer, neurons].index_add_(0, rows, attributed.float().cpu())
                self.activations[:, layer, neurons].index_add_(
                    0, rows, bank.coefficients.float().cpu() / recorded.n_targets
                )

    def fields(self) -> dict[str, Any]:
        """Return the fields of the record."""
        return {
            "prompts": tuple(self.prompts),
            "target": self.target,
            "target_ids": tuple(tuple(target) for _, _, target in self.questions),
            "predicted": tuple(self.predicted),
            "is_correct": tuple(self.is_correct),
            "probability": self.probability,
            "silent": self.silent,
            "scores": self.scores,
            "activations": self.activations,
        }


def _check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts as a list, each a text without an open slot."""
    given = (
        [prompts]
        if isinstance(prompts, str)
        else check_items(prompts, "prompts", "texts", also="one text")
    )
    if not given:
        raise InputError(
            "prompts is empty. Give one prompt, or a list of at least one.", argument="prompts"
        )
    texts = [check_text(prompt, "a prompt") for prompt in given]
    for text in texts:
        if count_prompt_slots(text, ""):
            raise InputError(
                f"prompt {text!r} has an open slot {{}}. Fill the subject in first. Write {{{{}}}} "
                "for the two characters themselves.",
                argument="prompts",
            )
    return [literal(text) for text in texts]


def _coarse(
    scores: Tensor, threshold: float, n_experts: Sequence[int], d_ff: Sequence[int]
) -> tuple[tuple[Neuron, ...], ...]:
    """The strong neurons of each prompt, strongest first; empty where no score is positive."""
    sets = []
    for of_prompt in scores:
        strong = ((of_prompt >= threshold * of_prompt.max()) & (of_prompt > 0)).nonzero()
        order = of_prompt[strong[:, 0], strong[:, 1]].argsort(descending=True, stable=True)
        sets.append(
            tuple(
                _neuron_at(layer, flat, n_experts, d_ff) for layer, flat in strong[order].tolist()
            )
        )
    return tuple(sets)


def _neuron_at(layer: int, flat: int, n_experts: Sequence[int], d_ff: Sequence[int]) -> Neuron:
    """Return the neuron that a column of the scores belongs to.

    A shared bank comes after the experts, and may be wider than they are.
    """
    if not n_experts[layer]:
        return layer, flat
    expert = min(flat // d_ff[layer], n_experts[layer])
    return layer, expert, flat - expert * d_ff[layer]
