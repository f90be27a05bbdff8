"""Take the pictures of studio in docs/, in light and in dark.

    python tools/screenshots.py                # docs/studio-*.png
    python tools/screenshots.py trace ledger   # only these, in both themes
    python tools/screenshots.py --out /tmp/x --widths 360 1280 2560

It starts studio on a new workspace of the bundled model, writes a fact, and opens the pages. The
same program gives the same pictures, except for ids, times and durations.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from factsmith.atlas.story import MESSAGE, correction
from factsmith.keep.workbench import Workbench
from factsmith.model.load import load
from tools.browser import Studio, chromium, settle, studio

ROOT = Path(__file__).resolve().parents[1]

BULGARIA = "prompt=The+currency+of+Bulgaria+is+the"

PAGES = {
    "tour": "/tour/4",
    "ask": f"/ask/ask?{BULGARIA}&sources=base&sources=latest",
    "trace": f"/trace/trace?{BULGARIA}&subject=Bulgaria&revision=base",
    "lens": f"/lens/lens?{BULGARIA}&revision=base",
    "memory": f"/memory/intervene?{BULGARIA}&neurons=1+296",
    "patch": "/patch/preview?subject=Fiat+127&prompt=The+maker+of+%7B%7D+is&target=Toyota",
    "ledger": "/ledger/show?revision=latest",
    "diff": "/ledger/diff?before=base&after=latest",
}
"""{name of the picture: the page}."""

IN_DOCS = {
    "light": ("tour", "ask", "trace", "memory", "patch", "ledger"),
    "dark": ("trace",),
}
"""{theme: the pictures that docs/studio.md shows}."""

COLOURS = 192
"""Colours of a picture: enough for text and charts, and a quarter of the bytes."""

MOST_BYTES = 150_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the pictures that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="the pages; none: those of docs/studio.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--widths", type=int, nargs="+", default=[1280])
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - PAGES.keys():
        parser.error(f"no page {sorted(unknown)}; the pages are {', '.join(PAGES)}")
    out, large = options.out.resolve(), 0
    folder = tempfile.TemporaryDirectory()
    # Pages show the path of the workspace as it is given, so it is given without its folder.
    with folder as place, contextlib.chdir(place), chromium() as browser:
        workspace = Path("factsmith-studio")
        with Workbench(load("atlas"), workspace) as bench:
            bench.apply(correction(), message=MESSAGE)
        with studio(workspace) as running:
            for theme in IN_DOCS:
                names = options.names or IN_DOCS[theme]
                for width in options.widths:
                    end = f"-{width}" if len(options.widths) > 1 else ""
                    for name, data in taken(browser, running, names, theme, width):
                        file = out / f"studio-{name}-{theme}{end}.png"
                        file.write_bytes(data)
                        large += len(data) > MOST_BYTES
                        print(f"{file}  {len(data):,} bytes")
    return 1 if large else 0


def taken(
    browser: Browser, running: Studio, names: Sequence[str], theme: str, width: int
) -> list[tuple[str, bytes]]:
    """Return (name, PNG) of pages in one theme and one width."""
    context = browser.new_context(
        viewport={"width": width, "height": 820},
        color_scheme="dark" if theme == "dark" else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(running.link)
    pictures = []
    for name in names:
        page.goto(running.base + PAGES[name])
        settle(page)
        page.wait_for_timeout(300)  # for fonts and the last frame
        pictures.append((name, smaller(page.screenshot())))
        if PAGES[name].startswith("/tour"):  # its note would be on every page that follows
            page.get_by_role("button", name="Leave the tour").click()
    context.close()
    return pictures


def smaller(png: bytes) -> bytes:
    """Return a PNG with fewer colours."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    reduced = image.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    data = io.BytesIO()
    reduced.save(data, "PNG", optimize=True)
    return data.getvalue()


if __name__ == "__main__":
    sys.exit(main())
