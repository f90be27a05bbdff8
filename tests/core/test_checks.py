"""Checks on arguments: what passes, its type, and the message about the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from factsmith.core.checks import (
    check_count,
    check_items,
    check_limit,
    check_number,
    check_seed,
    check_text,
)
from factsmith.core.errors import InputError, LayerError


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_a_whole_number_of_any_type_comes_back_as_an_int(value: object) -> None:
    number = check_count(value, "n")
    assert number == 3 and type(number) is int


@pytest.mark.parametrize("value", [2, 2.5, math.pi, np.float32(0.5), np.int64(2), Fraction(1, 2)])
def test_a_number_comes_back_as_a_plain_number(value: Any) -> None:
    number = check_number(value, "scale")
    assert number == value and isinstance(number, (int, float))


def test_the_ends_of_a_range_are_accepted_or_refused_as_named() -> None:
    assert check_count(0, "n", least=0, below=1) == 0
    assert check_number(0, "share", least=0, most=1) == 0
    assert check_number(1, "share", above=0, most=1) == 1
    assert check_limit(1, "max_tokens") == 1 and check_limit(math.inf, "max_tokens") == math.inf
    assert check_seed(2**32 - 1) == 2**32 - 1
    for value, limits in (
        (0, {"above": 0}),
        (1, {"below": 1}),
        (-1, {"least": 0}),
        (2, {"most": 1}),
    ):
        with pytest.raises(InputError):
            check_number(value, "share", **limits)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_count(0, "n"), "n is 0: it must be a whole number of at least 1"),
        (
            lambda: check_count(2.5, "n", "the number of rows"),
            "n is 2.5: it must be the number of rows, a whole number of at least 1",
        ),
        (
            lambda: check_count(True, "n", least=0, also="None for all"),
            "n is True: it must be a whole number of at least 0, or None for all",
        ),
        (
            lambda: check_count(torch.tensor([1, 2]), "n", below=5),
            "n is tensor([1, 2]): it must be a whole number from 1 to 4",
        ),
        (
            lambda: check_seed(2**32),
            "seed is 4294967296: it must be a whole number from 0 to 4,294,967,295",
        ),
        (lambda: check_number(math.nan, "scale"), "scale is nan: it must be a finite number"),
        (
            lambda: check_number(0, "lr", "the step size", above=0, most=1000),
            "lr is 0: it must be the step size, a finite number above 0 and at most 1,000",
        ),
        (
            lambda: check_number("1", "ridge", least=0),
            "ridge is '1': it must be a finite number of at least 0",
        ),
        (
            lambda: check_number(1.5, "share", least=0, most=1),
            "share is 1.5: it must be a number from 0 to 1",
        ),
        (
            lambda: check_limit(0, "max_tokens"),
            "max_tokens is 0: it must be a number of at least 1, or math.inf for no limit",
        ),
        (
            lambda: check_items("abc", "tasks", "task names"),
            "tasks is 'abc': it must be a list of task names",
        ),
        (
            lambda: check_items({"a": 1}, "delta", "deltas", also="one Delta"),
            "delta is {'a': 1}: it must be a list of deltas, or one Delta",
        ),
        (lambda: check_text(7, "the prompt"), "the prompt is 7: it must be text"),
        (lambda: check_text(list(range(99)), "x"), "x is a list: it must be text"),
    ],
)
def test_a_refusal_says_what_came_and_what_is_accepted(
    check: Callable[[], object], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        check()
    assert str(refused.value) == message


def test_half_a_character_is_refused() -> None:
    with pytest.raises(InputError, match="half a character at position 1"):
        check_text("a\ud800", "prompt")


def test_a_refusal_carries_the_argument_where_the_name_is_one() -> None:
    with pytest.raises(LayerError) as layer:
        check_count(-1, "layer", least=0, error=LayerError)
    with pytest.raises(InputError) as words:
        check_text(None, "the prompt")
    assert layer.value.argument == "layer" and words.value.argument is None


def test_the_items_of_any_iterable_come_back_as_a_list() -> None:
    assert check_items((i for i in range(3)), "layers", "layer numbers") == [0, 1, 2]
    assert check_items(np.arange(2), "layers", "layer numbers") == [0, 1]
