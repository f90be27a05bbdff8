"""The public names, the order of the packages, and that importing does nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import factsmith

SOURCE = Path(factsmith.__file__).parent

ORDER = [
    ("core",),
    ("atlas",),
    ("model",),
    ("remote",),
    ("corpus",),
    ("read", "locate", "edit", "judge"),
    ("patch",),
    ("keep", "show"),
    ("cluster",),
    ("studio",),
    ("cli",),
]
"""A package imports only from packages above it; packages of one line never import each other."""

FORMER = ("errors", "ledger", "verify")
"""Modules that only import from the place to which their names have moved."""

NEVER = {("cli", "edit"), ("studio", "edit"), ("show", "edit"), ("show", "keep")}
"""The first of a pair imports no file of the second, although the order may allow it."""

RECORDS_FOR_SHOW = {"read", "locate", "judge", "patch"}
"""Packages from which `show` imports classes of records, and nothing that computes."""


class Import(NamedTuple):
    """One import of a module of factsmith by another."""

    importer: str
    """The module that imports, such as "cli.patch"."""
    imported: str
    """The module that it imports, such as "patch.plan"."""
    name: str
    """What it imports from that module; "" for the module itself."""


def modules(folder: Path) -> dict[str, Path]:
    """Return {module: file} of a folder; a package has the file `__init__.py`."""
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    names = {".".join(path.parts).removesuffix(".__init__"): path for path in paths}
    return {name: folder / path.with_suffix(".py") for name, path in names.items()}


def imports(files: Mapping[str, Path]) -> Iterator[Import]:
    """Yield every import between modules: at the top, in functions, and for type checkers."""
    for module, path in files.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from _resolved(files, module, alias.name.removeprefix("factsmith."), "")
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join(filter(None, [*parents, base]))
                base = base.removeprefix("factsmith.") if base != "factsmith" else ""
                for alias in node.names:
                    yield from _resolved(files, module, base, alias.name)


def _resolved(files: Mapping[str, Path], importer: str, base: str, name: str) -> Iterator[Import]:
    """Yield the import of a submodule, or of a name in a module; nothing for another library."""
    inner = f"{base}.{name}".strip(".")
    if inner in files:
        yield Import(importer, inner, "")
    elif base in files:
        yield Import(importer, base, name)


def package_of(module: str) -> str:
    return module.partition(".")[0]


def line_of(package: str) -> int:
    return next(index for index, packages in enumerate(ORDER) if package in packages)


def wrong_ways(edges: list[Import]) -> set[str]:
    """Return the imports that go against the order, or that no package may make."""
    return {
        f"{edge.importer} -> {edge.imported}"
        for edge in edges
        for one, other in [(package_of(edge.importer), package_of(edge.imported))]
        if one != other and (line_of(one) <= line_of(other) or (one, other) in NEVER)
    }


def circle(edges: list[Import]) -> list[str]:
    """Return the modules of one circle of imports, or nothing when there is none."""
    outgoing: dict[str, set[str]] = {}
    for edge in edges:
        if edge.importer != edge.imported:
            outgoing.setdefault(edge.importer, set()).add(edge.imported)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for following in sorted(outgoing.get(module, ())):
                if round_trip := walk(following, [*path, module]):
                    return round_trip
            done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in sorted(outgoing))), [])


@pytest.fixture(scope="module")
def edges() -> list[Import]:
    files = modules(SOURCE)
    skipped = ("", "__main__", *FORMER)
    return list(imports({name: path for name, path in files.items() if name not in skipped}))


def test_the_order_names_every_package() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages <= {package for line in ORDER for package in line}


def test_the_guide_draws_the_order_and_names_files_that_exist() -> None:
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = [[package for package in line if (SOURCE / package).is_dir()] for line in ORDER]
    steps = [line[0] if len(line) == 1 else f"{{ {', '.join(line)} }}" for line in lines if line]
    assert f"    {' → '.join(steps)}\n" in text
    for name in re.findall(r"`([a-z_/]+(?:/|\.py))`", text):
        assert any((root / name).exists() for root in (SOURCE, SOURCE.parents[1])), name


def test_imports_go_one_way(edges: list[Import]) -> None:
    assert wrong_ways(edges) == set()
    pairs = {(package_of(edge.importer), package_of(edge.imported)) for edge in edges}
    assert ("keep", "edit") in pairs and ("cli", "core") in pairs, "the imports are seen"


def test_there_is_no_circle_of_imports(edges: list[Import]) -> None:
    assert circle(edges) == []


def test_show_imports_records_only(edges: list[Import]) -> None:
    for edge in edges:
        home = package_of(edge.imported)
        if package_of(edge.importer) == "show" and home in RECORDS_FOR_SHOW:
            value = getattr(importlib.import_module(f"factsmith.{edge.imported}"), edge.name)
            assert not inspect.isfunction(value), edge


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"core/a.py": "from ..model import b", "model/b.py": ""}, {"core.a -> model.b"}),
        ({"read/a.py": "from ..judge.b import c", "judge/b.py": "c = 1"}, {"read.a -> judge.b"}),
        ({"cli/a.py": "import factsmith.edit.b", "edit/b.py": ""}, {"cli.a -> edit.b"}),
        (
            {"show/a.py": "def f():\n    from ..keep.b import c", "keep/b.py": "c = 1"},
            {"show.a -> keep.b"},
        ),
        (
            {
                "locate/a.py": "if TYPE_CHECKING:\n    from ..patch.b import c",
                "patch/b.py": "from .d import e",
                "patch/d.py": "e = 1",
            },
            {"locate.a -> patch.b"},
        ),
        ({"judge/a.py": "from ..core.b import c", "core/b.py": "c = 1"}, set()),
    ],
)
def test_a_wrong_import_is_detected(tmp_path: Path, files: dict[str, str], wrong: set[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert wrong_ways(list(imports(modules(tmp_path)))) == wrong


def test_a_circle_is_detected(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").write_text("from .b import x")
    (tmp_path / "core/b.py").write_text("def f():\n    from .c import y")
    (tmp_path / "core/c.py").write_text("if TYPE_CHECKING:\n    from . import a\nfrom .d import z")
    (tmp_path / "core/d.py").write_text("")
    assert circle(list(imports(modules(tmp_path)))) == ["core.a", "core.b", "core.c"]


def listed() -> list[tuple[str, str]]:
    """Return (module, name) of each public name, in the order of the stub."""
    stub = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
    return [
        (str(node.module), alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_the_list_of_names_is_sorted_and_complete() -> None:
    assert listed() == sorted(listed())
    names = [name for _, name in listed()]
    assert len(set(names)) == len(names)
    assert factsmith.__all__ == sorted([*names, "__version__"]) == dir(factsmith)
    text = (SOURCE / "__init__.pyi").read_text(encoding="utf-8")
    assert all(f"import {name} as {name}\n" in text for name in names), "exported to type checkers"


@pytest.mark.parametrize("module", FORMER)
def test_a_former_place_says_where_its_names_are(module: str) -> None:
    with pytest.warns(DeprecationWarning, match="has moved"):
        former = importlib.import_module(f"factsmith.{module}")
    names = {"errors": "FactsmithError", "ledger": "Ledger", "verify": "verify"}
    assert names[module] in former.__all__
    defined = [node for node in ast.parse(inspect.getsource(former)).body if hasattr(node, "args")]
    assert defined == [], "it defines nothing itself"


@pytest.mark.parametrize(("module", "name"), listed())
def test_every_name_is_what_its_home_holds(module: str, name: str) -> None:
    value = getattr(importlib.import_module(f"factsmith.{module}"), name)
    if name == "edit":  # the one name that is also a package, which stands in for the function
        assert "method" in inspect.signature(value).parameters
    else:
        assert getattr(factsmith, name) is value
    assert value.__module__ == f"factsmith.{module}", "the stub names where it is defined"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = factsmith.no_such_name


def test_edit_is_the_one_name_that_is_also_a_module() -> None:
    """Importing a module sets its name in the package, so `factsmith.card` would be the module."""
    inside = {path.stem for path in SOURCE.iterdir()}
    assert set(factsmith.__all__) & inside == {"edit"}


@pytest.mark.parametrize("order", ["called first", "imported first"])
def test_edit_can_be_called_before_and_after_its_modules_are_imported(order: str) -> None:
    code = """
import inspect
import factsmith

def call():
    try:
        factsmith.edit(None, [], moments={})
    except factsmith.FactsmithError as error:
        assert "expected a model" in str(error), error
    else:
        raise AssertionError("it did not run")
    assert "method" in inspect.signature(factsmith.edit).parameters

def load():
    import factsmith.edit.solve
    assert factsmith.edit.solve.__name__ == "factsmith.edit.solve"

"""
    steps = ["call()", "load()", "call()"] if order == "called first" else ["load()", "call()"]
    command = [sys.executable, "-c", code + "\n".join(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_does_nothing_else() -> None:
    code = "import sys, logging, factsmith\n"
    code += "print('torch' in sys.modules, logging.getLogger().handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]"] and done.stderr == ""
