"""Who may come in: the token of the start-up link, a password, and the sessions of browsers.

    access = Access(port=8420)
    access.link("127.0.0.1")                      # http://127.0.0.1:8420/?token=...
    name = access.begin()                         # a session; its name goes into a cookie
    access.session(name).csrf                     # what each form of that session sends back

Secrets are compared in constant time, or found by their digest. No secret is in a log: addresses
with a token are answered by a redirect to the same address without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from ..core.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""The names of this machine that every studio answers to."""

MOST_SESSIONS = 100
"""Sessions at a time. A new one ends the one that was used longest ago."""

IDLE_SECONDS = 24 * 3600.0
"""How long a session lasts without a request."""

LEAST_TOKEN, LEAST_PASSWORD = 20, 8
"""Characters that a token or a password from the user must have."""

MOST_PASSWORD = 1_000
"""Characters that a password may have."""

_FREE_GUESSES, _LONGEST_WAIT = 3, 60.0
"""Wrong passwords of one address without a wait, and the longest wait in seconds."""

_FREE_FOR_ALL = 50
"""Wrong passwords of all addresses together without a wait."""

_MOST_ADDRESSES = 1_000
"""Addresses whose guesses are counted."""


@dataclass
class Session:
    """A browser that came in.

    Attributes:
        csrf: What its forms send back. Another site cannot read it.
        used: When it was last used, by the clock of `Access`.
    """

    csrf: str
    used: float


@dataclass
class Guesses:
    """Wrong passwords, and how long the next one must wait.

    Attributes:
        clock: Gives seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _wrong: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)

    def wait(self, address: str) -> float:
        """Return how many seconds an address must wait before it may guess; 0.0 for none."""
        now = self.clock()
        return max(
            self._wait(address, _FREE_GUESSES, now),
            self._wait("", _FREE_FOR_ALL, now),
        )

    def wrong(self, address: str) -> None:
        """Count a wrong password. Each one doubles the wait."""
        for name in (address, ""):
            count, _ = self._wrong.pop(name, (0, 0.0))
            self._wrong[name] = (count + 1, self.clock())
        while len(self._wrong) > _MOST_ADDRESSES:
            self._wrong.popitem(last=False)

    def right(self, address: str) -> None:
        """Forget the wrong passwords of an address."""
        self._wrong.pop(address, None)

    def _wait(self, name: str, free: int, now: float) -> float:
        count, last = self._wrong.get(name, (0, 0.0))
        if count < free:
            return 0.0
        pause = min(2.0 ** min(count - free, 30), _LONGEST_WAIT)
        return max(last + pause - now, 0.0)


class Access:
    """What opens a studio, and the sessions that were opened.

    Attributes:
        token: Opens a session from the start-up link, and is the bearer token of the API.
        port: The port that pages are served on.
        secure: Whether pages are served with TLS.
        needs_password: Whether there is a login page.
        guesses: Wrong passwords.
        streams: An event for each answer that is being sent. Set, it ends the answer.
    """

    def __init__(
        self,
        port: int,
        *,
        names: Iterable[str] = (),
        any_address: bool = False,
        password: str | None = None,
        token: str | None = None,
        secure: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare access.

        Args:
            port: The port that pages are served on.
            names: Names that browsers may use for this machine, next to those of the loopback. A
                name without a port is accepted with any port.
            any_address: Accept every network address as the name of this machine, as a studio must
                that serves a whole network. Only names can be rebound to this machine by others.
            password: The password of the login page. None: there is none.
            token: The token. None: one is drawn.
            secure: Whether pages are served with TLS.
            clock: Gives seconds.

        Raises:
            InputError: for a token or a password that is too short, or a name that is not one.
        """
        if token is not None and not (len(token) >= LEAST_TOKEN and _is_plain(token)):
            raise InputError(
                f"the token has {len(token)} characters or unusual ones; give at least "
                f"{LEAST_TOKEN} letters, digits, '-' or '_'",
                argument="token",
            )
        self.port, self.secure = port, secure
        self.token = token or secrets.token_urlsafe(32)
        self._names = frozenset(map(host_name, names))
        self._any_address = any_address
        self._secret = secrets.token_bytes(32)
        self._password = None if password is None else self._digest(password)
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._clock = clock
        self.guesses = Guesses(clock)
        self.streams: set[asyncio.Event] = set()

    # ── addresses ─────────────────────────────────────────────────────────────────────────────────

    @property
    def scheme(self) -> str:
        """Return "https" or "http"."""
        return "https" if self.secure else "http"

    def link(self, host: str) -> str:
        """Return the start-up link, with a host as a browser names it."""
        return f"{self.address(host)}/?token={quote(self.token, safe='')}"

    def address(self, host: str) -> str:
        """Return the address of studio without a slash at the end."""
        usual = 443 if self.secure else 80
        return f"{self.scheme}://{host}" + ("" if self.port == usual else f":{self.port}")

    def is_host(self, host: str) -> bool:
        """Whether a Host header names this studio.

        A page of another site cannot choose its name freely: with DNS rebinding it reaches this
        machine, but under the name of its own.
        """
        host = host.lower()
        name, colon, port = host.rpartition(":")
        if not colon or host.endswith("]"):
            name, port = host, ""
        if host in self._names or name in self._names:
            return port == "" or port.isdecimal()
        known = name in LOOPBACK or (self._any_address and _is_address(name))
        return known and (
            port == str(self.port) or (port == "" and self.port == (443 if self.secure else 80))
        )

    def is_origin(self, origin: str, host: str) -> bool:
        """Whether an Origin header is that of the page's own host."""
        scheme, separator, name = origin.lower().partition("://")
        # Without TLS of its own, studio may be behind a proxy that has it.
        schemes = ("https",) if self.secure else ("http", "https")
        return bool(separator) and scheme in schemes and name == host.lower()

    # ── secrets ───────────────────────────────────────────────────────────────────────────────────

    @property
    def needs_password(self) -> bool:
        """Whether there is a login page."""
        return self._password is not None

    def is_token(self, text: str) -> bool:
        """Whether a text is the token."""
        return self.same(text, self.token)

    def is_password(self, text: str) -> bool:
        """Whether a text is the password. False where there is none."""
        password = self._password or b""
        return hmac.compare_digest(self._digest(text), password) and self.needs_password

    def same(self, one: str, other: str) -> bool:
        """Whether two secrets are equal, in a time that says nothing about them."""
        return hmac.compare_digest(self._digest(one), self._digest(other))

    def _digest(self, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, data, hashlib.sha256)

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────

    @property
    def cookie(self) -> str:
        """The name of the cookie. Browsers send cookies to all ports, so the name has the port."""
        prefix = "__Host-" if self.secure else ""
        return f"{prefix}factsmith-studio-{self.port}"

    def begin(self) -> str:
        """Begin a session, and return the value of its cookie."""
        name = secrets.token_urlsafe(32)
        key = self._digest(name)
        csrf = hmac.digest(self._secret, b"csrf:" + key, hashlib.sha256).hex()
        self._sessions[key] = Session(csrf, self._clock())
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return name

    def session(self, name: str) -> Session | None:
        """Return the session of a cookie, and note that it is used; None where there is none."""
        # A digest with a secret key is looked up: how long that takes says nothing about names.
        key = self._digest(name)
        session, now = self._sessions.get(key), self._clock()
        if session is None:
            return None
        if now - session.used > IDLE_SECONDS:
            del self._sessions[key]
            return None
        session.used = now
        self._sessions.move_to_end(key)
        return session

    def end(self, name: str) -> None:
        """End the session of a cookie."""
        self._sessions.pop(self._digest(name), None)

    def set_cookie(self, name: str) -> str:
        """Return the header that gives a browser the cookie of a session; "" takes it away."""
        words = [f"{self.cookie}={name}", "Path=/", "HttpOnly", "SameSite=Strict"]
        words += ["Max-Age=0"] if not name else []
        words += ["Secure"] if self.secure else []
        return "; ".join(words)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────

    def end_streams(self) -> None:
        """End all answers that are still being sent, such as streams of events."""
        for stream in self.streams:
            stream.set()


