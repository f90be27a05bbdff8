"""An executor for tests that sends everything, as a cluster does, but to this same process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from factsmith.cluster.shipping import Names, Packed, UnknownModelError, pack, unpack
from factsmith.core.executor import Local
from factsmith.model.language_model import LanguageModel

Part = TypeVar("Part")
Result = TypeVar("Result")


class Sending:
    """Runs parts on copies of the models. Tasks, parts and results are pickled.

    Attributes:
        maps: For each call of `map`, how many parts it had.
        sent: The names of the models that were sent.
    """

    cuts: bool = True
    part_tokens: int | None = None

    def __init__(self) -> None:
        self.maps: list[int] = []
        self.sent: list[str] = []

    def check(self, thing: object, what: str) -> None:
        self._send(thing)

    def map(
        self,
        task: Callable[[Part], Result],
        parts: Iterable[Part],
        *,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Result]:
        packed, names, models = self._send(task)
        there: Any = unpack(packed, models)
        self.maps.append(0)

        def run(part: Part) -> Any:
            self.maps[-1] += 1
            return unpack(pack(there(unpack(pack(part, names), models)), Names()), {})

        yield from Local(cuts=True).map(run, parts, progress=progress)

    def _send(self, thing: object) -> tuple[Packed, Names, dict[str, LanguageModel]]:
        """Return something pickled, the names of its models, and the copies of them."""
        names = Names()
        models: dict[str, LanguageModel] = {}
        while True:
            try:
                return pack(thing, names), names, models
            except UnknownModelError as unknown:
                key = unknown.lm.fingerprint
                names.add(key, unknown.lm)
                models[key] = unpack(pack(unknown.lm), {})
                self.sent.append(key)
