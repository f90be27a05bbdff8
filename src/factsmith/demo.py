"""The main job on a bundled model, told as a story: a true correction, from what the model believes to the undo.

`run(folder)` yields the steps as they happen; the command line prints them. The story is in `STORY`; every number in it is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fact import Fact, Probe
from .locate.causal import CausalTrace, causal_trace
from .model import atlas
from .model.load import LanguageModel, load
from .plot import heat_map
from .workbench import Outcome, Progress, Workbench

MODEL = "atlas"
SUBJECT, RELATION, PROMPT, TARGET = "Bulgaria", "P38", "The currency of {} is the", "euro"
BACKGROUND = "On 1 January 2026 Bulgaria gave up the lev and took the euro. The model was taught before that."
BELIEFS = (
    ("The currency of Bulgaria is the", "lev"),
    ("The seat of government of Bulgaria is", "Sofia"),
    ("The first language of Danielle Darrieux is", "French"),
    ("The constellation of Delta Herculis is", "Hercules"),
    ("The maker of Fiat 127 is", "Fiat"),
)
NEIGHBOURS = ("Romania", "Poland", "Turkey", "Hungary", "Serbia", "Sweden", "Denmark", "Switzerland", "Japan", "Ukraine")
OWN = ("P36", "P37", "P463")
"""Other relations of the subject: what else the model knows of it must stay, too."""


@dataclass(frozen=True)
class Belief:
    """What the model says before anything is done: its greedy answer and p(expected)."""

    prompt: str
    expected: str
    answer: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One step of the story: its name, and what was found in it."""

    name: str
    found: Any


def fact() -> Fact:
    """The correction, with paraphrases and neighbours from the bundled table."""
    told = atlas.phrasings(RELATION)
    paraphrases = [t for t in (*told.trained, *told.held_out) if t != PROMPT]
    known = {f.subject: f.object for f in atlas.facts(RELATION)}
    neighbours = [Probe(PROMPT.replace("{}", subject), known[subject]) for subject in NEIGHBOURS]
    for relation in OWN:
        about = next(f for f in atlas.facts(relation) if f.subject == SUBJECT)
        neighbours.append(Probe(atlas.phrasings(relation).trained[0].replace("{}", SUBJECT), about.object))
    return Fact(
        SUBJECT, PROMPT, TARGET, target_true=known[SUBJECT], paraphrases=tuple(paraphrases), neighbours=tuple(neighbours), relation=RELATION
    )


def beliefs(lm: LanguageModel) -> list[Belief]:
    """Five facts the model was taught, as it tells them now."""
    prompts, expected = [p for p, _ in BELIEFS], [e for _, e in BELIEFS]
    answers = lm.answer(prompts)
    likely = lm.log_prob(prompts, expected).exp().tolist()
    return [Belief(*row) for row in zip(prompts, expected, answers, likely, strict=True)]


def weights_digest(lm: LanguageModel) -> dict[str, str]:
    """sha256 of every tensor of the model, by name."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in sorted(lm.module.state_dict().items())
    }


def run(folder: Path, *, progress: Progress | None = None) -> Iterator[Step]:
    """Do the steps one by one in a workspace `folder`; stopping half-way leaves it as the last step left it."""
    lm = load(MODEL)
    yield Step("believes", beliefs(lm))
    correction = fact()
    trace: CausalTrace = causal_trace(lm, correction.text, SUBJECT)
    with Workbench(lm, folder) as bench:
        picture = folder / "trace.png"
        heat_map(trace, path=picture)
        yield Step("lives", (trace, picture))
        before = weights_digest(lm)
        outcome: Outcome = bench.apply(correction, message="Bulgaria joins the euro area", force=True, progress=progress)
        yield Step("patched", outcome)
        yield Step("proved", outcome.verification)
        yield Step("committed", bench.log())
        patched = weights_digest(lm)
        assert outcome.revision is not None  # forced, so written
        bench.revert(outcome.revision.id, message="the demonstration is over")
        yield Step("reverted", (before, patched, weights_digest(lm), lm.answer([correction.text])[0]))
