"""One pass over a corpus that finds the triggers of every neuron.

    triggers = find_triggers(lm, texts, top=25, folder="triggers")

`corpus.sweep` reads the corpus, and `strongest` says what is kept for each bank of neurons. This
module holds the texts that some neuron refers to, and lets go of the others. So the memory needed
grows with the number of neurons times `top`, not with the corpus.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.artefact import Checkpoint, stated_count
from ..core.checks import check_count
from ..core.errors import InputError
from ..core.files import check_writable
from ..core.progress import Progress, tell
from ..corpus.accumulator import State, Swept, TextBatch
from ..corpus.scan import Bank, Coefficients, Site, bank_name, banks, check_dtype
from ..corpus.sweep import Corpus, sweep
from ..corpus.text import Piece
from ..model.address import check_layers
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking
from .strongest import LAST, BatchTokens, Strongest
from .triggers import FORMAT, Triggers, holds_triggers

_KEPT = 200_000
"""Tokens of texts held beyond those that some neuron refers to, before they are let go."""


@asking()
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
    corpus = Corpus(texts, max_tokens, batch_tokens, dtype)
    check_dtype(lm, dtype)
    if folder is not None:
        holds_triggers(check_writable(folder), lm)
    wanted = sorted(set(check_layers(layers, lm.n_layers)))
    checkpoint = None
    if folder is not None:
        made_from = {
            "format": f"unfinished {FORMAT}",
            "fingerprint": lm.fingerprint,
            "layers": str(wanted),
            "top": str(top),
            **corpus.settings(),
        }
        checkpoint = Checkpoint(Path(folder) / "unfinished.safetensors", made_from)
    total = None if math.isinf(corpus.max_tokens) else int(corpus.max_tokens)
    run = TriggerRun(lm, wanted, top)
    swept = sweep(
        lm,
        corpus,
        wanted,
        [run],
        checkpoint=checkpoint,
        unit="window",
        progress=lambda n: tell(progress, "scanning", n, total),
    )
    result = run.result(swept)
    if folder is not None and checkpoint is not None:
        result.save(folder)
        checkpoint.remove()
    return result


class TriggerRun:
    """The triggers of some layers under way: an accumulator for `sweep`.

    Attributes:
        lm: The model.
        best: {bank: its strongest coefficients so far}.
        texts: {number: piece} of the texts held.
        n_texts: Number of texts read.
        n_tokens: Number of tokens read.
        site: What it takes in.
        least_part: Tokens of a part of the corpus at least.
    """

    site: Site = "coefficients"
    least_part = 1

    def __init__(self, lm: LanguageModel, layers: Sequence[int], top: int) -> None:
        self.lm = lm
        self._wanted = list(layers), top
        self.best = {
            bank: Strongest(neurons.d_ff, top) for bank, neurons in banks(lm, layers).items()
        }
        self.texts: dict[int, Piece] = {}
        self.n_texts = self.n_tokens = 0
        # Tokens of the texts held, now and when others were last let go.
        self._size = self._least = 0

    def maker(self) -> Callable[[], TriggerRun]:
        """Return a function that makes an empty run of the same kind."""
        return partial(TriggerRun, self.lm, *self._wanted)

    def add(self, batch: TextBatch, coefficients: Mapping[Bank, Coefficients]) -> None:
        """Add one batch.

        Raises:
            NumericsError: when a coefficient is not finite.
        """
        tokens = BatchTokens(batch.pieces)
        for bank, each in coefficients.items():
            self.best[bank].add(each, tokens)
        self.n_texts += len(batch.pieces)
        self.n_tokens += batch.n_tokens
        self.keep(batch.pieces)

    def merge(self, other: TriggerRun) -> None:
        """Add what another run collected from the texts that follow those of this run."""
        for bank, best in self.best.items():
            best.merge(other.best[bank], self.n_texts)
        later = [replace(p, number=p.number + self.n_texts) for p in other.texts.values()]
        self.n_texts += other.n_texts
        self.n_tokens += other.n_tokens
        self.keep(later)

    def keep(self, pieces: Sequence[Piece]) -> None:
        """Hold texts, and let go of those that no neuron refers to once they may be half.

        Raises:
            InputError: when the corpus has more texts than can be numbered.
        """
        if self.n_texts > LAST:
            raise InputError(
                f"the corpus has more than {LAST:,} texts, so triggers cannot name them all; set "
                "max_tokens, or join short texts",
                argument="texts",
            )
        self.texts.update((piece.number, piece) for piece in pieces)
        self._size += sum(len(piece.ids) for piece in pieces)
        if self._size > 2 * self._least + _KEPT:
            self._let_go()

    def _let_go(self) -> None:
        """Hold only the texts that some neuron refers to."""
        self.texts = {number: self.texts[number] for number in self.numbers().tolist()}
        self._size = self._least = sum(len(piece.ids) for piece in self.texts.values())

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled, without the texts that no neuron refers to."""
        self._let_go()
        return self.__dict__

    def numbers(self) -> Tensor:
        """Return the numbers of the pieces that some neuron refers to, ascending.

        If no neuron has ever been on, this is the first piece held.
        """
        numbers: Tensor = torch.unique(torch.cat([best.pieces() for best in self.best.values()]))
        return numbers if len(numbers) else torch.tensor(sorted(self.texts)[:1])

    def state(self) -> State:
        """Return all of the run, for a checkpoint."""
        tensors = {
            f"{bank_name(bank)}/{name}": tensor
            for bank, best in self.best.items()
            for name, tensor in best.state().items()
        }
        held = [self.texts[number] for number in self.numbers().tolist()]
        fields = {
            "n_texts": str(self.n_texts),
            "n_tokens": str(self.n_tokens),
            "texts": json.dumps([(p.number, p.text, p.ids, p.spans) for p in held]),
        }
        return tensors, fields

    def restore(self, tensors: Mapping[str, Tensor], fields: Mapping[str, str]) -> None:
        """Continue from a state."""
        for bank, best in self.best.items():
            begin = f"{bank_name(bank)}/"
            best.restore(
                {
                    name.removeprefix(begin): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(begin)
                }
            )
        self.n_texts = stated_count(fields, "n_texts")
        self.n_tokens = stated_count(fields, "n_tokens")
        self.texts = {each[0]: _piece(*each) for each in json.loads(fields["texts"])}
        if missing := set(self.numbers().tolist()) - self.texts.keys():
            raise ValueError(f"it refers to text {min(missing)}, which it does not hold")
        self._size = self._least = sum(len(piece.ids) for piece in self.texts.values())

    def result(self, swept: Swept) -> Triggers:
        """Return the triggers in all that was swept."""
        numbers = self.numbers()
        held = [self.texts[number] for number in numbers.tolist()]
        ids, spans, starts = _packed(held)
        return Triggers(
            banks={bank: best.result(numbers, swept.n_tokens) for bank, best in self.best.items()},
            texts=[piece.text for piece in held],
            model=self.lm.name,
            fingerprint=self.lm.fingerprint,
            corpus=swept.digest,
            n_texts=swept.n_texts,
            n_tokens=swept.n_tokens,
            _ids=ids,
            _spans=spans,
            _starts=starts,
        )


def _packed(held: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of pieces, their characters (n, 2), and where each piece begins."""
    ids = torch.tensor([i for piece in held for i in piece.ids])
    spans = torch.tensor([span for piece in held for span in piece.spans])
    return ids, spans, torch.tensor([0, *itertools.accumulate(len(piece.ids) for piece in held)])


def _piece(number: int, text: str, ids: list[int], spans: list[list[int]]) -> Piece:
    """Return a text of a checkpoint; raises TypeError and ValueError."""
    numbers = [number, *ids, *itertools.chain.from_iterable(spans)]
    if not isinstance(text, str) or not all(type(n) is int and -1 <= n < 2**31 for n in numbers):
        raise TypeError("a text that it holds is not a text with its tokens")
    return Piece(number, text, ids, [(start, stop) for start, stop in spans])
