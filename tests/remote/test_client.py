"""Requests to a scripted server on the loopback address: retries, time-outs, and bad answers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from factsmith.core.errors import FactsmithError, InputError, ServerError
from factsmith.remote import client as client_module
from factsmith.remote.client import Client, is_url, server_url
from scripted import Answer, Notes, Scripted, in_turn, scripted

FINE = Answer({"fine": True})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)
    monkeypatch.delenv("FACTSMITH_API_KEY", raising=False)


@contextlib.contextmanager
def asking(*answers: Answer, **options: Any) -> Iterator[tuple[Client, Scripted]]:
    with scripted(in_turn(*answers)) as server, Client(server.url, **options) as client:
        yield client, server


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/", "http://host:8000"),
        ("http://host:8000/v1", "http://host:8000"),
        ("HTTPS://host/v1/", "https://host"),
        ("https://host/llm/v1", "https://host/llm"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_an_address_is_taken_with_and_without_v1(url: str, address: str) -> None:
    assert is_url(url) and server_url(url) == address


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000", "does not begin with http"),
        ("ftp://host", "does not begin with http"),
        ("", "does not begin with http"),
        ("http://", "names no host"),
        ("http://ho st", "no address has"),
        ("http://host\x1b[31m", "no address has"),
        ("http://host:port", "http://host:port"),
        ("http://host:99999", "http://host:99999"),
        ("http://host?key=s3cret", "after"),
        ("http://host/v1/completions", "one service"),
    ],
)
def test_another_text_is_no_address(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Client(url)
    assert "\x1b" not in str(caught.value) and "http://127.0.0.1:8000" in str(caught.value)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="FACTSMITH_API_KEY"):
        Client("http://user:s3cret@host")
    for url in ("user:s3cret@host", "host?key=s3cret", "user:s3cret@host:x", "host:x?s3cret"):
        with pytest.raises(InputError) as caught:
            Client(f"http://{url}")
        assert "s3cret" not in str(caught.value)


def test_values_are_sent_and_come_back() -> None:
    with asking(Answer({"a": [1, "ü"]})) as (client, server):
        assert client.get("/v1/models") == {"a": [1, "ü"]}
        assert client.post("/v1/completions", {"prompt": ["ü"]}) == {"a": [1, "ü"]}
    assert [(a.method, a.path, a.body) for a in server.asked] == [
        ("GET", "/v1/models", None),
        ("POST", "/v1/completions", {"prompt": ["ü"]}),
    ]


def test_the_path_of_the_address_stays() -> None:
    with scripted(in_turn(FINE)) as server, Client(server.url + "/llm/v1") as client:
        client.get("/v1/models")
    assert server.asked[0].path == "/llm/v1/models"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    notes = Notes()
    busy = Answer({"error": {"message": "Loading model"}}, status)
    with asking(busy, busy, FINE, progress=notes) as (client, server):
        assert client.get("/") == {"fine": True}
    assert len(server.asked) == 3
    assert len(notes.texts) == 2 and "Loading model" in notes.texts[0]
    assert "(1 of 3)" in notes.texts[0] and "(2 of 3)" in notes.texts[1]


def test_a_server_that_stays_busy_is_given_up() -> None:
    with asking(Answer({}, 503), retries=2) as (client, server):
        with pytest.raises(ServerError, match="status 503") as caught:
            client.get("/")
        assert caught.value.status == 503 and len(server.asked) == 3


def test_the_server_says_when_to_ask_again() -> None:
    with asking(Answer({}, 429, {"Retry-After": "1"}), FINE) as (client, _):
        start = time.monotonic()
        client.get("/")
        assert 0.9 < time.monotonic() - start < 5
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    with asking(Answer({}, 429, {"Retry-After": past}), FINE) as (client, _):
        start = time.monotonic()
        client.get("/")
        assert time.monotonic() - start < 0.9


def test_nobody_waits_for_hours() -> None:
    with asking(Answer({}, 429, {"Retry-After": "7200"}), FINE) as (client, server):
        with pytest.raises(ServerError, match="429"):
            client.get("/")
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (Answer({"long": "x" * 100}, cut=10), False),  # it may have been done
        (Answer({}, 502), False),
        (Answer({}, 503), False),
        (Answer({}, 503, {"Retry-After": "0"}), True),  # it was not done
        (Answer({}, 429), True),
    ],
)
def test_what_may_have_been_done_is_not_sent_again(failure: Answer, again: bool) -> None:
    with asking(failure, FINE) as (client, server):
        if again:
            assert client.post("/", {}, retry=False) == {"fine": True}
        else:
            with pytest.raises(ServerError) as caught:
                client.post("/", {}, retry=False)
            assert caught.value.maybe_done
        assert len(server.asked) == 1 + again
    with asking(failure, FINE) as (client, server):
        assert client.post("/", {}) == {"fine": True}, "control: with leave to send it again"
        assert len(server.asked) == 2


def test_a_server_that_begins_late_is_reached() -> None:
    port, notes = free_port(), Notes()
    with Client(f"http://127.0.0.1:{port}", progress=notes) as client:
        with pytest.raises(ServerError, match="cannot be reached") as caught:
            client.post("/", {}, retry=False)
        assert not caught.value.maybe_done and caught.value.status is None
        assert len(notes.texts) == 3, "a request that never arrived is sent again"


def test_a_server_that_dies_in_the_middle_of_an_answer() -> None:
    with asking(Answer({"long": "x" * 1000}, cut=100), retries=1) as (client, server):
        with pytest.raises(ServerError, match="broke before the answer was complete") as caught:
            client.get("/")
        assert caught.value.maybe_done and len(server.asked) == 2


def test_a_slow_server_is_left_in_time() -> None:
    gate = threading.Event()
    with asking(Answer({}, wait=gate), timeout=0.3) as (client, server):
        start = time.monotonic()
        with pytest.raises(ServerError, match=r"within 0\.3 s") as caught:
            client.get("/")
        assert time.monotonic() - start < 5 and caught.value.maybe_done
        gate.set()
        assert len(server.asked) == 1, "a server that is slow is not given more to do"
        assert client.get("/", timeout=10) == {}, "control: with more time"


def test_a_server_that_drips_is_left_in_time() -> None:
    """Each byte comes in time, the whole answer does not."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3) as client:
            start = time.monotonic()
            with pytest.raises(ServerError, match=r"within 0\.3 s"):
                client.get("/")
            assert time.monotonic() - start < 3
        thread.join()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"Success: loaded", "not JSON but 'Success: loaded'"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", r"an HTML page \('Sign in'\)"),
        (b"<html>", "an HTML page"),
        (b"", "nothing"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_an_answer_that_is_no_json(body: bytes, words: str) -> None:
    with asking(Answer(body)) as (client, server):
        with pytest.raises(ServerError, match=words) as caught:
            client.get("/")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
        assert len(server.asked) == 1


def test_an_answer_as_text_where_that_is_wanted() -> None:
    with asking(Answer(b"Success: loaded")) as (client, _):
        assert client.post("/", {}, as_text=True) == "Success: loaded"


def test_a_server_cannot_steer_the_terminal() -> None:
    steering = {"error": {"message": "bad\x1b[2J\r\nworse \u202e" + "x" * 10_000}}
    with asking(Answer(steering, 400)) as (client, _):
        with pytest.raises(ServerError, match="bad") as caught:
            client.get("/")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no such model"}},
        {"object": "error", "message": "no such model"},
        {"detail": "no such model"},
        {"error": "no such model"},
    ],
)
def test_the_reason_of_each_kind_of_server_is_shown(body: object) -> None:
    with asking(Answer(body, 404)) as (client, server):
        with pytest.raises(ServerError, match="404, 'no such model'") as caught:
            client.get("/v1/x")
        assert caught.value.status == 404 and len(server.asked) == 1


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(Answer({"detail": "no"}, 401)) as (client, server):
        with pytest.raises(ServerError, match=r"is missing: set .* FACTSMITH_API_KEY"):
            client.get("/")
        assert "authorization" not in server.asked[0].headers
    monkeypatch.setenv("FACTSMITH_API_KEY", "s3cret")
    with asking(Answer({"detail": "wrong key s3cret"}, 401)) as (client, server):
        with pytest.raises(ServerError, match="was refused") as caught:
            client.get("/")
        assert server.asked[0].headers["authorization"] == "Bearer s3cret"
        assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("FACTSMITH_API_KEY", "s3cret\n\x01é")
    with pytest.raises(InputError, match="FACTSMITH_API_KEY") as refused:
        Client("http://host")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("key", ["s3cret-" * 8, "it's\"q\\uote-s3cret"])
