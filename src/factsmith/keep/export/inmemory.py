"""Comparing what an export holds with the patched model, in the model in memory.

    compare_in_memory(lm, deltas, {5: weight}, limit)      # a ReadBack; NumericsError

llama.cpp's files cannot be loaded by transformers and peft in every case. Here the matrices that
were read back from the file are put into the model for a moment, and the model is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...edit.delta import Delta, written
from ...model.appended import AppendedRows
from ...model.language_model import LanguageModel
from .questions import Questions, ask, run_row
from .readback import Answers, ReadBack, compare


def compare_in_memory(
    lm: LanguageModel,
    deltas: Sequence[Delta],
    weights: Mapping[int, Tensor],
    limit: float,
    advice: str = "",
    factors: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    appended: Mapping[int, AppendedRows] | None = None,
) -> ReadBack:
    """Compare the model with some matrices with the patched model.

    Args:
        lm: The model, without the deltas.
        deltas: The patches.
        weights: {layer: (d_model, d_ff)}, as they were read back.
        limit: The largest accepted difference of logits, relative to their range.
        advice: What to do if they differ, as a sentence.
        factors: {layer: (left, right)} as they were written, if they were truncated: the logits
            are compared with what these give. None: with those of the patched model.
        appended: {layer: neurons}, as they were read back. None: none.

    Raises:
        NumericsError: when answers or logits differ.
    """
    questions = ask(lm, deltas, factors)
    with written(lm, weights, appended=appended):
        answers = _answers(lm, questions)
    return compare(questions, answers, limit, advice)


def _answers(lm: LanguageModel, questions: Questions) -> Answers:
    picks, last = [], []
    for row, ids in zip(questions.rows, questions.prompt_ids, strict=True):
        logits, candidates = run_row(lm, row, len(ids))
        picks.append(candidates.ids[:, 0].tolist())
        last.append(logits)
    return Answers(tokenized=questions.tokenized, picks=picks, logits=torch.stack(last))
