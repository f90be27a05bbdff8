"""Send requests to a server and read its answers as JSON, with retries and time-outs.

    client = Client("http://127.0.0.1:8000")
    client.get("/v1/models")
    client.post("/v1/completions", {"model": "m", "prompt": "Paris is"})

A key comes from the environment variable FACTSMITH_API_KEY, or from the caller. It is sent to the
server alone, and no message contains it. Redirects are not followed.
"""

from __future__ import annotations

import email.utils
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ..core.errors import InputError, ServerError
from ..core.progress import Progress, note
from ..core.tables import visible
from .parallel import within

KEY = "FACTSMITH_API_KEY"
"""The environment variable that holds the key."""

_MOST_BYTES = 256 * 2**20
"""Bytes of an answer."""

_LONGEST = 300
"""Characters of a server's own words in a message."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first retry, and at most before any."""

_BUSY = (429, 503)
"""Statuses of a server that has no time now."""

_LONGEST_TIMEOUT = 86_400
"""Seconds within which any request must be answered."""

_GRACE = 1.0
"""Seconds after a time-out in which a request may end by itself."""

_GATEWAY = (502, 504)
"""Statuses of a gateway that lost the server."""


def httpx_library() -> ModuleType:
    """Import httpx.

    Raises:
        InputError: It is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise InputError(
            f"A server is asked with httpx, which cannot be imported ({error}). "
            'Install it with: pip install "factsmith[serve]"'
        ) from None
    return httpx


def is_url(text: object) -> bool:
    """Return whether a text is the address of a server: it begins with http:// or https://."""
    return isinstance(text, str) and text.lower().startswith(("http://", "https://"))


