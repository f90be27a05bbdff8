"""What runs on a worker: it keeps models, does parts, and says how far it is.

`engine` makes an actor of Ray from it. A worker does one part at a time. `done` is answered
meanwhile, from another thread.
"""

from __future__ import annotations

import os
import platform
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from .. import __version__
from ..core.errors import ClusterError, FingerprintError, first_line
from ..core.executor import reporting
from ..model.language_model import LanguageModel
from ..model.load import load
from .installed import need_ray
from .shipping import Names, Packed, pack, unpack

VERSIONS = {
    "factsmith": __version__,
    "torch": torch.__version__,
    "Python": platform.python_version(),
}
"""What must be the same on all machines, so that pickles are read and the numbers are the same."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where models are on a worker.

    Attributes:
        threads: Threads of one part.
        device: Where models that were sent go, such as "cuda". None: they stay on the CPU.
        models: The folder or hub id that workers load the model from. None: it is sent to them.
        device_map: How a loaded model is spread over the worker's devices, as `load` takes it.
        dtype: The dtype of a loaded model, as `load` takes it.
    """

    threads: int = 1
    device: str | None = None
    models: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    dtype: str | None = None


class Hello(NamedTuple):
    """What a worker says of itself.

    Attributes:
        pid: Its process.
        node: The id of the machine in Ray.
        versions: The versions of what must be the same everywhere.
    """

    pid: int
    node: str
    versions: dict[str, str]


class Answer(NamedTuple):
    """What a part gave.

    Attributes:
        kind: "result", or "error" if it raised one.
        packed: The result, or the error.
        done: How much of the part was done, in the task's own unit.
    """

    kind: Literal["result", "error"]
    packed: Packed
    done: int


class Worker:
    """Does parts, one at a time."""

    def __init__(self, placement: Placement) -> None:
        """Start without a model."""
        self._placement = placement
        self._models: dict[str, LanguageModel] = {}
        self._names = Names()
        self._task: tuple[str, Any] = "", None
        self._done = "", 0

    def hello(self) -> Hello:
        """Say that the worker is there."""
        node = need_ray().get_runtime_context().get_node_id()
        return Hello(os.getpid(), node, VERSIONS)

    def done(self) -> tuple[str, int]:
        """Return the present part, and how much of it is done, in the task's own unit."""
        return self._done

    def run(
        self,
        task_id: str,
        part_id: str,
        task: Packed,
        models: Mapping[str, Sequence[Any]],
        part: Packed,
    ) -> Answer:
        """Do one part.

        Args:
            task_id: Names the task, which is unpickled once.
            part_id: Names the part, for `done`.
            task: The task.
            models: {key: [a reference to the pickled model]} of the models in it.
            part: The part.
        """
        self._done = part_id, 0
        torch.set_num_threads(self._placement.threads)  # counts for the calling thread
        try:
            self._take(models)
            if self._task[0] != task_id:
                self._task = task_id, unpack(task, self._models)
            with reporting(self._report):
                result = self._task[1](unpack(part, self._models))
            return Answer("result", self._packed(result), self._done[1])
        except BaseException as error:  # whatever it is, it is raised where the task was given
            error.add_note(f"On a worker:\n{''.join(traceback.format_exception(error))}")
            return Answer("error", self._packed_error(error), self._done[1])

    def _packed(self, result: Any) -> Packed:
        """Return a result pickled.

        Raises:
            ClusterError: It cannot be pickled.
        """
        try:
            return pack(result, self._names)
        except Exception as error:
            raise ClusterError(
                f"the result of a part, a {type(result).__name__}, cannot be sent back: "
                f"{type(error).__name__}: {first_line(error)[:300]}. Return plain values"
            ) from error

    def _packed_error(self, error: BaseException) -> Packed:
        """Return an error pickled, or a description of one that does not survive that."""
        try:
            packed = pack(error, self._names)
            if type(unpack(packed, self._models)) is type(error):
                return packed
        except Exception as reason:
            error.add_note(f"It cannot be pickled: {reason}")
        described = ClusterError(
            f"a part failed on a worker with {type(error).__name__}: {str(error)[:500]}"
        )
        described.__notes__ = error.__notes__
        return pack(described, self._names)

    def _report(self, done: int) -> None:
        self._done = self._done[0], done

    def _take(self, models: Mapping[str, Sequence[Any]]) -> None:
        """Keep exactly these models."""
        if self._models.keys() == models.keys():
            return
        self._task = "", None
        self._models = {key: lm for key, lm in self._models.items() if key in models}
        for key, (reference, *_) in models.items():
            if key not in self._models:
                self._models[key] = self._model(key, reference)
        self._names = Names()
        for key, lm in self._models.items():
            self._names.add(key, lm)

    def _model(self, key: str, reference: Any) -> LanguageModel:
        """Return a model that was sent, or load it.

        Raises:
            FingerprintError: The loaded model is another one.
        """
        placement = self._placement
        if placement.models is not None:
            lm = load(placement.models, device_map=placement.device_map, dtype=placement.dtype)
            # In another dtype the weights differ, and so does the fingerprint.
            if placement.dtype is None and lm.fingerprint != key:
                raise FingerprintError(
                    f"the workers loaded {placement.models}, whose fingerprint is "
                    f"{lm.fingerprint[:10]}; the model at hand has {key[:10]}. Give the folder of "
                    "that model, without patches, or leave out `models`, so that it is sent",
                    argument="models",
                )
            return lm
        sent: LanguageModel = unpack(need_ray().get(reference), {})
        if placement.device is not None:
            sent.module.to(placement.device)
        return sent