def test_no_part_of_the_key_is_shown(key: str) -> None:
    for body in ({"error": {"message": "x" * 280 + key}}, key * 20, {"detail": [key]}):
        with asking(Answer(body, 500), api_key=key) as (client, _):
            with pytest.raises(ServerError) as caught:
                client.get("/")
            assert "s3cret" not in str(caught.value), caught.value
    plain = Answer({"error": {"message": "plain"}}, 500)
    with asking(plain, api_key=key) as (client, _), pytest.raises(ServerError, match="plain"):
        client.get("/")


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), 1e9])
def test_a_time_out_that_is_none(timeout: float) -> None:
    with pytest.raises(InputError, match="timeout is"):
        Client("http://host", timeout=timeout)


def test_a_head_that_comes_byte_by_byte_ends_at_the_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100:
                    if stop.wait(0.1):
                        return
                    connection.sendall(bytes([byte]))

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        start = time.monotonic()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with (
            Client(url, timeout=0.5, retries=0) as client,
            pytest.raises(ServerError, match=r"did not answer within 0\.5 s"),
        ):
            client.get("/")
        assert time.monotonic() - start < 5
        stop.set()
        thread.join()


def test_a_redirect_is_not_followed() -> None:
    with scripted(in_turn(FINE)) as other:
        moved = Answer({}, 307, {"Location": f"{other.url}/elsewhere"})
        refused = pytest.raises(ServerError, match=r"sends on to .*/elsewhere")
        with asking(moved, api_key="s3cret") as (client, _), refused:
            client.get("/")
        assert other.asked == [], "the key went nowhere else"


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with asking(FINE) as (client, _):
        assert client.get("/") == {"fine": True}


