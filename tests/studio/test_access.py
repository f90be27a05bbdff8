"""Who may come in: hosts, the start-up link, sessions, forms of other sites, passwords."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from clocks import Clock
from factsmith.core.errors import InputError
from factsmith.studio import access as module
from factsmith.studio.access import IDLE_SECONDS, MOST_SESSIONS, Access, Guesses, read_password
from factsmith.studio.guard import local
from guarded import HOST, Browser, small_app

PASSWORD = "correct horse battery"


@pytest.fixture
def access() -> Access:
    return Access(8420)


@pytest.fixture
def browser(access: Access) -> Browser:
    return Browser(access)


def test_the_link_opens_a_session_and_leaves_no_token(browser: Browser) -> None:
    token = browser.access.token
    assert browser.get("/").status_code == 401
    answer = browser.get(f"/ask/ask?a=1&token={token}&a=2&b", site="none")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/ask/ask?a=1&a=2&b"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("factsmith-studio-8420=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert token not in cookie
    assert browser.get("/ask/ask").status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_link_on_another_site_opens_too(browser: Browser, site: str) -> None:
    answer = browser.get(f"/ask/ask?a=%22&token={browser.access.token}", site=site)
    assert answer.status_code == 200 and browser.access.token not in answer.text
    assert 'content="0; url=/ask/ask?a=%22"' in answer.text
    assert "SameSite=Strict" in answer.headers["set-cookie"]
    assert browser.get("/ask/ask?a=%22").status_code == 200


def test_wrong_tokens_open_nothing(browser: Browser) -> None:
    for token in ("", "x", browser.access.token[:-1], browser.access.token + "x", "%00", "%ff"):
        answer = browser.get(f"/?token={token}")
        assert answer.status_code == 401 and "set-cookie" not in answer.headers, token
    assert "earlier start" in answer.text
    assert browser.client.post(f"/?token={browser.access.token}").status_code == 401


def test_an_argument_named_token_stays_in_the_address(browser: Browser) -> None:
    browser.enter()
    assert browser.get("/ask/ask?token=3").status_code == 200
    answer = browser.get(f"/ask/ask?token=3&token={browser.access.token}")
    assert answer.headers["location"] == "/ask/ask?token=3"
    assert "set-cookie" not in answer.headers, "there is a session already"


def test_a_made_up_cookie_opens_nothing(browser: Browser) -> None:
    name = browser.access.cookie
    for value in ("", "x", browser.access.token, "é"):
        answer = browser.client.get("/", headers={"cookie": f"{name}={value}".encode()})
        assert answer.status_code == 401, value
    session = browser.access.begin()
    right = f"other=1; {name}=tossed; {name}={session}"
    assert browser.client.get("/", headers={"cookie": right}).status_code == 200
    other = Access(8421)
    wrong = f"{other.cookie}={session}"
    assert browser.client.get("/", headers={"cookie": wrong}).status_code == 401


def test_hosts(browser: Browser) -> None:
    browser.enter()
    for host in ("127.0.0.1:8420", "localhost:8420", "[::1]:8420", "LOCALHOST:8420"):
        assert browser.access.is_host(host), host
    for host in (
        "evil.example:8420",
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost.evil.example:8420",
        "127.0.0.1:8420.evil.example",
        "evil@127.0.0.1:8420",
        "",
        ":8420",
        "[::1]",
    ):
        assert not browser.access.is_host(host), host
        answer = browser.get("/", host=host)
        assert answer.status_code == 421 and "<i>" not in answer.text, host
    assert browser.get("/", host="localhost:8420").status_code == 200


def test_hosts_that_the_user_names() -> None:
    access = Access(8420, names=["gpu-3.example", "proxy:9000", "fe80::1"])
    for host in ("gpu-3.example", "GPU-3.example:8420", "gpu-3.example:443", "proxy:9000"):
        assert access.is_host(host), host
    assert access.is_host("[fe80::1]:8420")
    for host in ("proxy", "proxy:8420", "gpu-3.example:x", "gpu-3.example.evil", "x.gpu-3.example"):
        assert not access.is_host(host), host
    network = Access(8420, any_address=True)
    for host in ("192.0.2.7:8420", "[2001:db8::1]:8420", "localhost:8420"):
        assert network.is_host(host), host
    for host in ("192.0.2.7", "192.0.2.7:80", "evil.example:8420", "192.0.2.7.evil.example:8420"):
        assert not network.is_host(host), host
    assert not Access(8420).is_host("192.0.2.7:8420")
    for name in ("", "http://x", "a/b", "a b", "a\r\nb"):
        with pytest.raises(InputError, match="as browsers use it"):
            Access(8420, names=[name])


def test_another_site_cannot_send_a_form(browser: Browser) -> None:
    csrf = browser.enter().csrf
    form = {"csrf": csrf, "subject": "Edwin"}
    assert browser.post("/patch/apply", data=form).status_code == 200
    assert browser.post("/patch/apply", data=form, site="cross-site").status_code == 403
    assert browser.post("/patch/apply", data=form, site="same-site").status_code == 403
    for origin in ("null", "http://evil.example", "http://127.0.0.1:3000", "ftp://127.0.0.1:8420"):
        answer = browser.post("/patch/apply", data=form, headers={"origin": origin})
        assert answer.status_code == 403, origin
    for token in ("", "x", csrf[:-1], browser.access.token):
        answer = browser.post("/patch/apply", data={**form, "csrf": token})
        assert answer.status_code == 403 and "not of your session" in answer.text
    assert browser.post("/patch/apply", data={"subject": "Edwin"}).status_code == 403


def test_a_form_has_its_token_in_a_header_or_in_a_field(browser: Browser) -> None:
    csrf = browser.enter().csrf
    header = {"X-CSRF-Token": csrf}
    for options in (
        {"headers": header, "data": {"a": "bcd"}},
        {"data": {"csrf": csrf}},
        {"headers": header, "files": {"file": ("a.yaml", b"xyz")}},
        {"data": {"csrf": csrf}, "files": {"file": ("a.yaml", b"xyz")}},
    ):
        answer = browser.post("/patch/apply", **options)
        assert answer.status_code == 200 and answer.json()["got"] > 2, options
    for options in (
        {"files": {"file": ("a.yaml", b"xyz")}},
        {"files": {"csrf": ("csrf", csrf.encode())}},
        {"json": {"csrf": csrf}},
        {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
    ):
        assert browser.post("/patch/apply", **options).status_code in (400, 403), options
    other = Browser(browser.access, app=small_app(browser.access)).enter()
    assert other.csrf != csrf
    assert other.post("/patch/apply", data={"csrf": csrf}).status_code == 403


def test_another_site_can_link_and_not_embed(browser: Browser) -> None:
    browser.enter()
    answer = browser.get("/ask/ask?a=1", site="same-site")
    assert answer.status_code == 403, "a cookie came along, and the page starts a job"
    assert 'href="/ask/ask?a=1"' in answer.text and "Continue" in answer.text
    assert browser.get("/api/v1/log", site="same-site").status_code == 403
    for dest, mode in (("iframe", "navigate"), ("script", "no-cors"), ("empty", "cors")):
        headers = {"sec_fetch_dest": dest, "sec_fetch_mode": mode}
        assert browser.get("/", site="cross-site", **headers).status_code == 403, dest
        assert browser.get("/static/a.js", site="cross-site", **headers).status_code == 403
        foreign = {"origin": "http://127.0.0.1:3000", "upgrade": "websocket"}
        assert browser.client.get("/", headers=foreign).status_code == 403
        assert browser.client.get("/", headers={**foreign, "origin": HOST}).status_code == 200
        if dest != "iframe":
            assert browser.get("/", **headers).status_code == 200, "its own pages may"


def test_a_colleagues_link_offers_to_continue(browser: Browser) -> None:
    answer = browser.get("/ask/ask?prompt=%22%3E%3Cb%3E&x=1", site="cross-site")
    assert answer.status_code == 401
    assert 'href="/ask/ask?prompt=%22%3E%3Cb%3E&amp;x=1"' in answer.text
    assert "Continue" in answer.text and "<b>" not in answer.text
    assert "Continue" not in browser.get("/ask/ask?prompt=x").text


def test_programs_have_a_bearer_token_and_no_form(browser: Browser) -> None:
    client, token = browser.client, browser.access.token
    right = {"authorization": f"Bearer {token}"}
    assert client.post("/api/v1/apply", headers=right, json={}).json() == {"bytes": 2}
    assert client.get("/api/v1/log", headers=right).status_code == 200
    for wrong in ("Bearer x", "Bearer ", f"Basic {token}", token, f"Bearer {token}x"):
        answer = client.post("/api/v1/apply", headers={"authorization": wrong}, json={})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert error["exit_code"] == 2 and "Authorization: Bearer" in error["message"]
    assert client.get("/api/v1/log").status_code == 401
    assert client.get(f"/api/v1/log?token={token}").status_code == 401
    assert client.get("/", headers=right).status_code == 401, "pages have sessions"
    csrf = browser.enter().csrf
    assert browser.post("/api/v1/apply", json={}).status_code == 403
    assert browser.post("/api/v1/apply", json={}, headers={"x-csrf-token": csrf}).status_code == 200
    foreign = {**right, "origin": "http://evil.example"}
    assert client.post("/api/v1/apply", headers=foreign, json={}).status_code == 403


def test_methods_and_upgrades(browser: Browser) -> None:
    browser.enter()
    for method in ("OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "PROPFIND"):
        answer = browser.client.request(method, "/")
        assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD, POST", method
    assert browser.client.head("/static/a.css").status_code != 401
    with pytest.raises(WebSocketDisconnect) as refused:
        browser.client.websocket_connect("/events").__enter__()
    assert refused.value.code == 1008


def test_addresses_that_no_page_has(browser: Browser) -> None:
    browser.enter()
    for path in (
        "/static/../ledger.db",
        "/static/%2e%2e/x",
        "/static/..%2fx",
        "/a%00b",
        "/%0d%0aX:1",
    ):
        answer = browser.client.get(path)
        assert answer.status_code in (400, 404), path
        assert "static x" not in answer.text, path
    assert browser.client.get("/static/a..b.js").status_code == 200


def test_a_header_that_is_sent_twice_is_refused(browser: Browser) -> None:
    browser.enter()
    for name, one, other in (
        ("host", "127.0.0.1:8420", "evil.example"),
        ("origin", HOST, "http://evil.example"),
        ("authorization", "a", "b"),
    ):
        pairs = [(name, one), (name, other)]
        assert browser.client.get("/api/v1/log", headers=pairs).status_code == 400, name


def test_static_files_and_refusals_need_no_session(browser: Browser) -> None:
    assert browser.get("/static/a.css").status_code == 200
    assert browser.client.post("/static/a.css").status_code == 401


def test_a_fault_has_a_page_without_a_traceback(browser: Browser) -> None:
    answer = browser.enter().get("/broken")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert "content-security-policy" in answer.headers


def test_sessions_are_limited_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    access = Access(8420, clock=clock)
    first = access.begin()
    others = [access.begin() for _ in range(MOST_SESSIONS - 1)]
    assert access.session(first) is not None
    access.begin()
    assert access.session(first) is not None, "the one used longest ago ended"
    assert access.session(others[0]) is None and access.session(others[1]) is not None
    access.end(others[1])
    assert access.session(others[1]) is None
    clock.now += IDLE_SECONDS / 2
    assert access.session(first) is not None
    clock.now += IDLE_SECONDS / 2 + 1
    assert access.session(first) is not None, "it was used in between"
    assert access.session(others[2]) is None


# ── a password ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def locked() -> Browser:
    return Browser(Access(8420, password=PASSWORD))


def test_login_and_logout(locked: Browser) -> None:
    page = locked.get("/ask/ask?a=1")
    assert page.status_code == 401 and 'action="/login"' in page.text
    assert 'value="/ask/ask?a=1"' in page.text
    form = {"password": PASSWORD, "next": "/ask/ask?a=1"}
    answer = locked.post("/login", data=form)
    assert answer.status_code == 303 and answer.headers["location"] == "/ask/ask?a=1"
    csrf = locked.csrf
    assert locked.get("/login").headers["location"] == "/"
    assert locked.post("/logout").status_code == 403
    assert locked.get("/").status_code == 200
    cookie = locked.client.cookies[locked.access.cookie]
    assert locked.post("/logout", data={"csrf": csrf}).status_code == 303
    assert locked.get("/").status_code == 401
    locked.client.cookies.set(locked.access.cookie, cookie)
    assert locked.get("/").status_code == 401, "the session ended, not the cookie alone"


def test_wrong_passwords_wait(locked: Browser) -> None:
    clock = Clock()
    locked.access.guesses = Guesses(clock)
    for _ in range(3):
        answer = locked.post("/login", data={"password": "wrong"})
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
    form = {"password": PASSWORD}
    answer = locked.post("/login", data=form)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    clock.now += 1.1
    assert locked.post("/login", data={"password": "wrong"}).status_code == 401
    clock.now += 1.1
    assert locked.post("/login", data=form).status_code == 429, "the wait doubles"
    clock.now += 1.1
    assert locked.post("/login", data=form).status_code == 303
    assert locked.access.guesses.wait("unknown") == 0


def test_guesses_of_many_addresses_wait_together_and_are_bounded() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    for n in range(3000):
        guesses.wrong(f"10.0.{n // 256}.{n % 256}")
    assert guesses.wait("192.0.2.1") > 0
    assert len(guesses._wrong) <= 1000
    clock.now += 61
    assert guesses.wait("192.0.2.1") == 0


def test_login_is_refused_from_other_sites_and_without_a_password(browser: Browser) -> None:
    assert browser.post("/login", data={"password": ""}).status_code == 401
    locked = Browser(Access(8420, password=PASSWORD))
    form = {"password": PASSWORD}
    assert locked.post("/login", data=form, site="cross-site").status_code == 403
    assert locked.post("/login", data=form, headers={"origin": "null"}).status_code == 403
    for wrong in ("", PASSWORD + " ", PASSWORD.upper(), "\0", "x" * 9_000):
        assert not locked.access.is_password(wrong)
    assert locked.post("/login", data={"password": "x" * 20_000}).status_code == 413


def test_no_way_leads_elsewhere(locked: Browser) -> None:
    elsewhere = [
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        " //evil.example",
        "http://evil.example",
        "javascript:alert(1)",
        "evil.example",
        "",
    ]
    for address in elsewhere:
        assert local(address) == "/", address
        answer = locked.post("/login", data={"password": PASSWORD, "next": address})
        assert answer.headers["location"] == "/", address
    assert local("/a\r\nSet-Cookie: x=1") == "/aSet-Cookie:x=1"
    assert local("/a?b=%2F%2Fevil&c=é") == "/a?b=%2F%2Fevil&c=%C3%A9"
    token = locked.access.token
    answer = locked.client.get(f"{HOST}//evil.example/?token={token}")
    assert answer.headers["location"] == "/"


def test_password_files(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\nsecond line\n")
    file.chmod(0o600)
    assert read_password(file) == (PASSWORD, None)
    file.chmod(0o644)
    password, warning = read_password(file)
    assert password == PASSWORD and warning is not None and "chmod 600" in warning
    for text in (b"", b"\n", b"short\n", b"          \n", b"\xff" * 20, b"x" * 5000):
        file.write_bytes(text)
        with pytest.raises(InputError, match="password") as error:
            read_password(file)
        assert error.value.argument == "password_file"
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_password(missing)


def test_tokens_of_the_user() -> None:
    assert Access(8420, token="x" * 20).is_token("x" * 20)
    for token in ("", "short", "x" * 19 + " ", "é" * 20):
        with pytest.raises(InputError, match="at least 20"):
            Access(8420, token=token)
    assert Access(8420).token != Access(8420).token
    assert len(Access(8420).token) >= 40


def test_tls_makes_cookies_secure_and_origins_https() -> None:
    access = Access(8420, secure=True)
    assert access.cookie == "__Host-factsmith-studio-8420"
    assert "Secure" in access.set_cookie("x").split("; ")
    assert access.is_origin("https://localhost:8420", "localhost:8420")
    assert not access.is_origin("http://localhost:8420", "localhost:8420")
    assert access.link("localhost").startswith("https://localhost:8420/?token=")
    answer = TestClient(small_app(access), base_url="https://localhost:8420").get("/")
    assert "max-age" in answer.headers["strict-transport-security"]


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    access = Access(8420, password=PASSWORD)
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    assert not access.is_token("x") and access.is_token(access.token)
    assert not access.is_password("x") and access.is_password(PASSWORD)
    assert access.same("a", "a") and not access.same("a", "b")
    assert len(compared) == 6 and all(len(digest) == 32 for digest in compared)
