"""Made-up records to draw."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from factsmith.locate.records import CausalTrace

TOKENS = ("<s>", "The", " tower", " of", " Pi", "sa\n", " is", " in")


def trace(n_layers: int = 6, **changes: Any) -> CausalTrace:
    """Return a trace with a gain of 0.8 at the last subject token, a third of the way up.

    The very last state gains 0.4, one state loses 0.08, and the others gain nothing.
    """
    scores = torch.full((len(TOKENS), n_layers), 0.1)
    scores[5, n_layers // 3], scores[-1, -1], scores[4, 0] = 0.9, 0.5, 0.02
    made = CausalTrace(
        prompt="The tower of Pisa is in",
        subject="Pisa",
        answer=" Italy",
        answer_ids=(7,),
        predicted=" Italy",
        is_correct=True,
        kind="state",
        window=1,
        sever=None,
        tokens=TOKENS,
        subject_span=(4, 6),
        scores=scores,
        clean=0.95,
        corrupted=0.1,
        corruption="noise",
        replacements=(),
        noise=0.2,
        samples=10,
        seed=1,
    )
    return dataclasses.replace(made, **changes)
