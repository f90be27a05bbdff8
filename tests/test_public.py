"""The public names, the one-way imports, and that importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import factsmith

SOURCE = Path(factsmith.__file__).parent

# DESIGN: imports go one way, left to right; packages in one set never import each other.
ORDER = [
    {"errors"},
    {"checks", "files", "progress", "tables"},
    {"tensors"},
    {"fact"},
    {"model", "records"},
    {"verify"},
    {"inspect", "locate", "edit", "judge"},
    {"ledger", "gates", "folders", "readback"},
    {"export"},
    {"recommend", "standing"},
    {"proposals"},
    {"workbench", "cards", "editing"},
    {"pages", "plot"},
    {"report"},
    {"demo"},
    {"cli"},
]


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Parts of factsmith that a file imports by relative imports."""
    depth = len(path.relative_to(SOURCE).parts)
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            parts.update(
                [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            )
    return parts


def _rank(part: str) -> int:
    return next(i for i, parts in enumerate(ORDER) if part in parts)


def test_imports_go_one_way() -> None:
    files = [
        p
        for p in SOURCE.rglob("*.py")
        if p.parent != SOURCE or p.stem not in ("__init__", "__main__")
    ]
    edges = {(_part(path), part) for path in files for part in _imported(path)}
    wrong = {(a, b) for a, b in edges if a != b and _rank(a) <= _rank(b)}
    assert not wrong
    assert ("workbench", "edit") in edges and ("cli", "fact") in edges  # the picture is not empty


def test_every_public_name_is_there_and_sorted() -> None:
    assert factsmith.__all__ == sorted(factsmith.__all__)
    assert all(getattr(factsmith, name) is not None for name in factsmith.__all__)
    assert set(dir(factsmith)) == set(factsmith.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = factsmith.no_such_name


def test_no_name_is_hidden_by_a_module() -> None:
    """Importing a module sets it as an attribute of the package: `factsmith.card` would be the module, once anything had imported it."""
    assert not set(factsmith.__all__) & {path.stem for path in SOURCE.iterdir()}


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        a.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for a in node.names
    }
    assert imported | {"__version__"} == set(factsmith.__all__)


def test_importing_does_nothing_else() -> None:
    code = "import sys, logging, factsmith; print('torch' in sys.modules, logging.getLogger().handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]"] and done.stderr == ""
