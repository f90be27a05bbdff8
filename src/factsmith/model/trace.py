"""Read and change activations for the length of a `with` block.

    with recording({l: lm.layers[l] for l in (3, 4)}) as calls:      # what goes in and comes out
        lm.forward(batch)
    calls[3][0].input, calls[3][0].output                            # tensors of the first call

    with replacing({lm.layers[3]: lambda hidden: hidden + noise}):   # change an output or input
        lm.forward(batch)

    with standing_in(lm.layers, play): ...       # call play(l, args, kwargs) instead of the layers

No other module registers a hook. When a block ends, with an exception or without, the model is as
before. A block belongs to the thread that opens it: passes of other threads do not see it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from ..core.errors import UnsupportedModelError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module, as it happened. The inputs are the model's own tensors, not copies.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments.
        result: What the module returned.
        order: How many calls of the modules recorded with it had ended before.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    order: int = 0

    @property
    def input(self) -> Tensor:
        """The first tensor given: by position, then by keyword."""
        return first_tensor((*self.args, *self.kwargs.values()))

    @property
    def output(self) -> Tensor:
        """The first tensor returned. Layers return a tensor, or a tuple that begins with it."""
        return first_tensor(self.result)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor inside `value`.

    Raises:
        UnsupportedModelError: There is none.
    """
    tensor = next(tensors(value), None)
    if tensor is None:
        raise UnsupportedModelError(
            f"a part of the model works with {type(value).__name__} without a tensor; expected a "
            "tensor, or one inside"
        )
    return tensor


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """Return `value` with its first element (or itself) replaced by `tensor`.

    This is the inverse of `first_tensor` for what layers return.
    """
    if isinstance(value, (tuple, list)):
        return type(value)([with_first_tensor(value[0], tensor), *value[1:]])
    return tensor


def _copied(value: Any) -> Any:
    """Return the same with every tensor in nested tuples and lists copied."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)([_copied(v) for v in value]) if type(value) in (tuple, list) else value


def _forget(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook from a module, if it is there.

    Callers arrange for this before they register the hook. Otherwise a Ctrl-C between the two would
    leave it on for good.
    """
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        # A list first: another thread may register a hook meanwhile.
        for identity in [identity for identity, other in list(hooks.items()) if other is hook]:
            hooks.pop(identity, None)
            for marks in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                marks.pop(identity, None)


@contextmanager
def ending(live: list[bool]) -> Generator[ExitStack, None, None]:
    """Yield a stack whose end also empties `live`, before and after it unwinds.

    A Ctrl-C can come while the stack unwinds, so that something is not put back. What is left finds
    `live` empty: it does nothing, and puts itself back.
    """
    with ExitStack() as stack:
        stack.callback(live.clear)
        try:
            yield stack
        finally:
            live.clear()


_registering = threading.RLock()
"""torch numbers hooks, and two threads at once might get one number."""


def _after_fork() -> None:
    """Another thread of the parent process may have had the lock."""
    global _registering
    _registering = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class _Stop(Exception):  # noqa: N818 - it is not an error
    """Ends a forward pass whose remaining layers are not needed."""


@contextmanager
def recording(
    modules: Mapping[Key, nn.Module], *, stop: bool = False, copy: bool = True
) -> Generator[dict[Key, list[Call]], None, None]:
    """Record every call of the given modules: {key: [Call, ...]}, filled while the block runs.

    Args:
        modules: The modules, by any key.
        stop: End the forward pass, and the block, once each module was called. Layers above never
            run.
        copy: Keep copies of what is returned, since models add to such tensors in place. False is
            enough if only inputs are of interest.
    """
    calls: dict[Key, list[Call]] = {key: [] for key in modules}
    live, thread = [True], threading.get_ident()

    def remember(key: Key) -> Callable[..., None]:
        # A thread that calls a hook of another thread may lack its keyword arguments, because the
        # hook may have been removed a moment ago.
        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if not live:
                return _forget(module, hook)
            if threading.get_ident() != thread:
                return None
            kwargs, result = rest
            order = sum(map(len, calls.values()))
            calls[key].append(
                Call(
                    args=args,
                    kwargs=kwargs,
                    result=_copied(result) if copy else result,
                    order=order,
                )
            )
            if stop and all(calls.values()):
                raise _Stop
            return None

        return hook

    with ending(live) as stack:
        for key, module in modules.items():
            hook = remember(key)
            stack.callback(_forget, module, hook)
            with _registering:
                module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield calls
        except _Stop:
            return


