"""patch.plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.errors import InputError
from ..core.fact import Fact, listed
from ..core.tables import Shown, Table, counted
from ..edit.configs import SpreadConfig, by_depth
from ..model.answers import answer_tokens, begins_with, first_phrase, probabilities
from ..model.language_model import LanguageModel
from ..model.tokens import subject_span
from .conflicts import Standing
from .layer_choice import LayerChoice


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the model says about one fact today: its greedy `answer` to the prompt, p(target), and whether it says the target already.

    Of a fact to be forgotten: p(target_true), and whether the model does not say it.

    standing   "known": nothing to write; else how it stands to others, as of `standing.Place`
    because    of a change or conflict, what with
    crowding   share of its key that earlier patches' keys explain: near 1 what is written for one is hardly to be had without touching the
               others. None: not measured
    """

    fact: Fact
    answer: str
    probability: float
    known: bool
    standing: Standing = "new"
    because: str = ""
    crowding: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Shown):
    """What an edit would have to do; nothing was changed to find out.

    notes    what could not be told beforehand, in words

    method   what it would be written with, into `layers`; n_bytes: the size of the patch; seconds: about how long it would take. Empty or
             None where nobody asked (`plan` without a workspace)
    """

    entries: tuple[Planned, ...]
    method: str = ""
    layers: tuple[int, ...] = ()
    n_bytes: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def conflicts(self) -> tuple[Planned, ...]:
        """The facts that contradict others; they are not written unless forced."""
        return tuple(entry for entry in self.entries if entry.standing == "conflict")

    @property
    def contradictions(self) -> tuple[str, ...]:
        """The same in words, with what each is in conflict."""
        return tuple(f"{entry.fact}: {entry.because}" for entry in self.conflicts)

    @property
    def new(self) -> tuple[Fact, ...]:
        """The facts that the model does not say yet."""
        return tuple(entry.fact for entry in self.entries if not entry.known)

    @property
    def known(self) -> tuple[Fact, ...]:
        """The facts that it says already."""
        return tuple(entry.fact for entry in self.entries if entry.known)

    def tables(self) -> list[Table]:
        """What the model says about each fact now."""
        rows = [
            (
                e.standing,
                e.fact.text,
                e.answer,
                e.fact.target or "(forget)",
                f"{e.probability:.3f}",
                "" if e.crowding is None else f"{e.crowding:.0%}",
            )
            for e in self.entries
        ]
        title = f"{counted(len(self.new), 'fact')} to write, {len(self.known)} known"
        if self.method:
            size = f", about {self.n_bytes:,} bytes" if self.n_bytes is not None else ""
            time_needed = f" and {self.seconds:.0f} s" if self.seconds is not None else ""
            title += f"; {self.method}, layer {', '.join(map(str, self.layers))}{size}{time_needed}"
        columns = {"": "<", "prompt": "<", "answer": "<", "target": "<", "p": ">", "crowding": ">"}
        crowding = (
            ["crowding: share of a fact's key that earlier patches' keys explain"]
            if any(row[-1] for row in rows)
            else []
        )
        tables = [Table(title, columns, rows, "; ".join([*crowding, *self.notes]))]
        told = [(e.standing, str(e.fact), e.because) for e in self.entries if e.because]
        return (
            [*tables, Table("what they meet", {"": "<", "fact": "<", "why": "<"}, told)]
            if told
            else tables
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        entries = [{**vars(entry), "fact": entry.fact.to_dict()} for entry in self.entries]
        told = {
            "method": self.method,
            "layers": list(self.layers),
            "n_bytes": self.n_bytes,
            "seconds": self.seconds,
        }
        return {"entries": entries, **told, "notes": list(self.notes)}


def plan(lm: LanguageModel, facts: Fact | Iterable[Fact]) -> Plan:
    """Ask what the model says about each fact now; the model is untouched.

    Raises SubjectError when a subject cannot be found once in its prompt, InputError when there is no fact.
    """
    facts = listed(facts)
    for fact in facts:
        subject_span(lm.tokenizer, fact.text, fact.subject)
    prompts = [fact.text for fact in facts]
    answers = lm.answer(
        prompts,
        max_new_tokens=answer_tokens(
            lm, prompts, [fact.target or fact.target_true or "" for fact in facts]
        ),
    )
    facts = [
        _to_forget(fact, answer) if fact.target is None else fact
        for fact, answer in zip(facts, answers, strict=True)
    ]
    asked = [fact.target or fact.target_true or "" for fact in facts]
    said = [
        begins_with(a, wanted) == (f.target is not None)
        for f, a, wanted in zip(facts, answers, asked, strict=True)
    ]
    return Plan(
        entries=tuple(
            Planned(
                fact=fact,
                answer=answer,
                probability=p or 0.0,
                known=known,
                standing="known" if known else "new",
            )
            for fact, answer, p, known in zip(
                facts, answers, probabilities(lm, prompts, asked), said, strict=True
            )
        )
    )


def chosen_layers(lm: LanguageModel, kind: type[Any], choice: LayerChoice) -> tuple[int, ...]:
    """The layers that settings of this kind edit, where they do not name any themselves."""
    return (
        (choice.memit or by_depth(lm.n_layers))
        if issubclass(kind, SpreadConfig)
        else (choice.rome,)
    )


def _to_forget(fact: Fact, answer: str) -> Fact:
    """A fact without a target, with what the model says now as what is to be forgotten, unless that was given."""
    if fact.target_true is not None:
        return fact
    said = first_phrase(answer)
    if not said:
        raise InputError(
            f"the model says nothing after {fact.text!r}, so there is nothing to forget; give target_true to name it"
        )
    return Fact.from_dict({**fact.to_dict(), "target_true": said})
