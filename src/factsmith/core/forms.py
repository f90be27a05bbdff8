"""One form for texts that a reader cannot tell apart.

canonical("Andre\\u0301 Malraux") == canonical("André\\u00a0Malraux")     # True
"""

from __future__ import annotations

import unicodedata


def canonical(text: str) -> str:
    """Return a text with composed letters and plain spaces.

    The letters are in Unicode's composed form (NFC). Each kind of space, such as a no-break space,
    becomes a plain one. Line breaks and tabs stay.
    """
    composed = unicodedata.normalize("NFC", text)
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in composed)
