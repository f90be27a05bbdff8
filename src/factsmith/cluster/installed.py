"""Ray, imported where it is used first."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

from ..core.errors import ClusterError


def need_ray() -> Any:
    """Return the module ray.

    Raises:
        ClusterError: It is not installed.
    """
    # Its workers keep the devices that the machine shows, and it sends no statistics anywhere.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("ray")
    except ImportError as error:
        raise ClusterError(
            f"Ray cannot be imported ({error}). Work on several workers needs it; install it with: "
            "pip install 'factsmith[ray]'"
        ) from None
