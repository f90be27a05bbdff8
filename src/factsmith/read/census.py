"""What a model is made of: how much of it is memory, how many neurons that is, and how full.

    result = census(lm)                                       # parameters by part
    result = census(lm, triggers=triggers, moments=moments)   # and idle neurons, effective ranks
    result = find_census(lm)                                  # the same, on text of the model's own

The effective rank of a second moment C is exp(−Σ pᵢ ln pᵢ), where pᵢ are the shares of its
eigenvalues (Roy & Vetterli 2007). It is d_ff when the text uses all directions of the coefficients
alike, and 1 when it uses one. A layer whose text uses few of them has room for more keys.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import FingerprintError, InputError
from ..core.progress import Progress, tell
from ..core.tables import Shown, Table, counted
from ..corpus.measuring import enough_tokens
from ..corpus.moments import second_moments
from ..corpus.moments_store import own_corpus
from ..corpus.ordinary import ordinary_texts
from ..corpus.own import is_own
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .index_store import find_index
from .triggers import Triggers


@dataclass(frozen=True)
class LayerCensus:
    """One layer.

    Attributes:
        layer: The layer.
        ffn: Number of parameters of its FFN.
        attention: Number of parameters of its attention.
        neurons: Number of neurons.
        experts: Number of experts.
        idle: Number of neurons whose mean square coefficient is below a ten-thousandth of their
            bank's median. They add almost nothing to what the layer writes. None where the layer
            was not scanned.
        effective_rank: Of the second moment. None where none was given.
    """

    layer: int
    ffn: int
    attention: int
    neurons: int
    experts: int
    idle: int | None
    effective_rank: float | None


@dataclass(frozen=True, repr=False)
class Census(Shown):
    """Parameters by part, and by layer.

    Attributes:
        model: The name that the model was loaded by.
        ffn: Number of parameters of all FFNs.
        attention: Number of parameters of all attention.
        embeddings: Number of parameters of embeddings and unembedding. A tied one counts once.
        other: Number of all other parameters.
        layers: The layers.
    """

    model: str
    ffn: int
    attention: int
    embeddings: int
    other: int
    layers: tuple[LayerCensus, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "parts": {
                "ffn": self.ffn,
                "attention": self.attention,
                "embeddings": self.embeddings,
                "other": self.other,
            },
            "neurons": self.neurons,
            "layers": [dict(vars(layer)) for layer in self.layers],
        }

    def tables(self) -> list[Table]:
        """Return parameters by part, then layer by layer."""
        parts = {
            "memory (FFN)": self.ffn,
            "attention": self.attention,
            "embeddings": self.embeddings,
            "other": self.other,
        }
        columns = {
            "layer": [str(layer.layer) for layer in self.layers],
            "memory": [f"{layer.ffn:,}" for layer in self.layers],
            "attention": [f"{layer.attention:,}" for layer in self.layers],
            "neurons": [f"{layer.neurons:,}" for layer in self.layers],
            "idle": ["" if layer.idle is None else f"{layer.idle:,}" for layer in self.layers],
            "effective rank": [
                ""
                if layer.effective_rank is None
                else f"{layer.effective_rank:z,.0f} of {layer.neurons:,}"
                for layer in self.layers
            ],
        }
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        rows = _together([*zip(*columns.values(), strict=True)])
        return [
            Table(
                f"{self.model}: {self.parameters:,} parameters, {counted(self.neurons, 'neuron')}",
                {"part": "<", "parameters": ">", "share": ">"},
                [(name, f"{n:,}", f"{n / self.parameters:z.1%}") for name, n in parts.items()],
            ),
            Table("by layer", dict.fromkeys(columns, ">"), rows),
        ]

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.ffn + self.attention + self.embeddings + self.other

    @property
    def neurons(self) -> int:
        """Number of all neurons, those of experts included."""
        return sum(layer.neurons for layer in self.layers)


def _together(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows, with neighbouring layers of equal numbers as one row: ("0–29", ...)."""
    alike = [[*group] for _, group in itertools.groupby(rows, key=lambda row: row[1:])]
    return [
        (group[0][0] if len(group) == 1 else f"{group[0][0]}–{group[-1][0]}", *group[0][1:])
        for group in alike
    ]


_IDLE = 1e-4


@asking()
def census(
    lm: LanguageModel,
    *,
    triggers: Triggers | None = None,
    moments: Mapping[int, Tensor] | None = None,
) -> Census:
    """Count a model's parameters by part and layer, and measure how its neurons are used.

    Args:
        lm: The model.
        triggers: Triggers in a corpus, on which idle neurons are counted. None: they are not.
        moments: {layer: (d_ff, d_ff)}, second moments of which the effective rank is computed.
            None: it is not.

    Raises:
        FingerprintError: when the triggers are another model's.
        InputError: when a matrix does not fit its layer.
    """
    check_model(lm)
    if triggers is not None and not lm.has_fingerprint(triggers.fingerprint):
        raise FingerprintError(
            f"the triggers are of {triggers.model}, another model than {lm.name}. "
            "Scan the corpus with this model."
        )
    parameters = _Parameters()
    embeddings = parameters.count(lm.embedding, lm.module.get_output_embeddings())
    embeddings += parameters.count(*(m for m in lm.module.modules() if isinstance(m, nn.Embedding)))
    layers = []
    for ffn, attention in zip(lm.ffn, lm.attention, strict=True):
        moment = (moments or {}).get(ffn.layer)
        if moment is not None and (ffn.n_experts or tuple(moment.shape) != (ffn.n_original,) * 2):
            raise InputError(
                f"the second moment of layer {ffn.layer} has shape {tuple(moment.shape)}: it must "
                "have one row and one column for each neuron of a dense layer",
                argument="moments",
            )
        layers.append(
            LayerCensus(
                layer=ffn.layer,
                ffn=parameters.count(ffn.module),
                attention=parameters.count(attention),
                neurons=sum(bank.d_ff for bank in ffn.banks),
                experts=ffn.n_experts,
                idle=None if triggers is None else _idle(triggers, ffn.layer),
                effective_rank=None if moment is None else effective_rank(moment),
            )
        )
    return Census(
        model=lm.name,
        ffn=sum(layer.ffn for layer in layers),
        attention=sum(layer.attention for layer in layers),
        embeddings=embeddings,
        other=parameters.count(lm.module),
        layers=tuple(layers),
    )