def test_without_httpx_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InputError, match=r'pip install "factsmith\[serve\]"'):
        Client("http://host")


def test_a_closed_client_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 20.0)
    with asking(Answer({}, 503)) as (client, server):
        threading.Timer(0.2, client.close).start()
        start = time.monotonic()
        with pytest.raises(ServerError, match="503"):
            client.get("/")
        assert time.monotonic() - start < 5 and len(server.asked) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a certificate that nobody knows, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(
            [*command, "-out", str(paths[0]), "-keyout", str(paths[1])],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl to make a certificate")
    return paths


def test_an_unknown_certificate_is_refused(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with scripted(in_turn(FINE)) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        monkeypatch.setattr(server.httpd, "handle_error", lambda *_: None)
        server.httpd.socket = context.wrap_socket(server.httpd.socket, server_side=True)
        url = server.url.replace("http:", "https:")
        with Client(url) as client, pytest.raises(ServerError, match="SSL_CERT_FILE") as caught:
            client.get("/")
        assert "not secure" in str(caught.value) and server.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with Client(url) as client:
            assert client.get("/") == {"fine": True}, "control: a certificate that is known"


def test_the_error_is_one_of_ours_with_a_code_of_its_own() -> None:
    assert issubclass(ServerError, FactsmithError) and ServerError.exit_code == 6
    codes = [kind.exit_code for kind in FactsmithError.__subclasses__()]
    assert codes.count(6) == 1
