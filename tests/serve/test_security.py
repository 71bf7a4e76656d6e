"""Who may speak to the server (cases 21 to 24), and what an answer carries."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from hadal.serve import Settings, SettingsError, create_app
from hadal.serve.app import OLLAMA, OPENAI, PREFIXES, SERVER
from hadal.serve.security import host_name
from hadal.serve.settings import is_loopback
from tests.helpers.live_server import LiveServer, live_server
from tests.serve.fake_engine import FakeAsyncEngine

KEY = "sk-a-long-enough-key"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(fake: FakeAsyncEngine) -> Iterator[LiveServer]:
    with live_server(fake, api_keys=(KEY, "another-key-of-ours")) as server:
        yield server


@pytest.fixture(scope="module")
def stranger(locked: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url, trust_env=False) as http:
        yield http


def all_routes() -> list[tuple[str, str]]:
    routes = [(method, prefix + path) for prefix in PREFIXES for method, path, _ in OPENAI]
    routes += [(method, path) for method, path, _ in (*SERVER, *OLLAMA)]
    routes += [
        ("GET", "/"),
        ("GET", "/nothing"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/files"),
    ]
    return [(method, path.replace("{model_id:path}", "fake")) for method, path in routes]


@pytest.mark.parametrize(("method", "path"), all_routes())
def test_21_no_route_without_the_key(stranger: httpx.Client, method: str, path: str) -> None:
    public = path in ("/health", "/ready")
    given = ["", "Bearer wrong", f"Bearer {KEY}x", KEY, "Basic !!!", f"bearer{KEY}", "Bearer"]
    for authorization in given:
        response = stranger.request(method, path, headers={"authorization": authorization, "x-api-key": KEY})
        assert response.status_code == (200 if public else 401), (path, authorization)
        if not public:
            assert "API key" in str(response.json()["error"])
            assert response.headers["www-authenticate"] == "Bearer"
    response = stranger.request(method, path, headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code != 401


@pytest.mark.parametrize(
    "path", ["//v1/models", "/v1/../v1/models", "/V1/models", "/%76%31/models", "/v1/models/"]
)
def test_21_no_way_around_by_spelling(locked: LiveServer, path: str) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), 5) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        assert b" 401 " in raw.recv(4096).split(b"\r\n")[0]


def test_21_a_browser_may_give_the_key_as_a_password(locked: LiveServer) -> None:
    with httpx.Client(base_url=locked.url, trust_env=False) as http:
        asked = http.get("/v1/models", headers={"accept": "text/html"})
        assert asked.headers["www-authenticate"].startswith("Basic")
        assert http.get("/v1/models", auth=("anyone", KEY)).status_code == 200
        assert http.get("/v1/models", auth=("anyone", "wrong")).status_code == 401


def test_each_key_has_its_own_cache_salt(locked: LiveServer, fake: FakeAsyncEngine) -> None:
    with httpx.Client(base_url=locked.url, trust_env=False) as http:
        for key in (KEY, "another-key-of-ours", KEY):
            http.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {key}"})
    salts = [salt for _, _, salt in fake.seen]
    assert salts[0] == salts[2] != salts[1]
    assert all(salts)
    assert KEY not in "".join(salts)


EVIL_HOSTS = [
    "evil.example",
    "evil.example:80",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "10.0.0.5",
    "",
    "127.0.0.1@evil.example",
    "evil.example#127.0.0.1",
    "[::1",
    "0x7f.1",
]


@pytest.mark.parametrize("host", EVIL_HOSTS)
def test_22_evil_host(client: httpx.Client, host: str) -> None:
    response = client.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:1", "localhost", "LOCALHOST:8", "[::1]:9", "a.localhost"]
)
def test_22_own_host(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_22_no_host_at_all(served: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 5) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b" 403 " in raw.recv(4096).split(b"\r\n")[0]


EVIL_ORIGINS = [
    "http://evil.example",
    "https://127.0.0.1.evil.example",
    "null",
    "http://127.0.0.1@evil.example",
    "chrome-extension://abc",
    "file://",
    "http://127.0.0.1/x",
    "http://[",
    "http://10.0.0.5",
]


@pytest.mark.parametrize("origin", EVIL_ORIGINS)
def test_22_evil_origin(client: httpx.Client, fake: FakeAsyncEngine, origin: str) -> None:
    """Also as the simple POST that no browser asks leave for."""
    headers = {"origin": origin, "content-type": "text/plain"}
    response = client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    assert not fake.seen
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    assert client.options("/v1/chat/completions", headers=preflight).status_code == 403


# Page Assist sends its origin without a port.
@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1", "http://localhost:3000", "https://localhost", "http://[::1]:5"]
)
def test_22_own_origin(client: httpx.Client, origin: str) -> None:
    response = client.post("/v1/chat/completions", json=CHAT, headers={"origin": origin})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in response.headers
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = client.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-headers"] == "authorization"


def test_22_named_hosts_and_origins(fake: FakeAsyncEngine) -> None:
    options = {"allowed_hosts": ("model.example",), "allowed_origins": ("https://app.example",)}
    with live_server(fake, **options) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/v1/models", headers={"host": "model.example:80"}).status_code == 200
        assert http.get("/v1/models", headers={"host": "other.example"}).status_code == 403
        assert http.get("/v1/models", headers={"origin": "https://app.example"}).status_code == 200
        assert http.get("/v1/models", headers={"origin": "https://app.example.evil"}).status_code == 403
        # A page that this very name served.
        same = {"host": "model.example:80", "origin": "http://model.example:80"}
        assert http.get("/v1/models", headers=same).status_code == 200


def test_a_public_bind_takes_addresses_but_no_strange_names(fake: FakeAsyncEngine) -> None:
    bearer = {"authorization": f"Bearer {KEY}"}
    with (
        live_server(fake, host="0.0.0.0", api_keys=(KEY,)) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, headers=bearer) as http,
    ):
        assert http.get("/v1/models", headers={"host": "192.168.1.7:11435"}).status_code == 200
        assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        assert http.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 403


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": "0.0.0.0"}, "API key"),
        ({"host": "192.168.0.4"}, "API key"),
        ({"host": "::"}, "API key"),
        ({"host": "example.org"}, "API key"),
        ({"api_keys": ("short",)}, "at least 8"),
        ({"api_keys": ("with a newline\n",)}, "printable"),
        ({"allowed_hosts": ("*",)}, "rebinding"),
        ({"allowed_origins": ("*",)}, "name each origin"),
        ({"port": 70000}, "port"),
        ({"body_timeout": 0}, "body_timeout"),
        ({"max_queue": -1}, "max_queue"),
    ],
)
def test_unsafe_settings_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        Settings(**options)  # type: ignore[arg-type]


def test_loopback_names() -> None:
    assert all(
        map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LocalHost.", "x.localhost"])
    )
    assert not any(
        map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "evil.example", "127.0.0.1.evil", "localhost.evil"])
    )
    assert host_name("[::1]:80") == "::1"
    assert host_name("a b") is None


def test_23_one_escaped_log_line(
    served: LiveServer, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hadal.serve"):
        client.get("/v1/models/a%0d%0aINFO%20forged%1b[31m")
        client.post("/v1/chat/completions", json={**CHAT, "model": "x\r\nINFO forged", "user": "a\nb"})
        client.post("/v1/chat/completions", json=CHAT)
        time.sleep(0.05)
    lines = [record.getMessage() for record in caplog.records if record.name == "hadal.serve"]
    assert len(lines) == 3
    for line in lines:
        assert line.isprintable()
        assert line.isascii()
    assert "\\r\\nINFO forged\\x1b" in lines[0]
    assert "404" in lines[0]
    assert "POST /v1/chat/completions 200" in lines[2]
    assert "model=fake" in lines[2]
    assert "completion_tokens=2" in lines[2]


def test_protective_headers(client: httpx.Client) -> None:
    for response in (
        client.get("/v1/models"),
        client.get("/nothing"),
        client.get("/v1/models", headers={"host": "x.y"}),
    ):
        assert response.headers["content-security-policy"].startswith("default-src 'none'")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "server" not in response.headers


def test_html_gets_the_page_policy(fake: FakeAsyncEngine) -> None:
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    app = create_app(fake, Settings())

    async def page(request: object) -> HTMLResponse:
        return HTMLResponse("<p>hi</p>")

    app.router.routes.append(Route("/", page))
    policy = _get_sync(app, "/", {"accept": "text/html,*/*"})
    assert policy.text == "<p>hi</p>"
    assert policy.headers["content-security-policy"].startswith("default-src 'self'")
    assert "frame-ancestors 'none'" in policy.headers["content-security-policy"]
    assert _get_sync(app, "/", {"accept": "*/*"}).text == "Ollama is running"


def _get_sync(app: object, path: str, headers: dict[str, str]) -> httpx.Response:
    import asyncio

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.get(path, headers=headers)

    return asyncio.run(get())


@pytest.fixture(scope="module")
def hasty(fake: FakeAsyncEngine) -> Iterator[LiveServer]:
    with live_server(fake, header_timeout=0.4, body_timeout=0.4, keep_alive_timeout=1.0) as server:
        yield server


SLOW = {
    "nothing sent": b"",
    "half a request line": b"GET /v1/mod",
    "half the headers": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
    "no body": b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n",
    "half a body": b'POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{"a"',
}


@pytest.mark.parametrize("what", SLOW)
def test_24_slow_client(hasty: LiveServer, what: str) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), 5) as raw:
        start = time.monotonic()
        raw.sendall(SLOW[what])
        answer = b""
        while chunk := raw.recv(4096):
            answer += chunk
        assert 0.3 < time.monotonic() - start < 20
        assert b" 408 " in answer if "body" in what else not answer


def test_24_a_dribbled_header_does_not_reset_the_clock(hasty: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), 5) as raw:
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 30:
                raw.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - start < 20


def test_24_an_idle_connection_is_closed(hasty: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), 5) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        start = time.monotonic()
        while raw.recv(4096):
            pass
        assert 0.5 < time.monotonic() - start < 20


def test_24_a_long_answer_outlives_the_clocks(hasty: LiveServer, fake: FakeAsyncEngine) -> None:
    fake.delay = 0.1
    fake.script = lambda prompt, params: "</think>" + "x" * 12
    with httpx.Client(base_url=hasty.url, trust_env=False) as http:
        answer = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 14}).json()
        assert answer["choices"][0]["message"]["content"] == "x" * 12
        assert http.get("/health").status_code == 200
