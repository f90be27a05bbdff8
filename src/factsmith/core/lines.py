"""The lines of an answer.

first_lines(" Paris.\\nIt is large.", 1)     # "Paris."
"""

from __future__ import annotations


def first_lines(text: str, lines: int = 1) -> str:
    """Return the first lines with text, without white space around them.

    Args:
        text: The text.
        lines: The number of lines with text.
    """
    kept: list[str] = []
    for line in text.strip().split("\n"):
        if lines < 1:
            break
        kept.append(line)
        lines -= bool(line.strip())
    return "\n".join(kept).strip()
