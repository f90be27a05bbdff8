"""The options on how a model is loaded: its dtype, its revision, and whether its code may run.

    @with_loading_options
    def ask(words: ModelAndPrompt, device: Device = None) -> None: ...

    loading.get().dtype        # what the user chose, in whatever loads the model

Each command that names a model gets all three. One that only opens a workspace gets the last: the
workspace has recorded the others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..core.errors import InputError

_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Loading:
    """How the user wants a model to be loaded.

    Attributes:
        dtype: The dtype of the weights. None: as the model's place decides.
        revision: The branch, tag or commit on the hub. None: the main one.
        trust_remote_code: Whether code that comes with the model may run.
    """

    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


loading: ContextVar[Loading] = ContextVar("loading", default=Loading())  # noqa: B039 (frozen)

_OPTIONS: dict[str, tuple[object, object]] = {
    "dtype": (
        None,
        Annotated[
            str | None,
            typer.Option(
                metavar="NAME",
                help="The dtype to load the model in: float32, float16, bfloat16 or float64.",
                show_default="float32 on the cpu, elsewhere the model's",
            ),
        ],
    ),
    "revision": (
        None,
        Annotated[
            str | None,
            typer.Option(
                metavar="NAME", help="A branch, tag or commit on the hub.", show_default="main"
            ),
        ],
    ),
    "trust_remote_code": (
        False,
        Annotated[
            bool,
            typer.Option("--trust-remote-code", help="Run code that comes with the model."),
        ],
    ),
}
"""{parameter: (its default, its annotation)}."""


def with_loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes the options that apply to the model it works on."""
    signature = inspect.signature(command, eval_str=True)
    present = signature.parameters
    if "device" not in present:
        return command
    names_model = bool({"model", "words", "model_and_prompt"} & present.keys())
    names = list(_OPTIONS) if names_model else ["trust_remote_code"]
    names = [name for name in names if name not in present]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = Loading(**{name: given.pop(name) for name in names})
        if chosen.dtype is not None and chosen.dtype not in _DTYPES:
            raise InputError(
                f"dtype is {chosen.dtype!r}; give one of {', '.join(_DTYPES)}", argument="dtype"
            )
        token = loading.set(chosen)
        try:
            command(**given)
        finally:
            loading.reset(token)

    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_OPTIONS[name][0],
            annotation=_OPTIONS[name][1],
        )
        for name in names
    ]
    parameters = [*present.values(), *added]
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
