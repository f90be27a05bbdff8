"""Settings of the search, and its result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from factsmith.core.errors import InputError
from factsmith.edit.target import TargetConfig


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"lr": 0},
        {"lr": float("nan")},
        {"clamp": -1},
        {"kl_factor": -0.1},
        {"scale": "big"},
        {"stop_loss": "no"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        TargetConfig(**settings)


def test_numbers_are_kept_as_plain_ones() -> None:
    config = TargetConfig(lr=np.float32(0.5), steps=np.int64(3))  # type: ignore[arg-type]
    assert (config.lr, config.steps) == (0.5, 3)
    assert type(config.lr) is float and type(config.steps) is int