def host_name(name: str) -> str:
    """Return a name of this machine as a Host header has it.

    Raises:
        InputError: for a text that is no name, such as an address with a path.
    """
    text = name.strip().lower()
    if text.count(":") > 1 and not text.startswith("["):
        text = f"[{text}]"
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789.-_:[]")
    if not text or not set(text) <= allowed:
        raise InputError(
            f"allow_host is {name!r}; give a name as browsers use it, such as gpu-3.example.org or "
            "gpu-3.example.org:8420",
            argument="allow_host",
        )
    return text


def _is_address(name: str) -> bool:
    """Whether a host is a network address, as a Host header has it."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") else name)
    except ValueError:
        return False
    return True


def read_password(path: Path) -> tuple[str, str | None]:
    """Read a password file.

    Args:
        path: The file. Its first line is the password.

    Returns:
        The password, and a warning where other users of the machine can read the file. Such a file
        is accepted, because containers mount secrets that way.

    Raises:
        InputError: when the file cannot be read, or the password is too short.
    """
    try:
        with path.open("rb") as file:
            data = file.read(4 * MOST_PASSWORD + 1)
            mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise InputError(
            f"the password file {path} cannot be read ({error.strerror}); give a file whose first "
            "line is the password",
            argument="password_file",
        ) from None
    try:
        password = data.decode("utf-8").partition("\n")[0].removesuffix("\r")
    except UnicodeDecodeError:
        raise InputError(
            f"the password file {path} is not UTF-8 text; write the password on its first line",
            argument="password_file",
        ) from None
    if not LEAST_PASSWORD <= len(password) <= MOST_PASSWORD or not password.strip():
        raise InputError(
            f"the first line of {path} has {len(password)} characters; a password has at least "
            f"{LEAST_PASSWORD}, and at most {MOST_PASSWORD:,}",
            argument="password_file",
        )
    warning = None
    if mode & 0o077:
        warning = (
            f"other users of this machine can read {path} (mode {mode:03o}). `chmod 600` takes "
            "that away"
        )
    return password, warning


def _is_plain(token: str) -> bool:
    return token.isascii() and all(c.isalnum() or c in "-_" for c in token)
