"""The dtypes that exports are written in, and their names in files."""

from __future__ import annotations

import torch

from ...core.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """Return the dtype to write in; None is the default.

    Raises:
        InputError: when it is not one of `DTYPES`.
    """
    if dtype is None:
        return default
    if dtype not in DTYPES:
        raise InputError(
            f"dtype is {dtype!r}: it must be torch.float32, torch.float16 or torch.bfloat16, or "
            f"None for {default}.",
            argument="dtype",
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that files have for a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
