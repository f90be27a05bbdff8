"""The slot of a template: the two characters `{}`, where the subject goes.

    fill("The maker of {} is", "Fiat 127").text           # "The maker of Fiat 127 is"
    fill('{"country": "{}", "capital": "', "France")      # braces alone mean themselves
    fill("d = {{}}; d['{}'] =", "x").text                 # "d = {}; d['x'] =": {{}} means {}
    escape("d = {}")                                      # "d = {{}}"

A template may need the two characters `{}` themselves. Then `{{}}` means them. A template whose
only `{}` has a pair of braces around it, as in `{{}}`, has its slot between these braces.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKEN = re.compile(r"\{\{\}\}|\{\}")

_PLAIN = r"(?!\{\}|\{\{\}\})[\s\S]"
_ONE_SLOT = rf"(?:\{{\{{\}}\}}|{_PLAIN})*\{{\}}(?:\{{\{{\}}\}}|{_PLAIN})*"
_IN_BRACES = r"((?!\{\})[\s\S])*\{\{\}\}((?!\{\})[\s\S])*"
ONE_SLOT = f"^(?:{_ONE_SLOT}|{_IN_BRACES})$"
"""A regular expression that matches the texts with exactly one slot."""


class Filled(NamedTuple):
    """A template with its slot filled."""

    text: str
    start: int
    """Where the subject begins in the text, without white space around the subject."""
    stop: int
    """Where it ends."""


def count_slots(template: str) -> int:
    """Return how many slots a template has."""
    return len(_slots(template))


def fill(template: str, subject: str) -> Filled:
    """Fill the first slot of a template, and say where the subject is in the text.

    Raises:
        ValueError: when the template has no slot.
    """
    slots = _slots(template)
    if not slots:
        raise ValueError(f"no slot {{}} in {template!r}")
    start = len(literal(template[: slots[0]])) + len(subject) - len(subject.lstrip())
    return Filled(fill_all(template, subject), start, start + len(subject.strip()))


def fill_all(template: str, subject: str) -> str:
    """Fill every slot of a template. A text without a slot keeps its words."""
    words, at = [], 0
    for slot in _slots(template):
        words.append(literal(template[at:slot]))
        at = slot + 2
    return subject.join([*words, literal(template[at:])])


def literal(text: str) -> str:
    """Return the words of a text that has no slot: `{{}}` means `{}`."""
    return text.replace("{{}}", "{}")


def escape(text: str) -> str:
    """Return a text as a part of a template, the inverse of `literal`."""
    return text.replace("{}", "{{}}")


def _slots(template: str) -> list[int]:
    """Where the slots of a template begin."""
    if template.count("{}") == 1:
        return [template.index("{}")]
    return [match.start() for match in _TOKEN.finditer(template) if match.group() == "{}"]
