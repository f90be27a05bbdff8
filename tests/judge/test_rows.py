"""What a row says of its question, against values computed by hand."""

from __future__ import annotations

import math

import pytest

from factsmith.judge.rows import LOWEST, Row


def row(log_wanted: float | None, log_against: float | None) -> Row:
    return Row(
        editor="made",
        unit=0,
        record="r",
        kind="prompt",
        group=None,
        prompt="The home of Ada is",
        written=0,
        answer="Oslo",
        exact=True,
        stayed=None,
        log_wanted=log_wanted,
        log_against=log_against,
        tokens=1.0,
    )


def test_success_needs_the_wanted_side_strictly_likelier() -> None:
    new, true = [-1.0, -2.0, -3.0, -0.5], [-2.0, -1.0, -3.0, -4.0]
    pairs = list(zip(new, true, strict=True))
    assert [row(a, b).success for a, b in pairs] == [True, False, False, True]
    assert [row(b, a).success for a, b in pairs] == [False, True, False, False]  # a tie is neither
    assert row(-math.inf, -3.0).success is False
    assert row(None, -1.0).success is None and row(-1.0, None).success is None


def test_candidates_are_compared_by_the_token() -> None:
    """Four tokens at 0.5 each beat one token at 0.4; their product, 0.0625, would lose."""
    four = [math.log(0.5)] * 4
    assert row(sum(four) / 4, math.log(0.4)).success is True
    assert row(sum(four), math.log(0.4)).success is False  # control: what summing would say


def test_magnitude_is_the_difference_of_probabilities() -> None:
    pairs = [(math.log(0.5), math.log(0.25)), (math.log(0.125), math.log(0.5))]
    magnitudes = [row(a, b).magnitude for a, b in pairs]
    assert magnitudes == pytest.approx([0.25, -0.375])
    assert row(-math.inf, 0.0).magnitude == -1.0
    assert row(-1.0, None).magnitude is None


def test_a_broken_row_is_wrong_by_nothing() -> None:
    broken = row(LOWEST, LOWEST)
    assert broken.broken and broken.success is False and broken.magnitude == 0
    assert not row(-1.0, -2.0).broken
