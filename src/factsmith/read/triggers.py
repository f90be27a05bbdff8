"""What the memory's keys match: for every neuron the places in a corpus where its coefficient is largest, and where it is smallest.

    found = find_triggers(lm, texts, top=25, folder="triggers")     # one pass over the corpus, all layers at once
    found = Triggers.load("triggers")                               # later, without the model
    for trigger in found.of((3, 17)):
        print(trigger.coefficient, trigger.prefix)                  # ends with the token at which the neuron fires

Geva et al. 2021 (arXiv 2012.14913): a key is known by the prefixes it fires on. Per text a neuron counts once, at the position of its
largest coefficient (the first of equals), and of texts that tie the earlier ones stay. Coefficients of GELU and gated neurons have a sign,
and what is far below zero writes the value's opposite, so the smallest are kept as well.

What is held in memory grows with neurons times `top`, not with the corpus.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.artefact import read_artefact, read_metadata, write_tensors
from ..core.checks import check_count
from ..core.errors import FingerprintError, InputError, LayerError
from ..core.tables import Shown, Table, counted, ending
from ..corpus.scan import Bank, bank_name, bank_of, named_bank
from ..model.address import Neuron
from ..model.language_model import LanguageModel

if TYPE_CHECKING:
    pass


Sign = Literal["top", "bottom"]

SIGNS: tuple[Sign, ...] = ("top", "bottom")

FORMAT = "triggers 1"


def check_sign(sign: object) -> None:
    """Raises InputError for anything but "top" and "bottom"."""
    if sign not in SIGNS:
        raise InputError(
            f'sign is "top" (where coefficients are largest) or "bottom" (lowest); got {sign!r}'
        )


@dataclass(frozen=True, repr=False)
class Trigger:
    """A place in a text where a neuron's coefficient is among its largest (or smallest).

    coefficient  the neuron's
    text         the whole text
    start, stop  the characters of the token at which it fires
    token        that token's id
    next_token   the id of the token behind it; None at the end of the text
    position     which token of the text it is
    """

    coefficient: float
    text: str
    start: int
    stop: int
    token: int
    next_token: int | None
    position: int

    @property
    def prefix(self) -> str:
        """The text up to and with the token."""
        return self.text[: self.stop]

    def __repr__(self) -> str:
        return f"Trigger({self.coefficient:+.2f}, {ending(self.prefix)!r})"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BankTriggers:
    """The triggers of one bank of neurons, best first; a coefficient of 0 marks an empty place.

    coefficients  {"top", "bottom"}: (d_ff, t) float32
    texts         {"top", "bottom"}: (d_ff, t) int64, indices into `Triggers.texts`
    positions     {"top", "bottom"}: (d_ff, t) int64, which token of the text
    fired         (d_ff,) float64, the share of tokens at which the coefficient was above zero
    mean_square   (d_ff,) float64, its mean square over all tokens of the corpus
    """

    coefficients: Mapping[Sign, Tensor]
    texts: Mapping[Sign, Tensor]
    positions: Mapping[Sign, Tensor]
    fired: Tensor
    mean_square: Tensor

    def __repr__(self) -> str:
        n, t = self.coefficients["top"].shape
        return f"BankTriggers({counted(n, 'neuron')}, {t} triggers each)"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Triggers(Shown):
    """What every neuron of some layers fires on in a corpus.

    banks        {(layer,) or (layer, expert): BankTriggers}
    texts        the texts that are referred to
    model        what the model was loaded as
    fingerprint  the model's
    corpus       sha256 of the corpus' tokens
    n_texts      texts read
    n_tokens     tokens read
    """

    banks: Mapping[Bank, BankTriggers]
    texts: Sequence[str]
    model: str
    fingerprint: str
    corpus: str
    n_texts: int
    n_tokens: int
    _ids: Tensor = field(repr=False)  # the texts' tokens, one after another
    _spans: Tensor = field(repr=False)  # (n, 2) their characters
    _starts: Tensor = field(repr=False)  # (texts + 1,) where each text's tokens begin

    def tables(self) -> list[Table]:
        """What was scanned, of which model, and on what."""
        each = max((len(bank.coefficients["top"][0]) for bank in self.banks.values()), default=0)
        rows = [
            (
                "neurons",
                f"{sum(len(bank.fired) for bank in self.banks.values()):,} in {counted(len(self.banks), 'bank')}",
            ),
            ("triggers each", f"{each} largest, {each} smallest"),
            ("read", f"{counted(self.n_texts, 'text')}, {counted(self.n_tokens, 'token')}"),
            ("kept", counted(len(self.texts), "text")),
            ("corpus", self.corpus[:12]),
        ]
        return [Table(f"triggers of {self.model}", {"": "<", " ": "<"}, rows)]

    def of(self, neuron: Neuron, *, sign: Sign = "top", k: int | None = None) -> list[Trigger]:
        """The triggers of a neuron, strongest first, at most k (None: all). Raises LayerError for a neuron that was not scanned."""
        place, i = bank_of(neuron)
        bank = self.banks.get(place)
        if bank is None or not 0 <= i < len(bank.fired):
            raise LayerError(
                f"neuron {tuple(neuron)} was not scanned; there are those of {', '.join(map(str, self.banks))}"
            )
        check_sign(sign)
        k = (
            None
            if k is None
            else check_count(k, "k", "the number of triggers to give", least=0, also="None for all")
        )
        columns = zip(
            bank.coefficients[sign][i].tolist(),
            bank.texts[sign][i].tolist(),
            bank.positions[sign][i].tolist(),
            strict=True,
        )
        return [
            self._trigger(*column)
            for column in itertools.islice((column for column in columns if column[0]), k)
        ]

    def _trigger(self, coefficient: float, text: int, position: int) -> Trigger:
        at, end = int(self._starts[text]) + position, int(self._starts[text + 1])
        start, stop = self._spans[at].tolist()
        next_token = int(self._ids[at + 1]) if at + 1 < end else None
        return Trigger(
            coefficient, self.texts[text], start, stop, int(self._ids[at]), next_token, position
        )

    def next_tokens(self, bank: Bank, sign: Sign = "top") -> Tensor:
        """The token behind each trigger: (d_ff, t) int64, -1 where there is none."""
        own = self.banks[bank]
        check_sign(sign)
        at = self._starts[own.texts[sign]] + own.positions[sign]
        inside = (at + 1 < self._starts[own.texts[sign] + 1]) & (own.coefficients[sign] != 0)
        return torch.where(inside, self._ids[(at + 1).clamp(max=len(self._ids) - 1)], -1)

    def tokens(self, bank: Bank, sign: Sign = "top", *, back: int = 0) -> Tensor:
        """The token at each trigger, or so many before it: (d_ff, t) int64, -1 where there is none."""
        own = self.banks[bank]
        check_sign(sign)
        there = (own.coefficients[sign] != 0) & (own.positions[sign] >= back)
        return torch.where(
            there,
            self._ids[(self._starts[own.texts[sign]] + own.positions[sign] - back).clamp(min=0)],
            -1,
        )

    def position(self, text: int, character: int) -> int | None:
        """The first token of a text that ends at or behind a character; None where there is none."""
        stops = self._spans[int(self._starts[text]) : int(self._starts[text + 1]), 1]
        behind = (stops >= character).nonzero()
        return int(behind[0, 0]) if len(behind) else None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `triggers.safetensors`, with the texts and what they are of, in one step. Raises WorkspaceError."""
        raw = [text.encode() for text in self.texts]
        tensors = {
            "ids": self._ids,
            "spans": self._spans,
            "starts": self._starts,
            "characters": torch.frombuffer(bytearray(b"".join(raw) or b" "), dtype=torch.uint8),
            "lengths": torch.tensor([len(text) for text in raw]),
        }
        for bank, own in self.banks.items():
            for name, tensor in _named(own).items():
                tensors[f"{bank_name(bank)}/{name}"] = tensor
        described = {name: str(getattr(self, name)) for name in _DESCRIBED}
        write_tensors(Path(folder) / _FILE, tensors, {"format": FORMAT, **described})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], lm: LanguageModel | None = None) -> Triggers:
        """Read what `save` wrote. Raises DamagedError when it is missing or altered, FingerprintError when it is not of `lm`."""
        tensors, metadata = read_artefact(
            Path(folder) / _FILE, "triggers", FORMAT, "find_triggers", "scan the corpus again"
        )
        if lm is not None:
            _check_model(metadata, folder, lm)
        characters, ends = (
            tensors["characters"].numpy().tobytes(),
            tensors["lengths"].cumsum(0).tolist(),
        )
        texts = [characters[a:b].decode() for a, b in zip([0, *ends], ends)]
        parts: dict[Bank, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if "/" in name:
                bank, _, part = name.partition("/")
                parts.setdefault(named_bank(bank), {})[part] = tensor
        return cls(
            banks={bank: _bank(own) for bank, own in sorted(parts.items())},
            texts=texts,
            **{name: kind(metadata[name]) for name, kind in _DESCRIBED.items()},
            _ids=tensors["ids"],
            _spans=tensors["spans"],
            _starts=tensors["starts"],
        )


def holds_triggers(folder: str | os.PathLike[str], lm: LanguageModel) -> bool:
    """Whether there are triggers in a folder, of whatever corpus. Raises FingerprintError when they are another model's."""
    path = Path(folder) / _FILE
    if path.is_file():
        _check_model(read_metadata(path), folder, lm)
    return path.is_file()


def _check_model(
    metadata: Mapping[str, str], folder: str | os.PathLike[str], lm: LanguageModel
) -> None:
    if metadata.get("fingerprint", lm.fingerprint) != lm.fingerprint:
        raise FingerprintError(
            f"the triggers in {folder} are of {metadata['model']} with fingerprint {metadata['fingerprint'][:12]}; {lm.name} has "
            f"{lm.fingerprint[:12]}: scan the corpus with it, into another folder"
        )


_FILE = "triggers.safetensors"

_DESCRIBED: Mapping[str, Any] = {
    "model": str,
    "fingerprint": str,
    "corpus": str,
    "n_texts": int,
    "n_tokens": int,
}

_BY_SIGN = ("coefficients", "texts", "positions")


def _named(own: BankTriggers) -> dict[str, Tensor]:
    signed = {
        f"{sign}.{name}": getattr(own, name)[sign].contiguous()
        for name in _BY_SIGN
        for sign in SIGNS
    }
    return {**signed, "fired": own.fired, "mean_square": own.mean_square}


def _bank(tensors: Mapping[str, Tensor]) -> BankTriggers:
    signed = {name: {sign: tensors[f"{sign}.{name}"] for sign in SIGNS} for name in _BY_SIGN}
    return BankTriggers(**signed, fired=tensors["fired"], mean_square=tensors["mean_square"])
