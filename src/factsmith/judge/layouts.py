"""The layouts of the benchmarks' files: the fields that show a layout, and how one record is read.

    LAYOUTS["counterfact"].read(Entry(row, dropped=[]), 0)      # a Record; raises FieldError

`suites.py` says what each layout is and which paper it comes from. A new layout is a function that
reads one record, and a row of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..core.fact import Fact
from ..core.slots import fill_all
from .entry import Entry, FieldError
from .fields import read_mapped
from .records import Question, QuestionKind, Record, negation


class Layout(NamedTuple):
    """How a benchmark writes its records."""

    name: str
    fields: frozenset[str]
    """The fields by which a file is recognised."""
    read: Callable[[Entry, int], Record]
    """Reads one record, given its place in the file."""


def _about_fact(
    row: Entry, fact: Fact, *, aliases: Sequence[str] = (), compared: bool = True
) -> list[Question]:
    """Return the questions that every fact has: its prompt and its negation.

    Args:
        row: Collects the questions that cannot be asked.
        fact: The fact that is written.
        aliases: Further right answers.
        compared: Whether the new object is compared with the old one.
    """
    assert fact.target is not None
    against = fact.target_true if compared else None
    questions = row.ask("prompt", "prompt", fact.text, (fact.target, *aliases), against)
    denial = negation(fact)
    return questions if denial is None else [*questions, denial]


def _portability(row: Entry) -> list[Question]:
    """Return the question that EasyEdit added in the field "portability", if it is there."""
    if not row.has("portability"):
        return []
    added = row.entry("portability")
    answers = (added.text("New Answer"),)
    return added.ask("reasoning", "New Question", added.text("New Question"), answers)


def _counterfact(row: Entry, index: int) -> Record:
    rewrite = row.entry("requested_rewrite")
    new, old = rewrite.entry("target_new").text("str"), rewrite.entry("target_true").text("str")
    subject, prompt = rewrite.text("subject"), rewrite.text("prompt")
    relation = rewrite.optional("relation_id")
    fact = rewrite.fact(subject, prompt, new, target_true=old, relation=relation)
    questions = _about_fact(row, fact)
    for text in row.expected_texts("paraphrase_prompts"):
        questions += row.ask("paraphrase", "paraphrase_prompts", text, (new,), old)
    for text in row.expected_texts("neighborhood_prompts"):
        questions += row.ask("neighbour", "neighborhood_prompts", text, (old,), new)
    if alias := row.optional("alternative_subject"):
        text = fill_all(prompt, alias)
        questions += row.ask("aliasing", "alternative_subject", text, (new,), old)
    questions += _portability(row)
    return Record(
        id=row.id(index, "case_id"),
        facts=(fact,),
        questions=tuple(questions),
        generation_prompts=row.texts("generation_prompts"),
    )


def _counterfact_slim(row: Entry, index: int) -> Record:
    fact = _fact_of_prompt(row, "prompt", "target_new", row.texts("ground_truth"))
    questions = _about_fact(row, fact)
    assert fact.target is not None
    new, old = fact.target, fact.target_true
    for text in row.expected_texts("rephrase_prompt"):
        questions += row.ask("paraphrase", "rephrase_prompt", text, (new,), old)
    for text in row.expected_texts("locality_prompt"):
        answers = row.texts("locality_ground_truth")
        questions += row.ask("neighbour", "locality_prompt", text, answers, new)
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(questions))


def _zsre(row: Entry, index: int, *, as_rome: bool) -> Record:
    """Read a record of zsRE.

    Args:
        row: Fields of the record.
        index: Its place in the file.
        as_rome: Whether the true answer is written, as ROME does, or the counterfactual.
    """
    right = row.expected_texts("answers", "no old object is known")
    template, subject = row.template("src", row.text("subject"))
    old: str | None = None
    if as_rome:
        if not right:
            raise FieldError(
                row.path_of("answers"), "is empty; expected the true answer, which is written"
            )
        new, aliases = right[0], right[1:]
    else:
        new, aliases = row.text("alt"), ()
        old = right[0] if right and new not in right else None
    fact = row.fact(subject, template, new, target_true=old, field="src")
    questions = _about_fact(row, fact, aliases=aliases, compared=False)
    for text in row.expected_texts("rephrase"):
        questions += row.ask("paraphrase", "rephrase", text, (new,))
    for text in row.expected_texts("loc"):
        prompt = text if text.endswith("?") else f"{text}?"
        questions += row.ask("locality", "loc", prompt, row.texts("loc_ans"))
    if not as_rome:  # the added question follows from the counterfactual
        questions += _portability(row)
    return Record(id=row.id(index, "case_id"), facts=(fact,), questions=tuple(questions))


def _mquake(row: Entry, index: int) -> Record:
    hops = [
        (hop.text("question"), (hop.text("answer"), *hop.texts("answer_alias")))
        for hop in row.entries("new_single_hops")
    ]
    answers_of = dict(hops)
    facts: list[Fact] = []
    questions: list[Question] = []
    edited_hops: set[str] = set()
    for rewrite in row.entries("requested_rewrite"):
        new = rewrite.entry("target_new").text("str")
        old = rewrite.entry("target_true").text("str")
        subject, prompt = rewrite.text("subject"), rewrite.text("prompt")
        relation = rewrite.optional("relation_id")
        facts.append(rewrite.fact(subject, prompt, new, target_true=old, relation=relation))
        hop = rewrite.optional("question")
        aliases = answers_of.get(hop or "", ())
        questions += _about_fact(rewrite, facts[-1], aliases=aliases)
        if hop is not None:
            edited_hops.add(hop)
            questions += rewrite.ask("paraphrase", "question", hop, (new, *aliases), old)
    if not facts:
        raise FieldError(
            row.path_of("requested_rewrite"), "is empty; expected at least one fact to write"
        )
    answers = (row.text("new_answer"), *row.texts("new_answer_alias"))
    before = row.optional("answer")
    against = before if before not in answers else None
    for text in row.expected_texts("questions"):
        chain = row.ask("multihop", "questions", text, answers, against)
        questions += [replace(question, group=0) for question in chain]
    for hop, answers in hops:
        if hop not in edited_hops:
            questions += row.ask("locality", "new_single_hops", hop, answers)
    return Record(id=row.id(index, "case_id"), facts=tuple(facts), questions=tuple(questions))


_ABILITIES: dict[str, QuestionKind] = {
    "Reasoning": "reasoning",
    "reasoning": "reasoning",
    "Subject_Aliasing": "aliasing",
    "Logical_Generalization": "relation",
    "Relation_Specificity": "locality",
    "Forgetfulness": "locality",
}

_PARTS: dict[str, QuestionKind] = {"portability": "reasoning", "locality": "locality"}
"""The parts of a record of KnowEdit, and the kind of an ability with another name."""


def _knowedit(row: Entry, index: int) -> Record:
    fact = _fact_of_prompt(row, "prompt", "target_new", row.texts("ground_truth"))
    assert fact.target is not None
    questions = _about_fact(row, fact)
    for text in row.texts("rephrase") or row.texts("rephrase_prompt"):
        questions += row.ask("paraphrase", "rephrase", text, (fact.target,), fact.target_true)
    for part, default in _PARTS.items():
        abilities = row.entry(part) if row.has(part) else Entry({}, dropped=row.dropped)
        for ability in abilities.fields:
            kind = _ABILITIES.get(str(ability), default)
            against = fact.target_true if kind == "aliasing" else None
            for each in abilities.entries(ability):
                prompt, answers = each.text("prompt"), each.texts("ground_truth")
                questions += each.ask(kind, "ground_truth", prompt, answers, against)
    return Record(
        id=row.id(index, "case_id"),
        facts=(fact,),
        questions=tuple(questions),
        generation_prompts=row.texts("generate_prompt"),
    )


def _known(row: Entry, index: int) -> Record:
    template, subject = row.template("prompt", row.text("subject"))
    true = row.text("attribute")
    relation = row.optional("relation_id")
    fact = row.fact(subject, template, None, target_true=true, relation=relation)
    questions = row.ask("prompt", "prompt", fact.text, (true,))
    return Record(id=row.id(index, "known_id"), facts=(fact,), questions=tuple(questions))


def _wikibigedit(row: Entry, index: int) -> Record:
    fact = _fact_of_prompt(row, "update", "ans", relation=row.optional("relation"))
    assert fact.target is not None
    questions = _about_fact(row, fact)
    rephrased, persona = row.expected_texts("rephrase"), row.texts("personas")
    for field, texts in (("rephrase", rephrased), ("personas", persona)):
        for text in texts:
            questions += row.ask("paraphrase", field, text, (fact.target,))
    if row.has("mhop"):
        questions += row.ask("multihop", "mhop", row.text("mhop"), row.texts("mhop_ans"))
    if row.has("loc"):
        questions += row.ask("locality", "loc", row.text("loc"), row.texts("loc_ans"))
    return Record(id=row.id(index, "case_id", "id"), facts=(fact,), questions=tuple(questions))


def _qaedit(row: Entry, index: int) -> Record:
    fact = _fact_of_prompt(row, "prompt", "target")
    assert fact.target is not None
    questions = _about_fact(row, fact)
    for text in row.expected_texts("rephrase"):
        questions += row.ask("paraphrase", "rephrase", text, (fact.target,))
    for each in row.entries("locality"):
        questions += each.ask("locality", "loc", each.text("loc"), each.texts("loc_ans"))
    return Record(id=row.id(index, "source", "id"), facts=(fact,), questions=tuple(questions))


def _fact_of_prompt(
    row: Entry,
    prompt: str,
    target: str,
    old: Sequence[str] = (),
    *,
    relation: str | None = None,
) -> Fact:
    """Return the fact of a layout whose prompt names its subject.

    Args:
        row: Fields of the record.
        prompt: Name of the field with the prompt.
        target: Name of the field with the new object.
        old: The old object and its aliases, if the record gives them.
        relation: The relation, if the record gives it.
    """
    template, subject = row.template(prompt, row.text("subject"))
    old_object = old[0] if old else None
    return row.fact(
        subject,
        template,
        row.text(target),
        target_true=old_object,
        relation=relation,
        field=prompt,
    )


LAYOUTS = {
    name: Layout(name, frozenset(fields.split()), read)
    for name, fields, read in (
        ("counterfact", "requested_rewrite paraphrase_prompts neighborhood_prompts", _counterfact),
        (
            "counterfact-slim",
            "subject prompt target_new rephrase_prompt locality_prompt",
            _counterfact_slim,
        ),
        ("zsre", "subject src alt answers", partial(_zsre, as_rome=False)),
        ("zsre-rome", "subject src alt answers", partial(_zsre, as_rome=True)),
        ("mquake", "requested_rewrite questions new_answer", _mquake),
        ("knowedit", "subject prompt target_new", _knowedit),
        ("known", "subject attribute prompt", _known),
        ("wikibigedit", "subject update ans", _wikibigedit),
        ("qaedit", "subject prompt target rephrase", _qaedit),
        ("facts", "subject prompt target", partial(read_mapped, fields={})),
    )
}
"""The layouts by name."""
