"""A method of one's own, named by the function that writes it.

    function_of("my_methods:write")         # a module on Python's path, or in this folder
    function_of("my_method.py:write")       # a file

The function takes a model and a list of facts. It returns one of these:

- a `Delta`
- {layer: its new down-projection, (d_model, d_ff)}
- a `with` block inside which the model carries the facts; it may yield {name: number}
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from ..core.errors import InputError, first_line
from ..core.fact import Fact
from ..model.language_model import LanguageModel

OwnMethod: TypeAlias = Callable[[LanguageModel, Sequence[Fact]], Any]
"""Writes facts; the module says what it returns."""


def is_own(name: str) -> bool:
    """Return whether a method is named by its function."""
    return ":" in name


def function_of(name: str) -> OwnMethod:
    """Return the function that a name stands for.

    Raises:
        InputError: when there is no such module or function, or the module cannot be imported.
    """
    where, _, attribute = name.rpartition(":")
    if not where.strip() or not attribute.strip():
        raise InputError(
            f"{name!r} names no function; give module:function, or file.py:function",
            argument="methods",
        )
    module = _module(where.strip())
    value: Any = module
    for part in attribute.strip().split("."):
        value = getattr(value, part, None)
        if value is None:
            functions = sorted(
                key
                for key, each in vars(module).items()
                if callable(each) and getattr(each, "__module__", None) == module.__name__
            )
            raise InputError(
                f"{where} has no {attribute}; it has {', '.join(functions) or 'no function'}",
                argument="methods",
            )
    if not callable(value):
        raise InputError(
            f"{name} is a {type(value).__name__}; give a function of a model and facts",
            argument="methods",
        )
    method: OwnMethod = value
    return method


def _module(where: str) -> ModuleType:
    """Import a module by its name, or a file by its path."""
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise InputError(
                f"there is no file {where}; name the file that holds your method",
                argument="methods",
            )
        return _imported(where, lambda: _from_file(path.resolve()))
    if str(Path.cwd()) not in sys.path and "" not in sys.path and _is_at_hand(where):
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    return _imported(where, lambda: importlib.import_module(where))


def _is_at_hand(module: str) -> bool:
    """Whether this folder holds a module that Python does not find otherwise."""
    top = module.partition(".")[0]
    return Path(f"{top}.py").is_file() or Path(top).is_dir()


def _from_file(path: Path) -> ModuleType:
    """Import a file. It may import its neighbours."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _imported(where: str, load: Callable[[], ModuleType]) -> ModuleType:
    """Import a module; what goes wrong in it becomes an InputError."""
    try:
        return load()
    except ModuleNotFoundError as error:
        if error.name is not None and f"{where}.".startswith(f"{error.name}."):
            raise InputError(
                f"there is no module {where}; give its name as in `import {where}`, or the file "
                "that holds it, as file.py:function",
                argument="methods",
            ) from None
        raise InputError(f"{where} cannot be imported: {error}", argument="methods") from error
    except Exception as error:
        raise InputError(
            f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}",
            argument="methods",
        ) from error
