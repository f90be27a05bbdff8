"""Units such as files, read by Ray Data in the order of the units.

for row in stream(read, units, at_once=4):          # read(unit) yields rows
    ...
"""

from __future__ import annotations

import functools
import importlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ..core.errors import ClusterError
from .installed import need_ray, why

Unit = TypeVar("Unit")
Row = TypeVar("Row")

_ROWS = 256
"""Rows that travel together."""

_BLOCK = 2**22
"""Bytes that a task collects before it hands them on."""


def stream(
    read: Callable[[Unit], Iterable[Row]], units: Sequence[Unit], *, at_once: int
) -> Iterator[Row]:
    """Yield what `read` yields of each unit.

    Args:
        read: Reads one unit.
        units: The units.
        at_once: How many are read at once, at most.

    Raises:
        ClusterError: Ray Data is not installed, or fails.
        Exception: What `read` raised.
    """
    ray = need_ray()
    # Ray Data needs a unit, and a process within the cluster.
    if not units or ray.util.client.ray.is_connected():
        for unit in units:
            yield from read(unit)
        return
    rows = _quietly(lambda: iter(_dataset(read, units, at_once).iter_rows()))
    try:
        while (packed := _quietly(lambda: next(rows, None))) is not None:
            for kind, value in pickle.loads(packed["rows"]):
                if kind == "error":
                    raise value
                yield value
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the texts cannot be read by Ray Data: {why(error)}") from error


def _dataset(read: Callable[[Unit], Iterable[Row]], units: Sequence[Unit], at_once: int) -> Any:
    """Return the dataset of pickled rows."""
    ray, data = need_ray(), _ray_data()
    reader = ray.put(ray.cloudpickle.dumps(read))  # sent once, however many units there are
    with data.DataContext.current(_settings(data)):
        items = [{"unit": ray.cloudpickle.dumps(unit)} for unit in units]
        return data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read,
            batch_size=1,
            fn_kwargs={"reader": [reader]},
            # The workers hold the CPUs, so reading asks for none: it would wait for them for ever.
            num_cpus=0,
            compute=data.TaskPoolStrategy(size=min(at_once, len(items))),
        )


def _quietly(do: Callable[[], Any]) -> Any:
    """Return what a function returns. Ray Data warns of its own defaults meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return do()


def _settings(data: Any) -> Any:
    """Return the settings of Ray Data for a stream. Those of the user's own datasets stay."""
    settings = data.DataContext.get_current().copy()
    settings.execution_options.preserve_order = True
    settings.enable_progress_bars = settings.print_on_execution_start = False
    settings.target_max_block_size = _BLOCK
    return settings


def _ray_data() -> Any:
    """Return the module ray.data.

    Raises:
        ClusterError: What it needs is not installed.
    """
    need_ray()
    try:
        data = importlib.import_module("ray.data")
    except ImportError as error:
        raise ClusterError(
            f"Ray Data cannot be imported ({error}). Reading texts on several machines needs it; "
            "install it with: pip install 'factsmith[ray]'"
        ) from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces each dataset
    return data


def _read(batch: dict[str, Any], reader: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a unit in pickles, and an error in the place of the row that raised it."""
    read, unit = _reader(reader[0]), pickle.loads(batch["unit"][0])
    rows: list[tuple[str, Any]] = []
    try:
        for row in read(unit):
            rows.append(("row", row))
            if len(rows) == _ROWS:
                yield _packed(rows)
                rows = []
    except Exception as error:
        rows.append(("error", error))
    if rows:
        yield _packed(rows)


@functools.lru_cache(maxsize=1)
def _reader(reference: Any) -> Any:
    """Return the function that reads units. A process unpickles it once."""
    return pickle.loads(need_ray().get(reference))


def _packed(rows: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"rows": np.array([need_ray().cloudpickle.dumps(rows)], dtype=object)}
