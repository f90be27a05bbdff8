"""Every error factsmith raises on purpose; catch `FactsmithError` to catch them all.

    FactsmithError
    ├── InputError                what the caller gave cannot be used
    │   ├── FactError             a fact is incomplete or contradicts itself
    │   ├── SubjectError          the subject cannot be found in the prompt, or not uniquely
    │   └── LayerError            a layer, expert or neuron that the model does not have
    ├── ModelError                the model cannot be used
    │   ├── ModelNotFoundError    no such bundled model, folder or hub id
    │   ├── TokenizerError        no fast tokenizer, so no offset mapping
    │   └── UnsupportedModelError the structure is not unique, or the weights cannot be edited
    ├── NumericsError             a computation did not give finite, meaningful numbers
    ├── LedgerError               the workspace or its records
    │   ├── WorkspaceError        missing, not a workspace, not writable, in use, disk full
    │   ├── FingerprintError      it belongs to another model
    │   ├── DamagedError          a file does not match its checksum or cannot be read
    │   └── RevisionError         no such revision, or an ambiguous id
    ├── ServerError               a server cannot be reached, or refuses
    └── ClusterError              workers cannot be had, or a part of the work cannot be done

A message says what was got, what is accepted, and what to do next. It speaks of Python arguments,
never of command-line flags: an error carries the name of the argument, and the command line names
the flag. `exit_code` is what the command line returns.
"""

from __future__ import annotations


class FactsmithError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        argument: The name of the Python argument to change, such as "layer". None: no single one.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class InputError(FactsmithError, ValueError):
    """What the caller gave cannot be used."""

    exit_code = 2


class FactError(InputError):
    """A fact is incomplete or contradicts itself."""


class SubjectError(InputError):
    """The subject cannot be found in the prompt, or not uniquely."""


class LayerError(InputError):
    """A layer, expert or neuron that the model does not have."""


class ModelError(FactsmithError):
    """The model cannot be used."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No such bundled model, folder or hub id."""


class TokenizerError(ModelError):
    """The model has no fast tokenizer, so tokens cannot be mapped to characters."""


class UnsupportedModelError(ModelError):
    """The model's structure is not unique, or its weights cannot be edited."""


class NumericsError(FactsmithError, ArithmeticError):
    """A computation did not give finite, meaningful numbers."""

    exit_code = 4


class LedgerError(FactsmithError):
    """The workspace or its records."""

    exit_code = 5


class WorkspaceError(LedgerError):
    """The workspace is missing, invalid, read-only or in use, or the disk is full."""


class FingerprintError(LedgerError):
    """The workspace, delta or statistics belong to another model."""


class DamagedError(LedgerError):
    """A file does not match its checksum or cannot be read."""


class RevisionError(LedgerError):
    """No such revision, or an ambiguous id."""


class ServerError(FactsmithError):
    """A server cannot be reached, refuses, or does not answer as it should.

    Attributes:
        status: The status of the HTTP answer. None: no answer came.
        maybe_done: Whether the server may have done what it was asked to do.
    """

    exit_code = 6

    def __init__(
        self,
        message: str = "",
        *,
        argument: str | None = None,
        status: int | None = None,
        maybe_done: bool = False,
    ) -> None:
        super().__init__(message, argument=argument)
        self.status = status
        self.maybe_done = maybe_done


class ClusterError(FactsmithError):
    """Workers on other machines cannot be had, or a part of the work cannot be done there."""

    exit_code = 7


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
