"""Memory for weights that come and go: the same pages again and again.

    room = Room()
    tensor = room.like(stored, device).copy_(stored)      # pages are free again when it is gone

Fresh memory from the system costs several times as much as the copy into it, and a heap that keeps
freed memory for later grows beyond what is in use.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

_LINE = 64
"""Bytes of a cache line."""

_PAGE = 4096
"""Sizes are multiples of this, so that weights of one shape fit into the same pages."""

_LARGE = 2**20
"""Bytes from which a tensor gets pages of its own."""

_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_FLAGS: dict[str, Any] = {"flags": _PRIVATE} if _PRIVATE else {}  # not on Windows


class Room:
    """Gives memory to tensors, and takes it back when they are gone."""

    def __init__(self) -> None:
        self._pages: list[mmap.mmap] = []

    def like(self, stored: Tensor, device: torch.device) -> Tensor:
        """Return a tensor like a stored one, whose numbers are not set.

        On a CPU it has the same place within a cache line. The last bits of a product depend on
        that, and a model in memory has its weights where the file has them.

        Args:
            stored: The tensor, as a file has it.
            device: The device of the new one.
        """
        if device.type != "cpu":
            return torch.empty(stored.shape, dtype=stored.dtype, device=device)
        shift = stored.data_ptr() % _LINE // stored.element_size()
        n, dtype = shift + stored.numel(), stored.dtype
        n_bytes = n * stored.element_size()
        if n_bytes < _LARGE:
            return torch.empty(n, dtype=dtype, device=device)[shift:].view(stored.shape)
        pages = self._take(-(-n_bytes // _PAGE) * _PAGE)
        return torch.frombuffer(pages, dtype=dtype, count=n)[shift:].view(stored.shape)

    def _take(self, n_bytes: int) -> mmap.mmap:
        """Return pages that no tensor has. A tensor's storage refers to its pages."""
        free = [i for i in range(len(self._pages)) if _references(self._pages, i) == _UNUSED]
        for i in free:
            if len(self._pages[i]) == n_bytes:
                return self._pages[i]
        # Layers have other sizes now.
        self._pages = [pages for i, pages in enumerate(self._pages) if i not in free]
        self._pages.append(mmap.mmap(-1, n_bytes, **_FLAGS))
        return self._pages[-1]


def _references(kept: list[mmap.mmap], i: int) -> int:
    return sys.getrefcount(kept[i])


_UNUSED = _references([mmap.mmap(-1, _PAGE)], 0)
"""References to pages that no tensor has. Python decides how it counts those of the question."""
