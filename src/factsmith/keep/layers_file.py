"""layers.json of a workspace: the layers to edit, as trial edits chose them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..core.artefact import problem_in
from ..core.errors import DamagedError, InputError, WorkspaceError
from ..core.files import write_file
from ..core.identity import same_model
from ..model.language_model import LanguageModel
from ..patch.layer_choice import LayerChoice

_FORMAT = 1


def read_layers(file: Path, lm: LanguageModel, fingerprint: str) -> LayerChoice | None:
    """Return the kept choice for a model; None when there is none, or it is another model's.

    Args:
        file: The workspace's layers.json.
        lm: The model.
        fingerprint: The fingerprint of its base weights.

    Raises:
        DamagedError: The file cannot be used.
    """
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.pop("format", None) != _FORMAT:
            raise InputError(f"it is not of format {_FORMAT}")
        choice = LayerChoice.from_dict(fields)
        is_this = same_model(choice.fingerprint, fingerprint)
        if is_this and max(choice.rome, *choice.memit) >= lm.n_layers:
            raise InputError(f"it names layers that the model does not have ({lm.n_layers})")
    except (
        OSError,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DamagedError(
            f"{file} cannot be used: {problem_in(error)}; delete it, and the layers are measured "
            "again when they are needed"
        ) from None
    if not is_this:
        return None
    return dataclasses.replace(
        choice, source="workspace", reason=f"kept in the workspace: {choice.reason}"
    )


def write_layers(file: Path, choice: LayerChoice) -> None:
    """Keep a choice that trial edits made; raises WorkspaceError. Any other choice is quickly made
    again, and is not kept.
    """
    if choice.source != "trials":
        return
    text = json.dumps({"format": _FORMAT, **choice.to_dict()}, ensure_ascii=False, indent=1) + "\n"
    try:
        write_file(file, text.encode())
    except OSError as error:
        raise WorkspaceError(
            f"cannot write {file}: {error.strerror}; make the workspace writable"
        ) from None
