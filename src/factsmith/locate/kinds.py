"""locate.kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from ..core.checks import check_count
from ..core.errors import InputError, LayerError
from ..core.tables import Shown, Table

Part: TypeAlias = Literal["mlp", "attention"]

Kind: TypeAlias = Literal["state", "mlp", "attention"]

Corruption: TypeAlias = Literal["noise", "replace"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CausalTrace(Shown):
    """What restoring each state of one prompt brings back of its answer. Probabilities are joint over the answer's tokens.

    prompt, subject  the whole text, and the part of it that was corrupted
    answer           the text whose probability was measured
    answer_ids       its tokens
    predicted        the model's own greedy answer, of as many tokens (fewer where it ends its text or line)
    is_correct       whether that is the answer traced; a target that the model would not say is traced all the same
    kind, window     "state", "mlp" or "attention"; number of neighbouring layers restored together (1 for "state")
    sever            "mlp" or "attention": held at the corrupted run's values above the restored state; None: nothing held
    tokens           (n_tokens,) the prompt's tokens as printed, a BOS included
    subject_span     token columns [start, stop) of the subject
    scores           (n_tokens, n_layers) float32 on the CPU: mean p(answer) over the samples after restoring, `corrupted` not taken off
    clean            p(answer) of the untouched run
    corrupted        mean p(answer) with the subject corrupted and nothing restored
    corruption       "noise" on the subject's embeddings, or "replace": other subjects in its place
    replacements     those other subjects, one a sample; empty for noise
    noise            standard deviation of the noise on the subject's embeddings (of the given tensor, where one was given); 0 for "replace"
    samples          number of corrupted runs averaged
    seed             what they were drawn from; None when they were given
    """

    prompt: str
    subject: str
    answer: str
    answer_ids: tuple[int, ...]
    predicted: str
    is_correct: bool
    kind: Kind
    window: int
    sever: Part | None
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    scores: Tensor
    clean: float
    corrupted: float
    corruption: Corruption
    replacements: tuple[str, ...]
    noise: float
    samples: int
    seed: int | None

    @property
    def effects(self) -> Tensor:
        """(n_tokens, n_layers) the indirect effect of each state: scores - corrupted."""
        return self.scores - self.corrupted

    @property
    def peak(self) -> tuple[int, int]:
        """(token, layer) with the largest indirect effect."""
        token, layer = divmod(int(self.scores.argmax()), self.scores.shape[1])
        return token, layer

    def tables(self) -> list[Table]:
        """The best layer of every token; the whole map is `heat_map(trace)`."""
        title = f"p({self.answer.strip()}) after {self.prompt!r}: {self.clean:.3f}, with the subject corrupted {self.corrupted:.3f}"
        best, layers = self.scores.max(1)
        start, stop = self.subject_span
        rows = [
            (f"{token}{'*' if start <= t < stop else ''}", str(layer), f"{p:.3f}")
            for t, (token, layer, p) in enumerate(
                zip(self.tokens, layers.tolist(), best.tolist(), strict=True)
            )
        ]
        restored = "state" if self.kind == "state" else f"{self.window} layers of {self.kind}"
        return [
            Table(
                title,
                {"token": "<", "best layer": ">", "p": ">"},
                rows,
                f"* subject; p: with one {restored} restored",
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON-able values."""
        return {**vars(self), "scores": self.scores.tolist()}

    def rows(self) -> list[dict[str, Any]]:
        """The map as a table: one row for each token and layer."""
        start, stop = self.subject_span
        return [
            {
                "column": t,
                "token": self.tokens[t],
                "subject": start <= t < stop,
                "layer": layer,
                "score": p,
                "effect": p - self.corrupted,
            }
            for t, row in enumerate(self.scores.tolist())
            for layer, p in enumerate(row)
        ]


def window_spans(n_layers: int, window: int) -> list[range]:
    """The layers restored together around each layer, cut at the model's ends (the reference's [l - w//2, l + ceil(w/2)))."""
    return [
        range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2)))
        for layer in range(n_layers)
    ]


def check_map(kind: Kind, window: int, sever: Part | None) -> int:
    """The window as an int; raises InputError or LayerError unless this map can be made."""
    if kind not in get_args(Kind):
        raise InputError(
            f"kind is {kind!r}; expected one of {', '.join(map(repr, get_args(Kind)))}"
        )
    window = check_count(
        window, "window", "the number of layers restored together", error=LayerError
    )
    if sever not in (None, *get_args(Part)):
        raise InputError(f"sever is {sever!r}; expected 'mlp', 'attention' or None")
    if sever is not None and kind != "state":
        raise InputError(
            f"sever={sever!r} was given with kind={kind!r}; expected kind='state': a restored state is what gets cut off"
        )
    return window
