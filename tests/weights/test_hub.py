"""Names, downloads, the cache: against a hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hadal.config import PRESETS
from hadal.text.templates import template_for
from hadal.weights import HubError, NotFoundError, PullError, hub, load, save
from hadal.weights.download import pull
from hadal.weights.layout import read_config
from tests.weights import tiny
from tests.weights.helpers import random_model, same
from tests.weights.stub_hub import Repo, StubHub

REPO = "org/tiny-v3"
SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("published") / "m"
    save(random_model(tiny.V3), folder, max_shard_bytes=2_000_000)
    (folder / "manifest.json").unlink()  # published folders have none
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert SHARD in found
    return found


@pytest.fixture
def stub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A hub with one model, and an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    large = {name for name in files if name.endswith(".safetensors")}
    more = {
        "README.md": b"# tiny",
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "sub/x.safetensors": b"",
    }
    with StubHub({REPO: Repo(files | more, set(large))}) as server:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("hadal.weights.download.default_endpoint", lambda: server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what a cut may lose, 10 MB otherwise
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setattr(_http.time, "sleep", lambda s: None)
        yield server


def nothing_left(name: str = REPO) -> None:
    """A pull that failed leaves nothing that would be taken for a model."""
    with pytest.raises(NotFoundError):
        hub.resolve(name)
    assert name not in [e.name for e in hub.list_models()]


def test_pull_resolve_list_remove(stub: StubHub, files: dict[str, bytes]) -> None:
    calls: list[tuple[int, int]] = []
    folder = pull(REPO, lambda done, total: calls.append((done, total)))
    assert hub.resolve(REPO) == folder
    names = {p.name for p in folder.iterdir()}
    assert names == set(files) | {"README.md", "tokenizer.json"}, "no pickle, no subfolders"
    for name, data in files.items():
        assert (folder / name).read_bytes() == data
    same(load(folder), random_model(tiny.V3))
    total = sum(map(len, files.values())) + len(b"# tiny") + len(b"{}")
    assert calls[-1] == (total, total)
    entry = next(e for e in hub.list_models() if e.name == REPO)
    assert (entry.path, entry.size_bytes, entry.config) == (folder, total, tiny.V3)
    assert len(entry.digest) == 64
    hub.remove(REPO)
    assert not list((folder.parents[2]).glob("models--*"))
    nothing_left()


def test_second_pull_downloads_nothing(stub: StubHub) -> None:
    first = pull(REPO)
    digest = next(e.digest for e in hub.list_models() if e.name == REPO)
    stub.log.clear()
    assert pull(REPO) == first
    assert not [r for r in stub.log if r.method == "GET" and "/api/" not in r.path]
    assert next(e.digest for e in hub.list_models() if e.name == REPO) == digest


def test_hub_blobs_verify_a_folder_in_full(stub: StubHub) -> None:
    """The cache's blob names are SHA-256 sums; a flipped bit is found and both hashes are named."""
    folder = pull(REPO)
    with pytest.raises(ValueError, match=r"config\.json has no known SHA-256"):
        load(folder, verify="full")
    from hadal.weights.manifest import verify_files

    verify_files(folder, [SHARD])
    blob = (folder / SHARD).resolve()
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 4
    blob.write_bytes(raw)
    with pytest.raises(ValueError, match="is corrupt") as caught:
        verify_files(folder, [SHARD])
    assert hashlib.sha256(raw).hexdigest() in str(caught.value) and blob.name in str(caught.value)


def test_cut_once_resumes_where_it_broke(stub: StubHub, files: dict[str, bytes]) -> None:
    stub.cuts[SHARD] = [100_000]
    folder = pull(REPO)
    assert (folder / SHARD).read_bytes() == files[SHARD]
    ranges = [r.range for r in stub.downloads(SHARD)]
    assert ranges[0] is None and ranges[-1] is not None
    assert 0 < int(ranges[-1].removeprefix("bytes=").rstrip("-")) <= 100_000


