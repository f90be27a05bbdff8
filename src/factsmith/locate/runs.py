"""Record the clean and the corrupted runs of one prompt, from which every map is made.

    runs = record_runs(lm, prompt, subject, Corruption(samples=10))
    runs.p_clean, runs.p_corrupted             # p(answer) of the two
    runs.outputs["mlp"][3]                     # what the MLP of layer 3 puts out in every run

All runs are rows of one batch, so they cost one forward pass. The pass is kept as a `Replay`: any
layer can be run again at any column. `sweep.py` restores states in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..core.errors import NumericsError, UnsupportedModelError
from ..core.multiply import quick_products
from ..model.answers import n_lines
from ..model.language_model import LanguageModel, check_model
from ..model.replay import Replay, record
from ..model.tokens import Batch, target_ids
from ..model.trace import recording
from ..model.turns import asking
from .corruption import CorruptedInputs, Corruption, TracedPrompt
from .kinds import Part, Restoration

HEAD_ROWS = 128
"""Rows unembedded at once. Each row gives as many numbers as the vocabulary has tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """The clean run and the corrupted runs of one prompt.

    Attributes:
        lm: The model.
        prompt: The whole text, and its subject.
        corruption: How the subject was corrupted.
        inputs: The inputs of the corrupted runs.
        answer_ids: The tokens whose joint probability is measured.
        predicted_ids: The model's own greedy tokens, as many or fewer.
        clean: The clean run, one row, live from the subject's first token on.
        corrupted: The corrupted runs, `samples` rows, live from the same column on.
        outputs: For each part, n_layers tensors (1 + samples, S, d_model): the part's outputs, the
            clean run first. Attention is left out where a layer has no single attention part.
        attention_last: (n_layers,) whether the layer's attention runs after its MLP.
        p_clean: p(answer) of the clean run.
        p_corrupted: Mean p(answer) of the corrupted runs.
    """

    lm: LanguageModel
    prompt: TracedPrompt
    corruption: Corruption
    inputs: CorruptedInputs
    answer_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    clean: Replay
    corrupted: Replay
    outputs: Mapping[Part, Sequence[Tensor]]
    attention_last: tuple[bool, ...]
    p_clean: float
    p_corrupted: float

    @property
    def samples(self) -> int:
        """Number of corrupted runs."""
        return self.corrupted.batch.size

    @property
    def columns(self) -> range:
        """The token columns where a restored state can have an effect."""
        return range(self.prompt.span[0], len(self.prompt.ids))

    def part_outputs(self, part: Part) -> Sequence[Tensor]:
        """Return the outputs of a part in every layer, (1 + samples, S, d_model) each.

        Raises:
            UnsupportedModelError: when some layer has no single attention part.
        """
        if part not in self.outputs:
            missing = [layer for layer, module in enumerate(self.lm.attention) if module is None]
            raise UnsupportedModelError(
                f"layers {missing} have no single part where positions meet. "
                "Use 'state' or 'mlp' instead."
            )
        return self.outputs[part]

    def trace_fields(self, restoration: Restoration, scores: Tensor) -> dict[str, Any]:
        """Return the fields of a `CausalTrace`.

        Args:
            restoration: What was restored.
            scores: (S, n_layers) scores from the subject's first token on. A state before the
                subject has no effect in a causal model: its score is the corrupted probability.
        """
        prompt, decode = self.prompt, self.lm.tokenizer.decode
        untouched = torch.full(
            (prompt.span[0], self.lm.n_layers), self.p_corrupted, dtype=torch.float32
        )
        return {
            "prompt": prompt.text,
            "subject": prompt.subject,
            "answer": decode(self.answer_ids),
            "answer_ids": self.answer_ids,
            "predicted": decode(self.predicted_ids),
            "is_correct": self.predicted_ids == self.answer_ids,
            "kind": restoration.kind,
            "window": restoration.layers_together,
            "sever": restoration.sever,
            "tokens": tuple(
                _readable(decode([i]), prompt.text[start:stop])
                for i, (start, stop) in zip(prompt.ids, prompt.offsets, strict=True)
            ),
            "subject_span": prompt.span,
            "scores": torch.cat([untouched, scores]),
            "clean": self.p_clean,
            "corrupted": self.p_corrupted,
            "corruption": self.corruption.kind,
            "replacements": self.inputs.replacements,
            "noise": self.inputs.noise,
            "samples": self.samples,
            "seed": self.corruption.drawn_by,
        }


@asking()
def record_runs(
    lm: LanguageModel,
    prompt: str,
    subject: str,
    corruption: Corruption,
    *,
    target: str | None = None,
    occurrence: int | None = None,
) -> Runs:
    """Record the clean and the corrupted runs of a prompt in one pass.

    Args:
        lm: The model.
        prompt: A text that has the subject, or a template with one `{}` in its place.
        subject: The subject to corrupt.
        corruption: How to corrupt it.
        target: The answer to follow. None: the model's own most likely next token.
        occurrence: Which occurrence of the subject in a text is meant; see `TracedPrompt.read`.

    Raises:
        InputError: when the prompt, the target or the corruption cannot be used.
        SubjectError: when the subject is empty, is not in the text, or it is not clear which of
            several occurrences is meant.
        NumericsError: when a probability is not finite, or the answer has the probability 0.
    """
    check_model(lm)
    traced = TracedPrompt.read(lm, prompt, subject, occurrence=occurrence)
    return record_prompt(lm, traced, corruption, target=target)


