"""One pass over a corpus that finds the triggers of every neuron.

    triggers = find_triggers(lm, texts, top=25, folder="triggers")

`strongest` says what is kept for each bank of neurons. This module reads the corpus, keeps the
texts that some neuron refers to, and lets go of the others. So the memory needed grows with the
number of neurons times `top`, not with the corpus.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.artefact import Checkpoint
from ..core.checks import check_count, check_limit
from ..core.errors import InputError
from ..core.files import check_writable
from ..core.progress import Progress, tell
from ..corpus.scan import bank_name, banks, check_dtype, scan
from ..corpus.text import Piece, batches, pieces, windows
from ..model.address import check_layers
from ..model.language_model import LanguageModel, check_model
from .strongest import BatchTokens, Strongest
from .triggers import FORMAT, Triggers, holds_triggers

_KEPT = 200_000
"""Tokens of texts held beyond those that some neuron refers to, before they are let go."""


def find_triggers(  # house: a promised public signature
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
    """Return the strongest triggers of every neuron of some layers, from one pass over a corpus.

    Texts longer than the model's context, or than 1,024 tokens, are cut, and each part counts as a
    text. Long texts are tokenized part by part, cut at white space: a token that reaches hundreds
    of characters beyond the cut may come out as two. A token that the tokenizer adds (BOS) is no
    trigger.

    Args:
        lm: The model.
        texts: The corpus: one text, or texts one after another.
        layers: The layers. None: all.
        top: Number of triggers to keep for each neuron, at either end.
        max_tokens: Stop after this many tokens; the last text is cut.
        batch_tokens: Padded tokens in one forward pass.
        dtype: `torch.bfloat16` runs the pass in it. None: the model's own dtype.
        folder: Where the result is kept, and from time to time the unfinished run. Called again
            with the same arguments and texts, a run that was killed continues. None: nowhere.
        progress: Gets the number of tokens read.

    Raises:
        LayerError: when a layer does not exist.
        InputError: when there is no text, or the folder holds an unfinished run of other texts or
            arguments.
        FingerprintError: when the folder holds triggers or an unfinished run of another model.
        NumericsError: when a coefficient is not finite.
        WorkspaceError: when the folder cannot be written. Raised before anything is read.
    """
    check_model(lm)
    top = check_count(top, "top", "the number of triggers to keep for each neuron")
    max_tokens = check_limit(max_tokens, "max_tokens")
    batch_tokens = check_count(batch_tokens, "batch_tokens", "the number of tokens to run together")
    check_dtype(lm, dtype)
    if folder is not None:
        holds_triggers(check_writable(folder), lm)
    wanted = sorted(set(check_layers(layers, lm.n_layers)))
    settings = {
        "layers": str(wanted),
        "top": str(top),
        "max_tokens": str(max_tokens),
        "dtype": str(dtype),
        "batch_tokens": str(batch_tokens),
    }
    run = TriggerRun(lm, wanted, top)
    made_from = {"format": f"unfinished {FORMAT}", "fingerprint": lm.fingerprint, **settings}
    checkpoint = (
        None if folder is None else Checkpoint(Path(folder) / "unfinished.safetensors", made_from)
    )
    state = None if checkpoint is None else checkpoint.load()
    done, digest = (0, "") if state is None else run.restore(*state)
    other = InputError(
        f"the unfinished run in {folder} is of other texts. "
        "Give the same texts again, choose another folder, or delete the run."
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
            tokens = BatchTokens(rows)
            for bank, coefficients in scan(
                lm, [piece.ids for piece in rows], wanted, dtype
            ).items():
                run.best[bank].add(coefficients, tokens)
            run.n_texts += len(rows)
            run.n_tokens += sum(len(piece.ids) for piece in rows)
            total = None if math.isinf(max_tokens) else int(max_tokens)
            tell(progress, "scanning", run.n_tokens, total)
        run.keep(window)
        if checkpoint is not None:
            checkpoint.save(partial(run.state, number))
    if number < done:
        raise other
    result = run.result(lm)
    if folder is not None and checkpoint is not None:
        result.save(folder)
        checkpoint.remove()
    return result


def corpus_digest(
    lm: LanguageModel, texts: str | Iterable[str], max_tokens: float = math.inf
) -> str:
    """Return what `Triggers.corpus` of these texts would be. No model runs.

    Raises:
        InputError: when the texts are not texts.
    """
    digest = hashlib.sha256()
    for piece in pieces(lm, texts, check_limit(max_tokens, "max_tokens")):
        digest.update(repr(piece.ids).encode())
    return digest.hexdigest()


class TriggerRun:
    """A pass under way.

    Attributes:
        best: {bank: its strongest coefficients so far}.
        texts: {number: piece} of the texts held.
        digest: sha256 of the tokens read.
        n_texts: Number of texts read.
        n_tokens: Number of tokens read.
    """

    def __init__(self, lm: LanguageModel, layers: Sequence[int], top: int) -> None:
        self.best = {
            bank: Strongest(neurons.d_ff, top) for bank, neurons in banks(lm, layers).items()
        }
        self.texts: dict[int, Piece] = {}
        self.digest = hashlib.sha256()
        self.n_texts = self.n_tokens = 0
        # Tokens of the texts held, now and when others were last let go.
        self._size = self._least = 0

    def numbers(self) -> Tensor:
        """Return the numbers of all pieces that some neuron refers to, ascending."""
        numbers: Tensor = torch.unique(torch.cat([best.pieces() for best in self.best.values()]))
        return numbers

    def keep(self, window: Sequence[Piece]) -> None:
        """Hold texts, and let go of those that no neuron refers to once they may be half."""
        self.texts.update((piece.number, piece) for piece in window)
        self._size += sum(len(piece.ids) for piece in window)
        if self._size > 2 * self._least + _KEPT:
            self.texts = {number: self.texts[number] for number in self.numbers().tolist()}
            self._size = self._least = sum(len(piece.ids) for piece in self.texts.values())

    def state(self, window: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return all of the run after so many windows, for a checkpoint."""
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
        """Continue from a state. Return the number of windows done, and their digest."""
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
        """Return the triggers."""
        if not self.n_tokens:
            raise InputError(
                "find_triggers got no text. Give strings with at least one token.",
                argument="texts",
            )
        numbers = self.numbers()
        if not len(numbers):  # no neuron is ever on
            numbers = torch.tensor(sorted(self.texts)[:1])
        held = [self.texts[number] for number in numbers.tolist()]
        ids, spans, starts = _packed(held)
        return Triggers(
            banks={bank: best.result(numbers, self.n_tokens) for bank, best in self.best.items()},
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
    """Return the tokens of pieces, their characters (n, 2), and where each piece begins."""
    ids = torch.tensor([i for piece in held for i in piece.ids])
    spans = torch.tensor([span for piece in held for span in piece.spans])
    return ids, spans, torch.tensor([0, *itertools.accumulate(len(piece.ids) for piece in held)])
