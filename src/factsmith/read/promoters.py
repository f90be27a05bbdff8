"""The neurons of a model whose values promote a word most.

    for promotion in promoters(lm, "Sofia"):
        promotion.neuron, promotion.token, promotion.rank, promotion.score

The search needs no index and finds any word. Ranks in the whole vocabulary cost a full product, so
they are counted only for the values that point most towards the word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_count
from ..corpus.scan import Bank, banks
from ..model.address import Neuron
from ..model.language_model import LanguageModel, check_model
from ..model.neurons import Neurons
from ..model.tokens import word_ids
from ..model.turns import asking
from .unembedding import Unembedding, find_unembedding, output_scales

NEAR = 16
"""How many candidates are ranked for each neuron asked for."""


@dataclass(frozen=True)
class Promotion:
    """A neuron whose value promotes or demotes a word.

    Attributes:
        neuron: (layer, i) or (layer, expert, i).
        token: The token of the word, as text.
        rank: The token's rank among the tokens that the value promotes (or demotes). 0 is the
            first.
        score: What one unit of coefficient adds to the token's logit, without the final norm's
            division.
    """

    neuron: Neuron
    token: str
    rank: int
    score: float


@asking()
def promoters(
    lm: LanguageModel, word: str, k: int = 20, *, demoted: bool = False, norm: bool = True
) -> list[Promotion]:
    """Return the k neurons of the whole model whose values promote a word most.

    They are ordered by the word's rank among all tokens, then by score.

    Args:
        lm: The model.
        word: Any word. If it is several tokens, the first one is used (`word_ids`).
        k: Number of neurons. Ranks are counted for the `NEAR` · k values with the largest share
            of their length along a token.
        demoted: Return the neurons whose values demote the word most.
        norm: Fold in the final norm, as `value_tokens` does.

    Raises:
        InputError: when the word has no token, or k is not a whole number of at least 1.
        UnsupportedModelError: as `find_unembedding`.
    """
    check_model(lm)
    k = check_count(k, "k", "the number of neurons to find")
    ids = word_ids(lm.tokenizer, word)
    lm.check_known(ids)
    head, sign = find_unembedding(lm, norm=norm), -1.0 if demoted else 1.0
    rows = head.weight[ids].float() * sign
    neurons = banks(lm)
    values = _Values(head, neurons, output_scales(lm, {bank[0] for bank in neurons}, norm=norm))
    best = _closest(values, rows, NEAR * k)
    if not best:
        return []
    chosen = torch.stack([values.one(bank, i) for _, bank, i, _ in best])
    scores = (chosen * rows[[column for *_, column in best]]).sum(1)
    ranks = torch.zeros(len(best), dtype=torch.int64, device=rows.device)
    # The margin keeps a token from ranking above itself.
    threshold = scores[:, None] + scores.abs()[:, None] * 1e-6
    for part in torch.split(head.weight, 16_384):
        ranks += (sign * (chosen @ part.float().T) > threshold).sum(1)
    promotions = [
        Promotion((*bank, i), lm.tokenizer.decode([ids[column]]), rank, sign * score)
        for (_, bank, i, column), rank, score in zip(
            best, ranks.tolist(), scores.tolist(), strict=True
        )
    ]
    return sorted(promotions, key=lambda p: (p.rank, -abs(p.score), p.neuron))[:k]


@dataclass(frozen=True, eq=False)
class _Values:
    """Values of banks with the norms folded in, computed when asked for."""

    head: Unembedding
    neurons: Mapping[Bank, Neurons]
    scales: Mapping[int, Tensor]

    def bank(self, bank: Bank) -> Tensor:
        """Return the values of a bank, (d_ff, d_model)."""
        return self._folded(bank, self.neurons[bank].values)

    def one(self, bank: Bank, i: int) -> Tensor:
        """Return the value of one neuron, (d_model,)."""
        return self._folded(bank, self.neurons[bank].values[i : i + 1])[0]

    def _folded(self, bank: Bank, values: Tensor) -> Tensor:
        return self.head.fold((values.float() * self.scales[bank[0]]).to(self.head.weight.device))


def _closest(values: _Values, rows: Tensor, n: int) -> list[tuple[float, Bank, int, int]]:
    """Return the n neurons whose values point most along one of some rows (tokens, d_model).

    Each is (share of its length, bank, index, token), the largest share first.
    """
    best: list[tuple[float, Bank, int, int]] = []
    for bank in values.neurons:
        folded = values.bank(bank)
        along = (folded @ rows.T) / folded.norm(dim=1, keepdim=True).clamp(
            min=torch.finfo(folded.dtype).tiny
        )
        share, column = along.max(1)
        top = share.topk(min(n, len(share)))
        best += [
            (float(s), bank, int(i), int(column[i]))
            for s, i in zip(top.values, top.indices, strict=True)
            if s > 0
        ]
        best = sorted(best, key=lambda entry: -entry[0])[:n]
    return best
