"""Names of folders that a form may give: one part, and nothing that leads elsewhere.

checked_name("judged-1", "name")     "judged-1"
inside(folder, "judged-1", "name")   folder / "judged-1"
"""

from __future__ import annotations

import re
from pathlib import Path

from ..core.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def checked_name(name: str, argument: str) -> str:
    """Return a name that is one part of a path.

    Raises:
        InputError: for any other text.
    """
    if _NAME.fullmatch(name) and not name.endswith("."):
        return name
    raise InputError(
        f"{argument} is {name[:80]!r}; give up to 64 letters, digits, dots, dashes and "
        "underscores, the first of them a letter or a digit",
        argument=argument,
    )


def inside(folder: Path, name: str, argument: str) -> Path:
    """Return the path of a name in a folder, which may not be a link to elsewhere.

    Raises:
        InputError: when the name is no name, or leads out of the folder.
    """
    path = folder / checked_name(name, argument)
    if path.resolve().parent != folder.resolve():
        raise InputError(
            f"{argument} is {name!r}, which is a link to another place; choose another name",
            argument=argument,
        )
    return path
