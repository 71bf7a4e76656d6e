"""`hadal probe`: a study from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.helpers import hadal

SMALL = ("--language", "en", "--permutations", "19", "--set", "data.carriers=2", "--set", "data.words=1",
         "--set", "tests.bootstraps=0", "--set", 'tests.hypotheses=["H1"]')  # fmt: skip


def test_json_and_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hadal.probe.report.draw", lambda outcome, folder: [])  # seconds; drawn below
    done = hadal(capsys, "probe", "nsm", "--simulate", "0.5", "-o", str(tmp_path / "out"), "--json", *SMALL)
    assert done.status == 0, done.err
    told = json.loads(done.out)
    saved = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert told["simulation"] is True and told["verdicts"] == saved["verdicts"]
    assert told["report"] == str(tmp_path / "out" / "report.html") and told["seconds"] > 0
    assert saved["recipe"]["tests"]["permutations"] == 19
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.html", "results.json", "recipe.json", "run.json", "tables",
    }  # fmt: skip


def test_a_model_in_words_and_its_estimate(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": f"Here {w} goes, {i}.", "start": 5, "end": 5 + len(w), "concept": w, "category": w[0]}
        for w in ("ax", "ay", "az", "aw", "bx", "by", "bz", "bw")
        for i in range(2)
    ]
    (tmp_path / "spans.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'name = "mine"\n[data]\nset = ""\nspans = ["spans.jsonl"]\n[[model]]\nname = "{tiny_folder}"\n'
        'device = "cpu"\n[tests]\nhypotheses = ["H1"]\npermutations = 49\nbootstraps = 0\n', "utf-8"
    )  # fmt: skip
    told = json.loads(hadal(capsys, "probe", str(recipe), "--estimate", "--json").out)
    assert [row["texts"] for row in told] == [16, 16] and "random" in told[1]["model"]
    done = hadal(capsys, "probe", str(recipe), "-o", str(tmp_path / "out"))
    assert done.status == 0, done.err
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 5  # PCA, t-SNE, turning, two curves
    assert "H1  " in done.out and "Of 1 questions" in done.out and "report.html" in done.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("probe", "nsm", "--backend", "http://x/v1"), "--backend is MODEL@URL"),
        (("probe", "nsm", "--simulate", "1", "--model", "hadal-mini"), "not told in one report"),
        (("probe", "nsm", "--layers", "one", "--simulate", "1"), "--layers is numbers"),
        (("probe", "nsm", "--set", "tests.permutatons=9", "--simulate", "1"), "Did you mean 'permutations'"),
        (("probe", "nsm", "--simulate", "-1"), "model.simulate"),
        (("probe", "missing.toml"), "no recipe at missing.toml"),
        (("probe", "nsm", "--language", "xx", "--simulate", "1"), "no primes in xx"),
    ],
)
def test_misuse_is_one_line(
    arguments: tuple[str, ...], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = hadal(capsys, *arguments)
    assert done.status in (1, 2) and match in done.err and len(done.err.strip().splitlines()) == 1


def test_a_service_is_asked_for_much_only_after_a_yes(capsys: pytest.CaptureFixture[str]) -> None:
    service = ("probe", "nsm", "--backend", "m@http://127.0.0.1:9/v1", "--set", "data.words=1")
    told = json.loads(hadal(capsys, *service, "--language", "en", "--estimate", "--json").out)
    assert told[0]["requests"] > 10 and told[0]["cost"] is None
