"""The cache folder: named, of the platform, or where an earlier version kept its files."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from factsmith.core.cache import cache_folders, cached


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A platform whose cache folder is not that of earlier versions."""
    monkeypatch.delenv("FACTSMITH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "old"))
    monkeypatch.setattr(
        platformdirs, "user_cache_path", lambda name, author: tmp_path / "Caches" / name
    )
    return tmp_path


def test_the_variable_names_the_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSMITH_CACHE", str(home / "mine"))
    assert cache_folders() == [home / "mine"] and cached("index") == home / "mine" / "index"
    monkeypatch.setenv("FACTSMITH_CACHE", "")
    assert cache_folders()[0] == home / "Caches" / "factsmith"


def test_the_place_of_earlier_versions_is_read_where_files_exist(home: Path) -> None:
    new, old = home / "Caches" / "factsmith" / "index", home / "old" / "factsmith" / "index"
    assert cached("index") == new
    old.mkdir(parents=True)
    assert cached("index") == old
    new.mkdir(parents=True)
    assert cached("index") == new


def test_one_folder_where_the_two_are_the_same(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "Caches"))
    assert cache_folders() == [home / "Caches" / "factsmith"]
