"""The conversation with a server, against a small server that answers as OpenAI's API does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hadal.cli.options import Sampling
from hadal.cli.session import answer_once
from hadal.cli.speaker import RemoteSpeaker
from hadal.cli.terminal import CliError
from tests.cli.helpers import ROOT, hadal, program

KEY = "secret-key"
USAGE = {"prompt_tokens": 9, "prompt_cache_hit_tokens": 4, "completion_tokens": 5}


class Api(BaseHTTPRequestHandler):
    """Models and streamed chat; `server.seen` keeps the requests, `server.slow` makes the stream endless."""

    server: Any

    def log_message(self, *arguments: object) -> None:
        pass

    def _json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {KEY}":
            return True
        self._json(401, {"error": {"message": "wrong key", "type": "authentication_error"}})
        return False

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {})
        elif self._allowed():
            models = {"/v1/models": {"data": [{"id": "tiny"}]}, "/api/ps": {"models": [{"name": "tiny"}]}}
            self._json(200, models[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        if not self._allowed():
            return
        if body["messages"][-1]["content"] == "too long":
            self._json(400, {"error": {"message": "the prompt has 99 tokens, the context 50", "code": "x"}})
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b": keep-alive\n\n")
        self._delta({"role": "assistant", "content": ""})
        self._delta({"reasoning_content": "hm", "reasoning": "hm"})
        self._delta({"content": "forty"})
        while self.server.slow:
            time.sleep(0.05)
            try:
                self._delta({"content": " more"})
            except OSError:
                return  # the client hung up, as it should on Ctrl-C
        self._delta({"content": "-seven"}, "stop")
        self._event({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")

    def _delta(self, delta: dict[str, str], reason: str | None = None) -> None:
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    def _event(self, value: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()


@pytest.fixture
def api() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.seen, server.slow = [], False  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.slow = False  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_reasoning_content_usage_and_settings(api: Any) -> None:
    speaker = RemoteSpeaker(api.url + "/v1/", KEY)
    question = [{"role": "user", "content": "40 + 7?"}]
    answer, stopped = answer_once(speaker, question, Sampling(temperature=0.0, max_tokens=9), False, None)
    assert (answer.content, answer.reasoning, answer.finish_reason) == ("forty-seven", "hm", "stop")
    assert (answer.rate.prompt_tokens, answer.rate.cached_tokens, answer.rate.completion_tokens) == (9, 4, 5)
    assert answer.rate.decode is not None
    assert not stopped
    asked = api.seen[0]
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("tiny", 0.0, 9)
    assert asked["thinking"] == {"type": "disabled"}
    assert asked["stream_options"] == {"include_usage": True}
    assert "top_p" not in asked, "what the user did not set is the server's to choose"


@pytest.mark.parametrize(
    ("url", "key", "model", "expected"),
    [
        (
            "{url}",
            "wrong",
            None,
            "answered 401: wrong key; give the server's key with --api-key or HADAL_API_KEY",
        ),
        ("{url}", KEY, "huge", "serves tiny, not 'huge'"),
        ("http://127.0.0.1:9", KEY, None, "no answer from http://127.0.0.1:9"),
        ("gopher://x", KEY, None, "is no server's address"),
    ],
)
def test_a_server_that_cannot_be_used(api: Any, url: str, key: str, model: str | None, expected: str) -> None:
    with pytest.raises(CliError) as fault:
        RemoteSpeaker(url.format(url=api.url), key, model)
    assert expected in str(fault.value)


def test_a_refused_question(api: Any) -> None:
    speaker = RemoteSpeaker(api.url, KEY)
    with pytest.raises(CliError, match="answered 400: the prompt has 99 tokens"):
        answer_once(speaker, [{"role": "user", "content": "too long"}], Sampling(), None, None)


def test_chat_from_a_pipe_prints_one_answer(api: Any) -> None:
    shown = program("chat", "--url", api.url, "--api-key", KEY, stdin="40 + 7?\n")
    assert shown.status == 0
    assert shown.out == "│ hm\n\nforty-seven\n"
    assert shown.err.startswith("5 tokens")
    assert "\x1b" not in shown.out + shown.err


def test_ctrl_c_stops_a_piped_answer_with_130(api: Any) -> None:
    api.slow = True
    child = subprocess.Popen(
        [sys.executable, "-m", "hadal", "chat", "--url", api.url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "HADAL_API_KEY": KEY},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("count\n")
    child.stdin.close()
    child.stdin = None
    assert child.stdout.readline() == "│ hm\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert out.endswith("\n")
    assert "seven" not in out, "the answer went on to its end"
    assert "stopped" in err
    assert "Traceback" not in err


def test_ps_of_a_server(api: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "ps", "--url", api.url, "--api-key", KEY, "--json")
    assert shown.status == 0
    assert json.loads(shown.out)[0]["model"] == "tiny"
    shown = hadal(capsys, "ps", "--url", "http://127.0.0.1:9")
    assert shown.status == 1
    assert "no answer from http://127.0.0.1:9" in shown.err


def test_ps_lists_registered_servers_and_forgets_dead_ones(
    api: Any, capsys: pytest.CaptureFixture[str], cache_home: Any
) -> None:
    from hadal.cli.state import registered, running

    dead = cache_home / "hadal" / "servers" / "999999.json"
    dead.parent.mkdir(parents=True, exist_ok=True)
    dead.write_text(json.dumps({"pid": 999999, "born": 1.0, "url": "http://x", "model": "m", "started": 1.0}))
    (dead.parent / "888888.json").write_text("{half")
    with registered(api.url, "tiny"):
        shown = json.loads(hadal(capsys, "ps", "--json").out)
        assert [(s["model"], s["url"], s["state"]) for s in shown] == [("tiny", api.url, "healthy")]
        assert shown[0]["pid"] == os.getpid()
        assert shown[0]["memory_bytes"] > 1e6
        assert "tiny" in hadal(capsys, "ps").out
    assert running() == []
    assert list(dead.parent.glob("*.json")) == []
    empty = hadal(capsys, "ps")
    assert "No server runs here" in empty.err
    shown_chat = hadal(capsys, "chat")
    assert shown_chat.status == 1
    assert "no server runs on this machine" in shown_chat.err
