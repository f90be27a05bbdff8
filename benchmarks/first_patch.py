"""How long the first patch by mouse takes, from the start of studio, at the pace of a person.

    python benchmarks/first_patch.py --json benchmarks/results/first_patch.json

Two claims: a useful page is there within 10 seconds of the command, and somebody who has never seen
studio has patched a fact within 60 seconds of the first page. A script plays that person in the
system's chromium: it looks at each page before it acts, moves the mouse, and types slowly. It goes
to the room Patch, fills in a fact, plans, previews, applies, and reads that the patch is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.browser import chromium, settle, studio

LOOKS = 2.0
"""Seconds for which a person looks at a page before acting."""

REACHES = 1.0
"""Seconds that the mouse takes to a field or a button, with the click."""

KEY = 0.25
"""Seconds for each key: 48 words a minute."""

FACT = {"subject": "Fiat 127", "prompt": "The maker of {} is", "target": "Toyota"}

USEFUL, PATCHED = 10.0, 60.0
"""The claims, in seconds."""


class Person:
    """Somebody in front of a page, who takes time for everything."""

    def __init__(self, page: Any) -> None:
        """Take the page."""
        self.page = page

    def look(self) -> None:
        """Look at the page."""
        settle(self.page)
        time.sleep(LOOKS)

    def click(self, element: Any) -> None:
        """Move the mouse to an element and click it."""
        time.sleep(REACHES)
        element.click()

    def type(self, text: str) -> None:
        """Type a text into the field that has the focus."""
        self.page.keyboard.type(text, delay=1000 * KEY)


def measured() -> list[tuple[str, float]]:
    """Return (what has happened, seconds since the command was started)."""
    times: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        began = time.monotonic()

        def note(what: str) -> None:
            times.append((what, round(time.monotonic() - began, 1)))

        with studio(Path(folder) / "workspace") as running:
            note("the link is printed")
            page = browser.new_page()
            page.goto(running.link)
            settle(page)
            note("the first page is there")
            person = Person(page)
            person.look()
            person.click(page.locator("#rooms").get_by_role("link", name="Patch"))
            person.look()
            for name, text in FACT.items():
                person.click(page.locator(f"#f-{name}"))
                person.type(text)
            person.click(page.get_by_role("button", name="Plan", exact=True))
            page.get_by_role("link", name="Preview the patch").wait_for()
            note("the plan is there")
            person.look()
            person.click(page.get_by_role("link", name="Preview the patch"))
            page.get_by_role("button", name="Apply", exact=True).wait_for()
            note("the proof is there")
            person.look()
            person.click(page.get_by_role("button", name="Apply", exact=True))
            page.get_by_text("Kept.", exact=True).wait_for()
            note("the patch is kept")
            assert running.ask("log")["revisions"][0]["facts"][0]["target"] == FACT["target"]
    return times


def main() -> int:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    times = measured()
    for what, seconds in times:
        print(f"{seconds:6.1f} s  {what}")
    at = dict(times)
    first = at["the first page is there"]
    patch = round(at["the patch is kept"] - first, 1)
    claims = {"useful page": (first, USEFUL), "first patch": (patch, PATCHED)}
    for name, (seconds, limit) in claims.items():
        print(f"{name}: {seconds} s, at most {limit:g} s: {'yes' if seconds <= limit else 'NO'}")
    if options.json is not None:
        pace = {"looks": LOOKS, "reaches": REACHES, "key": KEY}
        document = {"pace": pace, "seconds": at, "useful_page": first, "first_patch": patch}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(seconds <= limit for seconds, limit in claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
