"""Runs in parts: the same file as in one piece, in any order, with models that were copied."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import ClusterError, FingerprintError
from factsmith.core.executor import Executor, Local, executor_in_use, running_on
from factsmith.core.fact import Fact
from factsmith.judge.evaluation import Evaluation
from factsmith.judge.run import evaluate
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from judging import PROSE, RECORDS, breaker, pusher

WRITING = [replace(one, generation_prompts=("Entity is",)) for one in RECORDS]


@pytest.fixture
def lm() -> LanguageModel:
    return wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())


class Workers:
    """Pickles tasks and parts for workers with models of their own, which run them in any order."""

    cuts: bool = True
    part_tokens: int | None = None

    def __init__(self, n: int = 2, seed: int = 0) -> None:
        pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")
        self.n, self.draw = n, random.Random(seed)

    def map(
        self,
        task: Callable[[Any], Any],
        parts: Iterable[Any],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Any]:
        listed = list(parts)
        tasks = [self._sent(task) for _ in range(self.n)]
        results: dict[int, Any] = {}
        for at in self.draw.sample(range(len(listed)), len(listed)):
            with running_on(Local()):
                results[at] = copy.deepcopy(tasks[at % self.n](copy.deepcopy(listed[at])))
        return iter([results[at] for at in range(len(listed))])

    def check(self, thing: object, what: str) -> None:
        try:
            self._sent(thing)
        except ClusterError as error:
            raise ClusterError(f"{what}: {error}") from error

    def _sent(self, task: Any) -> Any:
        from factsmith.cluster.shipping import pack, unpack

        try:
            return unpack(pack(task), {})
        except Exception as error:
            raise ClusterError(f"the work cannot be sent to workers: {error}") from error


def judged(lm: LanguageModel, executor: Executor, folder: Path | None, **fields: Any) -> Evaluation:
    # A strength at which answers stay readable, so that many rows differ.
    editors = {"push": pusher(lm, [], 0.1), "break": breaker(lm, float("nan"))}
    fields = {"drift_tokens": 30, "texts": [PROSE], "continued": 3, **fields}
    with running_on(executor):
        return evaluate(lm, WRITING, fields.pop("editors", editors), folder=folder, **fields)


SCHEDULES: list[dict[str, Any]] = [
    {"size": 1, "drift_tokens": 0, "texts": None},
    {"size": 2},
    {"size": 2, "sequence": True, "retained": 1},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parts_give_the_file_of_one_piece(
    lm: LanguageModel, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    files = []
    executors: tuple[Executor, ...] = (Local(), Local(cuts=True), Workers(2, seed=1))
    for number, executor in enumerate(executors):
        folder = tmp_path / str(number)
        before = lm.fingerprint
        judged(lm, executor, folder, **schedule)
        assert lm.fingerprint == before
        files.append((folder / "rows.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    rows = [row for row in Evaluation.load(tmp_path / "0").rows if row.editor == "push"]
    assert len({row.log_wanted for row in rows}) > 10, "the control: rows differ"


class Dies(Local):
    """Ends before it yields the results after some, as a process that is killed."""

    def __init__(self, after: int) -> None:
        super().__init__(cuts=True)
        self.after = after

    def map(self, task: Any, parts: Any, **options: Any) -> Iterator[Any]:
        for result in super().map(task, parts, **options):
            if not self.after:
                raise KeyboardInterrupt
            self.after -= 1
            yield result


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_a_run_in_parts_goes_on_where_it_was_killed(
    lm: LanguageModel, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    class Counting(Local):
        handed: tuple[Any, ...] = ()

        def map(self, task: Any, parts: Any, **options: Any) -> Iterator[Any]:
            listed = list(parts)
            self.handed = (*self.handed, *listed)
            return super().map(task, listed, **options)

    straight, torn = tmp_path / "straight", tmp_path / "torn"
    whole = Counting(cuts=True)
    judged(lm, whole, straight, **schedule)
    with pytest.raises(KeyboardInterrupt):
        judged(lm, Dies(after=2), torn, **schedule)  # the sample, and the first answers
    judged(lm, Local(), torn, **{**schedule, "editors": {"push": pusher(lm, [], 0.1)}})
    rest = Counting(cuts=True)
    evaluation = judged(lm, rest, torn, **schedule)
    assert len(rest.handed) < len(whole.handed)
    assert (torn / "rows.jsonl").read_bytes() == (straight / "rows.jsonl").read_bytes()
    assert vars(evaluation)["rows"] == Evaluation.load(straight).rows
    judged(lm, again := Counting(cuts=True), torn, **schedule)
    assert not again.handed


def test_a_sequence_goes_on_from_the_rounds_of_one_piece(lm: LanguageModel, tmp_path: Path) -> None:
    """Rounds that were kept are written into the model again, and not asked again."""
    fields: dict[str, Any] = {"size": 2, "sequence": True, "editors": {"push": pusher(lm, [], 0.1)}}
    judged(lm, Local(), tmp_path, **fields)
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    end = next(at for at, line in enumerate(lines) if line.startswith(b'{"ends": "push"'))
    path.write_bytes(b"\n".join(lines[: end + 1]) + b"\n")
    judged(lm, Workers(2), tmp_path, **fields)
    assert path.read_bytes() == whole


def test_progress_counts_edits(lm: LanguageModel, tmp_path: Path) -> None:
    for executor in (Local(), Local(cuts=True)):
        counts: list[tuple[int, int | None]] = []
        folder = tmp_path / str(executor.cuts)
        for _ in range(2):
            judged(
                lm,
                executor,
                folder,
                size=2,
                progress=lambda step, done, total: counts.append((done, total)),  # noqa: B023
            )
        assert counts == [*((n, 9) for n in range(10)), (9, 9)], "the second time all are there"


def test_what_cannot_be_sent_is_refused_before_work_begins(
    lm: LanguageModel, tmp_path: Path
) -> None:
    with (tmp_path / "open").open("w") as file:

        def probe() -> dict[str, float]:
            return {"place": float(file.tell())}

        @contextmanager
        def writes(facts: Sequence[Fact]) -> Iterator[None]:
            file.write("edit")
            yield

        for fields, words in (
            ({"probe": probe}, "^the probe: .* cannot be sent"),
            ({"editors": {"own": writes}}, "^the editor own: .* cannot be sent"),
        ):
            with pytest.raises(ClusterError, match=words):
                judged(lm, Workers(), tmp_path, **fields)
            assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1, "the header alone"
            judged(lm, Local(cuts=True), None, **fields)
            (tmp_path / "rows.jsonl").unlink()


def test_an_error_that_ends_a_run_ends_it_in_parts_too(lm: LanguageModel, tmp_path: Path) -> None:
    def foreign(facts: Sequence[Fact]) -> Any:
        assert not executor_in_use().cuts, "a part is not cut again"
        raise FingerprintError("of another model")

    editors = {"push": pusher(lm, [], 0.1), "foreign": foreign}
    for executor in cast("tuple[Executor, ...]", (Local(cuts=True), Workers())):
        with pytest.raises(FingerprintError, match="another model"):
            judged(lm, executor, tmp_path, editors=editors)
    kept = (tmp_path / "rows.jsonl").read_text()
    assert len(re.findall('"ends": "base"', kept)) == 5
