"""Differences between answers, in words."""

from __future__ import annotations

from factsmith.read.differences import difference


def test_differences_are_said_in_words() -> None:
    lev, euro, llama = ("base", "lev."), ("latest", "euro, yes"), ("llama", "lev")
    assert difference([]) == difference([lev]) == ""
    assert difference([lev, llama]) == "Both say 'lev'."
    assert difference([lev, llama, lev]) == "All say 'lev'."
    assert difference([lev, euro]) == "base says 'lev'; latest says 'euro'."
    assert difference([lev, euro, llama]) == "base and llama say 'lev'; latest says 'euro'."
