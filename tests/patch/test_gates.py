"""Each gate compares one number with its threshold, and lists the checks that failed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from factsmith.core.gates import Gates
from factsmith.judge.drift import LIMITS, Changed, Drift
from factsmith.patch.gates import check_gates, gates_table, measures_drift
from factsmith.patch.verification import Check, Role, Verification

FACT = {"subject": "Ann", "prompt": "{} lives in", "target": "Oslo"}
NONE = {field.name: None for field in dataclasses.fields(Gates)}


def check(role: Role, held: bool, forget: bool = False) -> Check:
    """Return a check of a role that held or failed."""
    return Check(
        role=role,
        prompt=f"a {role}",
        wanted="Oslo",
        before="x",
        after="Oslo." if held != forget else "Rome.",
        p_before=0.1,
        p_after=0.2,
        held=held,
        forget=forget,
    )


PROOF = Verification(
    checks=(
        check("prompt", True),
        check("paraphrase", True),
        check("paraphrase", False),
        check("earlier", False, True),
    )
)
MOVED = Drift(
    kl_text=0.2,
    kl_text_worst=1.5,
    perplexity=(10.0, 12.0),
    kl_facts=0.3,
    changed=(Changed("p", "a", "b"),),
    n_facts=4,
    n_tokens=100,
    seconds=1,
)


@pytest.mark.parametrize(
    ("name", "loose", "tight", "value"),
    [
        ("efficacy", 1.0, None, 1.0),
        ("paraphrases", 0.5, 0.51, 0.5),
        ("earlier", 0.0, 0.01, 0.0),
        ("kl_text", 0.2, 0.19, 0.2),
        ("kl_text_worst", 1.5, 1.49, 1.5),
        ("kl_facts", 0.3, 0.2, 0.3),
        ("changed_share", 0.25, 0.2, 0.25),
        ("perplexity", 1.2, 1.1, 1.2),
    ],
)
def test_each_gate_by_itself(name: str, loose: float, tight: float | None, value: float) -> None:
    (passed,) = check_gates(Gates(**{**NONE, name: loose}), PROOF, MOVED)
    assert (passed.name, passed.passed, passed.value) == (name, True, pytest.approx(value))
    if tight is not None:
        (failed,) = check_gates(Gates(**{**NONE, name: tight}), PROOF, MOVED)
        assert not failed.passed and failed.failures and json.dumps(failed.to_dict())


def test_failed_checks_are_listed_and_gates_without_questions_pass() -> None:
    results = {result.name: result for result in check_gates(Gates(), PROOF, MOVED)}
    assert list(results) == ["efficacy", "paraphrases", "neighbours", "earlier", "kl_text"]
    assert results["paraphrases"].failures == (
        "paraphrase 'a paraphrase' is answered 'Rome.', not 'Oslo'",
    )
    assert results["earlier"].failures == ("earlier 'a earlier' is still answered 'Oslo.'",)
    assert results["neighbours"].passed and results["neighbours"].value is None
    unmeasured = check_gates(Gates(**{**NONE, "kl_text": 1.0}), PROOF)
    assert not unmeasured[0].passed and unmeasured[0].failures == ("it was not measured",)
    nothing = dataclasses.replace(MOVED, kl_facts=None, n_facts=0, changed=())
    assert [
        r.passed
        for r in check_gates(
            Gates(**{**NONE, "kl_facts": 1.0, "changed_share": 1.0}), PROOF, nothing
        )
    ] == [False, False]
    assert measures_drift(Gates()) and not measures_drift(Gates(**NONE)) and set(LIMITS) < set(NONE)
    rows = gates_table(tuple(results.values())).rows
    assert ("neighbours", "nothing to ask", "at least 80%", "passed") in rows and (
        "kl_text",
        "0.2",
        "at most 0.1",
        "failed",
    ) in rows
