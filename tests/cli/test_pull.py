"""pull, list, show, run, rm: a model's whole life, against a hub on 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hadal.config import preset
from tests.cli.helpers import Outcome, hadal, program
from tests.weights.stub_hub import Repo, StubHub

REPO = "org/tiny-r1"
HUGE = "org/huge"
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def stub(tiny_folder: Path) -> Iterator[StubHub]:
    """A hub with a tiny model, and with a V3-sized one whose weights nobody may ask for."""
    files = {p.name: p.read_bytes() for p in tiny_folder.iterdir() if p.name != "manifest.json"}
    huge = {
        "config.json": json.dumps(preset("deepseek-v3").config.to_hf()).encode(),
        "model.safetensors": b"x",
    }
    repos = {REPO: Repo(files, {"model.safetensors"}), HUGE: Repo(huge, {"model.safetensors"})}
    with StubHub(repos) as hub:
        yield hub


@pytest.fixture
def run(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """`hadal ...` in this process, with the stub as hub and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("hadal.weights.download.default_endpoint", lambda: stub.url)

    def call(*arguments: str) -> Outcome:
        return hadal(capsys, *arguments)

    return call


def test_pull_list_show_run_rm(run: Run, stub: StubHub) -> None:
    missing = run("run", REPO, "12 + 35?")
    assert missing.status == 1
    assert f"`hadal pull {REPO}`" in missing.err
    assert stub.downloads("model.safetensors") == [], "nothing is downloaded without being asked for"

    pulled = run("pull", REPO)
    assert pulled.status == 0, pulled.err
    folder = Path(pulled.out.strip())
    assert (folder / "model.safetensors").is_file()
    assert f"{REPO}: a deepseek_v3 model with" in pulled.err

    listed = json.loads(run("list", "--json").out)
    entry = next(e for e in listed if e["name"] == REPO)
    assert entry["path"] == str(folder)
    assert entry["size_bytes"] > 200_000
    assert REPO in run("list").out
    assert json.loads(run("show", REPO, "--json").out)["folder"] == str(folder)

    asked = len(stub.log)
    answer = run("run", REPO, "12 + 35?", "--max-tokens", "3", "--json")
    assert len(stub.log) == asked, "what is here runs without the network"
    assert answer.status == 0, answer.err
    assert json.loads(answer.out)["model"] == REPO

    unsure = run("rm", REPO)
    assert unsure.status == 2
    assert "add --yes" in unsure.err
    removed = run("rm", REPO, "--yes")
    assert removed.status == 0, removed.err
    assert "Removed" in removed.err
    assert not folder.exists()
    assert REPO not in run("list").out


def test_as_a_program_with_yes_and_offline(stub: StubHub, tmp_path: Path) -> None:
    places = {"HF_ENDPOINT": stub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    offline = program("pull", REPO, HF_HUB_OFFLINE="1", **places)
    assert offline.status == 1
    assert "HF_HUB_OFFLINE" in offline.err.splitlines()[-1]
    answer = program("run", REPO, "12 + 35?", "--max-tokens", "3", "--yes", **places)
    assert answer.status == 0, answer.err
    assert "\x1b" not in answer.err
    assert f"models--{REPO.replace('/', '--')}" in {p.name for p in (tmp_path / "hub").iterdir()}


def test_what_cannot_fit_is_refused_before_its_weights(run: Run, stub: StubHub) -> None:
    before = len(stub.downloads("model.safetensors"))
    calls = (
        ["pull"],
        ["run", "--yes", "--json", "hi"],
        ["serve", "--yes"],
        ["bench"],
        ["complete", "--yes", "hi"],
    )
    for verb, *more in calls:
        refused = run(verb, HUGE, *more[::-1])
        assert refused.status == 1, (verb, refused.err)
        fault = refused.err.splitlines()[-1]
        assert fault.startswith(f"hadal: {HUGE} does not fit: 1,342"), (verb, refused.err)
        assert "on one device would hold it" in fault
    assert len(stub.downloads("model.safetensors")) == before


def test_a_known_name_that_cannot_fit_is_refused_without_network(run: Run, stub: StubHub) -> None:
    asked = len(stub.log)
    refused = run("run", "deepseek-r1", "hi", "--yes")
    assert refused.status == 1
    assert "deepseek-r1 does not fit" in refused.err
    assert "DeepSeek-R1: reasoning model on V3-Base" in refused.err
    assert len(stub.log) == asked


def test_unknown_names(run: Run) -> None:
    unknown = run("pull", "org/tiny-r2")
    assert unknown.status == 1
    assert "has no model org/tiny-r2" in unknown.err.splitlines()[-1]
    misspelt = run("pull", "deepseek-r1-distil-qwen-1.5b")
    assert misspelt.status == 1
    assert "deepseek-r1-distill-qwen-1.5b" in misspelt.err.splitlines()[-1]


def test_v32_says_that_it_cannot_run(run: Run) -> None:
    refused = run("pull", "deepseek-v3.2-exp")
    assert refused.status == 1
    assert "sparse attention" in refused.err
    assert "deepseek-v3.1-terminus" in refused.err
