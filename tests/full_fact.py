"""A fact that has every field, for the tests of facts and of their files."""

from __future__ import annotations

from factsmith.core.fact import Fact, Probe

FULL = Fact(
    "N'Djamena",
    "The river of {} is",
    "Łódź",
    target_true="Chari",
    paraphrases=["{} lies on", "Q: Which river? A: N'Djamena's is"],
    neighbours=[
        "Cairo lies on",
        Probe("Paris lies on", "Seine"),
        {"prompt": "Rome lies on", "expected": "Tiber"},
    ],
    relation="P206",
)