def test_cut_for_good_then_pulled_again(stub: StubHub, files: dict[str, bytes]) -> None:
    stub.cuts[SHARD] = [1000] + [0] * 50
    with pytest.raises(PullError, match=rf"was cut .*`hadal pull {REPO}` goes on"):
        pull(REPO)
    nothing_left()
    with pytest.raises(NotFoundError, match=r"only partly here .*hadal pull org/tiny-v3"):
        hub.resolve(REPO)
    stub.cuts.clear()
    whole = [p.name for p in (hub.storage_of(REPO) / "blobs").iterdir()]
    stub.log.clear()
    folder = pull(REPO)
    same(load(folder), random_model(tiny.V3))
    again = {r.path.rsplit("/", 1)[1] for r in stub.log if r.method == "GET" and r.server == "cdn"}
    assert SHARD in again
    for name in again:
        assert hashlib.sha256(files[name]).hexdigest() not in whole, "whole files are not fetched twice"


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_wrong_bytes_are_deleted_and_never_count(name: str, stub: StubHub, files: dict[str, bytes]) -> None:
    bad = bytearray(files[name])
    bad[len(bad) // 2] ^= 1
    if name == "config.json":
        bad = bytearray(files[name].replace(b'"initializer_range": 0.02', b'"initializer_range": 0.03'))
        assert bytes(bad) != files[name]
    stub.repos[REPO].served[name] = bytes(bad)
    with pytest.raises(
        PullError, match=rf"{name} has the wrong bytes: hash [0-9a-f]+, the hub says [0-9a-f]+"
    ):
        pull(REPO)
    nothing_left()
    assert not [p for p in hub.storage_of(REPO).rglob("*") if p.is_file() and p.read_bytes() == bytes(bad)]
    stub.repos[REPO].served.clear()
    same(load(pull(REPO)), random_model(tiny.V3))


def test_wrong_size_is_refused(stub: StubHub, files: dict[str, bytes]) -> None:
    stub.repos[REPO].served[SHARD] = files[SHARD] + b"more"
    with pytest.raises(PullError):
        pull(REPO)
    nothing_left()


def test_no_space_is_refused_before_the_download(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import hadal.weights.download as download

    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=12_345))
    with pytest.raises(
        PullError, match=r"needs [\d,]+ bytes more and .*hub has 12,345 bytes free; .*HF_HOME"
    ):
        pull(REPO)
    assert not [r for r in stub.log if r.method == "GET" and "/api/" not in r.path]
    nothing_left()


def test_space_counts_what_is_here_already(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import hadal.weights.download as download

    pull(REPO)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    pull(REPO)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"is gated: accept its terms at .*/org/tiny-v3, then set HF_TOKEN"),
        (401, "GatedRepo", r"is gated: accept its terms"),
        (401, "", r"HF_TOKEN"),
        (403, "", r"HTTP 403.*HF_TOKEN"),
        (500, "", r"HTTP 500"),
    ],
)
def test_refusals_are_explained(status: int, code: str, message: str, stub: StubHub) -> None:
    stub.repos[REPO].refuse = (status, code)
    with pytest.raises((PullError, NotFoundError), match=message) as caught:
        pull(REPO)
    assert "\n" not in str(caught.value)


def test_unknown_repositories_suggest_near_ones(stub: StubHub) -> None:
    with pytest.raises(
        NotFoundError, match=r"no model deepseek-ai/DeepSeek-R2.*Did you mean 'deepseek-ai/DeepSeek-"
    ):
        pull("deepseek-ai/DeepSeek-R2")
    with pytest.raises(
        NotFoundError, match=r"unknown model 'deepseek-r1-distill-qwen-1\.6b'.*deepseek-r1-distill-qwen"
    ):
        pull("deepseek-r1-distill-qwen-1.6b")


def test_unreachable_hub(stub: StubHub) -> None:
    stub.__exit__()
    with pytest.raises(PullError, match=r"was cut|goes on"):
        pull(REPO)


