"""Ray behind the seam `core.executor`: parts run on workers of a cluster, of this machine or many.

    with Ray(workers=4):                           # four processes of this machine
        moments = second_moments(lm, texts, [3, 4, 5])
    with Ray("10.0.0.7:6379", workers=16, num_gpus=1):
        index = find_index(lm)
    with Ray() as ray:
        ray.map(task, parts)                       # as an executor

Each worker loads a model once and does part after part. Results come in the order of the parts. If
a worker dies, another one does its part. A part that takes much longer than the others is given to
a second worker; the first answer counts. So each part counts exactly once, and the numbers are
those of `Local(cuts=True)` to the last bit, if a part has as many threads there.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self, TypeVar

import torch

from ..core.checks import check_count, check_number
from ..core.errors import ClusterError, InputError, first_line
from ..core.executor import check_part_tokens, running_on
from ..core.progress import Progress, tell
from ..core.tables import counted
from ..model.language_model import LanguageModel
from .installed import need_ray, quiet_ray, uninterrupted
from .pool import Pool
from .reading import stream
from .run import Run
from .shipping import Names, Packed, UnknownModelError, pack, unsendable
from .worker import Placement, Worker

Part = TypeVar("Part")
Result = TypeVar("Result")

_CONNECT = 10.0
"""Seconds to wait for the head of a cluster."""

_LONGEST = 40
"""Characters of the folder for temporary files, at most. The path of a socket has at most 107, of
which Ray adds about 60."""

_LOOK = 0.5
"""Seconds between two looks at workers that start."""


@dataclass(eq=False)
class Ray:
    """An executor on Ray, and a block in which everything that is cut into parts runs there.

    Attributes:
        address: The head of a running cluster: "auto", "host:port" or "ray://host:port". None: a
            cluster of this machine, which ends with the block. If this process is connected to Ray
            already, that cluster is used.
        workers: Number of workers. None: as many as the cluster has CPUs, or GPUs, for.
        num_cpus: CPUs that a worker takes.
        num_gpus: GPUs that a worker takes. Models that are sent go to the first.
        resources: What else a worker takes, as {name: amount}.
        threads: Threads of one part. None: as many as a worker has CPUs, at least one.
        models: The folder or hub id that each worker loads the model from. None: the model of this
            process is sent to them.
        device_map: How a loaded model is spread over a worker's devices, as `load` takes it.
        dtype: The dtype of a loaded model, as `load` takes it.
        part_tokens: Tokens of one part of a corpus. None: each sweep chooses.
        progress: Gets how far the start is, and notes about workers that died.

    Raises:
        InputError: An argument has a wrong type or value.
        ClusterError: Raised by the block: Ray is not installed, or there is no such cluster.
    """

    address: str | None = None
    _: KW_ONLY
    workers: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] | None = None
    threads: int | None = None
    models: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    dtype: torch.dtype | str | None = None
    part_tokens: int | None = None
    progress: Progress | None = None

    cuts: bool = field(default=True, init=False)
    _pool: Pool | None = field(default=None, init=False, repr=False)
    _models: dict[str, tuple[LanguageModel, Any]] = field(
        default_factory=dict, init=False, repr=False
    )
    _block: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _tasks: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.address is not None and (
            not isinstance(self.address, str) or not self.address.strip()
        ):
            raise InputError(
                f'address is {self.address!r}; give "auto", "host:port" or "ray://host:port", or '
                "None for a cluster of this machine",
                argument="address",
            )
        if self.workers is not None:
            self.workers = check_count(
                self.workers, "workers", "the number of workers", also="None"
            )
        self.num_cpus = check_number(self.num_cpus, "num_cpus", least=0)
        self.resources = _checked_resources(self.resources)
        if self.models is not None and (
            not isinstance(self.models, (str, os.PathLike)) or not str(self.models)
        ):
            raise InputError(
                f"models is {self.models!r}; give the folder or hub id that the workers load the "
                "model from, or None",
                argument="models",
            )
        self.num_gpus = check_number(self.num_gpus, "num_gpus", least=0)
        if self.threads is not None:
            self.threads = check_count(self.threads, "threads", "threads of a part", also="None")
        self.part_tokens = check_part_tokens(self.part_tokens)
        if self.models is None and (self.device_map is not None or self.dtype is not None):
            name = "device_map" if self.device_map is not None else "dtype"
            raise InputError(
                f"{name} is {getattr(self, name)!r}, and models is None; give the folder or hub id "
                "that the workers load the model from, or leave it out: a model that is sent has "
                "its dtype, and goes to one device",
                argument=name,
            )

    # ── the block ─────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Self:
        """Connect, start the workers, and wait for the first.

        Raises:
            ClusterError: Ray is not installed, there is no such cluster, or no worker can start.
        """
        if self._pool is not None:
            raise InputError("this engine is in use already; make another one for another block")
        ray = need_ray()
        tell(self.progress, "starting Ray", 0, None)
        with ExitStack() as block:
            if not ray.is_initialized():
                block.enter_context(quiet_ray())
                block.callback(ray.shutdown)
                self._connect(ray)
            block.callback(self._stop_workers)
            self._start_workers(ray)
            block.enter_context(running_on(self))
            self._block = block.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.close()

    def _stop_workers(self) -> None:
        pool, self._pool = self._pool, None
        self._models.clear()
        if pool is not None:
            pool.close()

    def _connect(self, ray: Any) -> None:
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if self.address is None:
            n_cpus = max(os.cpu_count() or 1, round((self.workers or 1) * self.num_cpus))
            # "local": whatever cluster the variable RAY_ADDRESS names
            options |= {"address": "local", "num_cpus": n_cpus, "include_dashboard": False}
            options |= {"resources": dict.fromkeys(self.resources or {}, 10**6)}
            if len(tempfile.gettempdir()) > _LONGEST:
                options |= {"_temp_dir": tempfile.mkdtemp(prefix="ray-", dir="/tmp")}
        else:
            _check_reachable(self.address)
            options |= {"address": self.address}
        try:
            with warnings.catch_warnings(), uninterrupted():
                warnings.simplefilter("ignore")
                ray.init(**options)
        except Exception as error:
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise ClusterError(
                f"Ray cannot be used {where}: {first_line(error)[:300]}. Start a cluster with: "
                "ray start --head, and give its address, or leave the address out for a cluster of "
                "this machine",
                argument="address",
            ) from error

    def _start_workers(self, ray: Any) -> None:
        threads = self.threads or max(1, int(self.num_cpus))
        placement = Placement(
            threads=threads,
            device="cuda" if self.num_gpus and self.models is None else None,
            models=self.models,
            device_map=self.device_map,
            dtype=None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        )
        actor = ray.remote(Worker).options(
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            resources=dict(self.resources or {}),
            max_concurrency=2,  # `done` is answered while a part runs
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        resources = ray.cluster_resources()
        if self.address is None:  # a cluster of this machine does not grow
            self._room(resources)
        n = self.workers or self._room(resources)
        wants = f"{self.num_cpus:g} CPU, {self.num_gpus:g} GPU"
        wants += "".join(f", {amount:g} {name}" for name, amount in (self.resources or {}).items())
        self._pool = Pool(lambda: actor.remote(placement), n, wants, _head(ray), self.progress)
        self._pool.fill()
        step = f"starting {counted(n, 'Ray worker')}"
        tell(self.progress, step, 0, n)
        while not self._pool.n_ready:
            self._pool.wait(_LOOK)
            tell(self.progress, step, self._pool.n_ready, n)

    def _room(self, resources: Mapping[str, float]) -> int:
        """Return how many workers the cluster has room for."""
        wants = {"CPU": self.num_cpus, "GPU": self.num_gpus, **(self.resources or {})}
        counts = [int(resources.get(name, 0) / n) for name, n in wants.items() if n]
        if counts and min(counts) < 1:
            has = ", ".join(f"{resources.get(name, 0):g} {name}" for name, n in wants.items() if n)
            asked = ", ".join(f"{n:g} {name}" for name, n in wants.items() if n)
            raise ClusterError(
                f"the cluster has {has}; a worker takes {asked}. Ask for less, or add machines"
            )
        return min(counts, default=1)

    # ── the executor ──────────────────────────────────────────────────────────────────────────────

    def map(
        self,
        task: Callable[[Part], Result],
        parts: Iterable[Part],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Result]:
        """Yield the result of every part, in the order of the parts.

        Args:
            task: Does one part. Models in it are sent once.
            parts: The parts. About two for each worker are taken before their turn.
            progress: Called now and then with the sum of what the parts report.

        Raises:
            ClusterError: The task cannot be pickled, a part cost several workers their lives, or no
                worker can be had.
            Exception: What the task raised.
        """
        if self._pool is None:
            raise _not_running()
        with self._pool.lock:
            names, packed, models = self._pack(task)
        references = {key: [reference] for key, (_, reference) in models.items()}
        run = Run(
            self._pool,
            names,
            {key: lm for key, (lm, _) in models.items()},
            (str(next(self._tasks)), need_ray().put(packed), references),
            progress,
        )
        yield from run.results(parts)

    def stream(
        self, read: Callable[[Part], Iterable[Result]], units: Sequence[Part]
    ) -> Iterator[Result]:
        """Yield everything that `read` yields of each unit, in the order of the units.

        Ray Data reads the units, a few at a time, next to the workers.

        Raises:
            Exception: What `read` raised.
        """
        if self._pool is None:
            raise _not_running()
        return stream(read, units, at_once=max(1, self._pool.n))

    def check(self, thing: object, what: str) -> None:
        """Check that something can be sent to workers. No model is sent.

        Args:
            thing: The task, or a part of it.
            what: What it is, for the error, such as "the probe".

        Raises:
            ClusterError: It cannot be pickled.
        """
        names = Names()
        while True:
            try:
                pack(thing, names)
            except UnknownModelError as unknown:
                names.add("", unknown.lm)
            except Exception as error:
                raise unsendable(what, error) from error
            else:
                return

    def _pack(self, task: Any) -> tuple[Names, Packed, dict[str, tuple[LanguageModel, Any]]]:
        """Return a task pickled, the names of its models, and {key: (model, what was sent)}.

        Raises:
            ClusterError: It cannot be pickled.
        """
        needed: dict[str, tuple[LanguageModel, Any]] = {}
        while True:
            names = Names()
            for key, (lm, _) in needed.items():
                names.add(key, lm)
            try:
                packed = pack(task, names)
            except UnknownModelError as unknown:
                key = unknown.lm.fingerprint
                sent = self._models.get(key)
                if sent is None or sent[0] is not unknown.lm:
                    sent = unknown.lm, self._send(unknown.lm)
                needed[key] = sent
            except Exception as error:
                raise unsendable("the work", error) from error
            else:
                # The last state of a model is likely to be asked for again, as after an edit.
                last = [each for each in self._models.items() if each[0] not in needed][-1:]
                self._models = {**dict(last), **needed}
                return names, packed, needed

    def _send(self, lm: LanguageModel) -> Any:
        """Put a model where workers can fetch it, unless they load it themselves."""
        if self.models is not None:
            return None
        tell(self.progress, f"sending {lm.name}", 0, None)
        return need_ray().put(pack(lm))


def _head(ray: Any) -> tuple[str, int] | None:
    """Return the host and port of the head, if this process speaks to it itself."""
    if ray.util.client.ray.is_connected():
        return None
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def _checked_resources(resources: object) -> dict[str, float] | None:
    """Return what a worker takes besides CPUs and GPUs.

    Raises:
        InputError: It is not {name: amount}.
    """
    if resources is None:
        return None
    if not isinstance(resources, Mapping) or not all(
        isinstance(name, str) and name not in ("", "CPU", "GPU", "memory") for name in resources
    ):
        raise InputError(
            f"resources is {resources!r}; give {{name: amount}} of resources that the machines "
            "have, such as {'fast_disk': 1}. CPUs and GPUs are num_cpus and num_gpus",
            argument="resources",
        )
    return {name: check_number(n, "resources", least=0) for name, n in resources.items()}


def _not_running() -> ClusterError:
    return ClusterError("this engine is not running; use it in a block: with Ray() as ray")


def _check_reachable(address: str) -> None:
    """Check that something listens where the head of a cluster is said to be.

    Raises:
        ClusterError: Nothing does, or the address cannot be read.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        raise ClusterError(
            f'address is {address!r}; give "auto", "host:port" such as "10.0.0.7:6379", or '
            '"ray://host:port"',
            argument="address",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"nothing answers at {address} ({error}). Start the head of a cluster there with: "
            f"ray start --head --port={port}, or check the address",
            argument="address",
        ) from None
