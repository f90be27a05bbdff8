"""What all commands share: two options, the look of their help, warnings and the log."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from .engine import with_ray_value
from .printing import Manner, complain, manner

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no notes; warnings stay.")
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        metavar="",
        show_default=False,
        help="Log what is done to standard error; -vv logs each step.",
    ),
]

_PANELS = {
    "Model and workspace": (
        "workspace",
        "device",
        "dtype",
        "revision",
        "attn_implementation",
        "trust_remote_code",
    ),
    "Cluster": ("ray", "workers"),
    "Output": ("as_json", "quiet", "verbose", "help"),
}
"""The last panels of a command's help: {title: names of parameters}."""

_EXPORTED = ("export",)
"""Commands whose --dtype is of what they write."""

_KEEPS_LINES = importlib.util.find_spec("typer._click") is not None
"""Whether Typer keeps the lines of all paragraphs. Older versions keep those after a mark."""

_WORDS = {"Literal": "NAME", "int": "N", "float": "X", "str": "TEXT"}
"""What stands for a value in the help, by its type."""


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes --quiet and --verbose."""

    @functools.wraps(command)
    def run(*, quiet: bool, verbose: int, **given: Any) -> None:
        before = manner.get()
        now = Manner(
            json=before.json or bool(given.get("as_json")),
            quiet=before.quiet or quiet,
            verbose=max(before.verbose, verbose),
        )
        manner.set(now)
        with logged(now.verbose):
            command(**given)

    signature = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("quiet", keyword, default=False, annotation=Quiet),
        inspect.Parameter("verbose", keyword, default=0, annotation=Verbose),
    ]
    parameters = [*signature.parameters.values(), *added]
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


# ── help ──────────────────────────────────────────────────────────────────────────────────────────


class _Tidy:
    """A command whose help fits 80 columns: short words for values, and none for switches."""

    panels: ClassVar[dict[str, tuple[str, ...]]] = _PANELS

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, as the help shows them."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            _tidy(parameter)
            for title, names in self.panels.items():
                if parameter.name in names and not (
                    parameter.name == "dtype" and ctx.info_name in _EXPORTED
                ):
                    parameter.rich_help_panel = title
        order = list(self.panels)

        def place(parameter: Any) -> int:
            panel = getattr(parameter, "rich_help_panel", None)
            return order.index(panel) + 1 if panel in order else 0

        return sorted(parameters, key=place)


class Command(_Tidy, TyperCommand):
    """A command of the command line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.help and self.rich_markup_mode:
            self.help: str | None = _unwrapped(self.help)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line."""
        if any(parameter.name == "ray" for parameter in self.params):
            args = with_ray_value(args)
        return super().parse_args(ctx, args)


class Group(_Tidy, TyperGroup):
    """The group of all commands. Its options are few, so they stay in one panel."""

    panels: ClassVar[dict[str, tuple[str, ...]]] = {}


def _tidy(parameter: Any) -> None:
    """Give a parameter's value a short word. Typer's own words are of programming languages."""
    if parameter.param_type_name == "argument":
        # Its metavar says all. Typer would add the type, and braces around the brackets.
        words = parameter.metavar or parameter.name.upper()
        vars(parameter)["get_usage_pieces"] = lambda _: [words]
        vars(parameter)["display_type_rich"] = lambda ctx: None
    elif parameter.is_flag:
        parameter.metavar = ""
    elif parameter.metavar is None:
        kind = getattr(parameter.type, "name", "") if hasattr(parameter, "type") else ""
        described = getattr(parameter, "type_descriptor", None)
        names = f"{kind} {getattr(described, 'annotation', '')}"
        parameter.metavar = next((w for n, w in _WORDS.items() if n in names), None)
    vars(parameter)["_get_number_range_help_str"] = lambda: None


def _unwrapped(text: str) -> str:
    """Return a help text with each paragraph on one line, for a terminal of any width."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    mark = "\b\n" if _KEEPS_LINES else ""
    return "\n\n".join(
        words.removeprefix(mark) if words.startswith("\b") else words.replace("\n", " ")
        for words in paragraphs
    )


# ── warnings and the log ──────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def spoken_warnings() -> Iterator[None]:
    """Print the warnings of Python libraries like our own, while the block runs."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        complain("warning", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def logged(verbose: int) -> Iterator[None]:
    """Print the log of the library while the block runs. 0: nothing."""
    if not verbose:
        yield
        return
    logger = logging.getLogger("factsmith")
    handler, level = _Log(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Log(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        try:
            fields = {"level": record.levelname.lower(), "logger": record.name}
            complain("log", record.getMessage(), **fields)
        except Exception:
            self.handleError(record)
