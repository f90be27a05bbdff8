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

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_count, check_items, check_limit
from ..errors import FingerprintError, InputError, LayerError, NumericsError
from ..files import check_writable
from ..model.ffn import Neuron, check_layer
from ..model.load import LanguageModel, check_model
from ..model.scan import (
    ADDED,
    Bank,
    Coefficients,
    Piece,
    bank_name,
    bank_of,
    banks,
    batches,
    check_dtype,
    named_bank,
    pieces,
    scan,
    windows,
)
from ..progress import Progress, tell
from ..tables import Shown, Table, counted, ending
from ..tensors import Checkpoint, read_artefact, read_metadata, write_tensors

Sign = Literal["top", "bottom"]
_SIGNS: tuple[Sign, ...] = ("top", "bottom")
_LAST = 2**31 - 1  # piece numbers are kept below it
_AT_ONCE = 2**22  # coefficients looked through for their place at a time
_FORMAT = "triggers 1"
_KEPT = 200_000  # tokens held beside those of texts some neuron refers to, before the others are let go


def check_sign(sign: object) -> None:
    """Raises InputError for anything but "top" and "bottom"."""
    if sign not in _SIGNS:
        raise InputError(f'sign is "top" (where coefficients are largest) or "bottom" (lowest); got {sign!r}')


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
            ("neurons", f"{sum(len(bank.fired) for bank in self.banks.values()):,} in {counted(len(self.banks), 'bank')}"),
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
            raise LayerError(f"neuron {tuple(neuron)} was not scanned; there are those of {', '.join(map(str, self.banks))}")
        check_sign(sign)
        k = None if k is None else check_count(k, "k", "how many triggers to give, or None for all", least=0)
        columns = zip(bank.coefficients[sign][i].tolist(), bank.texts[sign][i].tolist(), bank.positions[sign][i].tolist(), strict=True)
        return [self._trigger(*column) for column in itertools.islice((column for column in columns if column[0]), k)]

    def _trigger(self, coefficient: float, text: int, position: int) -> Trigger:
        at, end = int(self._starts[text]) + position, int(self._starts[text + 1])
        start, stop = self._spans[at].tolist()
        next_token = int(self._ids[at + 1]) if at + 1 < end else None
        return Trigger(coefficient, self.texts[text], start, stop, int(self._ids[at]), next_token, position)

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
        return torch.where(there, self._ids[(self._starts[own.texts[sign]] + own.positions[sign] - back).clamp(min=0)], -1)

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
        write_tensors(Path(folder) / _FILE, tensors, {"format": _FORMAT, **described})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], lm: LanguageModel | None = None) -> Triggers:
        """Read what `save` wrote. Raises DamagedError when it is missing or altered, FingerprintError when it is not of `lm`."""
        tensors, metadata = read_artefact(Path(folder) / _FILE, "triggers", _FORMAT, "find_triggers", "scan the corpus again")
        if lm is not None:
            _check_model(metadata, folder, lm)
        characters, ends = tensors["characters"].numpy().tobytes(), tensors["lengths"].cumsum(0).tolist()
        texts = [characters[a:b].decode() for a, b in zip([0, *ends], ends)]  # noqa: B905 - one more start than ends
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


def _check_model(metadata: Mapping[str, str], folder: str | os.PathLike[str], lm: LanguageModel) -> None:
    if metadata.get("fingerprint", lm.fingerprint) != lm.fingerprint:
        raise FingerprintError(
            f"the triggers in {folder} are of {metadata['model']} with fingerprint {metadata['fingerprint'][:12]}; {lm.name} has "
            f"{lm.fingerprint[:12]}: scan the corpus with it, into another folder"
        )


_FILE = "triggers.safetensors"
_DESCRIBED: Mapping[str, Any] = {"model": str, "fingerprint": str, "corpus": str, "n_texts": int, "n_tokens": int}
_BY_SIGN = ("coefficients", "texts", "positions")


def _named(own: BankTriggers) -> dict[str, Tensor]:
    signed = {f"{sign}.{name}": getattr(own, name)[sign].contiguous() for name in _BY_SIGN for sign in _SIGNS}
    return {**signed, "fired": own.fired, "mean_square": own.mean_square}


def _bank(tensors: Mapping[str, Tensor]) -> BankTriggers:
    signed = {name: {sign: tensors[f"{sign}.{name}"] for sign in _SIGNS} for name in _BY_SIGN}
    return BankTriggers(**signed, fired=tensors["fired"], mean_square=tensors["mean_square"])


