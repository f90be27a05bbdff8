"""What the memory's values promote: each value read out through the unembedding, as the model's own last layer is.

    found = value_tokens(lm, layers=[3], top=10)       # top and bottom tokens of every value of layer 3
    found.of((3, 17))                                  # those of one neuron, with their scores
    head = find_unembedding(lm)                        # the model's tail as scale, shift and a matrix

Geva et al. 2022 (arXiv 2203.14680): a value v is a distribution over the vocabulary, softmax(E v), and tokens with a large score are what
it promotes; with a negative coefficient it demotes them. The paper leaves the final norm out (`norm=False`); folded in, a value is
centred where the norm centres and weighed by the norm's scale, which is what becomes of it on the way to the logits.

Thousands of values times a whole vocabulary are screened by a rough product, and what comes near the top is scored again in float32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.artefact import read_artefact, write_tensors
from ..core.checks import check_count, check_items
from ..core.errors import InputError, LayerError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table, counted
from ..corpus.scan import Bank, bank_name, bank_of, banks, named_bank
from ..model.address import Neuron, check_layer, find_neuron
from ..model.language_model import LanguageModel, check_model
from ..model.tokens import word_ids
from .extremes import NEAR, Screen, extreme_tokens
from .unembedding import Unembedding, find_unembedding, norm_after


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ValueTokens(Shown):
    """The tokens that values promote most and least, by bank of neurons.

    top_ids, bottom_ids        {bank: (d_ff, k) int64}, best first; bottom: the most demoted first
    top_scores, bottom_scores  {bank: (d_ff, k) float32}, what one unit of coefficient adds to the token's logit, but for the norm's divisor
    words                      {id: text} of every token among them
    norm                       whether the final norm is folded in
    model, fingerprint         what the model was loaded as, and its fingerprint
    """

    top_ids: Mapping[Bank, Tensor]
    top_scores: Mapping[Bank, Tensor]
    bottom_ids: Mapping[Bank, Tensor]
    bottom_scores: Mapping[Bank, Tensor]
    words: Mapping[int, str]
    norm: bool
    model: str
    fingerprint: str

    def of(self, neuron: Neuron, *, bottom: bool = False) -> list[tuple[str, float]]:
        """The tokens of one neuron's value with their scores. Raises LayerError for one whose value was not read."""
        bank, i = bank_of(neuron)
        if bank not in self.top_ids or not 0 <= i < len(self.top_ids[bank]):
            raise LayerError(
                f"the value of {tuple(neuron)} was not read; there are those of {', '.join(map(str, self.top_ids))}"
            )
        ids, scores = (
            (self.bottom_ids, self.bottom_scores) if bottom else (self.top_ids, self.top_scores)
        )
        return [
            (self.words[token], score)
            for token, score in zip(ids[bank][i].tolist(), scores[bank][i].tolist(), strict=True)
        ]

    def tables(self) -> list[Table]:
        """What was read, of which model."""
        k = max((ids.shape[1] for ids in self.top_ids.values()), default=0)
        rows = [
            (
                "values",
                f"{sum(map(len, self.top_ids.values())):,} in {counted(len(self.top_ids), 'bank')}",
            ),
            ("tokens each", f"{k} most promoted, {k} most demoted"),
            ("final norm", "folded in" if self.norm else "left out"),
        ]
        return [Table(f"values of {self.model}", {"": "<", " ": "<"}, rows)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `values.safetensors` in one step. Raises WorkspaceError."""
        tensors = {
            f"{bank_name(bank)}/{part}": t.contiguous()
            for part in _PARTS
            for bank, t in getattr(self, part).items()
        }
        described = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "norm": str(self.norm),
            "words": json.dumps(dict(self.words)),
        }
        write_tensors(Path(folder) / FILE, tensors, {"format": _FORMAT, **described})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ValueTokens:
        """Read what `save` wrote. Raises DamagedError when it is missing or altered."""
        tensors, metadata = read_artefact(
            Path(folder) / FILE, "values", _FORMAT, "ValueTokens.save", "read the values again"
        )
        parts: dict[str, dict[Bank, Tensor]] = {part: {} for part in _PARTS}
        for name, tensor in tensors.items():
            bank, _, part = name.partition("/")
            parts[part][named_bank(bank)] = tensor
        return cls(
            **{part: dict(sorted(own.items())) for part, own in parts.items()},
            words={int(i): word for i, word in json.loads(metadata["words"]).items()},
            norm=metadata["norm"] == "True",
            model=metadata["model"],
            fingerprint=metadata["fingerprint"],
        )


FILE = "values.safetensors"

_FORMAT = "values 1"

_PARTS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores")


@torch.no_grad()
def value_tokens(
    lm: LanguageModel,
    layers: Iterable[int] | None = None,
    *,
    top: int = 10,
    norm: bool = True,
    progress: Progress | None = None,
) -> ValueTokens:
    """The `top` most promoted and most demoted tokens of every value of some layers (None: all).

    norm: fold the final norm in, and what the layer puts behind its memory (Gemma 2); False: the paper's bare projection.
    Raises LayerError for a layer that does not exist, InputError for `top`, UnsupportedModelError as `find_unembedding`.
    """
    check_model(lm)
    head = find_unembedding(lm, norm=norm)
    top = check_count(top, "top", "the number of tokens to give for each value")
    wanted = (
        range(lm.n_layers)
        if layers is None
        else [
            check_layer(x, lm.n_layers)
            for x in check_items(layers, "layers", "layer numbers", also="None for all")
        ]
    )
    if not wanted:
        raise InputError("no layer was asked for; expected at least one, or None for all")
    found: dict[Bank, tuple[Tensor, ...]] = {}
    every, scale, screen = banks(lm, wanted), norm_after(lm, wanted, norm), Screen.of(head.weight)
    for bank, neurons in every.items():
        found[bank] = extreme_tokens(
            head.fold(neurons.values.float() * scale[neurons.layer]), head.weight, top, screen
        )
        tell(progress, "values", len(found), len(every))
    used = torch.unique(
        torch.cat([ids.flatten() for tensors in found.values() for ids in tensors[::2]])
    ).tolist()
    return ValueTokens(
        **{
            part: {bank: tensors[i] for bank, tensors in found.items()}
            for i, part in enumerate(_PARTS)
        },
        words={token: lm.tokenizer.decode([token]) for token in used},
        norm=norm,
        model=lm.name,
        fingerprint=lm.fingerprint,
    )


@torch.no_grad()
def tokens_of(
    lm: LanguageModel,
    head: Unembedding,
    scales: Sequence[Tensor],
    neurons: Sequence[Neuron],
    negative: Sequence[bool],
    k: int,
) -> list[list[tuple[str, float]]]:
    """The k tokens that each neuron's sub-update promotes most, with their scores for one unit: of a negative coefficient those the value
    demotes. scales: `behind` of every layer. Raises LayerError for a neuron the model does not have."""
    places = [find_neuron(lm.ffn, neuron) for neuron in neurons]
    if not places:
        return []
    own = [lm.ffn[layer].banks[bank].values[i].float() * scales[layer] for layer, bank, i in places]
    values = torch.stack([value.to(head.weight.device) for value in own])
    top, top_scores, bottom, bottom_scores = extreme_tokens(head.fold(values), head.weight, k)
    found = []
    for row, is_negative in enumerate(negative):
        ids, scores = (
            (bottom[row], -bottom_scores[row]) if is_negative else (top[row], top_scores[row])
        )
        found.append(
            [
                (lm.tokenizer.decode([token]), score)
                for token, score in zip(ids.tolist(), scores.tolist(), strict=True)
            ]
        )
    return found


@dataclass(frozen=True)
class Promotion:
    """A neuron whose value has a word among its tokens: which token, its rank (0: the first), and the score."""

    neuron: Neuron
    token: str
    rank: int
    score: float


@torch.no_grad()
def promoters(
    lm: LanguageModel, word: str, k: int = 20, *, demoted: bool = False, norm: bool = True
) -> list[Promotion]:
    """The k neurons, of all the model's, whose values promote (or demote) a word most, by its rank among all tokens, then by score.

    Any word will do: of one that is no single token its first is looked for (`word_ids`). Ranks are counted for the `NEAR` · k values with
    the largest share of their length along a token. Raises InputError for a word without a token, UnsupportedModelError as
    `find_unembedding`.
    """
    check_model(lm)
    k = check_count(k, "k", "the number of neurons to find")
    ids = word_ids(lm.tokenizer, word)
    head, sign = find_unembedding(lm, norm=norm), -1.0 if demoted else 1.0
    rows = head.weight[ids].float() * sign
    every = banks(lm)
    scale = norm_after(lm, {bank[0] for bank in every}, norm)

    def folded(bank: Bank, chosen: Tensor | slice) -> Tensor:
        return head.fold((every[bank].values[chosen].float() * scale[bank[0]]).to(rows.device))

    best: list[tuple[float, Bank, int, int]] = []
    for bank in every:
        values = folded(bank, slice(None))
        along = (values @ rows.T) / values.norm(dim=1, keepdim=True).clamp(
            min=torch.finfo(values.dtype).tiny
        )
        share, column = along.max(1)
        top = share.topk(min(NEAR * k, len(share)))
        best += [
            (float(s), bank, int(i), int(column[i]))
            for s, i in zip(top.values, top.indices, strict=True)
            if s > 0
        ]
        best = sorted(best, key=lambda entry: -entry[0])[: NEAR * k]
    if not best:
        return []
    chosen = torch.stack(
        [
            folded(bank, torch.tensor([i], device=every[bank].values.device))[0]
            for _, bank, i, _ in best
        ]
    )
    own = (chosen * rows[[column for *_, column in best]]).sum(1)
    ranks = torch.zeros(len(best), dtype=torch.int64, device=rows.device)
    for part in torch.split(head.weight, 16_384):
        ranks += (sign * (chosen @ part.float().T) > own[:, None] + own.abs()[:, None] * 1e-6).sum(
            1
        )  # itself is not above itself
    found = [
        Promotion((*bank, i), lm.tokenizer.decode([ids[column]]), rank, sign * score)
        for (_, bank, i, column), rank, score in zip(
            best, ranks.tolist(), own.tolist(), strict=True
        )
    ]
    return sorted(found, key=lambda p: (p.rank, -abs(p.score), p.neuron))[:k]
