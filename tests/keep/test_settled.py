"""Ctrl-C may come at any line of any call of a workbench.

Afterwards the model carries what the ledger says. If it does not, the next call repairs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import factsmith
from conftest import GPT2, byte_tokenizer, tiny_model
from factsmith.core.errors import FactsmithError
from factsmith.edit.delta import applied, patched
from factsmith.edit.lending import n_lent, take_back
from factsmith.edit.neurons import erase
from factsmith.keep.ledger import BASE, LATEST, Ledger
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from factsmith.model.load import wrap
from workbenches import FACT, QUICK, hashes, moments_of, some_delta

HOME = str(Path(factsmith.__file__).parent)
PLACES = ("keep/", "edit/delta.py", "edit/lending.py", "edit/neurons.py")

# A generator that an interruption has left suspended is closed later, by the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:an interrupted operation"),
]


@contextmanager
def interrupted_at(k: int, count: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt at the k-th line of the library's record keeping, or of contextlib.

    Lines are counted in `count`. With a negative k nothing is raised.
    """

    def local(frame: FrameType, event: str, _: object) -> Any:
        if event in ("line", "call"):
            count[0] += 1
            if count[0] == k:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        ours = name.startswith(HOME) and any(place in name for place in PLACES)
        if ours or (name.endswith("contextlib.py") and frame.f_code.co_name in ("__exit__",)):
            return local(frame, event, argument)
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Space:
    """A tiny model with a workspace of two patches, made once and copied for every try."""

    def __init__(self, folder: Path) -> None:
        self.lm = wrap(tiny_model("gpt2", **GPT2), byte_tokenizer())
        self.base = hashes(self.lm)
        self.weights = {layer: self.lm.ffn[layer].weight().clone() for layer in range(3)}
        self.moments = moments_of(self.lm)
        self.folder = folder

    def opened(self, name: str) -> Workbench:
        bench = Workbench(self.lm, self.folder / name)
        self.first = bench.commit(some_delta(self.lm, 1))
        self.second = bench.commit(some_delta(self.lm, 2, (2,)))
        return bench

    def check(self, bench: Workbench) -> None:
        """Compare the model with base + Σ deltas of the ledger's current revision, read anew."""
        from factsmith.edit.delta import Delta

        with Ledger(bench.ledger.folder) as ledger:
            ledger.verify()
            deltas = [Delta.load(ledger.delta_folder(r)) for r in ledger.active()]
        expected = patched(self.weights, deltas)
        for layer, weight in expected.items():
            assert torch.equal(self.lm.ffn[layer].weight(), weight), f"layer {layer}"


VERBS: dict[str, Callable[[Space, Workbench, Path], object]] = {
    "commit": lambda s, b, _: b.commit(some_delta(s.lm, 3)),
    "revert": lambda s, b, _: b.revert(s.first.id, force=True),
    "checkout": lambda s, b, _: b.checkout(s.first.id),
    "diff": lambda s, b, _: b.diff(BASE, LATEST),
    "rebuild": lambda s, b, _: b.rebuild(),
    "verify": lambda s, b, _: b.verify(),
    "export": lambda s, b, folder: b.export(folder / "out", format="patch", overwrite=True),
    "import": lambda s, b, folder: b.import_patches(folder / "patch", force=True),
    "preview": lambda s, b, _: preview(s, b),
    "apply": lambda s, b, _: b.apply(
        FACT, config=QUICK, moments=s.moments, contexts=["{}"], force=True
    ),
}


def preview(space: Space, bench: Workbench) -> None:
    options: dict[str, Any] = {"moments": space.moments, "contexts": ["{}"], "force": True}
    with bench.preview(FACT, "rome", QUICK, **options):
        pass


def exported(space: Space) -> None:
    """Write a folder with an edit of neurons, to import."""
    with Workbench(space.lm, space.folder / "theirs") as theirs:
        theirs.commit(erase(space.lm, [(0, 3), (1, 2)]))
        theirs.export(space.folder / "patch", format="patch")


