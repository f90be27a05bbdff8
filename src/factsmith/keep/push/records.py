"""What was pushed where: one small file for each push, below the workspace.

    with turn(folder, url):                         # one push to a server at a time
        write_record(folder, record)
    pushes = read_records(folder, url)              # oldest first

A record holds the proof as it should be (`expected`). So a rollback, and a later proof of what a
server carries, need no model. The files hold no key and can be kept in git.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import DamagedError, WorkspaceError
from ...core.files import check_writable, make_folder, write_file
from ...core.progress import Progress, tell
from ..export.manifest import as_json
from .carrier import Adapter
from .expected import Expected
from .names import parsed

FOLDER = "served"
"""The folder of a workspace that holds the records, and the adapters unless they go elsewhere."""

State = Literal["loading", "serving", "failed", "withdrawn"]

_FORMAT = 1
_POLL = 0.1
_MOST_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """One push.

    Attributes:
        name: Its name, which is used once. In vLLM it is the adapter's name, too.
        url: The server.
        kind: "vllm" or "llama.cpp".
        adapter: The adapter's name in the server.
        path: Where the server reads the adapter.
        revision: The id of the revision.
        previous: The name of the push that the server carried before. None: none of this workspace.
        state: "loading": the push has begun. "serving": the proof passed. "failed": it did not, and
            the adapter was taken out. "withdrawn": it was rolled back.
        at: When the state was reached, UTC in ISO 8601.
        expected: The proof of the revision.
    """

    name: str
    url: str
    kind: str
    adapter: str
    path: str
    revision: str
    previous: str | None
    state: State
    at: str
    expected: Expected

    def having(self, adapter: Adapter) -> PushRecord:
        """Return the record with the adapter that the server carries."""
        return dataclasses.replace(self, adapter=adapter.name, path=adapter.path)

    def become(self, state: State) -> PushRecord:
        """Return the record in another state, as of now."""
        return dataclasses.replace(self, state=state, at=now())


def now() -> str:
    """Return the UTC time in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def write_record(folder: Path, record: PushRecord) -> None:
    """Write a record, or the new state of one.

    Raises:
        WorkspaceError: when it cannot be written.
    """
    fields = {"format": _FORMAT, **vars(record), "expected": record.expected.to_dict()}
    try:
        make_folder(folder)
        write_file(folder / f"{record.name}.json", as_json(fields))
    except OSError as error:
        raise WorkspaceError(
            f"the record of the push cannot be written to {folder}: {error.strerror}. Choose a "
            "folder that can be written.",
            argument="folder",
        ) from error


def read_records(folder: Path, url: str | None = None) -> list[PushRecord]:
    """Return the pushes to a server, or to all, the newest state last.

    A server may have several addresses. In vLLM the adapter has the name of its push, which no
    other adapter has, so the address does not matter.

    Raises:
        DamagedError: when a file cannot be read as a record.
    """
    # The folder may hold other files of factsmith, such as manifests.
    files = sorted(file for file in folder.glob("*.json") if parsed(file.stem))
    records = [_read(file) for file in files]
    return sorted(
        (each for each in records if url in (None, each.url) or each.adapter == each.name),
        key=lambda record: record.at,
    )


def of_adapters(records: Iterable[PushRecord]) -> dict[str, PushRecord]:
    """Return {adapter: the newest record of it}, from records in the order of `read_records`.

    A push of llama.cpp's that did not end does not count against an earlier one that was proved:
    several pushes may be of one adapter there.
    """
    newest: dict[str, PushRecord] = {}
    for record in records:
        earlier = newest.get(record.adapter)
        ended = record.state in ("serving", "withdrawn")
        if ended or earlier is None or earlier.state != "serving":
            newest[record.adapter] = record
    return newest


def _read(file: Path) -> PushRecord:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        fields: Mapping[str, Any] = json.loads(file.read_bytes())
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            raise ValueError("it is not the record of a push")
        values = {name: value for name, value in fields.items() if name != "format"}
        values["expected"] = Expected.from_dict(values["expected"])
        record = PushRecord(**values)
        texts = (record.name, record.url, record.adapter, record.path, record.revision, record.at)
        if not all(isinstance(each, str) for each in texts):
            raise ValueError("a field has the wrong type")
        if record.name != file.stem or record.revision != record.expected.revision:
            raise ValueError("it is the record of another push")
        return record
    except (OSError, ValueError, TypeError, KeyError, RecursionError, DamagedError) as error:
        problem = "; ".join(str(error).splitlines())[:200]
        raise DamagedError(
            f"{file} cannot be used: {problem}. Restore it, or delete it: then this push counts as "
            "never made."
        ) from None


def check_folder(folder: Path) -> None:
    """Check, before any work, that records and adapters can be written.

    Raises:
        WorkspaceError: when they cannot.
    """
    check_writable(folder)


@contextlib.contextmanager
def turn(folder: Path, url: str, progress: Progress | None = None) -> Iterator[None]:
    """A block that only one process at a time enters for a server; others wait.

    Raises:
        WorkspaceError: when the folder cannot be written.
    """
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        make_folder(folder)
        lock = os.open(folder / f".{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WorkspaceError(
            f"cannot write into {folder}: {error.strerror}; choose a folder that can be written",
            argument="folder",
        ) from error
    try:
        while not _locked(lock):
            tell(progress, "waiting for another push to this server", 0, None)
            time.sleep(_POLL)
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    """Return whether the lock is this process's now, or the disk knows no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
    return True
