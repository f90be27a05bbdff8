"""Studio: the verbs of factsmith as pages, served on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import atlas
from ..core.errors import InputError
from ..core.files import check_writable
from ..core.progress import Progress
from ..core.tables import counted
from ..keep.ledger import BASE, Ledger
from ..keep.model_place import model_place
from .loading import loading
from .models import load_model, opened_workspace, workspace_of
from .options import Device, Json, Model
from .printing import complain, print_result
from .waiting import progress

if TYPE_CHECKING:
    from ..keep.workbench import Workbench
    from ..model.language_model import LanguageModel
    from ..studio.desk import Desk

DEFAULT_MODEL = "atlas"
"""The model of a studio for which the user names none."""

DEFAULT_FOLDER = "factsmith-studio"
"""The workspace that is made for it, in the current folder."""

_LIBRARIES = ("fastapi", "uvicorn", "python_multipart")
"""What serves pages, and is installed with factsmith[studio]."""


def studio(  # house: Typer reads one parameter for each option
    model: Model = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="The name or address to listen on. Others than this machine's own need "
            "--password-file.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 for a free one.")
    ] = 8420,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name that browsers use for this machine, such as that of a proxy. May be "
            "repeated.",
            show_default="127.0.0.1, localhost",
        ),
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask for a password: the first line of this file.",
            show_default="the start-up link alone",
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Serve with TLS, and this certificate (PEM).",
            show_default="no TLS",
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The private key of the certificate (PEM).",
            show_default="in the certificate's file",
        ),
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="MODEL",
            help="Another model that may be read. May be repeated.",
            show_default="the bundled ones",
        ),
    ] = None,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Open no browser; only print the link.")
    ] = False,
    workspace: Annotated[
        Path | None,
        typer.Option(
            "--workspace",
            "-w",
            metavar="DIR",
            help="The workspace; it is made if it does not exist.",
            show_default="the current folder, if it is one; else factsmith-studio",
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Read, locate, patch and keep with a mouse, in a browser.

    Pages are served on this machine alone until Ctrl-C ends it. The link that is printed opens
    them. Without a model and a workspace, it is the bundled model in the folder factsmith-studio.

    \b
    Examples:
      factsmith studio
      factsmith studio -w my-workspace --no-browser
      factsmith studio --host 0.0.0.0 --password-file password.txt
    """
    serving = _serving()
    options = serving.Serving(host, port, tuple(allow_host or ()), password_file, certificate, key)
    folder = _folder(model, workspace)
    warnings = options.check()
    if not _is_workspace(folder):
        _check_new(folder)
    from ..studio.session import Studio

    with options.bound() as listener, _logged():
        access = options.access(listener)
        for warning in warnings:
            complain("warning", warning)
        session = Studio(_desk(model, folder, device, with_ or ()))
        with progress() as tell:
            tell("starting", 0, None)
            session.open(tell)
        link = options.link(access)

        def begun() -> None:
            _print_link(link, session.desk, as_json)
            if not (no_browser or as_json):
                serving.open_browser(link, folder / "studio")

        try:
            ended_by = serving.serve(session, access, listener, options, begun)
        finally:
            session.close()
    if ended_by == serving.INTERRUPT:
        raise typer.Exit(130)


def _serving() -> Any:
    """Import what serves pages.

    Raises:
        InputError: when a library that it needs is not installed.
    """
    try:
        for library in _LIBRARIES:
            importlib.import_module(library)
    except ImportError as error:
        raise InputError(
            f"studio is served with fastapi and uvicorn, which cannot be imported ({error}). "
            'Install them with: pip install "factsmith[studio]"'
        ) from None
    from ..studio import serving

    return serving


# ── what is opened ────────────────────────────────────────────────────────────────────────────────


def _folder(model: str | None, workspace: Path | None) -> Path:
    """Return the folder of the workspace that studio opens, or makes.

    It is the one that other commands would open, if there is one. Otherwise each model has a folder
    of its own, and the bundled model that needs no name has the one that needs none.
    """
    if workspace is not None:
        return workspace
    if model is not None or _is_workspace(Path()):
        known = workspace_of(model, None)
        if known is not None:
            return known
    if model in (None, DEFAULT_MODEL):
        return Path(DEFAULT_FOLDER)
    name = re.sub(r"[^\w.-]+", "-", Path(model or "").name.partition("@")[0]).strip("-.")
    return Path(f"{DEFAULT_FOLDER}-{name or 'model'}")


def _is_workspace(folder: Path) -> bool:
    return (folder / "ledger.db").is_file()


def _check_new(folder: Path) -> None:
    """Raise an error if no workspace can be made in a folder, before a model is loaded."""
    from ..keep.database import check_no_patches

    check_writable(folder)
    check_no_patches(folder)


def _desk(model: str | None, folder: Path, device: str | None, others: Sequence[str]) -> Desk:
    """Return the desk of a workspace, which may have to be made."""
    from ..studio.desk import Desk

    named = None if model is None or _is_workspace(Path(model)) else model

    def opening(tell: Progress) -> AbstractContextManager[Workbench]:
        if _is_workspace(folder):
            return opened_workspace(folder, device, tell, named)
        return _made_workspace(named or DEFAULT_MODEL, folder, device, tell)

    def load(name: str, tell: Progress) -> LanguageModel:
        with Ledger(folder) as ledger:
            recorded, dtype = ledger.model, ledger.dtype
        place, kept = (model_place(name), dtype) if name == recorded else (name, None)
        # The revision that the user chose is of the workspace's model.
        token = loading.set(dataclasses.replace(loading.get(), revision=None))
        try:
            return load_model(place, device, kept, tell)
        finally:
            loading.reset(token)

    return Desk(folder, opening, load, (*atlas.names(), *others))


@contextlib.contextmanager
def _made_workspace(
    model: str, folder: Path, device: str | None, tell: Progress
) -> Iterator[Workbench]:
    """Make a workspace for a model, and open it."""
    lm = load_model(model, device, None, tell)
    tell("computing the fingerprint", 0, None)
    from ..keep.workbench import Workbench

    with Workbench(lm, folder) as bench:
        yield bench


# ── what is printed ───────────────────────────────────────────────────────────────────────────────


def _print_link(link: str, desk: Desk, as_json: bool) -> None:
    """Print the start-up link, and what is open."""
    with desk.ledger() as ledger:
        current = ledger.current
        active = len(ledger.active(current))
    place = desk.place
    result = {
        "url": link.partition("/?")[0],
        "link": link,
        "token": link.partition("token=")[2],
        "workspace": str(desk.folder.resolve()),
        "model": place.model,
        "revision": current,
    }
    state = "no patches" if current == BASE else f"{counted(active, 'patch', 'es')} in effect"
    lines = [
        ("factsmith studio ", link),
        ("open:", f"workspace {shlex.quote(str(desk.folder))}, model {place.model}, {state}"),
        ("Ctrl-C", "ends studio; what was kept stays in the workspace"),
    ]
    print_result(result, [], as_json, lines)


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Print what studio logs while it runs: faults, each in one line."""
    logger, handler = logging.getLogger("factsmith.studio"), _Faults(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Faults(logging.Handler):
    """Prints faults. With FACTSMITH_TRACEBACK it prints where they come from."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one fault, or one warning."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            complain("warning", record.getMessage())
            return
        text = f"{record.getMessage()}: {type(error).__name__}: {error}"
        complain("unexpected error", text, type=type(error).__name__, exit_code=1)
        if os.environ.get("FACTSMITH_TRACEBACK"):
            traceback.print_exception(error)
