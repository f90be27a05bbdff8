"""The options on how a model is loaded: dtype, revision, attention, and whether its code may run.

    @with_loading_options
    def ask(words: ModelAndPrompt, device: Device = None) -> None: ...

    loading.get().dtype        # what the user chose, in whatever loads the model

Each command that names a model gets all of them. One that only opens a workspace gets those that
the workspace has not recorded: they decide no answers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..core.dtypes import DTYPES, SAVED_DTYPE
from ..core.errors import InputError

_ANY_TIME = ("attn_implementation", "trust_remote_code")
"""The options that a workspace does not record."""


@dataclass(frozen=True)
class Loading:
    """How the user wants a model to be loaded.

    Attributes:
        dtype: The dtype of the weights; "auto" for that of the checkpoint. None: as the model's
            place decides.
        revision: The branch, tag or commit on the hub. None: the main one.
        attn_implementation: How attention is computed. None: as transformers chooses.
        trust_remote_code: Whether code that comes with the model may run.
    """

    dtype: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False


loading: ContextVar[Loading] = ContextVar("loading", default=Loading())  # noqa: B039 (frozen)

_OPTIONS: dict[str, tuple[object, object]] = {
    "dtype": (
        None,
        Annotated[
            str | None,
            typer.Option(
                metavar="NAME",
                help="The dtype to load the model in: float32, float16, bfloat16, float64, or "
                "auto for the one in which it was saved.",
                show_default="the workspace's; else float32 on the cpu, auto elsewhere",
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
    "attn_implementation": (
        None,
        Annotated[
            str | None,
            typer.Option(
                "--attn",
                "--attn-implementation",
                metavar="NAME",
                help="How attention is computed: eager, sdpa, flash_attention_2, ...",
                show_default="transformers' choice",
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
    names = list(_OPTIONS) if names_model else list(_ANY_TIME)
    names = [name for name in names if name not in present]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = Loading(**{name: given.pop(name) for name in names})
        if chosen.dtype not in (None, SAVED_DTYPE, *DTYPES):
            raise InputError(
                f"dtype is {chosen.dtype!r}; give one of {', '.join(DTYPES)}, or {SAVED_DTYPE} for "
                "the dtype in which the model was saved",
                argument="dtype",
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
