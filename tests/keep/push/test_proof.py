"""The proof in a server: near ties, and what a server does not say."""

from __future__ import annotations

import pytest

from factsmith.keep.push.expected import Expected, Probe
from factsmith.keep.push.proof import Answer, ServedProof, compare, compare_base
from factsmith.keep.push.tolerance import tolerance_of
from factsmith.patch.verification import Role
from factsmith.remote.replies import Completion

BF16 = tolerance_of("bfloat16")


def probe(role: Role, after: str = "forint.", before: str = "forint.") -> Probe:
    """Return a probe whose answer is the forint."""
    return Probe(
        role=role,
        prompt="The currency of Hungary is the",
        wanted="forint",
        tail=" forint",
        forget=False,
        before=before,
        after=after,
        log_before=-0.1,
        log_after=-0.1,
        held=True,
    )


def expected(*probes: Probe) -> Expected:
    """Return the proof that asks these probes."""
    return Expected(
        revision="a" * 64,
        fingerprint="b" * 64,
        dtype="float32",
        n_facts=1,
        n_tokens=8,
        probes=probes,
    )


def said(text: str, *top: tuple[str, float], log: float | None = None) -> Answer:
    """Return an answer whose first token has these alternatives."""
    completion = Completion(
        text=text.strip(),
        tokens=(text,) if top else (),
        log_probs=(top[0][1],) if top else (),
        top=(top,) if top else (),
    )
    return Answer(completion, log)


FORINT = said(" forint", (" forint", -0.1), (" euro", -3.0))


def proved(answer: Answer, role: Role) -> ServedProof:
    """Return the proof of a fact that holds, and of one more answer."""
    both = expected(probe("prompt"), probe(role))
    return compare(both, [FORINT, FORINT], [FORINT, answer], BF16)


@pytest.mark.parametrize("role", ["neighbour", "paraphrase"])
@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (FORINT, "ok"),
        (said(" euro", (" euro", -0.6), (" forint", -0.8)), "tie"),
        (said(" euro", (" euro", -0.6), (" forint", -1.0)), "failed"),
        (said(" euro", (" euro", -0.6), (" for", -0.8)), "tie"),
        (said(" euro", (" euro", -0.6), (" pound", -0.8)), "failed"),
        (said(" euro", (" euro", -0.6)), "failed"),
        (said(" euro"), "failed"),
        (said(" forints", (" forints", -0.6), (" pound", -2.0)), "failed"),
    ],
    ids=["same", "tie", "no tie", "first part", "not listed", "one listed", "none", "longer"],
)
def test_a_near_tie_is_seen_by_its_tokens(answer: Answer, verdict: str, role: Role) -> None:
    proof = proved(answer, role)
    assert proof.checks[1].verdict == verdict
    assert proof.passed is (verdict != "failed")


def test_a_fact_is_never_excused() -> None:
    tie = said(" euro", (" euro", -0.6), (" forint", -0.61))
    assert not compare(expected(probe("prompt")), [FORINT], [tie], BF16).passed


def test_without_log_probabilities_a_few_may_fail() -> None:
    many = expected(probe("prompt"), *(probe("neighbour") for _ in range(20)))
    right, wrong, unseen = said(" forint"), said(" euro"), said(" euro", (" euro", -0.6))
    for n, bad, passed in ((2, wrong, True), (3, wrong, False), (2, unseen, True)):
        answers = [right, *[bad] * n, *[right] * (20 - n)]
        assert compare(many, [right] * 21, answers, BF16).passed is passed
    seen = said(" euro", (" euro", -0.1), (" pound", -3.0))
    answers = [right, seen, *[right] * 19]
    assert not compare(many, [right] * 21, answers, BF16).passed, "it is no near tie"


def test_probabilities_decide_where_answers_do_not() -> None:
    for log, passed in ((-0.3, True), (-0.5, False), (None, True)):
        answer = said(" forint", (" forint", -0.1), log=log)
        proof = compare(expected(probe("prompt")), [FORINT], [answer], BF16)
        assert proof.passed is passed, log


def test_a_base_model_that_says_one_thing_to_everything() -> None:
    five = expected(*(probe("prompt", "euro.", "forint.") for _ in range(5)))
    for banana in (said(" banana", (" banana", -0.2)), said(" banana")):
        share, wrong = compare_base(five, [banana] * 5, BF16)
        assert share == 0 and wrong is not None and "not the workspace's" in wrong
    assert compare_base(five, [FORINT] * 5, BF16) == (1.0, None), "control"
