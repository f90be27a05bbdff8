"""Write the reference pages of the documentation while mkdocs builds it.

    make docs        # calls `mkdocs build`, and mkdocs.yml names this file as a hook

The public names come from `src/factsmith/__init__.pyi`, a page for each package. The commands come
from the command line itself. So a new name or command is on its page without a further list.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = {
    "model": "Models",
    "core": "Facts, gates and errors",
    "corpus": "Texts and second moments",
    "read": "Read",
    "locate": "Locate",
    "edit": "Edit: methods, settings and deltas",
    "judge": "Judge",
    "patch": "Patch",
    "keep": "Keep and serve",
    "remote": "Servers",
    "show": "Pictures and pages",
    "cluster": "Scale out",
}
"""The title of each package's page, in the order of the navigation."""


def public_names() -> dict[str, list[str]]:
    """Return {package: full names of its public objects}, in the order of the stub."""
    stub = ast.parse((ROOT / "src/factsmith/__init__.pyi").read_text(encoding="utf-8"))
    names: dict[str, list[str]] = defaultdict(list)
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[node.module.split(".")[0]].append(f"factsmith.{node.module}.{alias.name}")
    return names


def pages() -> dict[str, str]:
    """Return {path below docs/: Markdown} of the pages that are made here.

    Raises:
        ValueError: A package with public names has no title in `PACKAGES`.
    """
    names = public_names()
    if untitled := set(names) - set(PACKAGES):
        raise ValueError(f"no title for {sorted(untitled)}; add one to PACKAGES")
    made = {f"reference/{package}.md": _package(package, names[package]) for package in PACKAGES}
    return {"reference/index.md": _index(names), "reference/commands.md": _commands(), **made}


def on_config(config: Any) -> Any:
    """Add the pages to the navigation: mkdocs calls this after it has read mkdocs.yml."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    reference.append({"Commands": "reference/commands.md"})
    reference += [{title: f"reference/{package}.md"} for package, title in PACKAGES.items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to the site: mkdocs calls this after it has listed docs/."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def _index(names: dict[str, list[str]]) -> str:
    lines = ["# Reference", "", "Every public name is an attribute of `factsmith`.", ""]
    lines += ["The commands are on [a page of their own](commands.md).", ""]
    for package, title in PACKAGES.items():
        links = [f"[`{name.rpartition('.')[2]}`]({package}.md#{name})" for name in names[package]]
        lines += [f"## [{title}]({package}.md)", "", " · ".join(links), ""]
    return "\n".join(lines)


def _package(package: str, names: list[str]) -> str:
    return "\n".join([f"# {PACKAGES[package]}", "", *(f"::: {name}\n" for name in names)])


def _commands() -> str:
    from factsmith.cli import app

    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="factsmith")
    text = get_docs_for_click(obj=command, ctx=context, name="factsmith")
    for name, each in command.commands.items():  # the list would cut each summary at 45 characters
        summary = each.get_short_help_str(limit=200)
        text = re.sub(rf"^\* `{name}`: .*$", f"* `{name}`: {summary}", text, flags=re.MULTILINE)
    examples = re.compile(r"^(Examples?:)\n((?: .*\n)+)", re.MULTILINE)
    text = examples.sub(r"\1\n\n```sh\n\2```\n", text)
    return text.replace("# `factsmith`", "# Commands", 1)