@contextmanager
def replacing(
    changes: Mapping[nn.Module, Callable[[Tensor], Tensor]],
    *,
    where: Literal["output", "input"] = "output",
) -> Generator[None, None, None]:
    """Pass a tensor of each module through its function while the block runs.

    Args:
        changes: For each module a function that takes the tensor as the model made it, for example
            (B, S, d_model), and returns one of the same shape.
        where: Whether the first output or the first input is passed through.
    """

    live, thread = [True], threading.get_ident()

    def change_output(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if not live:
                _forget(module, hook)
            if not live or threading.get_ident() != thread:
                return None
            return with_first_tensor(result, function(first_tensor(result)))

        return hook

    def change_input(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], *rest: Any
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not live:
                _forget(module, hook)
            if not live or threading.get_ident() != thread:
                return None
            (kwargs,) = rest
            for index, value in enumerate(args):
                if isinstance(value, Tensor):
                    return (*args[:index], function(value), *args[index + 1 :]), kwargs
            for name, value in kwargs.items():
                if isinstance(value, Tensor):
                    return args, {**kwargs, name: function(value)}
            raise UnsupportedModelError(
                f"a {type(module).__name__} was called without a tensor, so there is nothing to "
                "replace"
            )

        return hook

    with ending(live) as stack:
        for module, function in changes.items():
            hook = change_output(function) if where == "output" else change_input(function)
            stack.callback(_forget, module, hook)
            with _registering:
                if where == "output":
                    module.register_forward_hook(hook)
                else:
                    module.register_forward_pre_hook(hook, with_kwargs=True)
        yield


@contextmanager
def standing_in(
    modules: Sequence[nn.Module], play: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Generator[None, None, None]:
    """While the block runs, `play(index, args, kwargs)` answers in place of each module.

    So the model's own code before and after its layers runs without the layers. It builds masks,
    rotary angles and per-layer inputs, and turns a last hidden state into logits. Hooks on the
    modules rest meanwhile, because they are for what the modules compute.
    """

    live = [True]
    with ending(live) as stack:
        for index, module in enumerate(modules):
            # What a module's call goes to before its hooks and its forward.
            player = Player(module, "_compiled_call_impl", partial(play, index), live)
            stack.callback(player.put_back)
            player.stand_in()
        yield


class Player:
    """Answers the calls of one thread in place of a module.

    Attributes:
        module: The module.
        attribute: What a call goes to: "_compiled_call_impl", or "forward", which leaves the hooks
            in effect.
        play: `play(args, kwargs)` answers.
        live: It answers while this is not empty.
    """

    def __init__(
        self,
        module: nn.Module,
        attribute: Literal["_compiled_call_impl", "forward"],
        play: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        live: list[bool],
    ) -> None:
        self.module, self.attribute, self.play, self.live = module, attribute, play, live
        self.thread = threading.get_ident()

    def stand_in(self) -> None:
        """Begin to answer."""
        with _registering:
            stage = vars(self.module).get(self.attribute)
            if isinstance(stage, _Stage):
                stage.clear()
            stage = vars(self.module).get(self.attribute)
            if not isinstance(stage, _Stage):
                stage = _Stage(self.module, self.attribute)
                setattr(self.module, self.attribute, stage)
            stage.players.append(self)

    def put_back(self) -> None:
        """Answer no more."""
        stage = vars(self.module).get(self.attribute)
        if isinstance(stage, _Stage):
            stage.clear(self)


class _Stage:
    """Gives each call of a module to what stands in for it in the calling thread.

    Other calls go to the module. Without players it puts back what it replaced.
    """

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module, self.attribute = module, attribute
        # Models spread over devices carry a forward on the instance. That one is put back.
        self.before = vars(module).get(attribute)
        self.players: list[Player] = []

    def clear(self, left: Player | None = None) -> None:
        """Drop a player, and those whose block has ended."""
        with _registering:
            self.players = [p for p in self.players if p.live and p is not left]
            if self.players or vars(self.module).get(self.attribute) is not self:
                return
            if self.before is None:
                vars(self.module).pop(self.attribute, None)
            else:
                setattr(self.module, self.attribute, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread, players = threading.get_ident(), self.players
        for player in reversed(players):
            if player.thread == thread and player.live:
                return player.play(args, kwargs)
        if not all(player.live for player in players):
            self.clear()
        return self.plain(*args, **kwargs)

    @property
    def plain(self) -> Callable[..., Any]:
        """What answers without players."""
        if self.before is not None:
            return self.before  # type: ignore[no-any-return]
        if self.attribute == "forward":
            return partial(type(self.module).forward, self.module)
        return self.module._call_impl


@contextmanager
def stoppable() -> Generator[Callable[[], None], None, None]:
    """Yield a function that ends the block at once, for example from a `standing_in` player."""

    def stop() -> None:
        raise _Stop

    try:
        yield stop
    except _Stop:
        return


def hook_count(modules: Iterable[nn.Module]) -> int:
    """Return how many forward hooks and stand-ins the modules carry."""
    return sum(
        len(m._forward_hooks)
        + len(m._forward_pre_hooks)
        + ("forward" in vars(m))
        + isinstance(vars(m).get("_compiled_call_impl"), _Stage)
        for m in modules
    )


Slot = int | str
"""Where a layer takes its hidden state: a positional index or a keyword."""


def get_slot(call: Call, slot: Slot) -> Tensor:
    """Return the hidden state (B, S, d_model) that a layer was called with."""
    value = call.args[slot] if isinstance(slot, int) else call.kwargs[slot]
    assert isinstance(value, Tensor)
    return value


def with_slot(call: Call, slot: Slot, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the layer's arguments with another hidden state."""
    if isinstance(slot, int):
        return (*call.args[:slot], hidden, *call.args[slot + 1 :]), dict(call.kwargs)
    return call.args, {**call.kwargs, slot: hidden}
