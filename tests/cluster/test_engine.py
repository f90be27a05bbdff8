"""Parts on a local cluster of two workers: the same numbers, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEXTS
from factsmith import atlas
from factsmith.cluster import run as cluster_run
from factsmith.cluster.engine import Ray
from factsmith.core.errors import ClusterError, FingerprintError, InputError, LayerError
from factsmith.core.executor import Local, executor_in_use, report_done, running_on
from factsmith.core.fact import Fact
from factsmith.corpus.moments import second_moments
from factsmith.edit.delta import Delta, applied
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load

ray = pytest.importorskip("ray", reason="install it: pip install 'factsmith[ray]'")

MANY = [f"{text} {n}" for n in range(60) for text in TEXTS]


@pytest.fixture(scope="module")
def engine() -> Iterator[Ray]:
    """Return an engine with two workers; a test enters it by `running_on`."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests
    with Ray(workers=2, part_tokens=400) as started, running_on(Local()):
        yield started


def pids(engine: Ray) -> list[int]:
    """Return the processes of the workers that are there."""
    assert engine._pool is not None
    deadline = time.monotonic() + 60
    while engine._pool.n_ready < engine._pool.n and time.monotonic() < deadline:
        engine._pool.wait(0.5)
    return [seat.hello.pid for seat in engine._pool.seats if seat.hello is not None]


def square(part: int) -> int:
    return part * part


def slow_square(folder: Path, part: int) -> tuple[int, int]:
    """Note who did it, and take a while."""
    (folder / f"{part}.{os.getpid()}.{time.monotonic_ns()}").touch()
    time.sleep(0.3)
    return part * part, os.getpid()


def test_results_come_in_the_order_of_the_parts_from_several_processes(
    engine: Ray, tmp_path: Path
) -> None:
    assert len(pids(engine)) == 2
    results = list(engine.map(Partial(slow_square, tmp_path), range(8)))
    assert [value for value, _ in results] == [n * n for n in range(8)]
    assert os.getpid() not in {pid for _, pid in results} and len({p for _, p in results}) == 2
    assert sorted(int(file.name.split(".")[0]) for file in tmp_path.iterdir()) == list(range(8))
    assert list(engine.map(square, [])) == []


class Partial:
    """A function with its first argument, as functools.partial; it is pickled by value."""

    def __init__(self, function: Any, first: Any) -> None:
        self.function, self.first = function, first

    def __call__(self, part: Any) -> Any:
        return self.function(self.first, part)


def test_parts_are_taken_as_they_are_needed(engine: Ray) -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for n in range(10**6):
            taken.append(n)
            yield n

    results = engine.map(square, endless())
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 3 + 2 * cluster_run.AHEAD
    results.close()  # type: ignore[attr-defined]
    assert list(engine.map(square, [7])) == [49], "what was left behind is not waited for"


def test_several_runs_share_the_workers(engine: Ray) -> None:
    both = zip(engine.map(square, range(20)), engine.map(str, range(20)), strict=True)
    assert list(both) == [(n * n, str(n)) for n in range(20)]
    with ThreadPoolExecutor(3) as threads:
        runs = threads.map(lambda k: list(engine.map(square, range(k, k + 30))), range(3))
        assert list(runs) == [[n * n for n in range(k, k + 30)] for k in range(3)]


def moments_on(lm: LanguageModel, executor: Any, **options: Any) -> dict[int, torch.Tensor]:
    with running_on(executor):
        result = second_moments(lm, MANY, [0, 2], max_tokens=4000, **options)
    assert {moment.count for moment in result.values()} == {4000}
    return {layer: moment.matrix for layer, moment in result.items()}


