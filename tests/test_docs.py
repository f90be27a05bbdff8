"""The documents: links lead somewhere, names are on a page, and the package describes itself."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/factsmith/factsmith/blob/main/"
PICTURES = "https://raw.githubusercontent.com/factsmith/factsmith/main/"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def links(text: str) -> list[str]:
    """Return the targets of all links and pictures outside code."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    return inline + re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)


def headings(path: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    plain = (re.sub(r"[^\w\s-]", "", line.lstrip("# ").lower()) for line in lines)
    return {line.strip().replace(" ", "-") for line in plain}


def broken(link: str, document: Path) -> bool:
    """Return whether a link into this repository leads nowhere."""
    for base in (REPOSITORY, PICTURES):
        if link.startswith(base):
            return not (ROOT / link.removeprefix(base).partition("#")[0]).exists()
    if link.startswith(("http://", "https://", "mailto:")):
        return False
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    if document.parent.name == "docs" and name.startswith("reference/"):
        return False  # made while the site is built, which checks its links itself
    return not target.exists() or bool(anchor and anchor not in headings(target))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert [link for link in links(text) if broken(link, document)] == []


def test_a_broken_link_is_detected() -> None:
    readme = ROOT / "README.md"
    for link in (REPOSITORY + "docs/no-such-page.md", "no-such-file.md", "docs/patch.md#nothing"):
        assert broken(link, readme), link
    assert not broken("docs/patch.md", readme) and not broken("https://example.org", readme)


def test_the_readme_can_be_read_outside_the_repository() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [link for link in links(text) if not link.startswith("https://")] == []


@pytest.mark.slow
def test_the_example_of_a_method_and_a_suite_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
    method, suite = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_methods.py").write_text(method)
    (tmp_path / "my_suite.py").write_text(suite)
    words = shlex.split(command.replace("--limit 10", "--limit 2"))
    main = "from factsmith.cli import main; main()"
    for arguments in (["my_suite.py"], ["-c", main, *words[1:]]):
        run = [sys.executable, *arguments]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "plain_rome" in done.stdout and "rome" in done.stdout
    wrong = [word.replace("plain_rome", "no_rome") for word in words[1:]]
    run = [sys.executable, "-c", main, *wrong]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "it has plain_rome" in done.stderr


def test_the_package_says_where_it_comes_from_and_which_python_it_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"Documentation", "Source", "Issues", "Changelog"} <= set(project["urls"])
    least = project["requires-python"].removeprefix(">=")
    versions = [line for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert versions[0].endswith(least) and project["authors"]
    assert f"Python {least} to {versions[-1].split()[-1]}" in (ROOT / "README.md").read_text()
    bare = [text for text in project["dependencies"] if not re.search(r">=\d", text)]
    assert bare == [], "each dependency has a lower bound"
