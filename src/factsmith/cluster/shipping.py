"""Pickle tasks, parts and results. A model in them is sent once, and only named afterwards.

    packed = pack(task, names)              # Names knows the models that were sent
    task = unpack(packed, models)           # {key: model} on the other side

Tensors travel as bytes outside the pickle, so that Ray does not copy them. They arrive on the CPU
as tensors that can be written.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.errors import ClusterError, first_line
from ..model.language_model import LanguageModel
from .installed import need_ray

Name: TypeAlias = tuple[str, str]
"""A model's key, and what it is of the model: "" is the model itself."""


_GETTERS = {"module": "get_submodule", "parameter": "get_parameter", "buffer": "get_buffer"}
"""The method of a module that returns a part of each kind by its name."""


class Packed(NamedTuple):
    """Something pickled.

    Attributes:
        data: The pickle.
        buffers: The bytes of its tensors, each (n,) uint8.
    """

    data: bytes
    buffers: list[NDArray[np.uint8]]

    @property
    def n_bytes(self) -> int:
        """Number of bytes in all."""
        return len(self.data) + sum(buffer.nbytes for buffer in self.buffers)


class UnknownModelError(Exception):
    """A model was met that has no name yet.

    Attributes:
        lm: The model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(lm.name)
        self.lm = lm


class Names:
    """The names of models, and of their parts that tasks may hold."""

    def __init__(self) -> None:
        self._names: dict[int, Name] = {}
        self._held: list[object] = []  # so that no other object gets their ids

    def add(self, key: str, lm: LanguageModel) -> None:
        """Name a model."""
        parts = [("", lm), ("tokenizer", lm.tokenizer)]
        parts += [(f"ffn/{i}", ffn) for i, ffn in enumerate(lm.ffn)]
        parts += [(f"module/{name}", module) for name, module in lm.module.named_modules()]
        parts += [(f"parameter/{name}", each) for name, each in lm.module.named_parameters()]
        parts += [(f"buffer/{name}", each) for name, each in lm.module.named_buffers()]
        for path, part in parts:
            self._names.setdefault(id(part), (key, path))
            self._held.append(part)

    def of(self, thing: object) -> Name | None:
        """Return the name of a model or a part. None: it is something else.

        Raises:
            UnknownModelError: It is a model without a name.
        """
        name = self._names.get(id(thing))
        if name is None and isinstance(thing, LanguageModel):
            raise UnknownModelError(thing)
        return name


def pack(thing: object, names: Names | None = None) -> Packed:
    """Return something pickled, with its models named.

    Args:
        thing: What to pickle.
        names: The names of models. None: models are pickled with all their weights.

    Raises:
        UnknownModelError: A model has no name.
        Exception: What pickle raises for something that cannot be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _pickler()(file, names, buffers).dump(thing)
    return Packed(
        file.getvalue(), [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers]
    )


def unsendable(what: str, error: Exception) -> ClusterError:
    """Return the error for something that cannot be pickled."""
    return ClusterError(
        f"{what} cannot be sent to workers: {type(error).__name__}: {first_line(error)[:300]}. "
        "What it uses must be picklable, so it must not hold open files, locks or connections. Or "
        "run it in this process"
    )


def unpack(packed: Packed, models: Mapping[str, LanguageModel]) -> Any:
    """Return what `pack` pickled.

    Args:
        packed: The pickle.
        models: {key: model}, for the names in it.
    """
    return _Unpickler(packed, models).load()


@functools.cache
def _pickler() -> Any:
    """Return the class that names models, and leaves the bytes of tensors outside."""

    class Pickler(need_ray().cloudpickle.CloudPickler):  # type: ignore[misc]
        def __init__(
            self, file: io.BytesIO, names: Names | None, buffers: list[pickle.PickleBuffer]
        ) -> None:
            super().__init__(file, protocol=5, buffer_callback=buffers.append)
            self._names = names

        def persistent_id(self, thing: object) -> Name | None:
            return None if self._names is None else self._names.of(thing)

        def reducer_override(self, thing: Any) -> Any:
            if type(thing) in (Tensor, nn.Parameter) and _is_plain(thing):
                return _reduced(thing)
            return super().reducer_override(thing)

    return Pickler


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is its bytes: it has data, and no pending operation."""
    has_data = tensor.layout == torch.strided and tensor.device.type != "meta"
    return has_data and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    """Return how a tensor is pickled: as a buffer of bytes, and its form.

    The order of its dimensions in memory is kept: the last bits of a product depend on it.
    """
    data = tensor.detach().cpu()
    strides = data.stride()
    order = sorted(range(data.ndim), key=lambda d: -strides[d])
    data = data.permute(order).contiguous()
    # A buffer that pickle may leave outside has one dimension, and a dtype that NumPy knows.
    array: Any = data.reshape(-1).view(torch.uint8).numpy()
    is_parameter = isinstance(tensor, nn.Parameter)
    form = data.dtype, tuple(data.shape), tuple(order), is_parameter, tensor.requires_grad
    return _tensor, (pickle.PickleBuffer(array), *form)


def _tensor(
    data: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: tuple[int, ...],
    is_parameter: bool,
    grad: bool,
) -> Tensor:
    """Return a tensor from its bytes, which are copied: what Ray shares is read-only.

    The memory is torch's own. The last bits of a product depend on how its matrices are aligned.
    """
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    tensor = tensor.permute([order.index(d) for d in range(len(order))])
    if is_parameter:
        return nn.Parameter(tensor, requires_grad=grad)
    return tensor.requires_grad_(grad) if grad else tensor


class _Unpickler(pickle.Unpickler):
    """Puts models in the place of their names."""

    def __init__(self, packed: Packed, models: Mapping[str, LanguageModel]) -> None:
        super().__init__(io.BytesIO(packed.data), buffers=packed.buffers)
        self._models = models

    def persistent_load(self, name: Name) -> Any:
        """Return what a name stands for."""
        key, path = name
        lm = self._models[key]
        kind, _, rest = path.partition("/")
        if kind in _GETTERS:
            return getattr(lm.module, _GETTERS[kind])(rest)
        if kind == "ffn":
            return lm.ffn[int(rest)]
        return lm.tokenizer if kind == "tokenizer" else lm
