"""What keys match: for each neuron, the places in a corpus where its coefficient is extreme.

    triggers = find_triggers(lm, texts, top=25, folder="triggers")   # from .trigger_scan
    triggers = Triggers.load("triggers")                             # later, without the model
    for trigger in triggers.of((3, 17)):
        print(trigger.coefficient, trigger.prefix)    # ends with the token where it fires

Geva et al. 2021 (arXiv 2012.14913): a key is known by the prefixes on which it fires. This module
holds the result and its file; `trigger_scan` makes it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..core.artefact import (
    FLOATS,
    INTEGERS,
    believing,
    read_artefact,
    read_metadata,
    stated_count,
    stated_digest,
    stored,
    write_tensors,
)
from ..core.checks import check_count
from ..core.errors import DamagedError, FingerprintError, InputError, LayerError
from ..core.tables import Shown, Table, counted, ending
from ..corpus.scan import Bank, bank_name, bank_of, banks, named_bank
from ..model.address import Neuron
from ..model.language_model import LanguageModel

Sign = Literal["top", "bottom"]
"""Where coefficients are largest, or where they are smallest."""

SIGNS: tuple[Sign, ...] = ("top", "bottom")

FORMAT = "triggers 1"
"""The format of the file that holds triggers."""


def check_sign(sign: object) -> None:
    """Check that a sign is "top" or "bottom".

    Raises:
        InputError: when it is not.
    """
    if sign not in SIGNS:
        raise InputError(
            f'sign is {sign!r}: it must be "top", where coefficients are largest, or "bottom", '
            "where they are smallest",
            argument="sign",
        )


@dataclass(frozen=True, repr=False)
class Trigger:
    """A place in a text where a neuron's coefficient is among its largest (or smallest).

    Attributes:
        coefficient: The neuron's coefficient at the place.
        text: The whole text.
        start: First character of the token at which the neuron fires.
        stop: The character after that token.
        token: The token's id.
        next_token: The id of the token that follows. None at the end of the text.
        position: The number of the token in the text, counted from 0.
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
        """The text up to the token, with it."""
        return self.text[: self.stop]

    def __repr__(self) -> str:
        return f"Trigger({self.coefficient:+z.2f}, {ending(self.prefix)!r})"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class BankTriggers:
    """The triggers of one bank of neurons, strongest first.

    A coefficient of 0 marks an empty place.

    Attributes:
        coefficients: {"top", "bottom"}: (d_ff, t) float32.
        texts: {"top", "bottom"}: (d_ff, t) int64, indices into `Triggers.texts`.
        positions: {"top", "bottom"}: (d_ff, t) int64, the number of the token in its text.
        fired: (d_ff,) float64, the share of tokens at which the coefficient is above zero.
        mean_square: (d_ff,) float64, the coefficient's mean square over all tokens of the corpus.
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
    """The triggers of every neuron of some layers in a corpus.

    Attributes:
        banks: {(layer,) or (layer, expert): BankTriggers}.
        texts: The texts that the triggers refer to.
        model: The name that the model was loaded by.
        fingerprint: The model's fingerprint.
        corpus: sha256 of the tokens of the corpus.
        n_texts: Number of texts read.
        n_tokens: Number of tokens read.
    """

    banks: Mapping[Bank, BankTriggers]
    texts: Sequence[str]
    model: str
    fingerprint: str
    corpus: str
    n_texts: int
    n_tokens: int
    _ids: Tensor = field(repr=False)
    """The tokens of the texts, one text after another."""
    _spans: Tensor = field(repr=False)
    """(n, 2), the characters of each token."""
    _starts: Tensor = field(repr=False)
    """(texts + 1,), where the tokens of each text begin."""

    def tables(self) -> list[Table]:
        """Return one table: what was scanned, and how much was kept."""
        each = max((len(bank.coefficients["top"][0]) for bank in self.banks.values()), default=0)
        n_neurons = sum(len(bank.fired) for bank in self.banks.values())
        rows = [
            ("neurons", f"{n_neurons:,} in {counted(len(self.banks), 'bank')}"),
            ("triggers each", f"{each} largest, {each} smallest"),
            ("read", f"{counted(self.n_texts, 'text')}, {counted(self.n_tokens, 'token')}"),
            ("kept", counted(len(self.texts), "text")),
            ("corpus", self.corpus[:12]),
        ]
        return [Table(f"triggers of {self.model}", {"": "<", " ": "<"}, rows)]

    def of(self, neuron: Neuron, *, sign: Sign = "top", k: int | None = None) -> list[Trigger]:
        """Return the triggers of a neuron, strongest first.

        Args:
            neuron: (layer, i) or (layer, expert, i).
            sign: "top" for the largest coefficients, "bottom" for the smallest.
            k: At most so many. None: all.

        Raises:
            LayerError: when the neuron was not scanned.
        """
        place, i = bank_of(neuron)
        bank = self.banks.get(place)
        if bank is None or not 0 <= i < len(bank.fired):
            raise LayerError(
                f"neuron {tuple(neuron)} was not scanned. "
                f"Ask for a neuron of a bank that was: {', '.join(map(str, self.banks))}."
            )
        check_sign(sign)
        if k is not None:
            k = check_count(k, "k", "the number of triggers to return", least=0)
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
        """Return the token that follows each trigger: (d_ff, t) int64, -1 where there is none."""
        triggers = self.banks[bank]
        check_sign(sign)
        texts = triggers.texts[sign]
        at = self._starts[texts] + triggers.positions[sign]
        inside = (at + 1 < self._starts[texts + 1]) & (triggers.coefficients[sign] != 0)
        return torch.where(inside, self._ids[(at + 1).clamp(max=len(self._ids) - 1)], -1)

    def tokens(self, bank: Bank, sign: Sign = "top", *, back: int = 0) -> Tensor:
        """Return the token at each trigger: (d_ff, t) int64, -1 where there is none.

        Args:
            bank: (layer,) or (layer, expert).
            sign: "top" for the largest coefficients, "bottom" for the smallest.
            back: Return the token so many places before the trigger.
        """
        triggers = self.banks[bank]
        check_sign(sign)
        filled = (triggers.coefficients[sign] != 0) & (triggers.positions[sign] >= back)
        at = self._starts[triggers.texts[sign]] + triggers.positions[sign] - back
        return torch.where(filled, self._ids[at.clamp(min=0)], -1)

    def position(self, text: int, character: int) -> int | None:
        """Return the first token of a text that ends at a character or after it.

        None where no token does.
        """
        stops = self._spans[int(self._starts[text]) : int(self._starts[text + 1]), 1]
        later = (stops >= character).nonzero()
        return int(later[0, 0]) if len(later) else None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `triggers.safetensors`, texts included, into a folder in one step.

        Raises:
            WorkspaceError: when the file cannot be written.
        """
        raw = [text.encode() for text in self.texts]
        tensors = {
            "ids": self._ids,
            "spans": self._spans,
            "starts": self._starts,
            "characters": torch.frombuffer(bytearray(b"".join(raw) or b" "), dtype=torch.uint8),
            "lengths": torch.tensor([len(text) for text in raw]),
        }
        for bank, triggers in self.banks.items():
            for name, tensor in _named_tensors(triggers).items():
                tensors[f"{bank_name(bank)}/{name}"] = tensor
        described = {name: str(getattr(self, name)) for name in _DESCRIBED}
        write_tensors(Path(folder) / TRIGGERS, tensors, {"format": FORMAT, **described})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], lm: LanguageModel | None = None) -> Triggers:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            lm: The model that the triggers must belong to. None: any.

        Raises:
            DamagedError: when the file is missing or was altered.
            FingerprintError: when the triggers belong to another model than `lm`.
        """
        tensors, metadata = read_artefact(
            Path(folder) / TRIGGERS, "triggers", FORMAT, "find_triggers", "scan the corpus again"
        )
        with believing(Path(folder) / TRIGGERS, "an index of triggers", "scan the corpus again"):
            triggers = cls._read(tensors, metadata)
        if lm is not None:
            _check_model(metadata, folder, lm)
            sizes = {bank: each.d_ff for bank, each in banks(lm).items()}
            if wrong := [b for b, x in triggers.banks.items() if sizes.get(b) != len(x.fired)]:
                raise DamagedError(
                    f"{Path(folder) / TRIGGERS} holds triggers of bank {wrong[0]}, which {lm.name} "
                    "does not have in that size; scan the corpus again"
                )
        return triggers

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Triggers:
        """Return the triggers of a file; raises KeyError, TypeError and ValueError."""
        ids = stored(tensors, "ids", (None,), INTEGERS, least=0, below=2**31)
        starts = stored(tensors, "starts", (None,), INTEGERS, least=0, below=len(ids) + 1)
        if bool((starts.diff() < 0).any()) or starts[0] != 0 or starts[-1] != len(ids):
            raise ValueError("its texts do not begin where its tokens do")
        n_texts = len(starts) - 1
        texts = _texts(tensors, n_texts)
        parts: dict[Bank, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if "/" in name:
                bank, _, part = name.partition("/")
                parts.setdefault(named_bank(bank), {})[part] = tensor
        return cls(
            banks={bank: _bank_triggers(each, starts) for bank, each in sorted(parts.items())},
            texts=texts,
            model=metadata["model"],
            fingerprint=stated_digest(metadata, "fingerprint"),
            corpus=stated_digest(metadata, "corpus"),
            n_texts=stated_count(metadata, "n_texts"),
            n_tokens=stated_count(metadata, "n_tokens"),
            _ids=ids,
            _spans=stored(tensors, "spans", (len(ids), 2), INTEGERS, least=-1, below=2**31),
            _starts=starts,
        )


def holds_triggers(folder: str | os.PathLike[str], lm: LanguageModel) -> bool:
    """Return whether a folder holds triggers of a model, of any corpus.

    Raises:
        FingerprintError: when it holds triggers of another model.
    """
    path = Path(folder) / TRIGGERS
    if path.is_file():
        _check_model(read_metadata(path), folder, lm)
    return path.is_file()


def _check_model(
    metadata: Mapping[str, str], folder: str | os.PathLike[str], lm: LanguageModel
) -> None:
    """Check that the triggers in a folder belong to a model."""
    if not lm.has_fingerprint(metadata.get("fingerprint", lm.fingerprint)):
        raise FingerprintError(
            f"the triggers in {folder} belong to {metadata.get('model', 'another model')}, "
            f"fingerprint {metadata['fingerprint'][:12]}; {lm.name} has fingerprint "
            f"{lm.fingerprint[:12]}. Load that model, or scan the corpus into another folder."
        )


TRIGGERS = "triggers.safetensors"

_DESCRIBED = ("model", "fingerprint", "corpus", "n_texts", "n_tokens")

_BY_SIGN = ("coefficients", "texts", "positions")


def _named_tensors(triggers: BankTriggers) -> dict[str, Tensor]:
    """Return the tensors of one bank by their names in the file."""
    signed = {
        f"{sign}.{name}": getattr(triggers, name)[sign].contiguous()
        for name in _BY_SIGN
        for sign in SIGNS
    }
    return {**signed, "fired": triggers.fired, "mean_square": triggers.mean_square}


def _texts(tensors: Mapping[str, Tensor], n_texts: int) -> list[str]:
    """Return the texts of a file; raises KeyError and ValueError."""
    characters = stored(tensors, "characters", (None,), (torch.uint8,)).numpy().tobytes()
    lengths = stored(tensors, "lengths", (n_texts,), INTEGERS, least=0, below=len(characters) + 1)
    ends = lengths.cumsum(0).tolist()
    if ends and ends[-1] > len(characters):
        raise ValueError("its texts are longer than its characters")
    return [characters[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]


def _bank_triggers(tensors: Mapping[str, Tensor], starts: Tensor) -> BankTriggers:
    """Return one bank from its tensors by name: the inverse of `_named_tensors`.

    Args:
        tensors: The tensors of the bank.
        starts: (texts + 1,), where the tokens of each text begin.

    Raises:
        KeyError, ValueError: They are not those of a bank.
    """
    fired = stored(tensors, "fired", (None,), FLOATS, least=0)
    signed: dict[str, dict[Sign, Tensor]] = {name: {} for name in _BY_SIGN}
    shape: tuple[int | None, ...] = (len(fired), None)
    for sign in SIGNS:
        strengths = stored(tensors, f"{sign}.coefficients", shape, (torch.float32,))
        shape = tuple(strengths.shape)
        texts = stored(
            tensors, f"{sign}.texts", shape, INTEGERS, least=0, below=max(len(starts) - 1, 1)
        )
        places = stored(tensors, f"{sign}.positions", shape, INTEGERS, least=0)
        filled = strengths != 0
        if bool((filled & (starts[texts] + places >= starts[texts + 1])).any()):
            raise ValueError(f"a place of its {sign} triggers is outside of their texts")
        signed["coefficients"][sign] = strengths
        signed["texts"][sign], signed["positions"][sign] = texts, places
    square = stored(tensors, "mean_square", (len(fired),), FLOATS, least=0)
    return BankTriggers(**signed, fired=fired, mean_square=square)
