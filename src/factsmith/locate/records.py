"""The record of a causal trace.

    trace.scores       # (n_tokens, n_layers) p(answer) with that state restored
    trace.effects      # the indirect effect: scores minus the corrupted probability
    trace.peak         # (token, layer) with the largest indirect effect
    trace.warnings     # reasons not to trust the map

`causal_trace` returns it, and `show.plots` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.tables import Shown, Table
from .kinds import CorruptionKind, Part, TraceKind


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CausalTrace(Shown):
    """How much of one prompt's answer each restored state brings back.

    Probabilities are joint over the answer's tokens.

    Attributes:
        prompt: The whole text.
        subject: The part of the text that was corrupted.
        answer: The text whose probability was measured.
        answer_ids: The tokens of the answer.
        predicted: The model's own greedy answer, with as many tokens. It is shorter where the
            model ends its text or its line.
        is_correct: Whether the model's own answer is the answer traced.
        kind: What was restored: "state", "mlp" or "attention".
        window: Number of neighbouring layers restored together; 1 for "state".
        sever: The part that was held at the corrupted run's values above the restored state.
            None: no part was held.
        tokens: (n_tokens,) the prompt's tokens as text, with a BOS where the tokenizer adds one.
        subject_span: Token columns [start, stop) of the subject.
        scores: (n_tokens, n_layers) float32 on the CPU: p(answer) after restoring, averaged over
            the samples. The corrupted probability is not subtracted.
        clean: p(answer) of the clean run.
        corrupted: Mean p(answer) with the subject corrupted and nothing restored.
        corruption: "noise" on the subject's embeddings, or "replace" for other subjects.
        replacements: The other subjects, one for each sample; empty for noise.
        noise: Standard deviation of the noise on the subject's embeddings, or of the tensor that
            was given; 0 for "replace".
        samples: Number of corrupted runs.
        seed: Seed of the noise or of the choice of replacements. None: they were given.
    """

    prompt: str
    subject: str
    answer: str
    answer_ids: tuple[int, ...]
    predicted: str
    is_correct: bool
    kind: TraceKind
    window: int
    sever: Part | None
    tokens: tuple[str, ...]
    subject_span: tuple[int, int]
    scores: Tensor
    clean: float
    corrupted: float
    corruption: CorruptionKind
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

    @property
    def is_estimate(self) -> bool:
        """Whether the scores are estimated by gradients."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the quality of the scores; empty for exact scores."""
        return ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust the map, as sentences; usually empty."""
        return corruption_warnings(self.answer.strip(), self.clean, self.corrupted)

    def tables(self) -> list[Table]:
        """Return the best layer of every token; `heat_map(trace)` draws the whole map."""
        best, layers = self.scores.max(1)
        start, stop = self.subject_span
        rows = [
            (f"{token}{'*' if start <= t < stop else ''}", str(layer), f"{p:z.3f}")
            for t, (token, layer, p) in enumerate(
                zip(self.tokens, layers.tolist(), best.tolist(), strict=True)
            )
        ]
        restored = "state" if self.kind == "state" else f"{self.window} layers of {self.kind}"
        severed = "" if self.sever is None else f" and {self.sever} severed"
        estimated = "estimated, " if self.is_estimate else ""
        p = f"p: {estimated}with one {restored} restored{severed}"
        return [
            Table(
                f"p({self.answer.strip()}) after {self.prompt!r}: {self.clean:z.3f}, "
                f"with the subject corrupted {self.corrupted:z.3f}",
                {"token": "<", "best layer": ">", "p": ">"},
                rows,
                "; ".join(("* subject", p, *self.notes)),
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON."""
        return {**vars(self), "scores": self.scores.tolist()}

    def rows(self) -> list[dict[str, Any]]:
        """Return the map as a table: one row for each token and layer."""
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


def corruption_warnings(answer: str, clean: float, corrupted: float) -> tuple[str, ...]:
    """Return a warning if the corruption costs the answer hardly any probability.

    Args:
        answer: The answer, as it is named in p(...).
        clean: p(answer) of the clean run.
        corrupted: p(answer) of the corrupted runs.
    """
    if clean - corrupted >= max(0.01, 0.05 * clean):
        return ()
    return (
        f"p({answer}) is {clean:z.3f}, and {corrupted:z.3f} with the subject corrupted. The "
        "corruption does not take the answer away, so the map shows nothing. Try another "
        "corruption, or more noise.",
    )
