"""The folder of what can be made again, such as the index of a model.

cache_folders()      [the folder to use, a folder of earlier versions]
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE = "FACTSMITH_CACHE"
"""The environment variable that names the folder."""


def cache_folders() -> list[Path]:
    """Return the cache folder, followed by those where earlier versions kept their files.

    The folder is $FACTSMITH_CACHE, or the user's cache folder of the platform: for example
    ~/.cache/factsmith on Linux ($XDG_CACHE_HOME counts there), ~/Library/Caches/factsmith on macOS,
    and %LOCALAPPDATA%\\factsmith\\Cache on Windows.
    """
    if named := os.environ.get(VARIABLE):
        return [Path(named).expanduser()]
    earlier = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factsmith"
    return list(dict.fromkeys([platformdirs.user_cache_path("factsmith", False), earlier]))


def cached(name: str | Path) -> Path:
    """Return where the cache keeps a file or folder: where it is already, or where it is to go."""
    places = [folder / name for folder in cache_folders()]
    return next((place for place in places if place.exists()), places[0])
