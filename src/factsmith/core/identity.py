"""Fingerprints that name one model: the present one, and those that earlier versions gave it.

    note_earlier(earlier, present)      # two fingerprints that were computed of one model
    same_model(delta.fingerprint, lm.fingerprint)

The formula of the fingerprint has changed, and files keep what was computed when they were written.
Whoever computes a fingerprint computes the earlier one with it and notes both. From then on the two
compare as equal.
"""

from __future__ import annotations

_PRESENT: dict[str, str] = {}
"""{earlier fingerprint: the present one of the same model}."""


def note_earlier(earlier: str, present: str) -> None:
    """Note that two fingerprints were computed of the same weights, settings and tokenizer."""
    if earlier != present:
        _PRESENT[earlier] = present


def present_fingerprint(fingerprint: str) -> str:
    """Return the present fingerprint of the model that this one names, as far as it is known."""
    return _PRESENT.get(fingerprint, fingerprint)


def same_model(first: str, second: str) -> bool:
    """Return whether two fingerprints name one model."""
    return present_fingerprint(first) == present_fingerprint(second)
