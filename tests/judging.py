"""Records to judge, and editors that write nothing but a push: they say what they were given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from factsmith.core.errors import InputError
from factsmith.core.fact import Fact
from factsmith.edit.delta import Delta
from factsmith.judge.editor import Editor
from factsmith.judge.records import Question, Record
from factsmith.model.language_model import LanguageModel

PROSE = "The harbour was quiet in the morning, and nobody had seen the old captain since."


def record(n: int, *questions: Question) -> Record:
    """A record with a question of every kind but the chains; further ones may be given."""
    fact = Fact(f"Entity{n}", "The home of {} is", "Oslo", target_true="Rome")
    home = ("Oslo",)
    standard = (
        Question(kind="prompt", prompt=fact.text, answers=home, against="Rome"),
        Question(kind="paraphrase", prompt=f"Entity{n} lives in", answers=home, against="Rome"),
        Question(
            kind="neighbour", prompt=f"The home of Other{n} is", answers=("Rome",), against="Oslo"
        ),
        Question(kind="locality", prompt=f"The colour of Entity{n} is", answers=()),
        Question(
            kind="negation",
            prompt=f"It is not true that the home of Entity{n} is",
            answers=(),
            against="Oslo",
        ),
    )
    return Record(id=f"r{n}", facts=(fact,), questions=(*standard, *questions))


RECORDS = [record(n) for n in range(5)]


def letter_row(lm: LanguageModel) -> torch.Tensor:
    """The unembedding's row of O, a copy."""
    ids = lm.tokenizer("O", add_special_tokens=False)["input_ids"]
    row: torch.Tensor = lm.module.get_output_embeddings().weight[ids[0]].detach().clone()
    return row


def pusher(lm: LanguageModel, log: list[tuple[str, ...]], strength: float = 300.0) -> Editor:
    """Pushes the unembedding's row of O, so every answer begins with it, and logs the subjects."""

    @contextmanager
    def write(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        bias = lm.module.transformer.ln_f.bias
        before = bias.detach().clone()
        log.append(tuple(fact.subject for fact in facts))
        with torch.no_grad():
            bias += strength * letter_row(lm)
        try:
            yield {"facts": len(facts), "what": "not a number"}  # type: ignore[dict-item]
        finally:
            with torch.no_grad():
                bias.copy_(before)

    return write


def breaker(lm: LanguageModel, value: float) -> Editor:
    """Writes a value into a whole down-projection."""

    @contextmanager
    def write(facts: Sequence[Fact]) -> Iterator[dict[str, float]]:
        weight = lm.module.transformer.h[1].mlp.c_proj.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(value)
        try:
            yield {"norm": float("inf"), "seconds": 1.0}
        finally:
            with torch.no_grad():
                weight.copy_(before)

    return write


def pushing_delta(lm: LanguageModel, strength: float) -> Delta:
    """Layer 1 writes the unembedding's row of O wherever its first neuron fires."""
    row = letter_row(lm)
    key = torch.zeros(1, lm.ffn[1].d_ff)
    key[0, 0] = 1.0
    return Delta(
        layers={1: (strength * row[:, None], key)},
        k_star={1: key},
        v_star=row[None],
        facts=(Fact("Entity9", "{} is", "O"),),
        method="by hand",
        config={},
        fingerprint=lm.fingerprint,
    )


def refuse_target(monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, word: str) -> None:
    """Let a model have no token for a target."""
    question = lm.question

    def refusing(prompt: str, target: str, *gap: Any) -> Any:
        if target == word:
            raise InputError(f"target {word!r} has no token that the model knows")
        return question(prompt, target, *gap)

    monkeypatch.setattr(lm, "question", refusing)
