"""Make the bundled prose: sentences of public-domain books, in random order, in one packed file.

    python tools/prose.py ../shared/data/text            # writes src/factsmith/atlas/prose.txt.bz2
    python tools/prose.py ../shared/data/text --check    # compares; exit status 1 if it differs

The bundled corpus of second moments (`corpus/ordinary.py`) mixes these sentences with statements of
the bundled facts. Every book gives the same number of sentences. The same books and seed give the
same file.
"""

from __future__ import annotations

import argparse
import bz2
import random
import sys
from pathlib import Path

from factsmith.atlas.texts import BUNDLED_PROSE, book_prose

BOOKS = {
    "austen-emma": "Jane Austen, Emma, 1816",
    "austen-persuasion": "Jane Austen, Persuasion, 1818",
    "austen-sense": "Jane Austen, Sense and Sensibility, 1811",
    "carroll-alice": "Lewis Carroll, Alice's Adventures in Wonderland, 1865",
    "chesterton-ball": "G. K. Chesterton, The Ball and the Cross, 1909",
    "chesterton-brown": "G. K. Chesterton, The Wisdom of Father Brown, 1914",
    "chesterton-thursday": "G. K. Chesterton, The Man Who Was Thursday, 1908",
    "edgeworth-parents": "Maria Edgeworth, The Parent's Assistant, 1796",
    "melville-moby_dick": "Herman Melville, Moby Dick, 1851",
}
"""Each file, and the book: author, title, year.

All are in the public domain: they were published before 1929, and their authors died before 1937.
"""

EACH = 600
"""Sentences from each book."""

SHORTEST, LONGEST = 40, 300
"""Characters of a sentence."""

HEADER = """\
# Sentences of public-domain books, in random order, in the editions of Project Gutenberg.
# The books were published before 1929, and their authors died before 1937:
"""


def packed_prose(folder: Path, seed: int = 0) -> bytes:
    """Return the content of the file, from a folder with the books."""
    draw = random.Random(seed)
    chosen = []
    for name in BOOKS:
        sentences = [s for s in book_prose(folder / f"{name}.txt") if _fits(s)]
        chosen += draw.sample(list(dict.fromkeys(sentences)), EACH)
    draw.shuffle(chosen)
    header = HEADER + "".join(f"#   {book}\n" for book in BOOKS.values())
    return bz2.compress((header + "\n".join(chosen) + "\n").encode("utf-8"), 9)


def _fits(sentence: str) -> bool:
    """Whether a sentence is taken: not too short or long, no footnote, and no comment."""
    return SHORTEST <= len(sentence) <= LONGEST and sentence[0] not in "*#"


def main() -> None:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the folder of the books")
    parser.add_argument("--check", action="store_true", help="compare with the bundled file")
    given = parser.parse_args()
    content = packed_prose(given.folder)
    if given.check:
        # Versions of bzip2 may pack the same text in other bytes.
        same = bz2.decompress(content) == bz2.decompress(BUNDLED_PROSE.read_bytes())
        print("equal" if same else "different")
        sys.exit(not same)
    BUNDLED_PROSE.write_bytes(content)
    print(f"{BUNDLED_PROSE}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
