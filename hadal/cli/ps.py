"""`hadal ps`: the servers that run on this machine, and what they are busy with."""

from __future__ import annotations

import time
from typing import Any

from hadal.cli import options as o
from hadal.cli.terminal import CliError, human_bytes, human_seconds, note, print_json, table


def ps(url: o.Url = None, api_key: o.ApiKey = None, json: o.Json = False) -> None:
    """List the servers that run on this machine.

    With --url: what the server there has loaded (Hadal's or Ollama's).

    Examples:
        hadal ps
        hadal ps --json
        hadal ps --url http://127.0.0.1:11434
    """
    if url is not None:
        found = [_asked(url, api_key)]
    else:
        from hadal.cli.state import running

        found = [
            {
                "pid": s.pid,
                "model": s.model,
                "url": s.url,
                "uptime_s": time.time() - s.started,
                **_health(s.url),
            }
            for s in running()
        ]
    for entry in found:
        entry["memory_bytes"] = _memory(entry["pid"]) if entry.get("pid") else None
    if json:
        print_json(found)
        return
    if not found:
        note("No server runs here. `hadal serve MODEL` starts one.")
        return
    rows = [
        (
            entry["model"],
            entry["url"],
            entry.get("pid") or "-",
            human_seconds(entry["uptime_s"]) if entry.get("uptime_s") else "-",
            human_bytes(entry["memory_bytes"]) if entry.get("memory_bytes") else "-",
            entry["state"],
        )
        for entry in found
    ]
    table(("MODEL", "ADDRESS", "PID", "UP", "MEMORY", "STATE"), rows, right=(2,))


def _memory(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _health(url: str) -> dict[str, Any]:
    """Whether the server answers /health (which needs no key), within two seconds."""
    import urllib.error
    import urllib.request

    if not url.startswith(("http://", "https://")):
        return {"state": "unknown"}
    try:
        with urllib.request.urlopen(url + "/health", timeout=2):
            return {"state": "healthy"}
    except urllib.error.HTTPError as fault:
        return {"state": f"unhealthy ({fault.code})"}
    except OSError:
        return {"state": "no answer"}


def _asked(url: str, api_key: str | None) -> dict[str, Any]:
    """What the server at `url` has loaded, by its /api/ps (Hadal's or Ollama's)."""
    from hadal.cli.speaker import Http

    server = Http(url, api_key)
    models = server.get("/api/ps").get("models")
    if not isinstance(models, list):
        raise CliError(f"{server.url}/api/ps did not list models; is it a Hadal or Ollama server?")
    names = ", ".join(str(m.get("name")) for m in models) or "none loaded"
    return {"pid": None, "model": names, "url": server.url, "uptime_s": None, "state": "healthy"}
