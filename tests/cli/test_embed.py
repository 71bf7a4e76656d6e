"""`hadal embed`: texts from everywhere, vectors to every kind of file, and faults in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from hadal.probe import table
from tests.cli.helpers import hadal

ROWS = [
    {"id": "a", "text": "I know this.", "word": "know", "category": "mental"},
    {"id": "b", "text": "Je sais où.", "word": [[8, 10]], "category": "space"},
    {"id": "c", "text": "know, I know", "word": [8, 12], "category": "mental"},
]


@pytest.fixture
def local(tiny_folder: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_folder), "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", "utf-8")
    return path


def test_targets_of_jsonl_to_parquet(
    rows: Path, local: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.parquet"
    done = hadal(
        capsys, "embed", "-i", str(rows), "--span-field", "word", "--layer", "0,1,-1", "-o", str(out), *local
    )
    assert done.status == 0 and "tiny @" in done.err and "layer 0-2" in done.err
    found, columns = table.read_with_columns(out)
    assert found.vectors.shape[:2] == (3, 3) and found.ids == ["a", "b", "c"]
    assert found.spans == ["know", "où", "know"] and found.identity.pooling == "span"
    assert columns["category"] == ["mental", "space", "mental"] and columns["text"][1] == "Je sais où."


def test_arguments_and_stdin_give_the_same(
    local: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = hadal(capsys, "embed", "one text", "une autre", "--json", *local)
    body = json.loads(given.out)
    assert body["identity"]["backend"] == "local" and np.shape(body["vectors"]) == (2, 1, body["width"])
    monkeypatch.setattr("sys.stdin", io.StringIO("one text\n\nune autre\n"))
    header, *lines = hadal(capsys, "embed", *local).out.splitlines()
    assert json.loads(header)["digest"] == body["digest"]
    assert [json.loads(line)["vectors"] for line in lines] == body["vectors"]
    assert json.loads(lines[0])["text"] == "one text"


def test_places_and_fields_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text('\ufeff{"text": "a", "n": 3, "z": [1]}\n{"text": "b", "n": 4.5, "only": true}\n', "utf-8")
    simulated = ("embed", "-i", str(path), "--backend", "simulate", "-o")
    done = hadal(capsys, *simulated, str(out))
    assert done.status == 0 and "'z' is not written" in done.err and "2 texts, 1 layer of" in done.err
    assert table.read_with_columns(out)[1] == {"text": ["a", "b"], "n": [3, 4.5], "only": [None, True]}
    before = path.read_bytes()
    assert "is the input" in hadal(capsys, *simulated, str(path)).err and path.read_bytes() == before
    assert "cannot be written" in hadal(capsys, *simulated, str(tmp_path / "no" / "x.npy")).err


def test_a_simulation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.npy"
    done = hadal(capsys, "embed", "a", "b", "--backend", "simulate", "--seed", "3", "-o", str(out))
    assert done.status == 0 and "SIMULATION, no model (seed 3" in done.err
    assert table.read(out).identity.is_simulation


def test_estimate_runs_nothing(
    rows: Path, local: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads(hadal(capsys, "embed", "-i", str(rows), "--estimate", "--json", *local).out)
    assert told["texts"] == 3 and told["tokens"] > 9 and told["seconds"] > 0
    service = ("--backend", "endpoint", "--url", "http://127.0.0.1:9/v1", "--price", "2", "--rpm", "2")
    told = json.loads(hadal(capsys, "embed", "-i", str(rows), "--estimate", "--json", *service).out)
    assert told["seconds"] == 30 and told["cost"] == pytest.approx(2e-6 * told["tokens"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["x", "-o", "x.csv"], "must end in .parquet, .npy, .jsonl"),
        (["x", "--layer", "3"], "0 (embedding) to 2"),
        (["x", "--layer", "top"], "numbers with commas"),
        (["x", "--pool", "span"], "needs the target's span"),
        (["x", "--span-field", "s"], "belongs to an --input"),
        (["x", "--url", "http://a"], "--url belongs to --backend endpoint"),
        (["x", "--backend", "endpoint"], "needs --url"),
        (
            ["x", "--backend", "endpoint", "--url", "http://127.0.0.1:9/v1", "--layer", "all"],
            "name the layers",
        ),
        (["x", "-i", "y.txt"], "not both"),
        (["-i", "nowhere.txt"], "does not exist"),
        ([" "], "is empty"),
    ],
)
def test_faults_are_one_line(
    arguments: list[str], match: str, local: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    where = local if not {"--url", "--backend"} & set(arguments) else ()
    done = hadal(capsys, "embed", *arguments, *where)
    assert done.status in (1, 2) and match in done.err and "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1 and not done.out


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('{"text": "know, I know", "word": "know"}', "more than once"),
        ('{"text": "I know", "word": "moon"}', "does not stand"),
        ('{"text": "I know", "word": [1, 99]}', "not inside"),
        ('{"text": "I know", "word": [[1]]}', "a span is"),
        ('{"text": "I know"}', "no target under 'word'; the row has 'text'"),
        ('{"text": "I know", "word": null}', "a span is"),
        ('{"txt": "I know", "word": "I"}', "no text under 'text'"),
        ("{", "line 1"),
        ('{"text": "\\ud800"}', "line 1: it holds a lone surrogate U+D800"),
        ("[1]", "no text"),
    ],
)
def test_bad_rows_are_named(
    row: str, match: str, local: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n")
    done = hadal(capsys, "embed", "-i", str(path), "--span-field", "word", *local)
    assert done.status == 1 and match in done.err, done.err
