"""The JSON documents that commands print and that studio sends: results and errors.

document({"answer": "lev"})        # {"format_version": 1, "answer": "lev"}
error_document(InputError("..."))  # {"format_version": 1, "error": {"message": "...", ...}}
"""

from __future__ import annotations

from typing import Any

from .errors import FactsmithError

FORMAT_VERSION = 1
"""The field "format_version" of every JSON document. A change that breaks readers raises it."""


def document(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result with the version of its format."""
    return {"format_version": FORMAT_VERSION, **result}


def error_fields(
    error: BaseException | type[BaseException], code: int, argument: str | None, option: str | None
) -> dict[str, Any]:
    """Return what an error's document says next to its message.

    Args:
        error: The error, or its class.
        code: The exit code that a command has for it.
        argument: The Python argument to change. None: no single one.
        option: The option of the command line that sets the argument. None: there is none.
    """
    kind = error if isinstance(error, type) else type(error)
    return {"type": kind.__name__, "argument": argument, "option": option, "exit_code": code}


def error_document(error: Exception) -> dict[str, Any]:
    """Return an error as a document. An error that is not ours is called a fault of factsmith."""
    if isinstance(error, FactsmithError):
        text, code, argument = str(error), error.exit_code, error.argument
    else:
        text, code, argument = fault_in_words(error), 1, None
    return document({"error": {"message": text, **error_fields(error, code, argument, None)}})


def fault_in_words(error: Exception) -> str:
    """Return the beginning of the message about an error that factsmith did not raise itself."""
    return f"{type(error).__name__}: {error}. This is a fault in factsmith"