class _Parameters:
    """Counts parameters of modules, each parameter once."""

    def __init__(self) -> None:
        self.counted: set[int] = set()

    def count(self, *modules: nn.Module | None) -> int:
        """Return the number of entries of the parameters that were not counted before."""
        new = {
            id(p): p.numel()
            for module in modules
            if module is not None
            for p in module.parameters()
            if id(p) not in self.counted
        }
        self.counted.update(new)
        return sum(new.values())


def effective_rank(moment: Tensor) -> float:
    """Return the effective rank of a second moment (n, n): 1 to n, or 0 for a matrix of zeros."""
    values = torch.linalg.eigvalsh(moment.double()).clamp(min=0)
    if not float(values.sum()):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def _idle(triggers: Triggers, layer: int) -> int | None:
    """Return the number of idle neurons of a layer. None where it was not scanned."""
    squares = [bank.mean_square for place, bank in triggers.banks.items() if place[0] == layer]
    if not squares:
        return None
    return sum(
        int((each < _IDLE * each.median()).sum() + (each == 0).all() * len(each))
        for each in squares
    )


# ── with text that is read first ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class IdleText:
    """The text on which idle neurons were counted.

    Attributes:
        n_texts: Number of texts.
        n_tokens: Number of tokens.
        index: The folder of the index.
    """

    n_texts: int
    n_tokens: int
    index: str


@dataclass(frozen=True)
class RankText:
    """The text of the effective ranks.

    Attributes:
        n_tokens: Number of tokens.
        of: Whose text it is, in words.
    """

    n_tokens: int
    of: str


@dataclass(frozen=True, repr=False)
class ReadCensus(Shown):
    """A census, and the text that its neurons were measured on.

    Attributes:
        census: The census.
        idle: The text on which idle neurons were counted. None: they were not.
        effective_rank: The text of the effective ranks. None: there are none.
    """

    census: Census
    idle: IdleText | None = None
    effective_rank: RankText | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the census as JSON-able values, and the text as "read"."""
        texts = {"idle": self.idle, "effective_rank": self.effective_rank}
        read = {name: dict(vars(text)) for name, text in texts.items() if text is not None}
        return {**self.census.to_dict(), "read": read}

    def tables(self) -> list[Table]:
        """Return the tables of the census, then the text as lines."""
        lines = []
        if self.idle is not None:
            texts = counted(self.idle.n_texts, "text")
            tokens = counted(self.idle.n_tokens, "token")
            lines.append(f"idle in {texts}, {tokens}, of {self.idle.index}")
        if self.effective_rank is not None:
            tokens = counted(self.effective_rank.n_tokens, "token")
            lines.append(f"effective rank in the first {tokens} of {self.effective_rank.of}")
        return [*self.census.tables(), *(Table(line, {}) for line in lines)]


def find_census(
    lm: LanguageModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    texts: str | Iterable[str] | None = None,
    max_tokens: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ReadCensus:
    """Return a census with idle neurons and effective ranks, reading the text that they need.

    Idle neurons are those of the model's index, which is made if there is none. Effective ranks
    need more: an index keeps only the texts that some neuron fires on. They are measured on the
    same texts if texts are given, otherwise on the bundled corpus. They take 16 tokens for each
    neuron of the widest layer.

    Args:
        lm: The model.
        folder: As `find_index`.
        texts: As `find_index`. They are read twice, so they must not be an iterator. "own": text
            that the model writes itself, for the effective ranks too.
        max_tokens: As `find_index`. Also the most tokens for the effective ranks.
        seed: Seed of the model's own text.
        progress: Gets how far each step is.

    Raises:
        InputError: when the texts are an iterator.
        FactsmithError: as `find_index` and `second_moments`.
    """
    check_model(lm)
    if isinstance(texts, Iterator):
        raise InputError(
            "texts is an iterator, which can be read once: it must be a list, or another "
            "collection that can be read twice",
            argument="texts",
        )
    index = find_index(lm, folder, texts=texts, max_tokens=max_tokens, seed=seed, progress=progress)
    scanned = index.triggers
    idle = IdleText(scanned.n_texts, scanned.n_tokens, str(index.folder))
    dense = [ffn.layer for ffn in lm.ffn if not ffn.n_experts]
    if not dense:
        return ReadCensus(census(lm, triggers=scanned), idle)
    n = min(enough_tokens(lm, dense), max_tokens or float("inf"))
    corpus: Iterable[str]
    if texts is None:
        corpus, whose = ordinary_texts(), "the bundled text"
    elif is_own(texts):
        corpus, whose = own_corpus(lm, n, seed, progress), "the model's own words"
    else:
        corpus, whose = texts, "the texts"
    moments = second_moments(
        lm,
        corpus,
        dense,
        max_tokens=n,
        progress=lambda done: tell(progress, "second moments", done, round(n)),
    )
    ranks = RankText(moments[dense[0]].count, whose)
    matrices = {layer: moment.matrix for layer, moment in moments.items()}
    return ReadCensus(census(lm, triggers=scanned, moments=matrices), idle, ranks)
