"""General ability before and after an edit, by the tasks of lm-evaluation-harness.

    measure = ability(lm, ["hellaswag"], limit=200)
    measure()                                        # {"hellaswag acc": 0.31, ...} of the model now
    evaluate(lm, records, editors, size=100, probe=measure)

The harness measures through its own API. It gets the model that is loaded already, with its edits.
Gao et al., https://zenodo.org/records/12608602.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ..core.checks import check_count, check_items, check_seed
from ..core.errors import FactsmithError, InputError, first_line
from ..model.language_model import LanguageModel, check_model
from ..model.turns import asking

_LARGEST_HASHED = 100 * 2**20
"""Bytes. A larger file of task data is told from others by its size."""


@asking()
def ability(
    lm: LanguageModel,
    tasks: Iterable[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Callable[[], dict[str, float]]:
    """Return a function that runs tasks on the model at the time of each call.

    Args:
        lm: The model.
        tasks: Tasks by the harness's names. Their data must be in the local cache, or there must be
            a network.
        folder: A folder of further tasks, one YAML file each, which may read local files.
        limit: Number of examples a task. None: all.
        batch_size: Number of examples in one pass.
        seed: Seed of the few-shot examples.

    Returns:
        A function that returns {"task metric": value}. It raises InputError if a task's data cannot
        be loaded.

    Raises:
        InputError: when the harness is not installed, or does not have a task.
    """
    check_model(lm)
    return find_tasks(tasks, folder, limit=limit, batch_size=batch_size, seed=seed).on(lm)


def find_tasks(
    tasks: Iterable[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> HarnessTasks:
    """Return the tasks of `ability`, which need no model yet. Arguments and errors are its own."""
    names = list(dict.fromkeys(check_items(tasks, "tasks", "task names")))
    if limit is not None:
        limit = check_count(limit, "limit", "the number of examples of a task", also="None for all")
    batch_size = check_count(batch_size, "batch_size", "the number of examples in one pass")
    seed = check_seed(seed)
    try:
        with _quietly():
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"tasks need lm-evaluation-harness, which cannot be imported ({error}); "
            'install it with: pip install "factsmith[eval]"',
            argument="tasks",
        ) from None
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"{os.fspath(folder)!r} is no folder; give a folder with a YAML file for each task",
            argument="tasks_folder",
        )
    if not names:
        raise InputError("tasks is empty; name at least one task", argument="tasks")
    return HarnessTasks(
        tasks=tuple(names),
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        digest="" if folder is None else _digest(Path(folder)),
        manager=_task_manager(TaskManager, names, folder),
        wrapper=HFLM,
    )


def _task_manager(
    make: Callable[..., Any], names: Sequence[str], folder: str | os.PathLike[str] | None
) -> Any:
    """Return the harness's list of tasks.

    Args:
        make: The harness's class of such lists.
        names: The tasks that it must hold.
        folder: A folder of further tasks.

    Raises:
        InputError: when a task is missing.
    """
    path = None if folder is None else os.fspath(folder)
    with _quietly():
        # The harness's own thousands of tasks take seconds to list, so a folder comes first.
        manager = make(include_path=path, include_defaults=folder is None)
        if not set(names) <= set(manager.all_tasks):
            manager = make(include_path=path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        similar = sorted(
            name for name in manager.all_tasks if str(unknown[0]).lower() in name.lower()
        )
        hint = f" (similar names: {', '.join(similar[:5])})" if similar else ""
        raise InputError(
            f"there is no task {unknown[0]!r}{hint}; `lm-eval ls tasks` lists all of them",
            argument="tasks",
        )
    return manager


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Tasks of the harness, and how they are run.

    Attributes:
        tasks: Their names.
        limit: Number of examples a task. None: all.
        batch_size: Number of examples in one pass.
        seed: Seed of the few-shot examples.
        digest: Digest of the folder of tasks; "" without a folder.
        manager: The harness's list of tasks.
        wrapper: The harness's class of models.
    """

    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int
    seed: int
    digest: str
    manager: Any
    wrapper: Any

    def on(self, lm: LanguageModel) -> Callable[[], dict[str, float]]:
        """Return the function that runs the tasks on a model."""
        return _Ability(lm=lm, **vars(self))


@dataclass(frozen=True, kw_only=True)
class _Ability(HarnessTasks):
    """The function that `ability` returns."""

    lm: LanguageModel

    @property
    def description(self) -> str:
        """The tasks and settings in words. A run goes on only with the same ones."""
        folder = self.digest and f", of {self.digest}"
        return f"{', '.join(self.tasks)}, limit {self.limit}, seed {self.seed}{folder}"

    def __call__(self) -> dict[str, float]:
        """Run the tasks on the model in its present state."""
        import lm_eval

        try:
            with _quietly():
                model = self.wrapper(
                    pretrained=self.lm.module,
                    tokenizer=self.lm.tokenizer,
                    batch_size=self.batch_size,
                    device=str(self.lm.device),
                )
                results = lm_eval.simple_evaluate(
                    model=model,
                    tasks=list(self.tasks),
                    task_manager=self.manager,
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    random_seed=self.seed,
                    fewshot_random_seed=self.seed,
                )
        except FactsmithError:
            raise
        except Exception as error:  # a task is anybody's templates, code and data
            raise InputError(
                f"{', '.join(self.tasks)} cannot be run ({type(error).__name__}: "
                f"{first_line(error)}); if there is no network, the data of a task must be in the "
                "local cache",
                argument="tasks",
            ) from None
        return _finite_metrics(results)


def _finite_metrics(results: Any) -> dict[str, float]:
    """Return {"task metric": value} of the harness's results, without standard errors.

    The harness returns {"results": {task: {"metric,filter": value}}}.
    """
    metrics: dict[str, float] = {}
    for task, values in (results or {}).get("results", {}).items():
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            is_metric = comma and not metric.endswith("_stderr")
            if is_metric and isinstance(value, (int, float)) and math.isfinite(value):
                suffix = "" if filter_name == "none" else f" ({filter_name})"
                metrics[f"{task} {metric}{suffix}"] = float(value)
    return metrics


def _digest(folder: Path) -> str:
    """Return the sha256 of a folder's files, shortened: tasks of one name may differ."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        content = path.read_bytes() if size < _LARGEST_HASHED else str(size).encode()
        digest.update(
            f"{path.relative_to(folder)}\0{hashlib.sha256(content).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:16]


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the harness's bars, notes and warnings. Its problems come as errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
