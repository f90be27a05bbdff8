"""What layers and their neurons predict by themselves, and how often the two agree.

    counts = OwnPredictions(lm, among=(1.0, 0.5, 0.0), norm=False, values=None, scales=scales)
    tokens = counts.predictions(stream)       # what each layer predicts by itself
    counts.add(stream, tokens)                # compared with what its neurons predict
    counts.result(n)                          # shares over n predictions

Geva et al. 2021 (arXiv 2012.14913), section 5.1: a layer's own prediction is the token that its
output promotes most, and a neuron's the token that its value promotes most. The paper counts the
neurons whose coefficient is above zero. ReLU leaves few of them, GELU and gated models leave all.
So a neuron with a negative coefficient predicts the token that its value demotes most, and the
comparison is also made with the fewest neurons that carry a given share of Σ |mᵢ|·‖vᵢ‖.

How often a layer predicts what no neuron predicts depends on how many tokens the neurons cover: a
thousand neurons cover much of a small vocabulary. So every prediction of a layer is also compared
with the neurons of every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.identity import same_model
from ..corpus.scan import banks
from ..model.language_model import LanguageModel
from .extremes import extreme_tokens
from .stream import Fired, Stream, carrying_half, shares
from .unembedding import Unembedding, find_unembedding
from .values import ValueTokens, value_tokens


class OwnPredictions:
    """Counts over predictions, as they come in.

    Attributes:
        lm: The model.
        among: Which neurons count: the fewest that carry such a share of Σ |mᵢ|·‖vᵢ‖ in a layer.
            1: all, 0: the strongest alone.
        norm: Whether the final norm is folded in.
        head: The model's unembedding, with that norm or without it.
        scales: One for each layer, (d_model,): what its output is multiplied by.
        tokens: By layer and bank (d_ff,) and (d_ff,): the tokens that a neuron predicts with a
            positive and with a negative coefficient.
        lengths: By layer and bank (d_ff,): the length of each value.
        hits: (shares, layers) float64, how many predictions are those of a counted neuron.
        counts: (shares, layers) float64, how many neurons were counted.
        predicted: (layers, vocab) int32, how often each token was a layer's prediction.
        covered: (shares, layers, vocab) int32, for how many prompts a counted neuron predicts it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        among: Sequence[float],
        norm: bool,
        values: ValueTokens | None,
        scales: Mapping[int, Tensor],
    ) -> None:
        if values is not None and (
            not same_model(values.fingerprint, lm.fingerprint)
            or {bank[0] for bank in values.top_ids} != set(range(lm.n_layers))
        ):
            raise InputError(
                f"values are of {values.model}, and not of all layers of {lm.name}. "
                "Read them with value_tokens(lm), or leave them out.",
                argument="values",
            )
        values = value_tokens(lm, top=1, norm=norm) if values is None else values
        self.lm, self.norm, self.among = lm, values.norm, among
        self.head: Unembedding = find_unembedding(lm, norm=self.norm)
        self.scales = [
            scales[ffn.layer].to(self.head.scale) if self.norm else torch.ones_like(self.head.scale)
            for ffn in lm.ffn
        ]
        self.tokens = [
            [
                (values.top_ids[bank][:, 0], values.bottom_ids[bank][:, 0])
                for bank in banks(lm, [layer])
            ]
            for layer in range(lm.n_layers)
        ]
        self.lengths = [
            [
                (bank.values.float() * scale.to(bank.values.device)).norm(dim=1).cpu()
                for bank in ffn.banks
            ]
            for ffn, scale in zip(lm.ffn, self.scales, strict=True)
        ]
        shape = (len(among), lm.n_layers)
        self.hits = torch.zeros(shape, dtype=torch.float64)
        self.counts = torch.zeros(shape, dtype=torch.float64)
        self.predicted = torch.zeros(lm.n_layers, len(self.head.weight), dtype=torch.int32)
        self.covered = torch.zeros(*shape, len(self.head.weight), dtype=torch.int32)

    def predictions(self, stream: Stream) -> Tensor:
        """Return the token that each layer predicts by itself: (n, n_layers)."""
        written = torch.stack(
            [
                self.head.fold(output.to(scale) * scale)
                for output, scale in zip(stream.written, self.scales, strict=True)
            ],
            1,
        )
        ids, *_ = extreme_tokens(written.flatten(0, 1), self.head.weight, 1)
        return ids.view(written.shape[:2])

    def add(self, stream: Stream, tokens: Tensor) -> Tensor:
        """Compare what layers and their neurons predict, and count it.

        Args:
            stream: The stream at n tokens.
            tokens: What each layer predicts by itself, (n, n_layers).

        Returns:
            How many sub-updates carry half of what speaks for that token, (n, n_layers).
        """
        half = torch.zeros_like(tokens)
        for layer, (ffn, fired) in enumerate(zip(self.lm.ffn, stream.fired, strict=True)):
            token = tokens[:, layer]
            direction = self.head.unfold(self.head.weight[token]) * self.scales[layer]
            half[:, layer] = carrying_half(
                torch.cat([shares(ffn, some, direction).flatten(1).cpu() for some in fired], 1)
            )
            self.predicted[layer] += torch.bincount(token, minlength=self.predicted.shape[1]).int()
            self._count(layer, fired, token)
        return half

    def _count(self, layer: int, fired: Sequence[Fired], token: Tensor) -> None:
        """Count for n prompts whether a layer's prediction (n,) is that of a counted neuron."""
        said, weights = (
            torch.cat(each, 1)
            for each in zip(*(self._weighed(layer, some) for some in fired), strict=True)
        )
        weights, order = weights.double().sort(1, descending=True)
        said = said.gather(1, order)
        before = weights.cumsum(1) - weights
        row = torch.arange(len(token))
        for i, share in enumerate(self.among):
            counts = weights > 0
            if share < 1:  # of all, rounding must not lose the smallest
                counts &= before < share * weights.sum(1, keepdim=True)
                counts[:, 0] = weights[:, 0] > 0
            of, place = counts.nonzero(as_tuple=True)
            covered = torch.zeros(len(token), self.covered.shape[2], dtype=torch.bool)
            covered[of, said[of, place]] = True
            self.hits[i, layer] += covered[row, token].sum()
            self.counts[i, layer] += len(of)
            self.covered[i, layer] += covered.sum(0, dtype=torch.int32)

    def _weighed(self, layer: int, fired: Fired) -> tuple[Tensor, Tensor]:
        """Return what each sub-update predicts, and its |m|·‖v‖: (n, neurons) on the CPU."""
        on_cpu = Fired(fired.places.cpu(), fired.m.cpu())
        said = torch.zeros(on_cpu.m.shape, dtype=torch.long)
        weights = torch.zeros_like(on_cpu.m)
        for place, row, slot in on_cpu.by_bank():
            m = on_cpu.m[row, slot]
            promoted, demoted = self.tokens[layer][place]
            said[row, slot] = torch.where(m > 0, promoted, demoted)
            weights[row, slot] = m.abs() * self.lengths[layer][place]
        return said.flatten(1), weights.flatten(1)

    def result(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `composed`, `chance` and `counted` of a `Refinement` of n predictions."""
        dealt = (self.covered.double() * self.predicted.double()).sum(-1) / n**2
        return 1 - self.hits / n, 1 - dealt, self.counts / n