@asking()
@quick_products()
def record_prompt(
    lm: LanguageModel, traced: TracedPrompt, corruption: Corruption, *, target: str | None = None
) -> Runs:
    """Record the runs of a prompt whose subject is known; the rest is as for `record_runs`."""
    answer_ids = target_ids(lm, traced.text, target) if target is not None else []
    inputs = corruption.inputs(lm, traced)
    sequences = [list(traced.ids), *inputs.sequences]
    with torch.no_grad():
        batch = lm.align([[*ids, *answer_ids[:-1]] for ids in sequences], [0] * len(sequences))
        both, outputs, attention_last = _record_parts(lm, batch, traced.span[0], inputs.embed)
        answer_columns = both.hidden[-1][:, len(traced.ids) - 1 - both.start :]
        logits = lm.head(answer_columns).float()  # (1 + samples, n_answer, vocab)
        greedy = logits[0].argmax(-1).tolist()
        answer_ids = answer_ids or greedy
        # Each answer token is the likeliest after those before it: so the model says them all.
        predicted = (
            greedy
            if greedy == answer_ids
            else lm.continue_greedily(
                [list(traced.ids)],
                len(answer_ids),
                [n_lines(lm.tokenizer.decode(answer_ids))],
            )[0]
        )
        each = _joint(logits, answer_ids)
    p_clean, p_corrupted = float(each[0]), float(each[1:].mean())
    _check_probabilities(lm.tokenizer.decode(answer_ids), traced.text, p_clean, p_corrupted)
    rows = torch.arange(batch.size)
    return Runs(
        lm=lm,
        prompt=traced,
        corruption=corruption,
        inputs=inputs,
        answer_ids=tuple(answer_ids),
        predicted_ids=tuple(predicted),
        clean=both.keep(rows[:1]),
        corrupted=both.keep(rows[1:]),
        outputs=outputs,
        attention_last=attention_last,
        p_clean=p_clean,
        p_corrupted=p_corrupted,
    )


def answer_probability(lm: LanguageModel, hidden: Tensor, answer_ids: Sequence[int]) -> Tensor:
    """Return p(answer), joint over its tokens, of each row: (R,) float32.

    Args:
        lm: The model.
        hidden: (R, S, d_model) last-layer states. The last columns predict the answer's tokens.
        answer_ids: The answer's tokens.
    """
    rows = max(1, HEAD_ROWS // len(answer_ids))
    parts = torch.split(hidden[:, -len(answer_ids) :], rows)
    return torch.cat([_joint(lm.head(part).float(), answer_ids) for part in parts])


def _joint(logits: Tensor, answer_ids: Sequence[int]) -> Tensor:
    """(R,) joint probability of the answer's tokens, from logits (R, n_answer, vocab).

    Without a gradient the logits are overwritten: they are the largest tensor of all, and a copy
    costs more than the sum over them.
    """
    wanted = torch.tensor([*answer_ids], device=logits.device).expand(len(logits), -1)[..., None]
    if logits.requires_grad:
        chosen, total = logits.gather(-1, wanted)[..., 0], logits.logsumexp(-1)
    else:
        logits.sub_(logits.amax(-1, keepdim=True))
        chosen, total = logits.gather(-1, wanted)[..., 0], logits.exp_().sum(-1).log()
    return (chosen - total).sum(-1).exp()


def _record_parts(
    lm: LanguageModel, batch: Batch, start: int, embed: Callable[[Tensor], Tensor] | None
) -> tuple[Replay, dict[Part, list[Tensor]], tuple[bool, ...]]:
    """One pass over all runs: the replay, the parts' outputs, and whether attention runs last."""
    parts: dict[tuple[str, int], nn.Module] = {
        ("mlp", layer): ffn.module for layer, ffn in enumerate(lm.ffn)
    }
    parts |= {
        ("attention", layer): module
        for layer, module in enumerate(lm.attention)
        if module is not None
    }
    with recording(parts) as calls:
        both = record(lm, batch, start=start, embed=embed)
    outputs: dict[Part, list[Tensor]] = {}
    for part in get_args(Part):
        if all((part, layer) in parts for layer in range(lm.n_layers)):
            # The last call of a part is the one of the live columns.
            last_calls = (calls[part, layer][-1].output for layer in range(lm.n_layers))
            outputs[part] = [
                output.reshape(batch.size, -1, output.shape[-1])[:, start - batch.width :]
                for output in last_calls
            ]
    order = {key: call[-1].order for key, call in calls.items()}
    attention_last = tuple(
        order.get(("attention", layer), 0) > order["mlp", layer] for layer in range(lm.n_layers)
    )
    return both, outputs, attention_last


def _check_probabilities(answer: str, text: str, p_clean: float, p_corrupted: float) -> None:
    """Raise a NumericsError unless the two probabilities can be compared."""
    if not (math.isfinite(p_clean) and math.isfinite(p_corrupted)):
        raise NumericsError(
            f"p(answer) is {p_clean} in the clean run and {p_corrupted} in the corrupted runs. "
            "Both must be finite: load the model in float32, or use less noise."
        )
    if not p_clean:
        raise NumericsError(
            f"the model gives {answer!r} after {text!r} the probability 0, so no state can bring "
            "it back. Trace an answer that the model may give, or None for its own answer.",
            argument="target",
        )


def _readable(decoded: str, characters: str) -> str:
    """A token as text. A token that holds only some bytes of a character shows that character."""
    return characters if "�" in decoded else decoded
