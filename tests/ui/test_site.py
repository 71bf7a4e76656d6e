"""Mounting: which requests are the page's, its policy, what stays shut, what importing costs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import subprocess
import sys

import fastapi
import httpx
import pytest

import hadal.ui
from hadal.ui import site
from hadal.ui.api import Client
from hadal.ui.pages import PAGES, Page, build_site
from tests.ui.conftest import Live

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_the_root_answers_by_what_is_asked_for(live: Live) -> None:
    for accept in ("*/*", "application/json", ""):
        answer = httpx.get(live.url + "/", headers={"accept": accept}, timeout=60)
        assert (answer.status_code, answer.text) == (200, "Ollama is running")
    page = httpx.get(live.url + "/", headers=HTML, timeout=60)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "<title>Hadal</title>" in page.text and "gradio_config" in page.text
    head = httpx.head(live.url + "/", headers=HTML, timeout=60)
    assert head.status_code == 200 and head.content == b""
    assert httpx.post(live.url + "/", headers=HTML, timeout=60).status_code == 405  # the server's own answer


def test_html_names_nothing_outside_and_its_policy_covers_its_scripts(live: Live) -> None:
    page = httpx.get(live.url + "/", headers={**HTML, "accept-encoding": "br, gzip"}, timeout=60)
    policy = page.headers["content-security-policy"]
    assert "'unsafe-inline'" not in re.search(r"script-src[^;]*", policy).group()  # type: ignore[union-attr]
    for rule in (
        "default-src 'self'",
        "object-src 'none'",
        "img-src 'self' data: blob:",
        "frame-ancestors 'none'",
    ):
        assert rule in policy
    inline = re.findall(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", page.text, re.DOTALL)
    assert len(inline) >= 3
    for script in inline:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
    assert loaded and all(not re.match(r"(?:https?:)?//", url) for url in loaded)
    assert "og:image" not in page.text and "googleapis" not in page.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/hostname"),
        ("GET", "/gradio_api/file/etc/hostname"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/send"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/openapi.json"),
        ("POST", "/login"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
        ("GET", "/_hadal/../site.py"),
        ("GET", "/_hadal/%2e%2e/site.py"),
        ("GET", "/assets/..%2f..%2froutes.py"),
        ("GET", "/static/%2e%2e/%2e%2e/%2e%2e/routes.py"),
    ],
)
def test_other_doors_stay_shut(live: Live, method: str, path: str) -> None:
    answer = httpx.request(method, live.url + path)
    assert answer.status_code in (403, 404, 405), answer.text[:200]
    assert "import" not in answer.text


def test_assets_are_kept_and_own_files_are_checked(live: Live) -> None:
    page = httpx.get(live.url + "/", headers=HTML, timeout=60).text
    asset = re.search(r"/assets/index-[\w-]+\.js", page)
    assert asset is not None
    assert "immutable" in httpx.get(live.url + asset.group(), timeout=60).headers["cache-control"]
    for name in ("page.js", "page.css", "favicon.svg"):
        own = httpx.get(f"{live.url}/_hadal/{name}")
        assert own.status_code == 200 and own.headers["cache-control"] == "no-cache"


def test_a_giant_question_is_hung_up_on(live: Live) -> None:
    huge = b'{"data": ["' + b"x" * (site.MAX_REQUEST_BYTES + 1) + b'"]}'
    try:
        answer = httpx.post(live.url + "/gradio_api/queue/join", content=huge, timeout=60)
        assert answer.status_code >= 400
    except httpx.HTTPError:
        pass  # the connection was closed: as good
    assert httpx.get(live.url + "/", headers=HTML, timeout=60).status_code == 200


def test_the_config_holds_no_key_and_no_public_endpoint(live_with_key: Live) -> None:
    page = httpx.get(live_with_key.url + "/", headers=HTML).text
    config = httpx.get(live_with_key.url + "/config").text
    assert "correct-horse" not in page + config
    info = httpx.get(live_with_key.url + "/gradio_api/info").json()
    assert info["named_endpoints"] == {} and info["unnamed_endpoints"] == {}


def test_importing_and_mounting_do_not_import_gradio() -> None:
    code = (
        "import sys, fastapi, hadal.ui\n"
        "hadal.ui.mount(fastapi.FastAPI(), base_url='http://127.0.0.1:1')\n"
        "print('gradio' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]


def test_without_gradio_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(hadal.ui.UiError, match=r"pip install 'hadal\[ui\]'"):
        hadal.ui.mount(fastapi.FastAPI(), base_url="http://127.0.0.1:1")


def test_drain_hooks_are_kept() -> None:
    app = fastapi.FastAPI()
    called: list[int] = []
    app.state.on_drain = [lambda: called.append(1)]
    hadal.ui.mount(app, base_url="http://127.0.0.1:1")
    assert len(app.state.on_drain) == 2
    for hook in app.state.on_drain:
        hook()
    assert called == [1]


def test_pages_can_be_added(live: Live) -> None:
    import gradio as gr

    def extra(client: Client) -> None:
        gr.Markdown("# More about " + client.base_url)

    pages = (*PAGES[:1], Page("More", "more", extra))
    blocks = build_site(Client("http://127.0.0.1:1"), pages)
    assert ("more", "More") in [(path, name) for path, name, _ in blocks.pages]
    bars = [c["props"]["main_page_name"] for c in blocks.config["components"] if c["type"] == "navbar"]
    assert bars == ["Chat", "Chat"]  # one on each page
    app = hadal.ui.mount(fastapi.FastAPI(), base_url="http://127.0.0.1:1", pages=pages)

    async def fetch(path: str, accept: str) -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:1"
        ) as http:
            return await http.get(path, headers={"accept": accept})

    async def look() -> None:
        page = await fetch("/more", "text/html")
        assert page.status_code == 200 and "More about http://127.0.0.1:1" in page.text
        assert "<title>Hadal</title>" in page.text and "content-security-policy" in page.headers
        assert (await fetch("/more", "*/*")).status_code == 404

    asyncio.run(look())
    with pytest.raises(ValueError, match='must have the path ""'):
        build_site(Client("http://127.0.0.1:1"), pages[1:])