def server_url(url: str) -> str:
    """Return the address of a server without a slash and without /v1 at its end.

    Raises:
        InputError: It is not an address of a server.
    """
    example = "Give the server's address, for example http://127.0.0.1:8000"
    shown = re.sub(r"//[^/]*@", "//", visible(str(url)))  # a password stays secret
    given = f"The address of the server is {re.sub(r'[?#].*', '…', shown):.200}"
    if not is_url(url):
        raise InputError(f"{given}: it does not begin with http:// or https://. {example}.")
    if not url.isprintable() or any(c.isspace() for c in url):
        raise InputError(f"{given}: it has a character that no address has. {example}.")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{given}: {error}. {example}.") from None
    if not host:
        raise InputError(f"{given}: it names no host. {example}.")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "The address of the server holds a user name or a password. "
            f"Put the server's key into the environment variable {KEY}, and leave it out."
        )
    if parts.query or parts.fragment:
        raise InputError(f"{given}: it has a part after ? or #. {example}.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    if path.endswith("/completions"):
        raise InputError(f"{given}: it is one service of a server. {example}.")
    return f"{parts.scheme.lower()}://{parts.netloc}{path}"


class Client:
    """Requests to one server. Several threads may use it at once.

    Attributes:
        url: The server's address, without /v1 at its end.
        timeout: Seconds within which a request must be answered completely.
        retries: How often a request is sent again.
        progress: Gets a note for every retry.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        progress: Progress | None = None,
    ) -> None:
        """Open no connection yet.

        Args:
            url: The server's address, with or without /v1 at its end.
            api_key: The key that the server asks for. None: the environment variable
                FACTSMITH_API_KEY, where it is set.
            timeout: Seconds within which a request must be answered completely.
            retries: How often a request is sent again, if the server is busy or cannot be reached.
            progress: Gets a note for every retry.

        Raises:
            InputError: The address cannot be used, or httpx is not installed.
        """
        if not 0 < timeout <= _LONGEST_TIMEOUT:
            raise InputError(
                f"timeout is {timeout!r:.40}. Give seconds, at most {_LONGEST_TIMEOUT:,}.",
                argument="timeout",
            )
        self.url, self.timeout, self.retries = server_url(url), timeout, retries
        self.progress = progress
        self._key = (os.environ.get(KEY, "") if api_key is None else api_key).strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise InputError(
                f"The key in {KEY} has characters that HTTP cannot send. Set it again."
            )
        self._httpx = httpx_library()
        self._lock, self._closed = threading.Lock(), threading.Event()
        try:
            self._connections = self._httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                follow_redirects=False,
                mounts=_direct(urlsplit(self.url).netloc),
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"No connection can be prepared ({error}). Check the environment variables "
                "SSL_CERT_FILE, HTTP_PROXY and HTTPS_PROXY."
            ) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. Requests that wait for a retry end with an error."""
        self._closed.set()
        self._connections.close()

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """Return what the server answers to GET, as plain values.

        Args:
            path: The path, such as "/v1/models".
            timeout: Seconds. None: those of the client.

        Raises:
            ServerError: The server cannot be reached, refuses, or does not answer in JSON.
        """
        return self._ask("GET", path, None, retry=True, timeout=timeout, as_text=False)

    def post(
        self,
        path: str,
        body: Any,
        *,
        retry: bool = True,
        timeout: float | None = None,
        as_text: bool = False,
    ) -> Any:
        """Return what the server answers to POST, as plain values.

        Args:
            path: The path, such as "/v1/completions".
            body: What is sent, as plain values.
            retry: Send the request again although the server may have done it already. A request
                that the server did not take is sent again in any case.
            timeout: Seconds. None: those of the client.
            as_text: Return an answer that is not JSON as it came.

        Raises:
            ServerError: As for `get`.
        """
        return self._ask("POST", path, body, retry=retry, timeout=timeout, as_text=as_text)

    def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        *,
        retry: bool,
        timeout: float | None,
        as_text: bool,
    ) -> Any:
        seconds = self.timeout if timeout is None else timeout
        for again in range(self.retries + 1):
            try:
                return self._once(method, path, body, seconds, as_text)
            except _Again as failure:
                error, wait = failure.error, failure.wait
                if error.maybe_done and not retry:
                    raise error from None
            wait = _FIRST_WAIT * 2**again if wait is None else wait
            if again == self.retries or wait > _LONGEST_WAIT or self._closed.is_set():
                raise error from None
            self.note(f"{error} Trying again in {wait:.1f} s ({again + 1} of {self.retries}).")
            if self._closed.wait(wait):
                raise error from None
        raise AssertionError("the last try returns or raises")

    def note(self, text: str) -> None:
        """Send a note to the progress, from any thread."""
        with self._lock:
            note(self.progress, text)

    def _once(self, method: str, path: str, body: Any, seconds: float, as_text: bool) -> Any:
        """Send one request.

        Raises:
            _Again: It may go better the next time.
            ServerError: It will not.
        """
        httpx, where = self._httpx, f"{method} {self.url}{path}"
        try:
            # The library's limits are those of one read: an answer may come byte by byte for ever.
            answer, data = within(
                seconds + _GRACE, lambda: self._exchange(method, path, body, seconds, where)
            )
            return self._read(where, answer, data, as_text)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._unreachable(error)
        except httpx.PoolTimeout:
            raise ServerError(
                f"{where}: all connections are in use. Ask for less at once."
            ) from None
        except (httpx.TimeoutException, TimeoutError):
            raise ServerError(
                f"{where}: the server did not answer within {seconds:g} s. "
                "Give it more time, or ask for less at once.",
                argument="timeout",
                maybe_done=True,
            ) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            lost = (
                f"{where}: the connection broke before the answer was complete ({_words(error)})."
            )
            raise _Again(ServerError(self._safe(lost), maybe_done=True)) from None
        except (httpx.InvalidURL, UnicodeError, RuntimeError) as error:
            raise ServerError(self._safe(f"{where} cannot be sent ({_words(error)}).")) from None

    def _exchange(
        self, method: str, path: str, body: Any, seconds: float, where: str
    ) -> tuple[Any, bytes]:
        """Send a request, and return the answer with its content."""
        httpx, end = self._httpx, time.monotonic() + seconds
        content = None if body is None else json.dumps(body).encode()
        kind = {} if content is None else {"Content-Type": "application/json"}
        limits = httpx.Timeout(seconds, connect=min(seconds, 10.0))
        with self._connections.stream(
            method, path, content=content, headers=kind, timeout=limits
        ) as answer:
            data = bytearray()
            for part in answer.iter_bytes():
                data += part
                if len(data) > _MOST_BYTES:
                    raise ServerError(f"{where}: the answer is longer than 256 MB.")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("")
            return answer, bytes(data)

    def _unreachable(self, error: Exception) -> NoReturn:
        """Raise the error of a server to which there is no connection."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ssl.SSLError) or "CERTIFICATE" in str(error) or "SSL" in str(error):
            raise ServerError(
                f"The connection to {self.url} is not secure: {_words(error)}. If you trust the "
                "server, let the environment variable SSL_CERT_FILE name a file with the "
                "certificate of its issuer."
            ) from None
        raise _Again(
            ServerError(
                f"{self.url} cannot be reached ({_words(error)}). "
                "Check the address, and that the server runs."
            )
        ) from None

    def _read(self, where: str, answer: Any, data: bytes, as_text: bool) -> Any:
        """Return the values of an answer.

        Raises:
            _Again, ServerError: As for `_once`.
        """
        status: int = answer.status_code
        text = self._safe(data.decode("utf-8", "replace"))
        if answer.is_success:
            try:
                return json.loads(data)
            except (ValueError, RecursionError):
                if as_text:
                    return text
                raise ServerError(
                    f"{where}: the answer is not JSON but {_summary(text, self._safe)}. "
                    "Check that the address is that of a server that holds a model.",
                    status=status,
                    maybe_done=True,
                ) from None
        said = f"{where}: status {status}, {_summary(text, self._safe)}."
        if answer.is_redirect:
            target = visible(self._safe(answer.headers.get("location", "")))[:_LONGEST]
            said = f"{where}: the server sends on to {target!r}. Give the final address."
        elif status in (401, 403):
            state = "was refused" if self._key else "is missing"
            said += f" The key {state}: set the environment variable {KEY}."
        error = ServerError(
            said,
            status=status,
            maybe_done=status >= 500 and not _refused(answer),
        )
        if status in (*_BUSY, *_GATEWAY):
            raise _Again(error, _retry_after(answer))
        raise error

    def _safe(self, text: str) -> str:
        """Return a text without the key, as it is written plainly or in JSON."""
        if self._key:
            for written in {json.dumps(self._key)[1:-1], repr(self._key)[1:-1], self._key}:
                text = text.replace(written, "***")
        return text


class _Again(Exception):  # noqa: N818 - it leads to a retry
    """A request failed that may be sent again.

    Attributes:
        error: What to raise if it fails each time.
        wait: Seconds that the server asks to wait. None: it does not say.
    """

    def __init__(self, error: ServerError, wait: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait = error, wait


def _direct(place: str) -> dict[str, None]:
    """Return settings that let a server on this machine be reached without a proxy."""
    host = urlsplit(f"//{place}").hostname or ""
    if host == "localhost" or host == "::1" or host.startswith("127."):
        return {f"all://{'[::1]' if host == '::1' else host}": None}
    return {}


def _refused(answer: Any) -> bool:
    """Return whether a busy server says that it did not take a request."""
    return answer.status_code in _BUSY and (
        answer.status_code == 429 or "retry-after" in answer.headers
    )


def _retry_after(answer: Any) -> float | None:
    """Return the seconds after which a server wants the request again. None: it does not say."""
    value = answer.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _summary(text: str, safe: Callable[[str], str]) -> str:
    """Return what a server said, in one line: the message of its error, where it has one."""
    page = text.lstrip()[:200].lower()
    if page.startswith(("<!doctype", "<html")):
        start = text.lower().find("<title>")
        end = text.lower().find("</title>", start)
        title = visible(" ".join(text[start + 7 : end].split()))[:80] if 0 <= start < end else ""
        return f"an HTML page ({title!r})" if title else "an HTML page"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return repr(_cut(text)) if text.strip() else "nothing"
    for field in ("error", "message", "detail"):
        while isinstance(values, dict) and field in values:
            values = values[field]
    said = values if isinstance(values, str) else json.dumps(values)
    return repr(_cut(safe(said)))  # before it is cut: half a key is too much


def _cut(text: str) -> str:
    """Return a server's own words in one line, without what steers a terminal."""
    line = " ".join(visible(text[: 4 * _LONGEST]).split()).rstrip(".")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


def _words(error: Exception) -> str:
    """Return what an error of the HTTP library says, in one line."""
    return visible(str(error).strip() or type(error).__name__)[:_LONGEST].rstrip(".")