def test_pickle_only_repositories_are_refused(stub: StubHub) -> None:
    stub.repos["org/old"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(PullError, match=r"no \*\.safetensors \(it holds pytorch_model\.bin\); pickle"):
        pull("org/old")
    assert not stub.downloads("pytorch_model.bin")


def test_other_architectures_are_refused_before_their_weights(stub: StubHub, files: dict[str, bytes]) -> None:
    other = json.dumps({"model_type": "mamba"}).encode()
    stub.repos["org/mamba"] = Repo(
        {"config.json": other, "model.safetensors": b"x" * 99}, {"model.safetensors"}
    )
    with pytest.raises(PullError, match=r"cannot run here, nothing more was downloaded: .*mamba"):
        pull("org/mamba")
    assert not stub.downloads("model.safetensors")
    nothing_left("org/mamba")


def test_changed_upstream(stub: StubHub) -> None:
    """A new revision upstream is pulled, and both revisions go when the model is removed."""
    old = pull(REPO)
    stub.repos[REPO].files["README.md"] = b"# newer"
    stub.repos[REPO].commit = "b" * 40
    new = pull(REPO)
    assert new != old and new.name == "b" * 40 and hub.resolve(REPO) == new
    hub.remove(REPO)
    assert not new.exists() and not old.exists()


def test_plain_http_is_for_loopback_only(stub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://huggingface.co", "http://10.0.0.1:80", "ftp://127.0.0.1", "127.0.0.1:80"):
        monkeypatch.setattr("hadal.weights.download.default_endpoint", lambda url=url: url)
        with pytest.raises(PullError, match="must be an https"):
            pull(REPO)
    assert not stub.log


# --- token, offline ----------------------------------------------------------------------------------------
def run_python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


PULL = f"from hadal.weights import hub; print(hub.pull({REPO!r}))"


def test_the_token_goes_to_the_endpoint_alone(stub: StubHub, tmp_path: Path) -> None:
    done = run_python(PULL, tmp_path, HF_ENDPOINT=stub.url, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert {r.token for r in stub.log if r.server == "hub"} == {"Bearer hf_secret"}
    cdn = [r for r in stub.log if r.server == "cdn"]
    assert cdn and all(r.token is None for r in cdn)


def test_the_token_does_not_follow_redirects_to_another_hub(stub: StubHub, tmp_path: Path) -> None:
    """Even where the endpoint sends every request elsewhere, and huggingface_hub would trust that place."""
    code = f"""
from huggingface_hub import constants
from huggingface_hub.utils import _http
_http._HUB_ORIGINS = frozenset([*_http._HUB_ORIGINS, _http._url_origin({stub.cdn!r})])
{PULL}"""
    stub.redirect_everything_to = stub.cdn
    run_python(code, tmp_path, HF_ENDPOINT=stub.url, HF_TOKEN="hf_secret")
    assert [r for r in stub.log if r.server == "cdn"], "the redirect was followed"
    assert all(r.token is None for r in stub.log if r.server == "cdn")
    assert any(r.token for r in stub.log if r.server == "hub")


NO_SOCKETS = """
import socket, sys
def refuse(*a, **k): print("SOCKET"); raise SystemExit(9)
socket.socket.connect = refuse
socket.getaddrinfo = refuse
"""


def test_offline_opens_no_socket(stub: StubHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": stub.url, "HF_HUB_OFFLINE": "1"}
    code = (
        NO_SOCKETS
        + f"""
from hadal.weights import hub, PullError, NotFoundError
try: hub.pull({REPO!r})
except PullError as error: print(error)
try: hub.resolve({REPO!r})
except NotFoundError as error: print(error)
print(hub.list_models() is not None)
"""
    )
    done = run_python(code, tmp_path, **environment)
    assert done.returncode == 0 and "SOCKET" not in done.stdout, done.stdout + done.stderr
    assert "HF_HUB_OFFLINE=1 forbids the network" in done.stdout and "`hadal pull org/tiny-v3`" in done.stdout
    assert run_python(PULL, tmp_path, HF_ENDPOINT=stub.url).returncode == 0
    stub.log.clear()
    done = run_python(NO_SOCKETS + PULL, tmp_path, **environment)
    assert done.returncode == 0 and "snapshots" in done.stdout, done.stdout + done.stderr
    assert not stub.log


def test_resolving_opens_no_socket_even_online(stub: StubHub, tmp_path: Path) -> None:
    assert run_python(PULL, tmp_path, HF_ENDPOINT=stub.url).returncode == 0
    code = NO_SOCKETS + f"from hadal.weights import hub; hub.resolve({REPO!r}); print(len(hub.list_models()))"
    done = run_python(code, tmp_path, HF_ENDPOINT=stub.url)
    assert done.returncode == 0 and "SOCKET" not in done.stdout, done.stdout + done.stderr


# --- names -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/etc/passwd", "..", "a/../b", "a/b/c", "", ".hidden", "a b", "a\x00b"),
        *("C:\\x", "a\nb", "~/x", "org/", "/repo", "a..b", "x" * 300, "https://x/y", "hadal-mini:v2", "％"),
    ],
)
def test_unsafe_names(name: str) -> None:
    with pytest.raises(HubError, match="is not a model name"):
        hub.safe_model_name(name)


def test_safe_names() -> None:
    for name in ("hadal-mini", "deepseek-ai/DeepSeek-V2-Lite-Chat", "org/model_1.5b", *PRESETS):
        assert hub.safe_model_name(name) == name
    assert hub.safe_model_name("hadal-mini:latest") == "hadal-mini"


def test_repositories_of_names() -> None:
    assert hub.repo_of("deepseek-r1") == "deepseek-ai/DeepSeek-R1"
    assert hub.repo_of("DeepSeek-R1") == hub.repo_of("deepseek-ai/deepseek-r1") == "deepseek-ai/DeepSeek-R1"
    assert hub.repo_of("someone/else") == "someone/else"
    with pytest.raises(HubError, match="part of Hadal"):
        hub.repo_of("hadal-mini")


def test_resolve_folders_and_misses(stub: StubHub, tmp_path: Path) -> None:
    save(random_model(tiny.QWEN2), tmp_path / "mine")
    assert hub.resolve(tmp_path / "mine") == hub.resolve(str(tmp_path / "mine")) == tmp_path / "mine"
    with pytest.raises(NotFoundError, match="there is no folder"):
        hub.resolve(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"not on this machine; `hadal pull deepseek-v3` downloads it"):
        hub.resolve("deepseek-v3")
    with pytest.raises(NotFoundError, match=r"unknown model 'hadal-mimi'\. Did you mean 'hadal-mini'"):
        hub.resolve("hadal-mimi")
    with pytest.raises(HubError, match="is a folder of yours"):
        hub.remove(str(tmp_path / "mine"))
    for name in ("hadal-mini", "Hadal-Mini-Dense:latest"):
        with pytest.raises(HubError, match="is part of Hadal; it goes when"):
            hub.remove(name)
    with pytest.raises(NotFoundError, match="not on this machine"):
        hub.remove("deepseek-v3")


def test_what_is_not_trained_yet_is_not_on_board(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student of hadal-mini: on board like it, where the package has it; else nobody sees it."""
    assets = tmp_path / "assets"
    save(random_model(tiny.V3), assets / "hadal-mini")
    monkeypatch.setattr(hub, "_ASSETS", assets)
    assert [entry.name for entry in hub.list_models()] == ["hadal-mini"]
    with pytest.raises(NotFoundError, match=r"hadal-mini-dense is missing from .*; `hadal r1 recipes/r1"):
        hub.resolve("hadal-mini-dense")
    save(random_model(tiny.QWEN2), assets / "hadal-mini-dense")
    assert [entry.name for entry in hub.list_models()] == ["hadal-mini", "hadal-mini-dense"]
    for name in ("hadal-mini-dense", "hadal-mini-dense:latest", "HADAL-MINI-DENSE"):
        assert hub.resolve(name) == pull(name) == assets / "hadal-mini-dense"
    (assets / "hadal-mini" / "config.json").unlink()
    with pytest.raises(NotFoundError, match="install Hadal again"):
        hub.resolve("hadal-mini")


def test_presets_of_the_package_are_what_it_has() -> None:
    for name in filter(hub.is_here, hub.ON_BOARD):
        found, preset = read_config(hub.resolve(name)), PRESETS[name]
        assert found == preset.config, name
        assert template_for(hub.resolve(name)).name == preset.template


def test_other_peoples_downloads(stub: StubHub) -> None:
    """What other programs put into the cache: complete models count, others do not and disturb nothing."""
    from huggingface_hub import hf_hub_download, snapshot_download

    hf_hub_download(REPO, "config.json", endpoint=stub.url, cache_dir=hub.cache_dir())
    nothing_left()
    folder = snapshot_download(REPO, endpoint=stub.url, cache_dir=hub.cache_dir())
    assert hub.resolve(REPO) == Path(folder)
    (hub.cache_dir() / "models--org--broken").mkdir()
    (hub.cache_dir() / "models--org--broken" / "snapshots").write_text("not a folder")
    (hub.cache_dir() / "datasets--a--b").mkdir()
    assert [e.name for e in hub.list_models() if e.name not in hub.ON_BOARD] == [REPO]
    (Path(folder) / SHARD).unlink()
    with pytest.raises(NotFoundError, match="1 of 5 weight files are missing"):
        hub.resolve(REPO)
