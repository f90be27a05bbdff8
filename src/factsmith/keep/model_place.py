"""Where the model of a workspace is on this machine.

    model_place("/home/ada/models/base")        # "/models/base" with FACTSMITH_MODEL=/models/base

A workspace records the full path of a model that is a folder or a file. A copy of the workspace on
another machine, such as a clone, may find the model in another place. The environment variable
FACTSMITH_MODEL names that place. The fingerprint decides whether it is the same model.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..core.errors import ModelNotFoundError

VARIABLE = "FACTSMITH_MODEL"
"""The environment variable that names the place."""


def model_place(recorded: str) -> str:
    """Return where to load a workspace's model from.

    Args:
        recorded: What the workspace has recorded: a full path, a bundled model or a hub id.

    Raises:
        ModelNotFoundError: when it is a path that is not here, and nothing names another.
    """
    if not os.path.isabs(recorded) or Path(recorded).exists():  # noqa: PTH117
        return recorded
    place = os.environ.get(VARIABLE, "").strip()
    if not place:
        raise ModelNotFoundError(
            f"the workspace was made for the model in {recorded}, which is not on this machine. If "
            f"the model is elsewhere here, set the environment variable {VARIABLE} to its folder, "
            "its file or its hub id"
        )
    return place
