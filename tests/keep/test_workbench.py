"""The workbench keeps the model and the ledger in agreement, whatever happens."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import GPT2, LLAMA, byte_tokenizer, shared_dir, tiny_model
from factsmith.core.errors import (
    FactsmithError,
    FingerprintError,
    InputError,
    LayerError,
    UnsupportedModelError,
    WorkspaceError,
)
from factsmith.core.fact import Fact
from factsmith.corpus.moments import SecondMoment
from factsmith.edit.configs import RomeConfig
from factsmith.edit.delta import Delta
from factsmith.edit.methods import METHODS
from factsmith.keep import carried
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import load, wrap
from workbenches import FACT, QUICK, THREE, hashes, moments_of, some_delta


def test_a_model_path_is_kept_whole(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm, "name", "model")
    with Workbench(lm, "space") as bench:
        assert bench.ledger.model == str(tmp_path / "model")


def test_a_preview_leaves_nothing(lm: LanguageModel, bench: Workbench) -> None:
    before, moments = hashes(lm), moments_of(lm)
    with bench.preview(
        THREE[:1], "rome", RomeConfig(layer=1, steps=4), moments=moments, force=True
    ) as shown:
        assert shown is lm and hashes(lm) != before
    assert hashes(lm) == before and bench.log() == []
    with (
        pytest.raises(RuntimeError),
        bench.preview(THREE[:1], "rome", RomeConfig(layer=1, steps=4), moments=moments, force=True),
    ):
        raise RuntimeError
    assert hashes(lm) == before


def test_a_real_fact_is_patched_and_reverted(tmp_path: Path) -> None:
    golden = shared_dir() / "golden"
    if not golden.is_dir():
        pytest.skip("no golden model next to the checkout")
    lm = load(golden / "facts-gpt2")
    requests = json.loads((golden / "rome.json").read_text())["requests"]
    base = hashes(lm)
    neighbours = [r["prompt"].replace("{}", r["subject"]) for r in requests[1:]]
    fact = Fact(
        requests[0]["subject"],
        requests[0]["prompt"],
        requests[0]["target_new"]["str"],
        neighbours=tuple(neighbours),
    )
    kept = load_file(golden / "second_moment.safetensors")
    moments = {1: SecondMoment.from_matrix(kept["layer1"], count=int(kept["layer1.count"]))}
    with Workbench(lm, tmp_path) as bench:
        outcome = bench.apply(fact, moments=moments)
        proof = outcome.verification
        assert proof is not None and (proof.efficacy, proof.specificity) == (1.0, 1.0)
        assert lm.answer([fact.text])[0].startswith("Serbian")
        patched = hashes(lm)
        assert sum(patched[name] != base[name] for name in base) == 1
        bench.revert(LATEST)
        assert hashes(lm) == base and lm.answer([fact.text])[0].startswith("French")


def test_another_model_is_refused(bench: Workbench, tmp_path: Path) -> None:
    stranger = wrap(tiny_model("gpt2", seed=9, **GPT2), byte_tokenizer())
    before = hashes(stranger)
    with pytest.raises(FingerprintError, match="was made for"):
        Workbench(stranger, tmp_path / "space")
    assert hashes(stranger) == before


def test_two_workbenches_on_one_workspace(lm: LanguageModel, tmp_path: Path) -> None:
    other = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
    with Workbench(lm, tmp_path) as mine, Workbench(other, tmp_path) as theirs:
        delta = some_delta(other, 2)
        revision = mine.commit(some_delta(lm, 1))
        before = hashes(other)
        with pytest.raises(WorkspaceError, match=f"somebody committed {revision.id[:10]}"):
            theirs.commit(delta)
        with pytest.raises(WorkspaceError, match="somebody committed"):
            theirs.apply(FACT)  # before any work
        assert hashes(other) == before
        theirs.checkout(LATEST)
        assert hashes(other) == hashes(lm)
        theirs.commit(some_delta(other, 2))


def test_bad_input_is_refused_and_nothing_is_written(lm: LanguageModel, bench: Workbench) -> None:
    before = hashes(lm)
    cases: list[tuple[type[FactsmithError], Callable[[], object]]] = [
        (InputError, lambda: bench.apply([])),
        (InputError, lambda: bench.apply("a string")),  # type: ignore[arg-type]
        (InputError, lambda: bench.apply(FACT, method="magic")),
        (LayerError, lambda: bench.apply(FACT, config=RomeConfig(layer=99))),
        (InputError, lambda: bench.apply(FACT, config=QUICK, contexts=["no slot"])),
        (InputError, lambda: bench.apply(FACT, config=QUICK, moments={2: moments_of(lm)[2]})),
    ]
    for error, call in cases:
        with pytest.raises(error):
            call()
        assert hashes(lm) == before and bench.log() == []


@pytest.mark.parametrize("method", list(METHODS))
def test_a_model_of_experts_is_refused_before_any_work(tmp_path: Path, method: str) -> None:
    lm = wrap(
        tiny_model("mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
        byte_tokenizer(bos=True),
    )
    before, seen = hashes(lm), []
    with Workbench(lm, tmp_path) as bench:
        files = sorted(path.name for path in tmp_path.rglob("*"))
        for config in (None, METHODS[method].config().at([1])):
            with pytest.raises(UnsupportedModelError, match="take a model without experts"):
                bench.apply(FACT, method, config, progress=lambda *event: seen.append(event))
        with pytest.raises(UnsupportedModelError, match="take a model without experts"):
            bench.recommend_layers()
        assert bench.log() == [] and seen == []
        assert files == sorted(path.name for path in tmp_path.rglob("*"))
    assert hashes(lm) == before


def fail_after(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, bomb: Callable[..., Any]
) -> None:
    """Let the function work, and then fail after the first call that changes weights."""
    original = getattr(module, name)

    def wrapped(lm: Any, weights: Any) -> None:
        original(lm, weights)
        if weights and not bomb.gone:  # type: ignore[attr-defined]
            bomb()

    monkeypatch.setattr(module, name, wrapped)


class Bomb:
    """A function that raises the exception and notes that it was called."""

    def __init__(self, exception: BaseException) -> None:
        self.exception, self.gone = exception, False

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.gone = True
        raise self.exception


POINTS: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]] = {
    "solving": lambda m, bomb: m.setitem(
        METHODS, "rome", dataclasses.replace(METHODS["rome"], solve=bomb)
    ),
    "inside the solver": lambda m, bomb: m.setattr("factsmith.edit.rome.find_targets", bomb),
    "sampling": lambda m, bomb: m.setattr("factsmith.corpus.moments_store.own_text", bomb),
    "moments": lambda m, bomb: m.setattr("factsmith.corpus.moments_store.moments_with_total", bomb),
    "verifying": lambda m, bomb: m.setattr("factsmith.patch.proof.as_said", bomb),
    "saving": lambda m, bomb: m.setattr(Delta, "save", bomb),
    "writing weights": lambda m, bomb: fail_after(m, carried, "write_weights", bomb),
    "recording": lambda m, bomb: m.setattr("factsmith.keep.ledger.Ledger._append", bomb),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "exception", [KeyboardInterrupt(), RuntimeError("anything")], ids=lambda e: type(e).__name__
)
def test_a_failure_anywhere_leaves_both_as_before(
    lm: LanguageModel,
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    exception: BaseException,
) -> None:
    moments = moments_of(lm)  # from the base weights
    bench.commit(some_delta(lm, 1))
    before, log = hashes(lm), bench.log()
    bomb = Bomb(exception)
    with monkeypatch.context() as patching:
        POINTS[point](patching, bomb)
        with pytest.raises(type(exception)):
            bench.apply(
                FACT,
                config=QUICK,
                force=True,
                moments=None if point in ("sampling", "moments") else moments,
                texts="own" if point == "sampling" else None,
            )
    assert bomb.gone, "apply never reached the point of failure"
    assert hashes(lm) == before and bench.log() == log
    outcome = bench.apply(FACT, config=QUICK, force=True, moments=moments)
    assert outcome.revision is not None and hashes(lm) != before, "the next call succeeds"


@pytest.mark.parametrize("step", ["commit", "revert", "checkout"])
def test_an_interruption_after_the_record_moves_both(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Ctrl-C can come while the database flushes. History cannot be taken back, so the model
    follows it.
    """
    first = bench.commit(some_delta(lm, 1))
    one = hashes(lm)
    original = getattr(Ledger, step)

    def late(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise KeyboardInterrupt

    calls = {
        "commit": lambda: bench.commit(some_delta(lm, 2)),
        "revert": lambda: bench.revert(first.id),
        "checkout": lambda: bench.checkout(BASE),
    }
    with monkeypatch.context() as patching:
        patching.setattr(Ledger, step, late)
        with pytest.raises(KeyboardInterrupt):
            calls[step]()
    assert hashes(lm) != one and len(bench.log()) == {"commit": 2, "revert": 2, "checkout": 1}[step]
    carried = hashes(lm)
    assert bench.checkout(bench.ledger.current) == bench.ledger.current and hashes(lm) == carried
    bench.checkout(LATEST)
    assert bench.commit(some_delta(lm, 3)).state == "active", "the workbench still works"
    bench.checkout(first.id)
    assert hashes(lm) == one


@pytest.mark.parametrize("step", ["commit", "revert", "checkout"])
def test_a_commit_of_another_process_in_the_same_moment_is_not_applied(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The model carries the revision that this process recorded, although the ledger's newest
    revision is already another process's.
    """
    first = bench.commit(some_delta(lm, 1))
    second = bench.commit(some_delta(lm, 2))
    calls = {
        "commit": lambda: bench.commit(some_delta(lm, 3)).id,
        "revert": lambda: bench.revert(second.id).id,
        "checkout": lambda: bench.checkout(first.id),
    }
    original = getattr(Ledger, step)

    def overtaken(ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
        noted = original(ledger, *args, **kwargs)
        if ledger is bench.ledger:
            with Ledger(bench.ledger.folder) as other:
                other.checkout(LATEST)
                other.commit(
                    some_delta(lm, 9).save,
                    onto=other.head,
                    method="rome",
                    config={},
                    facts=(FACT,),
                    layers=[1],
                )
        return noted

    with monkeypatch.context() as patching:
        patching.setattr(Ledger, step, overtaken)
        mine = calls[step]()
    carried, newest = hashes(lm), bench.ledger.head
    assert newest != mine, "the other process did not commit in between"
    with pytest.raises(WorkspaceError, match="somebody committed"):
        bench.commit(some_delta(lm, 4))
    assert hashes(lm) == carried
    bench.checkout(mine)
    assert hashes(lm) == carried
    bench.checkout(newest)
    assert hashes(lm) != carried and bench.commit(some_delta(lm, 5)).state == "active"


# A signal can land between the opening of a file and the `with` that closes it. Python then closes
# the file itself and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_real_ctrl_c_in_the_middle(lm: LanguageModel, bench: Workbench) -> None:
    """A timer interrupts `apply` at arbitrary moments."""
    moments, before, interrupted, landed = moments_of(lm), hashes(lm), 0, []

    def interrupt(*_: object) -> None:
        landed.append(True)
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for step in range(12):
            landed.clear()
            signal.setitimer(signal.ITIMER_REAL, 0.01 + 0.015 * step)
            try:
                bench.apply(FACT, config=QUICK, moments=moments, contexts=["{}"], force=True)
            # Torch raises IndexError for an interruption that lands while it reads an index.
            except (KeyboardInterrupt, IndexError):
                assert landed
                interrupted += 1
                # Both changed or neither did: the record may have been made just before.
                assert (hashes(lm) == before) == (bench.log() == []) and torch.is_grad_enabled()
                assert len(bench.verify().checks) == len(bench.log()) * 3
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if bench.log():
                bench.ledger.verify()
                break
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted
