"""Cache: what the user's cache holds, and how to empty it."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.cache import KINDS, clear_cache, read_cache
from .options import Json
from .printing import print_result


def cache(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND]...",
            autocompletion=lambda: list(KINDS),
            help="moments, index or gguf.",
            show_default="all",
        ),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete it.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the cache keeps for each model, or delete it.

    All of it can be made again. Workspaces have their own copies of what their patches need.

    \b
    Examples:
      factsmith cache
      factsmith cache moments --clear
    """
    content = clear_cache(kinds or ()) if clear else read_cache(kinds or ())
    print_result(content.to_dict(), content.tables(), as_json)
