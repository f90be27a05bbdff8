"""The claim of a campaign on its folder: the file judged.json.

    claim_folder(Path("judged"), made_from, {"memit": "steps=40; seed=0"})

The file names the model, the suite, the sample, the text and the settings of each method. A folder
belongs to one of each. A campaign checks this before it computes anything, and adds its methods to
those of earlier campaigns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import DamagedError, InputError
from ..core.files import write_file
from ..core.identity import same_model

_FILE = "judged.json"


def claim_folder(folder: Path, made_from: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Write the claim on a folder, or check it against the claim of an earlier campaign.

    Args:
        folder: The folder, made if it is missing.
        made_from: What the campaign is made from, JSON-able, by name.
        settings: {method: its settings in words}. They are added to those of other methods.

    Raises:
        InputError: when the folder belongs to another campaign.
        DamagedError: when the file cannot be read.
    """
    path = folder / _FILE
    claim = _read(path) if path.is_file() else {**made_from, "settings": {}}
    kept = claim.get("settings") if isinstance(claim, dict) else None
    if not isinstance(claim, dict) or not isinstance(kept, dict):
        raise InputError(
            f"{folder} holds what another version judged; choose another folder", argument="folder"
        )
    if different := [
        name for name, value in made_from.items() if not _same(claim.get(name), value)
    ]:
        raise InputError(
            f"{folder} holds what was judged with another {', '.join(different)}; "
            "choose another folder",
            argument="folder",
        )
    for method, words in settings.items():
        if kept.get(method, words) != words:
            of_folder, given = _difference(str(kept[method]), words)
            raise InputError(
                f"{folder} holds {method} with other settings: {of_folder} there, {given} here; "
                "choose another folder",
                argument="folder",
            )
    if not path.is_file() or not settings.keys() <= kept.keys():
        folder.mkdir(parents=True, exist_ok=True)
        content = {**made_from, "settings": {**kept, **settings}}
        write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(
            f"{path} cannot be read ({error}); choose another folder", argument="folder"
        ) from None


def _difference(kept: str, given: str) -> tuple[str, str]:
    """Return the settings in which two descriptions differ, as each of them has them."""
    parts = kept.split("; "), given.split("; ")
    of_kept, of_given = (
        ", ".join(part for part in some if part not in others)
        for some, others in (parts, parts[::-1])
    )
    return of_kept, of_given


def _same(stated: object, value: object) -> bool:
    """Return whether two entries are equal, or fingerprints of one model."""
    both_texts = isinstance(stated, str) and isinstance(value, str)
    return stated == value or (both_texts and same_model(str(stated), str(value)))
