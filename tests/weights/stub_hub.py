"""A hub on 127.0.0.1 that behaves like huggingface.co where downloads need it, and misbehaves on request.

Model information with file metadata, the tree, HEAD and GET of files with Range, ETag, X-Repo-Commit and,
for large files, a redirect with X-Linked-Etag/-Size to a second server on another port, as the hub
redirects to its CDN.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Repo:
    """Files by name; `large` ones are LFS. `served` replaces the bytes that are really sent (wrong ones)."""

    files: dict[str, bytes]
    large: set[str] = field(default_factory=set)
    served: dict[str, bytes] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None  # status and X-Error-Code
    commit: str = COMMIT


@dataclass
class Request:
    server: str
    method: str
    path: str
    range: str | None
    token: str | None


class StubHub:
    """`with StubHub({...}) as hub: hub.url`. `cuts[file]`: byte counts after which its next downloads break
    off.
    """

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.cuts: dict[str, list[int]] = {}
        self.log: list[Request] = []
        self.redirect_everything_to: str | None = None
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> StubHub:
        self.url = self._start("hub")
        self.cdn = self._start("cdn")
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _start(self, name: str) -> str:
        handler = type("Handler", (_Handler,), {"hub": self, "server_name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    def downloads(self, name: str) -> list[Request]:
        return [r for r in self.log if r.method == "GET" and r.path.endswith("/" + name)]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    server_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(
            Request(
                self.server_name,
                self.command,
                path,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
            )
        )
        elsewhere = self.hub.redirect_everything_to
        if elsewhere and self.server_name == "hub":
            self._send(307, b"", {"Location": elsewhere + self.path})
            return
        if self.server_name == "cdn" and path.startswith("/blobs/"):
            _, _, org, name, file = path.split("/", 4)
            self._file(self.hub.repos[f"{org}/{name}"], file, {})
            return
        kind, repo, rest = self._parse(path)
        if repo is None:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif repo.refuse is not None:
            self._send(repo.refuse[0], b'{"error": "no"}', {"X-Error-Code": repo.refuse[1]})
        elif kind == "info":
            self._send(200, json.dumps(self._info(repo)).encode(), {"Content-Type": "application/json"})
        elif kind == "tree":
            self._send(200, json.dumps(self._tree(repo)).encode(), {"Content-Type": "application/json"})
        elif rest not in repo.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        else:
            self._resolve(repo, path.split("/resolve/")[0], rest)

    def _parse(self, path: str) -> tuple[str, Repo | None, str]:
        if path.startswith("/api/models/"):
            parts = path.removeprefix("/api/models/").split("/")
            kind = "tree" if len(parts) > 2 and parts[2] == "tree" else "info"
            return kind, self.hub.repos.get("/".join(parts[:2])), ""
        where, _, rest = path.partition("/resolve/")
        return "file", self.hub.repos.get(where.strip("/")), rest.partition("/")[2]

    def _info(self, repo: Repo) -> dict[str, object]:
        siblings = []
        for name, data in repo.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if name in repo.large:
                sha = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": "org/x", "modelId": "org/x", "sha": repo.commit, "siblings": siblings, "private": False}

    def _tree(self, repo: Repo) -> list[dict[str, object]]:
        found = []
        for name, data in repo.files.items():
            entry: dict[str, object] = {
                "type": "file",
                "path": name,
                "size": len(data),
                "oid": git_sha1(data),
            }
            if name in repo.large:
                sha = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
            found.append(entry)
        return found

    def _resolve(self, repo: Repo, where: str, name: str) -> None:
        data = repo.files[name]
        headers = {"X-Repo-Commit": repo.commit}
        if name not in repo.large:
            self._file(repo, name, headers | {"ETag": f'"{git_sha1(data)}"'})
            return
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.cdn}/blobs{where}/{name}",
        }
        self._send(302, b"", headers)

    def _file(self, repo: Repo, name: str, headers: dict[str, str]) -> None:
        data = repo.served.get(name, repo.files[name])
        wanted, status, start = self.headers.get("Range"), 200, 0
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        cuts = self.hub.cuts.get(name, [])
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self._send(status, data[start:], headers | {"Accept-Ranges": "bytes"}, cut)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
