"""Silence or amplify chosen neurons, and compare what the model says with and without.

    tried = ask_scaled(lm, "The currency of Bulgaria is the", [(1, 417)], 0)
    tried.before, tried.after           # the answers
    tried.rows()                        # each likely next token with both probabilities

The comparison changes coefficients while the model runs, and no weight (`model.intervene`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.errors import InputError, NumericsError
from ..core.tables import Shown, Table, counted, in_one_line
from ..model.address import Neuron, find_neurons
from ..model.intervene import intervene
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ScaledAnswer(Shown):
    """What a model says with and without a change of some coefficients.

    Attributes:
        prompt: The text.
        neurons: The neurons, each once.
        scale: What their coefficients were multiplied by, at every token.
        before: The answer of the unchanged model.
        after: The answer with the change.
        tokens: The likeliest next tokens of the two, the likeliest before the change first.
        p_before: (n,) float32, their probabilities without the change.
        p_after: (n,) float32, their probabilities with it.
        divergence: The Kullback-Leibler divergence of the next token's distribution with the change
            from that without, in nats.
        model: The name that the model was loaded by.
    """

    prompt: str
    neurons: tuple[Neuron, ...]
    scale: float
    before: str
    after: str
    tokens: tuple[str, ...]
    p_before: Tensor
    p_after: Tensor
    divergence: float
    model: str

    def tables(self) -> list[Table]:
        """Return the answers, and the likely next tokens with both probabilities."""
        done = "silenced" if self.scale == 0 else f"times {self.scale:g}"
        names = ", ".join(" ".join(map(str, neuron)) for neuron in self.neurons[:5])
        more = f" and {len(self.neurons) - 5:,} more" if len(self.neurons) > 5 else ""
        noun = "neuron" if len(self.neurons) == 1 else "neurons"
        return [
            Table(
                in_one_line(self.prompt),
                {"model": "<", "answer": "<"},
                [
                    ("unchanged", in_one_line(self.before)),
                    (f"{noun} {names}{more} {done}", in_one_line(self.after)),
                ],
            ),
            Table(
                f"next tokens with {counted(len(self.neurons), 'neuron')} {done}",
                {"next token": "<", "unchanged": ">", done: ">"},
                [
                    (repr(row["token"]), f"{row['before']:.2%}", f"{row['after']:.2%}")
                    for row in self.rows()
                ],
            ),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return the next tokens as rows of a table."""
        return [
            {"token": token, "before": before, "after": after}
            for token, before, after in zip(
                self.tokens, self.p_before.tolist(), self.p_after.tolist(), strict=True
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        return {
            "prompt": self.prompt,
            "neurons": [list(neuron) for neuron in self.neurons],
            "scale": self.scale,
            "before": self.before,
            "after": self.after,
            "next_tokens": self.rows(),
            "divergence": self.divergence,
            "model": self.model,
        }


@asking()
def ask_scaled(
    lm: LanguageModel,
    prompt: str,
    neurons: Iterable[Neuron],
    scale: float = 0.0,
    *,
    top: int = 10,
    max_new_tokens: int = 8,
) -> ScaledAnswer:
    """Ask a model once as it is, and once with the coefficients of some neurons multiplied.

    Args:
        lm: The model.
        prompt: The text to continue.
        neurons: (layer, i), or (layer, expert, i) in a layer with experts.
        scale: The factor on each coefficient. 0 silences, 2 doubles.
        top: Number of next tokens to take from each of the two.
        max_new_tokens: The most tokens of an answer.

    Raises:
        LayerError: The model has no such neuron.
        InputError: The prompt is empty, there is no neuron, or a number is not accepted.
        NumericsError: The scale is so large that the model's numbers overflow.
    """
    check_model(lm)
    scale = check_number(scale, "scale", "the factor on each coefficient")
    top = check_count(top, "top", "the number of next tokens")
    places = find_neurons(lm.ffn, neurons)
    if not places:
        raise InputError(
            "neurons is empty. Give at least one neuron, such as (1, 417).", argument="neurons"
        )
    chosen: tuple[Neuron, ...] = tuple(
        (layer, bank, i) if lm.ffn[layer].n_experts else (layer, i) for layer, bank, i in places
    )
    before, log_p = _ask(lm, prompt, max_new_tokens)
    with intervene(lm, chosen, scale):
        after, log_q = _ask(lm, prompt, max_new_tokens)
    p, q = log_p.exp(), log_q.exp()
    likely = [each.topk(min(top, len(each))).indices.tolist() for each in (p, q)]
    ids = sorted({i for some in likely for i in some}, key=lambda i: (-float(p[i]), i))
    return ScaledAnswer(
        prompt=prompt,
        neurons=chosen,
        scale=scale,
        before=before,
        after=after,
        tokens=tuple(lm.tokenizer.decode([i]) for i in ids),
        p_before=p[ids],
        p_after=q[ids],
        divergence=float((q.double() * (log_q.double() - log_p.double())).nansum().clamp(min=0)),
        model=lm.name,
    )


def _ask(lm: LanguageModel, prompt: str, max_new_tokens: int) -> tuple[str, Tensor]:
    """Return the answer, and the logarithms of the next token's distribution: (vocab,)."""
    answer = lm.answer([prompt], max_new_tokens=max_new_tokens)[0]
    log_p = torch.log_softmax(lm.last_logits(lm.batch([prompt]))[0].float(), -1).cpu()
    if not bool(log_p.isfinite().all()):
        raise NumericsError(
            "the probabilities of the next token are not finite. Give a scale nearer to 1.",
            argument="scale",
        )
    return answer, log_p