@pytest.mark.parametrize("verb", VERBS)
def test_interrupted_at_any_line(tmp_path: Path, verb: str) -> None:
    space = Space(tmp_path)
    exported(space)
    bench = space.opened("count")
    total = [0]
    with bench, interrupted_at(-1, total):
        VERBS[verb](space, bench, tmp_path)
    assert total[0] > 40
    tries = 40
    done = 0
    for n in range(tries):
        k = 1 + (total[0] - 1) * n // (tries - 1)
        bench = space.opened(f"space{n}")
        try:
            with interrupted_at(k, [0]):
                VERBS[verb](space, bench, tmp_path)
        except KeyboardInterrupt:
            done += 1
        assert bench.verify() is not None
        space.check(bench)
        bench.checkout(LATEST)
        bench.commit(some_delta(space.lm, 5, (2,)))
        space.check(bench)
        bench.close()
        assert torch.is_grad_enabled()
        assert hashes(space.lm) == space.base
    assert done > tries // 2


@pytest.mark.parametrize("verb", ["opening", "close"])
def test_interrupted_while_it_opens_or_closes(tmp_path: Path, verb: str) -> None:
    space = Space(tmp_path)
    bench = space.opened("space")
    head = bench.ledger.head

    def once(k: int, count: list[int]) -> None:
        with interrupted_at(k, count):
            if verb == "close":
                bench.close()
            else:
                Workbench(space.lm, tmp_path / "space").close()

    if verb == "opening":
        bench.close()
    total = [0]
    once(-1, total)
    interrupted = 0
    for k in range(1, total[0] + 1, max(1, total[0] // 60)):
        if verb == "close":
            bench = Workbench(space.lm, tmp_path / "space")
        try:
            once(k, [0])
        except KeyboardInterrupt:
            interrupted += 1
        if verb == "close":
            bench.close()
        with Workbench(space.lm, tmp_path / "space") as again:
            assert again.ledger.head == head
            space.check(again)
        assert hashes(space.lm) == space.base and torch.is_grad_enabled()
    assert interrupted > 10


def test_two_interruptions_are_settled_by_the_next_verb(
    lm: LanguageModel, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C comes while the first one is being mended."""
    bench.commit(some_delta(lm, 1))
    state = hashes(lm)
    put, calls = bench._carried._put, []

    def failing(deltas: Any) -> Any:
        calls.append(deltas)
        if len(calls) in (2, 3):
            raise KeyboardInterrupt
        return put(deltas)

    monkeypatch.setattr(bench._carried, "_put", failing)
    with pytest.raises(KeyboardInterrupt):
        bench.diff(BASE)
    assert hashes(lm) != state, "the model was left without its patch"
    with pytest.warns(UserWarning, match="now carries what the ledger says"):
        assert len(bench.verify().checks) == 1
    assert hashes(lm) == state


def test_what_blocks_lent_is_taken_back(lm: LanguageModel) -> None:
    before = hashes(lm)
    delta = some_delta(lm, 1, (0, 1))
    block = applied(lm, delta)
    block.__enter__()
    assert hashes(lm) != before and n_lent(lm) == 1
    take_back(lm, 0)
    assert hashes(lm) == before and n_lent(lm) == 0
    with torch.no_grad():
        lm.ffn[0].weight()[0, 0] += 1
    changed = hashes(lm)
    block.__exit__(None, None, None)
    assert hashes(lm) == changed, "a block that was ended writes nothing any more"


def test_a_forgotten_workbench_gives_the_weights_back(lm: LanguageModel, tmp_path: Path) -> None:
    before = hashes(lm)
    Workbench(lm, tmp_path / "two").close()
    first = Workbench(lm, tmp_path / "one")
    first.commit(some_delta(lm, 1))
    with pytest.raises(FactsmithError, match="close another workbench"):
        Workbench(lm, tmp_path / "two")
    assert hashes(lm) != before
    first.ledger.close()
    del first
    with Workbench(lm, tmp_path / "two") as second:
        assert hashes(lm) == before and second.log() == []