def check_same(
    lm: LanguageModel, matrices: dict[int, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Compare with the same parts in this process, bit for bit, and with one piece."""
    parts = moments_on(lm, Local(cuts=True, part_tokens=400), dtype=dtype)
    whole = moments_on(lm, Local(), dtype=dtype)
    for layer, matrix in matrices.items():
        assert torch.equal(matrix, parts[layer])
        scale = float(whole[layer].abs().max())
        torch.testing.assert_close(matrix, whole[layer], rtol=1e-12, atol=1e-12 * scale)


def test_second_moments_have_the_same_bits(engine: Ray, tiny_lm: LanguageModel) -> None:
    reports: list[int] = []
    matrices = moments_on(tiny_lm, engine, progress=reports.append)
    check_same(tiny_lm, matrices)
    assert reports == sorted(reports)
    assert not torch.equal(matrices[0], matrices[2]), "control"
    narrow = moments_on(tiny_lm, engine, dtype=torch.bfloat16)
    check_same(tiny_lm, narrow, torch.bfloat16)
    assert not torch.equal(narrow[0], matrices[0]), "control: the pass ran in bfloat16"


def test_a_killed_worker_is_replaced_and_no_part_counts_twice(
    engine: Ray, tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    victim, other = pids(engine)
    results = engine.map(Partial(slow_square, tmp_path), range(8))
    assert next(results)[0] == 0
    os.kill(victim, signal.SIGKILL)
    values = [value for value, _ in results]
    assert values == [n * n for n in range(1, 8)]
    assert victim not in pids(engine) and other in pids(engine)

    def killed(done: int) -> None:
        if done and not killing:
            killing.append(pids(engine)[0])
            os.kill(killing[0], signal.SIGKILL)

    killing: list[int] = []
    matrices = moments_on(tiny_gpt2, engine, progress=killed)
    check_same(tiny_gpt2, matrices)
    assert len(pids(engine)) == 2


def die(folder: Path, part: int) -> int:
    """Kill the worker in part 2, once for each file that is not there yet."""
    limit = int((folder / "limit").read_text())
    if part == 2 and len(list(folder.glob("died*"))) < limit:
        (folder / f"died.{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_part_that_kills_workers_is_given_up_in_words(engine: Ray, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("1")
    assert list(engine.map(Partial(die, tmp_path), range(4))) == [0, 1, 2, 3]
    (tmp_path / "limit").write_text("100")
    with pytest.raises(ClusterError, match=r"part 3 cost 4 workers their lives.*too little memory"):
        list(engine.map(Partial(die, tmp_path), range(4)))
    assert list(engine.map(square, [3])) == [9], "the engine goes on"


def lag(folder: Path, part: int) -> int:
    """The first worker that takes part 1 takes a minute."""
    if part == 1 and not (folder / "lagged").exists():
        (folder / "lagged").touch()
        time.sleep(60)
    return part


def test_a_straggler_is_done_by_another_worker_too(
    engine: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_run, "STRAGGLER_SECONDS", 1.0)
    began = time.monotonic()
    assert list(engine.map(Partial(lag, tmp_path), range(6))) == [0, 1, 2, 3, 4, 5]
    assert time.monotonic() - began < 40, "it did not wait for the minute to end"


def fail(part: int) -> int:
    if part == 1:
        raise LayerError("there is no layer 9", argument="layer")
    return part


def test_errors_of_a_part_arrive_as_they_were_raised(engine: Ray) -> None:
    results = engine.map(fail, range(4))
    assert next(results) == 0
    with pytest.raises(LayerError) as caught:
        next(results)
    assert str(caught.value) == "there is no layer 9"
    assert caught.value.argument == "layer"
    assert any("On a worker" in note for note in caught.value.__notes__)
    assert list(engine.map(square, [2])) == [4]


class TwoWordsError(Exception):
    """Cannot be unpickled: it takes two words, and keeps one."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class OtherError(BaseException):
    """No Exception."""


def raises(part: int) -> Any:
    if part == 0:
        raise TwoWordsError("a ", "b")
    if part == 1:
        raise OtherError("odd")
    return (n for n in range(3))


def test_odd_errors_and_results_are_told_in_words(engine: Ray) -> None:
    before = pids(engine)
    with pytest.raises(ClusterError, match="failed on a worker with TwoWordsError: a b") as caught:
        list(engine.map(raises, [0]))
    assert any("in raises" in note for note in caught.value.__notes__), "where it was raised"
    with pytest.raises(BaseException, match="odd") as other:
        list(engine.map(raises, [1]))
    assert type(other.value).__name__ == "OtherError"
    with pytest.raises(ClusterError, match="result of a part, a generator, cannot be sent back"):
        list(engine.map(raises, [2]))
    assert pids(engine) == before


def leave(part: int) -> int:
    sys.exit("enough")


def test_a_task_that_exits_ends_the_program_and_no_worker(engine: Ray) -> None:
    before = pids(engine)
    with pytest.raises(SystemExit, match="enough"):
        list(engine.map(leave, range(2)))
    assert pids(engine) == before
    with pytest.raises(ClusterError, match=r"has 0 GPU; a worker takes .*1 GPU"):
        Ray(workers=1, num_cpus=0, num_gpus=1).__enter__()


def test_what_cannot_be_sent_is_refused_before_any_part(
    engine: Ray, tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    with (
        (tmp_path / "open").open("w") as file,
        pytest.raises(ClusterError, match=r"cannot be sent to workers.*picklable"),
    ):
        list(engine.map(Partial(lambda f, part: f, file), [1]))
    with (
        (tmp_path / "open").open("w") as file,
        pytest.raises(ClusterError, match=r"^the probe cannot be sent"),
    ):
        engine.check([tiny_gpt2, file], "the probe")
    engine.check([tiny_gpt2, tmp_path], "the probe")
    with pytest.raises(ClusterError, match=r"^part 2 cannot be sent to workers"):
        list(engine.map(square, [1, (n for n in range(2))]))


def count(part: int) -> bool:
    for n in range(1, 4):
        report_done(n)
        time.sleep(0.5)
    return executor_in_use().cuts


def test_workers_say_how_far_they_are_and_cut_nothing_themselves(engine: Ray) -> None:
    reports: list[int] = []
    assert list(engine.map(count, range(4), progress=reports.append)) == [False] * 4
    assert reports == sorted(reports) and reports[-1] == 12 and len(reports) > 2
    few: list[int] = []
    assert list(engine.map(nap, range(2), progress=few.append)) == [0, 1]
    assert not any(few), "the counts of the parts before do not count"


def nap(part: int) -> int:
    time.sleep(1.5)
    return part


def log_prob(lm: LanguageModel, part: int) -> tuple[float, LanguageModel]:
    return float(lm.log_prob([TEXTS[part]], ["Paris"])), lm


def test_models_are_sent_with_their_present_weights_and_come_back_as_themselves(
    engine: Ray, tiny_gpt2: LanguageModel, tiny_llama: LanguageModel
) -> None:
    plain = [float(tiny_gpt2.log_prob([text], ["Paris"])) for text in TEXTS]
    results = list(engine.map(Partial(log_prob, tiny_gpt2), range(len(TEXTS))))
    assert [value for value, _ in results] == plain
    assert all(lm is tiny_gpt2 for _, lm in results)
    delta = Delta(
        layers={1: (torch.ones(32, 1), torch.ones(1, tiny_gpt2.ffn[1].d_ff))},
        k_star={1: torch.ones(1, tiny_gpt2.ffn[1].d_ff)},
        v_star=torch.ones(1, 32),
        facts=(Fact("Paris", "{} is the capital of", "France"),),
        method="rome",
        config={},
        fingerprint=tiny_gpt2.fingerprint,
    )
    with applied(tiny_gpt2, delta):
        edited = [value for value, _ in engine.map(Partial(log_prob, tiny_gpt2), range(len(TEXTS)))]
        assert edited == [float(tiny_gpt2.log_prob([text], ["Paris"])) for text in TEXTS]
    assert edited != plain, "control"
    other = [value for value, _ in engine.map(Partial(log_prob, tiny_llama), range(len(TEXTS)))]
    assert other == [float(tiny_llama.log_prob([text], ["Paris"])) for text in TEXTS]
    assert [v for v, _ in engine.map(Partial(log_prob, tiny_gpt2), range(len(TEXTS)))] == plain


@pytest.mark.skipif("atlas" not in atlas.names(), reason="the bundled model is not built")
def test_workers_load_the_model_themselves_and_refuse_another(
    engine: Ray, tiny_gpt2: LanguageModel
) -> None:
    assert engine._pool is not None
    lm = load("atlas")
    placed = {"models": "atlas", "device_map": {"": "cpu"}}
    with Ray(workers=1, num_cpus=0, **placed) as loading:  # in the same cluster
        assert next(loading.map(Partial(log_prob, lm), [0]))[0] == float(
            lm.log_prob([TEXTS[0]], ["Paris"])
        )
        with pytest.raises(FingerprintError, match="workers loaded atlas"):
            next(loading.map(Partial(log_prob, tiny_gpt2), [0]))
        late = loading.map(square, range(100))
        assert next(late) == 0
    with pytest.raises(ClusterError, match="block of this engine ended"):
        list(late)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "workers"),
        ({"num_gpus": -1}, "num_gpus"),
        ({"num_cpus": "many"}, "num_cpus"),
        ({"threads": 0}, "threads"),
        ({"part_tokens": 0}, "part_tokens"),
        ({"address": ""}, "address"),
        ({"address": 7}, "address"),
        ({"device_map": "auto"}, "device_map"),
        ({"resources": {"x": -1}}, "resources"),
        ({"resources": "x"}, "resources"),
        ({"resources": {"x": "a"}}, "resources"),
        ({"resources": {1: 1}}, "resources"),
        ({"resources": {"CPU": 1}}, "resources"),
        ({"models": 3}, "models"),
        ({"models": ""}, "models"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_arguments_are_checked_before_anything_starts(
    options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(InputError) as caught:
        Ray(**options)
    assert caught.value.argument == argument


def test_an_engine_runs_in_a_block_only() -> None:
    with pytest.raises(ClusterError, match="not running"):
        list(Ray().map(square, [1]))
