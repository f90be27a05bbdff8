"""Campaigns: what is judged, what the folder keeps, and how parts are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import DamagedError, InputError, NumericsError
from factsmith.core.executor import Local, running_on
from factsmith.core.fact import Fact
from factsmith.corpus.paragraphs import Paragraphs
from factsmith.judge.campaign import Campaign, Judged
from factsmith.judge.claim import claim_folder
from factsmith.judge.records import Malformed, Suite
from factsmith.judge.run import evaluate
from factsmith.judge.schedule import Schedule
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from judging import PROSE, RECORDS, breaker, pusher, record

SUITE = Suite(name="own", records=tuple(RECORDS), skipped=(), source="by hand", digest="0")
QUICK = Schedule(drift_tokens=0, continued=0)


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


class Editors:
    """Makes pushers with a description, and keeps what it was called with."""

    def __init__(self, strength: float = 0.1, **others: Any) -> None:
        self.strength, self.others = strength, others
        self.log: list[tuple[str, ...]] = []
        self.options: dict[str, Any] = {}

    def __call__(self, lm: LanguageModel, methods: Sequence[str], /, **options: Any) -> Any:
        self.options = options
        return {name: self.others.get(name) or self._pusher(lm) for name in methods}

    def _pusher(self, lm: LanguageModel) -> Any:
        write = pusher(lm, self.log, self.strength)

        def described(facts: Sequence[Fact]) -> Any:
            return write(facts)

        described.description = f"strength={self.strength}; seed=0"  # type: ignore[attr-defined]
        return described


class Counting(Local):
    """Counts the parts that it runs, last part first."""

    def __init__(self) -> None:
        super().__init__(cuts=True)
        self.n_parts: list[int] = []

    def map(self, task: Callable[[Any], Any], parts: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(parts)
        self.n_parts.append(len(listed))
        return iter([task(part) for part in reversed(listed)][::-1])


class Notes:
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.arguments: list[str | None] = []
        self.steps: list[str] = []

    def __call__(self, step: str, done: int, total: int | None) -> None:
        self.steps.append(step)

    def note(self, text: str, *, argument: str | None = None) -> None:
        self.texts.append(text)
        self.arguments.append(argument)


def campaign(
    lm: LanguageModel, sizes: Sequence[int], folder: Path | None, **fields: Any
) -> Campaign:
    fields = {"editors": Editors(), "schedule": QUICK, "known_only": False, **fields}
    return Campaign(lm, fields.pop("suite", SUITE), ["a"], sizes, folder, **fields)


def paces(judged: Judged) -> list[str]:
    return [evaluation.pace for evaluation in judged.evaluations]


def test_every_size_is_judged_as_by_evaluate(lm: LanguageModel, tmp_path: Path) -> None:
    editors, notes = Editors(), Notes()
    schedule = Schedule(drift_tokens=30, continued=0, texts=[PROSE])
    made = campaign(lm, [1, 2], tmp_path, editors=editors, schedule=schedule)
    judged = made.run(progress=notes)
    assert paces(judged) == ["1 at a time", "2 at a time"] and judged.left_out == {}
    assert judged.suite == SUITE
    for evaluation in judged.evaluations:
        alone = evaluate(
            lm,
            RECORDS,
            Editors()(lm, ["a"]),
            size=evaluation.size,
            drift_tokens=30,
            texts=[PROSE],
            continued=0,
        )
        assert evaluation.rows == alone.rows and evaluation.notes == alone.notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judged.json", "size-1", "size-2"]
    assert editors.options["folder"] == tmp_path / "moments" and editors.options["seed"] == 0
    assert {"judging, 1 at a time", "judging, 2 at a time"} <= set(notes.steps)
    assert not notes.texts


def test_a_campaign_goes_on_from_its_folder(lm: LanguageModel, tmp_path: Path) -> None:
    straight = campaign(lm, [2, 5], None).run()

    @contextmanager
    def dies(facts: Sequence[Fact]) -> Iterator[None]:
        if facts[0].subject == "Entity2":
            raise KeyboardInterrupt
        with pusher(lm, [], 0.1)(facts):
            yield {"facts": len(facts)}  # type: ignore[misc]

    dies.description = "strength=0.1; seed=0"  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        campaign(lm, [2, 5], tmp_path, editors=Editors(a=dies)).run()
    editors = Editors()
    judged = campaign(lm, [2, 5], tmp_path, editors=editors).run()
    assert editors.log[0] == ("Entity2", "Entity3"), "the first edit is not made again"
    for one, other in zip(judged.evaluations, straight.evaluations, strict=True):
        assert one.rows == other.rows and one.notes == other.notes
    editors = Editors()
    campaign(lm, [2, 5], tmp_path, editors=editors).run()
    assert not editors.log


def test_what_the_folder_holds_of_other_sizes_is_part_of_the_result(
    lm: LanguageModel, tmp_path: Path
) -> None:
    campaign(lm, [2], tmp_path, schedule=replace(QUICK, sequence=True)).run()
    judged = campaign(lm, [1], tmp_path).run()
    assert paces(judged) == ["1 at a time", "2 a round"]
    assert paces(campaign(lm, [1], None).run()) == ["1 at a time"], "the control: no folder"


def test_the_executor_gets_edits_as_parts(lm: LanguageModel) -> None:
    executor = Counting()
    judged = campaign(lm, [1, 5], None).run(executor)
    plain = campaign(lm, [1, 5], None).run()
    assert [e.rows for e in judged.evaluations] == [e.rows for e in plain.evaluations]
    # Records, then for each size what precedes the edits, and the edits.
    assert [n for n in executor.n_parts if n] == [1, 5, 5, 1, 1]
    idle = Counting()
    campaign(lm, [5], None).run()
    assert not idle.n_parts, "the control: no executor is in use"
    with running_on(idle):
        campaign(lm, [5], None).run()
    assert [n for n in idle.n_parts if n] == [1, 1, 1]


def test_notes_say_what_is_left_out_and_what_went_wrong(lm: LanguageModel, tmp_path: Path) -> None:
    nothing = replace(record(8), facts=(Fact("Edwin", "{} is", None, target_true="king"),))
    suite = replace(
        SUITE, records=(*RECORDS, nothing), skipped=(Malformed("f", 6, "subject", "is missing"),)
    )

    @contextmanager
    def fails(facts: Sequence[Fact]) -> Iterator[None]:
        raise NumericsError("no finite target")
        yield

    notes = Notes()
    for name, editor in (("broken", breaker(lm, float("nan"))), ("failing", fails)):
        made = campaign(lm, [9], tmp_path / name, suite=suite, editors=Editors(a=editor))
        judged = made.run(progress=notes)
        assert judged.left_out == {"nothing to write": 1}
    assert notes.texts[:3] == [
        "1 record of 6 left out: nothing to write",
        "malformed: 1 record left out, the first: f, record 6: subject is missing",
        "size 9: there are 5 records to write, so 5 are written at a time",
    ]
    assert notes.texts[3].startswith("a, 5 at a time: 1 edit left a model without finite numbers")
    assert notes.texts[-1].endswith("the first is a, edit 0: no finite target")


def test_editors_without_all_edits_are_left_out(lm: LanguageModel, tmp_path: Path) -> None:
    schedule = replace(QUICK, sequence=True)
    campaign(lm, [2], tmp_path, schedule=schedule).run()
    rows = tmp_path / "sequence-2" / "rows.jsonl"
    lines = rows.read_text().splitlines()
    ends = [at for at, line in enumerate(lines) if line.startswith('{"ends": "a"')]
    rows.write_text("\n".join(lines[: ends[0] + 1]) + "\n")
    notes = Notes()
    assert paces(campaign(lm, [1], tmp_path).run(progress=notes)) == ["1 at a time"]
    assert notes.texts == ["a, 2 a round: 1 of 3 edits are there; run it again to finish it"]
    assert len(campaign(lm, [2], tmp_path, schedule=schedule).run().evaluations) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": replace(QUICK, seed=1)}, "another seed"),
        ({"schedule": replace(QUICK, drift_tokens=7)}, "another drift_tokens"),
        ({"limit": 3}, "another limit"),
        ({"suite": replace(SUITE, digest="1")}, "another suite"),
        ({"suite": replace(SUITE, name="other")}, "another layout"),
        ({"texts": [PROSE]}, "another texts"),
        ({"editors": Editors(0.2)}, "strength=0.1 there, strength=0.2 here"),
    ],
)
def test_a_folder_belongs_to_one_campaign(
    lm: LanguageModel, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    campaign(lm, [1], tmp_path).run()
    with pytest.raises(InputError, match=words) as error:
        campaign(lm, [2], tmp_path, **fields).run()
    assert error.value.argument == "folder" and not (tmp_path / "size-2").exists()


def test_texts_are_known_by_their_files_or_their_content(lm: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(PROSE)
    texts: tuple[Any, ...] = (Paragraphs([file]), [PROSE])
    claims = []
    for number, given in enumerate(texts):
        folder = tmp_path / str(number)
        campaign(lm, [5], folder, texts=given, schedule=replace(QUICK, drift_tokens=20)).run()
        campaign(lm, [5], folder, texts=given, schedule=replace(QUICK, drift_tokens=20)).run()
        claims.append(json.loads((folder / "judged.json").read_text())["texts"])
    assert all(len(claim) == 1 and len(claim[0]) == 64 for claim in claims)
    file.write_text(PROSE + " It was late.")
    with pytest.raises(InputError, match="another texts"):
        schedule = replace(QUICK, drift_tokens=20)
        campaign(lm, [5], tmp_path / "0", texts=Paragraphs([file]), schedule=schedule).run()


def test_what_cannot_be_judged_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    for sizes, words in (([], "at least one"), ([1, 1], "each once"), ([0], "at least 1")):
        with pytest.raises(InputError, match=words):
            campaign(lm, sizes, None)
    with pytest.raises(InputError, match="none of 5 records can be judged") as error:
        campaign(lm, [1], None, known_only=True).run()
    assert error.value.argument == "known_only"
    for content, kind in (("[]", InputError), ("{", DamagedError)):
        (tmp_path / "judged.json").write_text(content)
        with pytest.raises(kind):
            claim_folder(tmp_path, {"model": "m"}, {})


def test_a_claim_keeps_the_settings_of_other_methods(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"model": "m"}, {"rome": "steps=1"})
    claim_folder(tmp_path, {"model": "m"}, {"memit": "steps=2"})
    kept = json.loads((tmp_path / "judged.json").read_text())
    assert kept == {"model": "m", "settings": {"rome": "steps=1", "memit": "steps=2"}}
