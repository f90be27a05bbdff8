"""What values promote: each value read as tokens, through the model's own unembedding.

    values = value_tokens(lm, layers=[3], top=10)      # the ends of every value of layer 3
    values.of((3, 17))                                 # one neuron's tokens with their scores
    values.save("folder"); ValueTokens.load("folder")  # later, without the model

Geva et al. 2022 (arXiv 2203.14680): a value v is a distribution over the vocabulary, softmax(E v).
The value promotes tokens with a large score; with a negative coefficient it demotes them. The paper
leaves the final norm out (`norm=False`). By default it is folded in: the value is centred where the
norm centres, and multiplied by the norm's scale, as happens on the way to the logits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.artefact import (
    INTEGERS,
    believing,
    read_artefact,
    stated_digest,
    stored,
    write_tensors,
)
from ..core.checks import check_count
from ..core.errors import LayerError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table, counted
from ..corpus.scan import Bank, bank_name, bank_of, banks, named_bank
from ..model.address import Neuron, check_layers, find_neuron
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .extremes import Screen, extreme_tokens
from .unembedding import Unembedding, find_unembedding, output_scales


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ValueTokens(Shown):
    """The tokens that values promote and demote most, by bank of neurons.

    Attributes:
        top_ids: {bank: (d_ff, k) int64}, the tokens promoted most, best first.
        top_scores: {bank: (d_ff, k) float32}, what one unit of coefficient adds to the token's
            logit, without the final norm's division.
        bottom_ids: {bank: (d_ff, k) int64}, the tokens demoted most, the most demoted first.
        bottom_scores: {bank: (d_ff, k) float32}, their scores.
        words: {id: text} of every token among them.
        norm: Whether the final norm is folded in.
        model: The name that the model was loaded by.
        fingerprint: The model's fingerprint.
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
        """Return the tokens of one neuron's value with their scores.

        Args:
            neuron: (layer, i) or (layer, expert, i).
            bottom: Return the tokens that it demotes most, not those that it promotes most.

        Raises:
            LayerError: when the neuron's value was not read.
        """
        bank, i = bank_of(neuron)
        if bank not in self.top_ids or not 0 <= i < len(self.top_ids[bank]):
            raise LayerError(
                f"the value of neuron {tuple(neuron)} was not read. "
                f"Ask for a neuron of a bank that was: {', '.join(map(str, self.top_ids))}."
            )
        ids, scores = (
            (self.bottom_ids, self.bottom_scores) if bottom else (self.top_ids, self.top_scores)
        )
        return [
            (self.words[token], score)
            for token, score in zip(ids[bank][i].tolist(), scores[bank][i].tolist(), strict=True)
        ]

    def tables(self) -> list[Table]:
        """Return one table: how many values were read, and how."""
        k = max((ids.shape[1] for ids in self.top_ids.values()), default=0)
        n_values = sum(map(len, self.top_ids.values()))
        rows = [
            ("values", f"{n_values:,} in {counted(len(self.top_ids), 'bank')}"),
            ("tokens each", f"{k} most promoted, {k} most demoted"),
            ("final norm", "folded in" if self.norm else "left out"),
        ]
        return [Table(f"values of {self.model}", {"": "<", " ": "<"}, rows)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `values.safetensors` into a folder in one step.

        Raises:
            WorkspaceError: when the file cannot be written.
        """
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
        """Read what `save` wrote.

        Raises:
            DamagedError: when the file is missing or was altered.
        """
        tensors, metadata = read_artefact(
            Path(folder) / FILE, "values", _FORMAT, "ValueTokens.save", "read the values again"
        )
        with believing(Path(folder) / FILE, "a file of values", "read the values again"):
            return cls._read(tensors, metadata)

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ValueTokens:
        """Return the values of a file; raises KeyError, TypeError and ValueError."""
        words = {int(i): word for i, word in json.loads(metadata["words"]).items()}
        if not all(isinstance(word, str) for word in words.values()):
            raise TypeError("its words are not all texts")
        parts: dict[str, dict[Bank, Tensor]] = {part: {} for part in _PARTS}
        for name in sorted({name.partition("/")[0] for name in tensors}):
            shape: tuple[int | None, ...] = (None, None)
            for part in _PARTS:
                is_id = part.endswith("ids")
                tensor = stored(
                    tensors, f"{name}/{part}", shape, INTEGERS if is_id else (torch.float32,)
                )
                shape = tuple(tensor.shape)
                if is_id and not words.keys() >= set(tensor.flatten().tolist()):
                    raise ValueError(f"its words lack some tokens of {name}/{part}")
                parts[part][named_bank(name)] = tensor
        if metadata["norm"] not in ("True", "False"):
            raise ValueError(f"its norm is {metadata['norm']!r:.40}")
        return cls(
            **{part: dict(sorted(each.items())) for part, each in parts.items()},
            words=words,
            norm=metadata["norm"] == "True",
            model=metadata["model"],
            fingerprint=stated_digest(metadata, "fingerprint"),
        )


FILE = "values.safetensors"
"""The file in a folder that holds values."""

_FORMAT = "values 1"

_PARTS = ("top_ids", "top_scores", "bottom_ids", "bottom_scores")


@asking()
def value_tokens(
    lm: LanguageModel,
    layers: Iterable[int] | None = None,
    *,
    top: int = 10,
    norm: bool = True,
    progress: Progress | None = None,
) -> ValueTokens:
    """Return the most promoted and the most demoted tokens of every value of some layers.

    Args:
        lm: The model.
        layers: The layers. None: all.
        top: Number of tokens at either end of each value.
        norm: Fold in the final norm, and a norm that follows the FFN (Gemma 2). False: the bare
            projection of the paper.
        progress: Gets the number of banks read.

    Raises:
        LayerError: when a layer does not exist.
        InputError: when `top` is not a whole number of at least 1, or `layers` is empty.
        UnsupportedModelError: as `find_unembedding`.
    """
    check_model(lm)
    top = check_count(top, "top", "the number of tokens wanted for each value")
    wanted = check_layers(layers, lm.n_layers)
    head = find_unembedding(lm, norm=norm)
    tokens: dict[Bank, tuple[Tensor, ...]] = {}
    every, screen = banks(lm, wanted), Screen.of(head.weight)
    scales = output_scales(lm, wanted, norm=norm)
    for bank, neurons in every.items():
        tokens[bank] = extreme_tokens(
            head.fold(neurons.values.float() * scales[neurons.layer]), head.weight, top, screen
        )
        tell(progress, "values", len(tokens), len(every))
    used = torch.unique(
        torch.cat([ids.flatten() for tensors in tokens.values() for ids in tensors[::2]])
    ).tolist()
    return ValueTokens(
        **{
            part: {bank: tensors[i] for bank, tensors in tokens.items()}
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
    scales: Mapping[int, Tensor],
    neurons: Sequence[Neuron],
    negative: Sequence[bool],
    k: int,
) -> list[list[tuple[str, float]]]:
    """Return the tokens that each neuron's sub-update promotes most, with scores for one unit.

    Args:
        lm: The model.
        head: The model's unembedding.
        scales: `output_scales` of every layer.
        neurons: The neurons.
        negative: For each neuron whether its coefficient is negative. Such a sub-update promotes
            the tokens that its value demotes.
        k: Number of tokens for each.

    Raises:
        LayerError: when the model does not have a neuron.
    """
    places = [find_neuron(lm.ffn, neuron) for neuron in neurons]
    if not places:
        return []
    values = [
        lm.ffn[layer].banks[bank].values[i].float() * scales[layer] for layer, bank, i in places
    ]
    stacked = torch.stack([value.to(head.weight.device) for value in values])
    top, top_scores, bottom, bottom_scores = extreme_tokens(head.fold(stacked), head.weight, k)
    tokens = []
    for row, is_negative in enumerate(negative):
        ids, scores = (
            (bottom[row], -bottom_scores[row]) if is_negative else (top[row], top_scores[row])
        )
        tokens.append(
            [
                (lm.tokenizer.decode([token]), score)
                for token, score in zip(ids.tolist(), scores.tolist(), strict=True)
            ]
        )
    return tokens
