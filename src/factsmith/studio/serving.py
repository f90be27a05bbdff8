"""How studio starts and ends: the port, the server, signals, and the browser.

    options = Serving(port=8420)
    with options.bound() as listener:                 # before a model is loaded
        access = options.access(listener)
        studio.open(tell)
        ended_by = serve(studio, access, listener, options, lambda: print(options.link(access)))
    studio.close()

The server ends at SIGINT or SIGTERM, also while streams of events are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, cast

import uvicorn
from markupsafe import escape
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..core.errors import InputError
from .access import Access, read_password
from .app import create_app
from .guard import guard

if TYPE_CHECKING:
    from .session import Studio

PORT = 8420
"""The port that studio is served on."""

TOKEN_VARIABLE = "FACTSMITH_STUDIO_TOKEN"
"""The environment variable with a token, for programs that must know it before studio starts."""

INTERRUPT = signal.SIGINT
"""The signal of Ctrl-C."""

_SIGNALS = (INTERRUPT, signal.SIGTERM)

_MOST_CONNECTIONS = 200
"""Connections at a time."""

_HEAD_SECONDS = 20.0
"""How long a connection may take until its first request is complete."""

_FILE_SECONDS = 30.0
"""How long the file stays that leads a browser to the link."""

_GRACE = 2
"""Seconds that answers have when studio ends."""


@dataclass(frozen=True)
class Serving:
    """Where studio is served, and to whom.

    Attributes:
        host: The name or network address to listen on.
        port: The port. 0: a free one.
        names: Names that browsers may use for this machine, besides the usual ones.
        password_file: The file with the password of the login page.
        certificate: The file with the TLS certificate, and those that it builds on.
        key: The file with the certificate's private key. None: it is in the certificate's file.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    names: Sequence[str] = ()
    password_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        if self.host.lower() == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False

    def check(self) -> list[str]:
        """Check what can be checked before anything is opened.

        Returns:
            Warnings.

        Raises:
            InputError: when others could connect without a password, or files cannot be used.
        """
        warnings: list[str] = []
        if self.password_file is not None:
            _, warning = read_password(self.password_file)
            warnings += [warning] if warning else []
        elif not self.is_local:
            raise InputError(
                f"host is {self.host!r}, so other machines can connect; studio serves them only "
                "with a password. Give a file whose first line is the password, or leave the host "
                "out: then only this machine can connect",
                argument="password_file",
            )
        if self.certificate is not None:
            _check_certificate(self.certificate, self.key)
        elif self.key is not None:
            raise InputError(
                "key is given without a certificate; give the certificate, too",
                argument="certificate",
            )
        elif not self.is_local:
            warnings.append(
                "the password and all pages travel unencrypted. Give a certificate and its key, or "
                "let others connect through an SSH tunnel or a proxy with TLS"
            )
        return warnings

    @contextlib.contextmanager
    def bound(self) -> Iterator[socket.socket]:
        """A block with a socket that listens.

        Raises:
            InputError: when the port is in use, or the host is not this machine.
        """
        try:
            family, *_, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.create_server(address[:2], family=family)
        except (OSError, UnicodeError, OverflowError) as error:
            raise self._unusable(error) from None
        with listener:
            yield listener

    def _unusable(self, error: Exception) -> InputError:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            return InputError(
                f"port {self.port} of {self.host} is in use, perhaps by another studio; give "
                "another port, or 0 for a free one",
                argument="port",
            )
        if number in (errno.EACCES, errno.EPERM):
            return InputError(
                f"port {self.port} needs rights that you do not have; give one above 1023, or 0 "
                "for a free one",
                argument="port",
            )
        reason = getattr(error, "strerror", None) or str(error)
        return InputError(
            f"host is {self.host!r}, where this machine cannot listen ({reason}); give a name or a "
            "network address of this machine, such as 127.0.0.1",
            argument="host",
        )

    def access(self, listener: socket.socket) -> Access:
        """Return who may come in, for a socket that listens.

        Raises:
            InputError: for a token, a password or a name that cannot be used.
        """
        names = list(self.names)
        if not self.is_local:
            names += [name for name in (self.host, socket.gethostname()) if _is_name(name)]
        password = None if self.password_file is None else read_password(self.password_file)[0]
        return Access(
            listener.getsockname()[1],
            names=names,
            any_address=not self.is_local,
            password=password,
            token=os.environ.get(TOKEN_VARIABLE) or None,
            secure=self.certificate is not None,
        )

    def link(self, access: Access) -> str:
        """Return the start-up link."""
        if self.host in ("0.0.0.0", "::", ""):
            return access.link(socket.gethostname())
        return access.link(f"[{self.host}]" if ":" in self.host else self.host)


