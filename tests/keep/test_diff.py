"""A diff lists the changes of weights, facts and answers between two revisions."""

from __future__ import annotations

import json

import pytest

from factsmith.core.errors import FingerprintError
from factsmith.keep.workbench import Workbench
from factsmith.model.language_model import LanguageModel
from workbenches import hashes, some_delta


def answer_at(lm: LanguageModel, bench: Workbench, reference: str, prompt: str) -> str:
    """Return the model's answer after a checkout of the revision."""
    current = bench.ledger.current
    bench.checkout(reference)
    answer = lm.answer([prompt])[0]
    bench.checkout(current)
    return answer


def test_a_diff_is_of_weights_and_facts(lm: LanguageModel, bench: Workbench) -> None:
    base = lm.ffn[1].weight().detach().clone()
    one = bench.commit(some_delta(lm, 1, (1,)))
    first = lm.ffn[1].weight().detach().clone()
    two = bench.commit(some_delta(lm, 2, (1, 2)))
    state = hashes(lm)
    change = bench.diff("base", one.id)
    assert change.norms == {1: pytest.approx(float((first - base).norm() / base.norm()), rel=1e-4)}
    assert [(f.prompt, f.before, f.after) for f in change.facts] == [("subject 1 is", None, "x")]
    assert change.facts[0].answer_before == answer_at(lm, bench, "base", "subject 1 is")
    back = bench.diff(two.id, "base")
    assert (
        set(back.norms) == {1, 2}
        and [f.after for f in back.facts] == [None, None]
        and hashes(lm) == state
    )
    assert "2 facts different" in repr(back) and json.dumps(back.to_dict())
    assert bench.rebuild().revisions == 2
    lm.ffn[2].weight().data[0, 0] += 1
    with pytest.raises(FingerprintError):
        bench.rebuild()
