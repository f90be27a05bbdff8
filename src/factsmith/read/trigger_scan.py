"""read.trigger_scan."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.artefact import Checkpoint
from ..core.checks import check_count, check_items, check_limit
from ..core.errors import InputError, NumericsError
from ..core.files import check_writable
from ..core.progress import Progress, tell
from ..corpus.scan import Coefficients, bank_name, banks, check_dtype, scan
from ..corpus.text import ADDED, Piece, batches, pieces, windows
from ..model.address import check_layer
from ..model.language_model import LanguageModel, check_model
from .triggers import FORMAT, SIGNS, BankTriggers, Sign, Triggers, holds_triggers

_LAST = 2**31 - 1  # piece numbers are kept below it

_AT_ONCE = 2**22  # coefficients looked through for their place at a time

_KEPT = (
    200_000  # tokens held beside those of texts some neuron refers to, before the others are let go
)


# ── the pass ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Best:
    """The largest coefficients of one bank so far.

    keys    {sign: (t, d_ff) int64}, descending: the coefficient's bits above, and below how early its piece came. The bits of floats above
            zero are in the floats' order, so one number orders by coefficient, then by piece, and the order of batches does not matter
    places  {sign: (t, d_ff) int32} the token's position
    fired   (d_ff,) float64; squares (d_ff,) float64; sums over tokens
    """

    def __init__(self, d_ff: int, top: int) -> None:
        self.keys = {sign: torch.zeros(top, d_ff, dtype=torch.int64) for sign in SIGNS}
        self.places = {sign: torch.zeros(top, d_ff, dtype=torch.int32) for sign in SIGNS}
        self.fired = torch.zeros(d_ff, dtype=torch.float64)
        self.squares = torch.zeros(d_ff, dtype=torch.float64)

    def add(self, found: Coefficients, batch: _Batch) -> None:
        """Take in one batch."""
        m = found.m.float()
        self.fired += (m > 0).sum(0, dtype=torch.int32).cpu()
        self.squares += m.square().sum(0).double().cpu()
        places = batch.places(found)
        for sign in SIGNS:
            ends = m.new_zeros(len(batch.early) + 1, m.shape[1])
            ends.scatter_reduce_(
                0, places.row[:, None].expand_as(m), m, "amax" if sign == "top" else "amin"
            )
            strength = ends[:-1].abs().cpu()
            if not bool(strength.amax() < math.inf):
                raise NumericsError(
                    "a coefficient is not finite; load the model in a wider dtype, or look for damaged weights"
                )
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
        held[:, changed], places[:, changed] = (
            best.values.masked_fill(best.values <= _LAST, 0),
            where,
        )

    def numbers(self, sign: Sign) -> Tensor:
        """The numbers of the pieces held: (t, d_ff), meaningless where a key is 0."""
        return _LAST - (self.keys[sign] & 0xFFFFFFFF)

    def state(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        signed = {
            f"{sign}.{name}": getattr(self, name)[sign]
            for sign in SIGNS
            for name in ("keys", "places")
        }
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
        for sign in SIGNS:
            keys = self.keys[sign].T
            strength = (keys >> 32).int().view(torch.float32)
            coefficients[sign] = (strength if sign == "top" else -strength).contiguous()
            held = keys != 0
            texts[sign] = torch.searchsorted(
                index, torch.where(held, self.numbers(sign).T, index[0]).contiguous()
            )
            positions[sign] = torch.where(held, self.places[sign].T, 0).long()
        return BankTriggers(
            coefficients=coefficients,
            texts=texts,
            positions=positions,
            fired=self.fired / n_tokens,
            mean_square=self.squares / n_tokens,
        )


class _Batch:
    """The pieces in the rows of a batch: which of their tokens are written in the text, and by when each piece came, later ones lower."""

    def __init__(self, rows: Sequence[Piece]) -> None:
        self.written = torch.tensor(
            [tuple(span) != ADDED for piece in rows for span in piece.spans]
        )
        self.starts = torch.tensor([0, *itertools.accumulate(len(piece.ids) for piece in rows)])
        self.early = _LAST - torch.tensor([piece.number for piece in rows])

    def places(self, found: Coefficients) -> _Places:
        """Where the tokens of a bank stand; those that the tokenizer added are put in a row behind the last."""
        n, device = len(self.early), found.m.device
        written = self.written.to(device)[self.starts.to(device)[found.row] + found.column]
        row = torch.where(written, found.row, n)
        return _Places(
            row, found.column, row.argsort(stable=True), torch.bincount(row, minlength=n + 1)
        )


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
        tokens = self.order[
            (begins + steps.minimum(counts - 1)).clamp(0, len(m) - 1)
        ]  # a shorter row has its last again
        found = []
        for r, at in zip(
            *(torch.split(x.to(m.device), max(_AT_ONCE // len(steps), 1)) for x in (row, i)),
            strict=True,
        ):
            token = tokens[r]
            hit = (
                (m.take(token * m.shape[1] + at[:, None]) == ends[r, at, None])
                .byte()
                .argmax(1, keepdim=True)
            )  # the first of equals
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
        {
            check_layer(x, lm.n_layers)
            for x in (
                range(lm.n_layers)
                if layers is None
                else check_items(layers, "layers", "layer numbers", also="None for all")
            )
        }
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
    run = TriggerRun(lm, wanted, top)
    made_from = {"format": f"unfinished {FORMAT}", "fingerprint": lm.fingerprint, **settings}
    kept = (
        None if folder is None else Checkpoint(Path(folder) / "unfinished.safetensors", made_from)
    )
    held = None if kept is None else kept.load()
    done, digest = (0, "") if held is None else run.restore(*held)
    other = InputError(
        f"the unfinished run in {folder} is of other texts; give the same again, or another folder, or delete it"
    )
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
            tell(
                progress,
                "scanning",
                run.n_tokens,
                None if math.isinf(max_tokens) else int(max_tokens),
            )
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


def corpus_digest(
    lm: LanguageModel, texts: str | Iterable[str], max_tokens: float = math.inf
) -> str:
    """What `Triggers.corpus` of these texts would be; they are tokenized, and no model runs. Raises InputError for what is no text."""
    digest = hashlib.sha256()
    for piece in pieces(lm, texts, check_limit(max_tokens, "max_tokens")):
        digest.update(repr(piece.ids).encode())
    return digest.hexdigest()


class TriggerRun:
    """A pass under way."""

    def __init__(self, lm: LanguageModel, layers: Sequence[int], top: int) -> None:
        self.best = {bank: _Best(neurons.d_ff, top) for bank, neurons in banks(lm, layers).items()}
        self.texts: dict[int, Piece] = {}
        self.digest = hashlib.sha256()
        self.n_texts = self.n_tokens = 0
        self._size = self._least = (
            0  # tokens of the texts held, now and when the others were let go of last
        )

    def numbers(self) -> Tensor:
        """The numbers of all pieces that some neuron holds, ascending."""
        held = [
            torch.unique(best.numbers(sign)[best.keys[sign] != 0])
            for best in self.best.values()
            for sign in SIGNS
        ]
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
        tensors = {
            f"{bank_name(bank)}/{name}": tensor
            for bank, best in self.best.items()
            for name, tensor in best.state().items()
        }
        held = [
            (number, self.texts[number].text, self.texts[number].ids, self.texts[number].spans)
            for number in self.numbers().tolist()
        ]
        stand = {
            "window": str(window),
            "digest": self.digest.hexdigest(),
            "n_texts": str(self.n_texts),
            "n_tokens": str(self.n_tokens),
        }
        return tensors, {**stand, "texts": json.dumps(held)}

    def restore(self, tensors: Mapping[str, Tensor], stand: Mapping[str, str]) -> tuple[int, str]:
        """The inverse of `state`: how many windows, and the texts' digest up to there."""
        for bank, best in self.best.items():
            begin = f"{bank_name(bank)}/"
            best.restore(
                {
                    name.removeprefix(begin): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(begin)
                }
            )
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