# ── the pass ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Best:
    """The largest coefficients of one bank so far.

    keys    {sign: (t, d_ff) int64}, descending: the coefficient's bits above, and below how early its piece came. The bits of floats above
            zero are in the floats' order, so one number orders by coefficient, then by piece, and the order of batches does not matter
    places  {sign: (t, d_ff) int32} the token's position
    fired   (d_ff,) float64; squares (d_ff,) float64; sums over tokens
    """

    def __init__(self, d_ff: int, top: int) -> None:
        self.keys = {sign: torch.zeros(top, d_ff, dtype=torch.int64) for sign in _SIGNS}
        self.places = {sign: torch.zeros(top, d_ff, dtype=torch.int32) for sign in _SIGNS}
        self.fired = torch.zeros(d_ff, dtype=torch.float64)
        self.squares = torch.zeros(d_ff, dtype=torch.float64)

    def add(self, found: Coefficients, batch: _Batch) -> None:
        """Take in one batch."""
        m = found.m.float()
        self.fired += (m > 0).sum(0, dtype=torch.int32).cpu()
        self.squares += m.square().sum(0).double().cpu()
        places = batch.places(found)
        for sign in _SIGNS:
            ends = m.new_zeros(len(batch.early) + 1, m.shape[1])
            ends.scatter_reduce_(0, places.row[:, None].expand_as(m), m, "amax" if sign == "top" else "amin")
            strength = ends[:-1].abs().cpu()
            if not bool(strength.amax() < math.inf):
                raise NumericsError("a coefficient is not finite; load the model in a wider dtype, or look for damaged weights")
            keys = (strength.view(torch.int32).long() << 32) | batch.early[:, None]
            self._merge(sign, keys, partial(places.first, m, ends))

    def _merge(self, sign: Sign, keys: Tensor, find: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Keep the largest of what is held and of new keys (rows, d_ff), at most `_LAST` for coefficients of 0, which are none.

        find: the positions of some, by row and neuron.
        """
        held, places, top = self.keys[sign], self.places[sign], len(self.keys[sign])
        changed = (keys.amax(0) > held[-1].clamp(min=_LAST)).nonzero()[:, 0]
        if not len(changed):
            return
        best = torch.cat([held[:, changed], keys[:, changed]]).topk(top, dim=0)
        where = places[:, changed].gather(0, best.indices.clamp(max=top - 1))
        new = ((best.indices >= top) & (best.values > _LAST)).nonzero(as_tuple=True)
        where[new] = find(best.indices[new] - top, changed[new[1]])
        held[:, changed], places[:, changed] = best.values.masked_fill(best.values <= _LAST, 0), where

    def numbers(self, sign: Sign) -> Tensor:
        """The numbers of the pieces held: (t, d_ff), meaningless where a key is 0."""
        return _LAST - (self.keys[sign] & 0xFFFFFFFF)

    def state(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        signed = {f"{sign}.{name}": getattr(self, name)[sign] for sign in _SIGNS for name in ("keys", "places")}
        return {**signed, "fired": self.fired, "squares": self.squares}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, tensor in tensors.items():
            sign, _, part = name.rpartition(".")
            if sign:
                getattr(self, part)[sign] = tensor
            else:
                setattr(self, name, tensor)

    def result(self, index: Tensor, n_tokens: int) -> BankTriggers:
        """The triggers held, texts numbered by their place in `index` (sorted piece numbers)."""
        coefficients, texts, positions = {}, {}, {}
        for sign in _SIGNS:
            keys = self.keys[sign].T
            strength = (keys >> 32).int().view(torch.float32)
            coefficients[sign] = (strength if sign == "top" else -strength).contiguous()
            held = keys != 0
            texts[sign] = torch.searchsorted(index, torch.where(held, self.numbers(sign).T, index[0]).contiguous())
            positions[sign] = torch.where(held, self.places[sign].T, 0).long()
        return BankTriggers(
            coefficients=coefficients, texts=texts, positions=positions, fired=self.fired / n_tokens, mean_square=self.squares / n_tokens
        )


class _Batch:
    """The pieces in the rows of a batch: which of their tokens are written in the text, and by when each piece came, later ones lower."""

    def __init__(self, rows: Sequence[Piece]) -> None:
        self.written = torch.tensor([tuple(span) != ADDED for piece in rows for span in piece.spans])
        self.starts = torch.tensor([0, *itertools.accumulate(len(piece.ids) for piece in rows)])
        self.early = _LAST - torch.tensor([piece.number for piece in rows])

    def places(self, found: Coefficients) -> _Places:
        """Where the tokens of a bank stand; those that the tokenizer added are put in a row behind the last."""
        n, device = len(self.early), found.m.device
        written = self.written.to(device)[self.starts.to(device)[found.row] + found.column]
        row = torch.where(written, found.row, n)
        return _Places(row, found.column, row.argsort(stable=True), torch.bincount(row, minlength=n + 1))


@dataclass(frozen=True, eq=False)
class _Places:
    """Where in a batch the n tokens of a bank stand.

    row, column  (n,); order (n,) the tokens row by row; counts (rows + 1,) how many each row has
    """

    row: Tensor
    column: Tensor
    order: Tensor
    counts: Tensor

    def first(self, m: Tensor, ends: Tensor, row: Tensor, i: Tensor) -> Tensor:
        """The columns (p,) at which some neurons first reach their ends (rows + 1, d_ff) in some rows (p,), on the CPU."""
        counts, begins = self.counts[:-1, None], (self.counts.cumsum(0) - self.counts)[:-1, None]
        steps = torch.arange(int(counts.max()), device=m.device)
        tokens = self.order[(begins + steps.minimum(counts - 1)).clamp(0, len(m) - 1)]  # a shorter row has its last again
        found = []
        for r, at in zip(*(torch.split(x.to(m.device), max(_AT_ONCE // len(steps), 1)) for x in (row, i)), strict=True):
            token = tokens[r]
            hit = (m.take(token * m.shape[1] + at[:, None]) == ends[r, at, None]).byte().argmax(1, keepdim=True)  # the first of equals
            found.append(self.column[token.gather(1, hit)[:, 0]])
        return torch.cat(found).int().cpu()


def find_triggers(
    lm: LanguageModel,
    texts: str | Iterable[str],
    layers: Iterable[int] | None = None,
    *,
    top: int = 25,
    max_tokens: float = math.inf,
    batch_tokens: int = 4096,
    dtype: torch.dtype | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Triggers:
    """The `top` strongest triggers, of either sign, of every neuron of some layers (None: all) in one pass over a corpus.

    max_tokens    stop after this many tokens (the last text is cut)
    batch_tokens  padded tokens in one forward pass
    dtype         torch.bfloat16 runs the pass in it; None: the model's own
    folder        where the result is kept, and before it now and then what there is: called again with the same arguments and texts, a run
                  that was killed goes on where it stood

    Tokens that the tokenizer adds (BOS) are not taken for triggers: every text begins with them. Texts longer than the model's context, or
    1,024 tokens, are cut, and each part counts as a text. Long texts are tokenized part by part, cut at white space: a token that reaches
    hundreds of characters beyond the cut may come out as two. Raises LayerError, InputError when there is no text, or the folder holds an
    unfinished run of other texts or arguments, FingerprintError when it, or the triggers in the folder, are another model's, NumericsError
    for coefficients that are not finite, WorkspaceError for a folder that cannot be written, before anything is read.
    """
    check_model(lm)
    top = check_count(top, "top", "the number of triggers to keep for each neuron")
    max_tokens = check_limit(max_tokens, "max_tokens")
    batch_tokens = check_count(batch_tokens, "batch_tokens", "the number of tokens to run together")
    check_dtype(lm, dtype)
    if folder is not None:
        holds_triggers(check_writable(folder), lm)
    wanted = sorted(
        {check_layer(x, lm.n_layers) for x in (range(lm.n_layers) if layers is None else check_items(layers, "layers", "numbers"))}
    )
    if not wanted:
        raise InputError("no layer was asked for; expected at least one, or None for all")
    settings = {
        "layers": str(wanted),
        "top": str(top),
        "max_tokens": str(max_tokens),
        "dtype": str(dtype),
        "batch_tokens": str(batch_tokens),
    }
    run = _Run(lm, wanted, top)
    made_from = {"format": f"unfinished {_FORMAT}", "fingerprint": lm.fingerprint, **settings}
    kept = None if folder is None else Checkpoint(Path(folder) / "unfinished.safetensors", made_from)
    held = None if kept is None else kept.load()
    done, digest = (0, "") if held is None else run.restore(*held)
    other = InputError(f"the unfinished run in {folder} is of other texts; give the same again, or another folder, or delete it")
    number = 0
    for number, window in enumerate(windows(pieces(lm, texts, max_tokens)), 1):
        for piece in window:
            run.digest.update(repr(piece.ids).encode())
        if number == done and run.digest.hexdigest() != digest:
            raise other
        if number <= done:
            continue
        for rows in batches(window, batch_tokens):
            batch = _Batch(rows)
            for bank, found in scan(lm, [piece.ids for piece in rows], wanted, dtype).items():
                run.best[bank].add(found, batch)
            run.n_texts += len(rows)
            run.n_tokens += sum(len(piece.ids) for piece in rows)
            tell(progress, "scanning", run.n_tokens, None if math.isinf(max_tokens) else int(max_tokens))
        run.keep(window)
        if kept is not None:
            kept.save(partial(run.state, number))
    if number < done:
        raise other
    result = run.result(lm)
    if folder is not None and kept is not None:
        result.save(folder)
        kept.remove()
    return result


def corpus_digest(lm: LanguageModel, texts: str | Iterable[str], max_tokens: float = math.inf) -> str:
    """What `Triggers.corpus` of these texts would be; they are tokenized, and no model runs. Raises InputError for what is no text."""
    digest = hashlib.sha256()
    for piece in pieces(lm, texts, check_limit(max_tokens, "max_tokens")):
        digest.update(repr(piece.ids).encode())
    return digest.hexdigest()


class _Run:
    """A pass under way."""

    def __init__(self, lm: LanguageModel, layers: Sequence[int], top: int) -> None:
        self.best = {bank: _Best(neurons.d_ff, top) for bank, neurons in banks(lm, layers).items()}
        self.texts: dict[int, Piece] = {}
        self.digest = hashlib.sha256()
        self.n_texts = self.n_tokens = 0
        self._size = self._least = 0  # tokens of the texts held, now and when the others were let go of last

    def numbers(self) -> Tensor:
        """The numbers of all pieces that some neuron holds, ascending."""
        held = [torch.unique(best.numbers(sign)[best.keys[sign] != 0]) for best in self.best.values() for sign in _SIGNS]
        found: Tensor = torch.unique(torch.cat(held))
        return found

    def keep(self, window: Sequence[Piece]) -> None:
        """Hold texts; let go of those that no neuron holds, whenever they may have become half of all."""
        self.texts.update((piece.number, piece) for piece in window)
        self._size += sum(len(piece.ids) for piece in window)
        if self._size > 2 * self._least + _KEPT:
            self.texts = {number: self.texts[number] for number in self.numbers().tolist()}
            self._size = self._least = sum(len(piece.ids) for piece in self.texts.values())

    def state(self, window: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All of it behind so many windows, for a checkpoint."""
        tensors = {f"{bank_name(bank)}/{name}": tensor for bank, best in self.best.items() for name, tensor in best.state().items()}
        held = [(number, self.texts[number].text, self.texts[number].ids, self.texts[number].spans) for number in self.numbers().tolist()]
        stand = {"window": str(window), "digest": self.digest.hexdigest(), "n_texts": str(self.n_texts), "n_tokens": str(self.n_tokens)}
        return tensors, {**stand, "texts": json.dumps(held)}

    def restore(self, tensors: Mapping[str, Tensor], stand: Mapping[str, str]) -> tuple[int, str]:
        """The inverse of `state`: how many windows, and the texts' digest up to there."""
        for bank, best in self.best.items():
            begin = f"{bank_name(bank)}/"
            best.restore({name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)})
        self.n_texts, self.n_tokens = int(stand["n_texts"]), int(stand["n_tokens"])
        self.texts = {number: Piece(number, *rest) for number, *rest in json.loads(stand["texts"])}
        self._size = self._least = sum(len(piece.ids) for piece in self.texts.values())
        return int(stand["window"]), stand["digest"]

    def result(self, lm: LanguageModel) -> Triggers:
        """What was found."""
        if not self.n_tokens:
            raise InputError("find_triggers got no text; expected strings with at least one token")
        index = self.numbers()
        if not len(index):  # not a neuron is ever on
            index = torch.tensor(sorted(self.texts)[:1])
        held = [self.texts[number] for number in index.tolist()]
        ids, spans, starts = _packed(held)
        return Triggers(
            banks={bank: best.result(index, self.n_tokens) for bank, best in self.best.items()},
            texts=[piece.text for piece in held],
            model=lm.name,
            fingerprint=lm.fingerprint,
            corpus=self.digest.hexdigest(),
            n_texts=self.n_texts,
            n_tokens=self.n_tokens,
            _ids=ids,
            _spans=spans,
            _starts=starts,
        )


def _packed(held: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Their tokens one after another, the tokens' characters (n, 2), and where each piece begins and the last ends."""
    ids = torch.tensor([i for piece in held for i in piece.ids])
    spans = torch.tensor([span for piece in held for span in piece.spans])
    return ids, spans, torch.tensor([0, *itertools.accumulate(len(piece.ids) for piece in held)])
