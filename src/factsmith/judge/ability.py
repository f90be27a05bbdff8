"""General ability before and after an edit, by the tasks of lm-evaluation-harness (Gao et al., https://zenodo.org/records/12608602).

    measure = ability(lm, ["hellaswag"], limit=200)
    measure()                                        # {"hellaswag acc": 0.31, ...} of the model as it is now
    evaluate(lm, records, editors, size=100, probe=measure)

The harness measures through its own API; here it is given a model that is already loaded, edits and all.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ..core.checks import check_count, check_items, check_seed
from ..core.errors import FactsmithError, InputError
from ..model.language_model import LanguageModel, check_model


def ability(
    lm: LanguageModel,
    tasks: Iterable[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Callable[[], dict[str, float]]:
    """A function that runs tasks on the model as it is when called: {"task metric": value}, shares in [0, 1] where the metric is one.

    tasks   by the harness's names; their data must be at hand, or there must be a network
    folder  of further tasks, one YAML file each, which may read local files
    limit   examples a task; None: all
    seed    of few-shot examples

    Raises InputError where the harness is not installed or does not have a task, and, when called, where a task's data cannot be had.
    """
    check_model(lm)
    named = list(dict.fromkeys(check_items(tasks, "tasks", "task names")))
    limit = (
        None
        if limit is None
        else check_count(limit, "limit", "the number of examples of a task", also="None for all")
    )
    batch_size, seed = (
        check_count(batch_size, "batch_size", "the number of examples in one pass"),
        check_seed(seed),
    )
    try:
        with _quietly():
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f'tasks need lm-evaluation-harness, which cannot be used ({error}); install it with: pip install "factsmith[eval]"'
        ) from None
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"{os.fspath(folder)!r} is no folder; expected one with a YAML file for each task"
        )
    if not named:
        raise InputError("no tasks; name at least one")
    with _quietly():
        manager = TaskManager(
            include_path=folder and os.fspath(folder), include_defaults=folder is None
        )
        if not set(named) <= set(
            manager.all_tasks
        ):  # the harness's own thousands take seconds to list
            manager = TaskManager(include_path=folder and os.fspath(folder))
    if unknown := [name for name in named if name not in manager.all_tasks]:
        near = sorted(
            name for name in manager.all_tasks if str(unknown[0]).lower() in name.lower()
        )[:5]
        told = f" (there are {', '.join(near)})" if near else ""
        raise InputError(f"no task {unknown[0]!r}{told}; `lm-eval ls tasks` lists them")
    return _Ability(
        lm,
        tuple(named),
        limit,
        batch_size,
        seed,
        "" if folder is None else _digest(Path(folder)),
        manager,
        HFLM,
    )


@dataclass(frozen=True)
class _Ability:
    lm: LanguageModel
    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int
    seed: int
    folder: str
    manager: Any
    wrapper: Any

    @property
    def description(self) -> str:
        """What is measured, by which a run is told from another."""
        return f"{', '.join(self.tasks)}, limit {self.limit}, seed {self.seed}{self.folder and f', of {self.folder}'}"

    def __call__(self) -> dict[str, float]:
        import lm_eval

        try:
            with _quietly():
                model = self.wrapper(
                    pretrained=self.lm.module,
                    tokenizer=self.lm.tokenizer,
                    batch_size=self.batch_size,
                    device=str(self.lm.device),
                )
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=list(self.tasks),
                    task_manager=self.manager,
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    random_seed=self.seed,
                    fewshot_random_seed=self.seed,
                )
        except (
            Exception
        ) as error:  # a task is somebody's templates, code and data: anything can be wrong with it
            if isinstance(error, FactsmithError):
                raise
            first = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {first[0]}"
            raise InputError(
                f"{', '.join(self.tasks)} cannot be run ({why}); where there is no network, a task's data must be at hand"
            ) from None
        return _numbers(found)


def _digest(folder: Path) -> str:
    """sha256 of a folder's files, shortened: tasks of one name may differ."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        content = path.read_bytes() if size < _LARGEST else str(size).encode()
        digest.update(
            f"{path.relative_to(folder)}\0{hashlib.sha256(content).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:16]


_LARGEST = 100 * 2**20
"""Bytes of a file of data beyond which its size stands for it."""


def _numbers(found: Any) -> dict[str, float]:
    """{"task metric": value} from what the harness gives, {task: {"metric,filter": value}}; without its standard errors."""
    told: dict[str, float] = {}
    for task, values in (found or {}).get("results", {}).items():
        for name, value in values.items():
            metric, comma, how = name.partition(",")
            if (
                comma
                and not metric.endswith("_stderr")
                and isinstance(value, (int, float))
                and math.isfinite(value)
            ):
                told[f"{task} {metric}" + ("" if how == "none" else f" ({how})")] = float(value)
    return told


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's own bars, notes and warnings: what went wrong comes as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
