"""The options and arguments that commands share, and how their words are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InputError
from ..core.factfile import SUFFIXES
from ..core.pairs import named_values
from . import completing

LARGEST_SEED = 2**32 - 1

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Where = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        metavar="DIR",
        help="The workspace.",
        show_default="the current folder, if it is one",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where to run the model: cpu, cuda, cuda:1, mps, auto to spread it over all devices, "
        "or disk to read each layer when it runs.",
        show_default="cpu",
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Also draw a picture: .png, .svg or .pdf; without a suffix .png and .svg. "
        "The numbers are written next to it.",
    ),
]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        autocompletion=completing.models,
        help="A bundled model, a folder, a GGUF file or a hub id.",
        show_default="the workspace's",
    ),
]
ModelAndPrompt = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PROMPT",
        autocompletion=completing.models,
        help="A bundled model, a folder, a GGUF file or a hub id (default: the workspace's), and "
        "the text.",
    ),
]
NextTokens = Annotated[
    int, typer.Option(min=1, help="How many of the likeliest next tokens to list.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="How far to continue the text.")]
Seed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything that is drawn.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--texts",
        metavar="FILE",
        help="Plain text in UTF-8, a blank line between texts; or Parquet or lines of JSON with a "
        "field text, also at an address such as s3://bucket/*.parquet. May be repeated. The word "
        "own asks for text that the model writes.",
        show_default="bundled text",
    ),
]
MomentsAgain = Annotated[
    Path | None,
    typer.Option(
        "--moments",
        metavar="DIR",
        help="Second moments, for patches that must be solved again.",
        show_default="the workspace's, or the model's",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        autocompletion=completing.methods,
        help="rome, r-rome, memit, emmet, alphaedit or append.",
        show_default="the file's; else rome for one fact, memit for more",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method, such as steps=40. May be repeated.",
        show_default="the file's, or the recommended ones",
    ),
]
Message = Annotated[
    str,
    typer.Option("--message", "-m", help="One line for the log.", show_default="the facts"),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Do parts of the work on workers of Ray: auto, HOST:PORT or ray://HOST:PORT. Without "
        "an address, a cluster of this machine is started. The numbers do not depend on the "
        "workers.",
        show_default="this process",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of Ray workers.",
        show_default="as many as the cluster has CPUs for",
    ),
]


def need_text(text: str | None, option: str) -> None:
    """Raise InputError for a text that is given and empty.

    Args:
        text: What the user gave. None: nothing.
        option: The option, or what the text is.
    """
    if text is not None and not text.strip():
        raise InputError(
            f"{option} is empty; give a text"
            + (", or leave it out" if option.startswith("-") else "")
        )


def model_and_prompt(words: list[str]) -> tuple[str | None, str]:
    """Take a model and a text apart; raises InputError for more than two words."""
    if len(words) > 2:
        raise InputError(
            f"got {len(words)} words; expected a model and a text. Put the text in quotes"
        )
    need_text(words[-1], "the text")
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def model_and_facts(words: list[str]) -> tuple[str | None, Path | None]:
    """Take a model and a fact file apart; raises InputError for two of either."""
    files = [word for word in words if is_facts(word)]
    models = [word for word in words if word not in files]
    if len(files) > 1 or len(models) > 1:
        raise InputError(
            f"got {' '.join(words)!r}; expected at most one model and one file of facts "
            f"({', '.join(SUFFIXES)})"
        )
    return (models[0] if models else None), (Path(files[0]) if files else None)


def is_facts(word: str) -> bool:
    """Return whether an argument is a file of facts, and not a text that ends in such a name."""
    if Path(word).suffix.lower() not in SUFFIXES:
        return False
    # Path.is_file raises for a text that is too long to be a name.
    return not any(map(str.isspace, word)) or os.path.isfile(word)  # noqa: PTH113


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """Read ["steps=40", "clamp=1.5"] as {"steps": 40, "clamp": 1.5}; raises InputError."""
    return named_values(pairs or (), "--set")