def serve(
    studio: Studio,
    access: Access,
    listener: socket.socket,
    options: Serving,
    begun: Callable[[], object] = lambda: None,
) -> signal.Signals | None:
    """Serve a studio that is open, until a signal or `studio.closing` ends it.

    Args:
        studio: The studio.
        access: Who may come in.
        listener: The socket that listens.
        options: Where studio is served.
        begun: Called when pages are served.

    Returns:
        The signal that ended it. None: another thread did.
    """
    app = create_app(studio)
    guard(app, access)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,  # addresses hold prompts, and once the token
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )

    def ending() -> None:
        studio.closing.set()
        access.end_streams()
        for job in studio.jobs.all():  # somebody may wait for the answer of one
            studio.jobs.cancel(job.id)

    server = _Server(config, begun, ending, studio.closing)
    with _quiet():
        server.run(sockets=[listener])
    return server.ended_by


class _Server(uvicorn.Server):
    """A server that says when it begins, and ends its streams when it ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        begun: Callable[[], object],
        ending: Callable[[], object],
        closing: threading.Event,
    ) -> None:
        super().__init__(config)
        self.ended_by: signal.Signals | None = None
        self._begun, self._ending, self._closing = begun, ending, closing

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        if self.started:
            self._begun()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends now."""
        return await super().on_tick(counter) or self._closing.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, and let other answers be finished."""
        self._ending()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """A block in which the first signal ends the server; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self.ended_by = signal.Signals(sig)


class _Protocol(H11Protocol):
    """HTTP with a limit on how long the head of a request may take."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        """Wait for a head that is not complete, from its beginning on."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        self.transport.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the server's library logs nothing. Studio logs its own faults."""
    logger = logging.getLogger("uvicorn.error")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# ── the browser ───────────────────────────────────────────────────────────────────────────────────


def open_browser(link: str, folder: Path) -> None:
    """Open the start-up link in the user's browser, if there is one. Never fails, never waits.

    Other users of the machine can see the arguments of a browser's process, so the browser gets the
    name of a file that leads to the link and that only this user can read.

    Args:
        link: The link.
        folder: Where the file is, for the time that the browser needs.
    """
    has_screen = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if has_screen:
        threading.Thread(target=_open, args=(link, folder), daemon=True).start()


def _open(link: str, folder: Path) -> None:
    file = folder / f"start-{secrets.token_hex(4)}.html"
    with contextlib.suppress(Exception):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            page = (
                '<!doctype html><title>factsmith studio</title><meta name="referrer" '
                f'content="no-referrer"><meta http-equiv="refresh" content="0; url={escape(link)}">'
                f'<a href="{escape(link)}">factsmith studio</a>\n'
            )
            file.touch(0o600, exist_ok=False)
            file.write_text(page, encoding="utf-8")
            webbrowser.open(file.absolute().as_uri())
            time.sleep(_FILE_SECONDS)
        finally:
            file.unlink(missing_ok=True)


# ── checks ────────────────────────────────────────────────────────────────────────────────────────


def _check_certificate(certificate: Path, key: Path | None) -> None:
    """Raise InputError for files that TLS cannot use."""

    def no_password() -> str:
        raise InputError(
            "the key of the certificate has a password; give one without", argument="key"
        )

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, no_password)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"the certificate {certificate} cannot be used with the key {key or certificate} "
            f"({reason}); give two PEM files that belong together",
            argument="certificate",
        ) from None


def _is_name(host: str) -> bool:
    """Whether a host is a name, and not a network address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(host)
    return False
