"""factsmith: read, locate, patch and keep the facts in a transformer's feed-forward memory.

    import factsmith as fs
    lm = fs.load("atlas")
    fact = fs.Fact("Bulgaria", "The currency of {} is the", "euro")
    with fs.Workbench(lm, "my-workspace") as bench:
        bench.apply(fact)
        lm.answer([fact.text])

`__init__.pyi` lists the public names. Each is imported when it is first used: torch takes seconds
to import, and `factsmith --help` does not need it.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """Return {public name: the module that defines it}, as the stub lists them."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f".{node.module}" for node in imports for alias in node.names}


_HOMES = _homes()
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name], __name__)
    # The import has set `edit`, which is also a package. That package can be called.
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return sorted(__all__)
