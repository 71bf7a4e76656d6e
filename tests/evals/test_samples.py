"""The protocol: figures from hand-made samples; a run that is cut and taken up again; the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hadal.cli import loading
from hadal.engine import Engine
from hadal.evals.folder import Folder, described
from hadal.evals.judges import Judge, Judging, Verdict
from hadal.evals.samples import (
    EvaluationError,
    Journal,
    Protocol,
    Sampled,
    judged,
    rows,
    sample,
    sample_lines,
)
from hadal.evals.sets import Problem, puzzle_problems
from tests.cli.helpers import hadal

RECORDS = [
    {"question": "What is 12 + 35?", "answer": "47", "kind": "text"},
    {"question": "What is 100 - 58?", "answer": "42", "kind": "text", "task": "less"},
    {"question": "What is 2 + 2?", "answer": "five", "kind": "text", "task": "less"},
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("hadal-mini", device="cpu", dtype="float32", max_num_seqs=8, max_model_len=256)


@pytest.fixture(scope="module")
def exact(engine: Engine) -> Engine:
    """With batch-invariant operations: the same samples whatever runs beside them."""
    return Engine(engine.model, engine.tokenizer, engine.template, name=engine.name, folder=engine.folder,
                  exact=True, max_num_seqs=4, max_model_len=256, cache_bytes=8 << 20)  # fmt: skip


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    from hadal.evals.puzzles import problems

    return puzzle_problems(problems(3, 0, ["comparison"]))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), "utf-8")
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Iterator[Engine]:
    """The command line takes the engine of these tests."""
    monkeypatch.setattr(loading, "load_engine", lambda *args, **options: engine)
    yield engine


def problem(number: int, group: str, kind: str = "text") -> Problem:
    return Problem(number, str(number), kind, group, ({"role": "user", "content": "?"},), "?", {}, None)


def drawn(number: int, index: int, tokens: int, reason: str = "stop") -> Sampled:
    return Sampled(number, index, "", tokens, reason, True)


def test_rows_from_samples_made_by_hand() -> None:
    asked = [problem(0, "a"), problem(1, "a"), problem(2, "b"), problem(3, "b")]
    # by problem: (answer, right, tokens, how it ended) of three samples
    table: list[list[tuple[str | None, bool, int, str]]] = [
        [("4", True, 10, "stop"), ("4", True, 20, "stop"), ("5", False, 30, "stop")],
        [("6", False, 10, "stop"), ("6", False, 10, "stop"), ("7", True, 10, "stop")],
        [("x", True, 5, "stop"), ("y", False, 5, "stop"), (None, False, 50, "length")],
        [(None, False, 50, "length")] * 3,
    ]
    results = [
        [(drawn(number, i, tokens, reason), Verdict(right, answer))
         for i, (answer, right, tokens, reason) in enumerate(line)]
        for number, line in enumerate(table)
    ]  # fmt: skip
    with Judge(["text"], Judging()) as judge:
        first, second, every = rows(asked, results, judge)
        single = rows(asked[:1], [results[0][:1]], judge)[0]
    assert (first["task"], second["task"], every["task"]) == ("a", "b", "all")
    assert first["pass@1"] == pytest.approx(0.5) and first["cons@k"]["value"] == 0.5
    assert first["pass@k"] == pytest.approx({"1": 0.5, "2": (1 + 2 / 3) / 2, "3": 1.0})
    assert first["length"] == 15 and first["length_right"] == pytest.approx(40 / 3)
    assert first["truncated"] == 0 and first["interval"] == "bootstrap"
    assert second["cons@k"]["value"] == 0.25, "a tie gives half a point, no answer none"
    assert second["truncated"] == second["unanswered"] == pytest.approx(4 / 6)
    assert second["length_right"] == 5
    assert every["pass@1"] == pytest.approx(4 / 12) and every["problems"] == 4
    assert single["cons@k"] is None and single["pass@1"] == 1.0 and single["interval"] == "wilson"


def test_verifiers_that_failed_are_counted_and_code_has_no_vote() -> None:
    results = [[(drawn(0, i, 3), Verdict(False, None, {"failed": "took too long"})) for i in range(2)]]
    with Judge(["text"], Judging()) as judge:
        (row,) = rows([problem(0, "h", "code")], results, judge)
    assert row["failures"] == 2 and row["cons@k"] is None and row["unanswered"] is None


def test_protocols_that_make_no_sense_are_refused() -> None:
    with pytest.raises(EvaluationError, match="would all be the same"):
        Protocol(samples=4, temperature=0.0)
    with pytest.raises(EvaluationError, match="at least 1"):
        Protocol(samples=0)
    one, other = (Protocol().params(problem(0, "a"), index, 99) for index in (0, 1))
    assert one.seed != other.seed and one.max_tokens == 99
    assert (one.temperature, one.top_p) == (0.6, 0.95)
    assert Protocol().params(problem(0, "a"), 0, 99).seed == one.seed
    assert Protocol(seed=1).params(problem(0, "a"), 0, 99).seed != one.seed


def test_a_run_that_was_cut_goes_on_to_the_same_samples(
    exact: Engine, problems: list[Problem], tmp_path: Path
) -> None:
    protocol = Protocol(samples=2, max_tokens=60)
    with Journal() as journal:
        sample(exact, problems, protocol, journal)
        whole = dict(journal.entries)
    path = tmp_path / "samples.jsonl"

    def interrupt(done: int, total: int) -> None:
        assert total == 6
        if done == 2:
            raise KeyboardInterrupt

    with Journal(path) as journal, pytest.raises(KeyboardInterrupt):
        sample(exact, problems, protocol, journal, interrupt)
    stats = exact.stats()
    assert stats.running == stats.waiting == 0, "nothing is left in the engine"
    with path.open("a") as file:
        file.write('{"number": 1, "sam')  # the machine went down while it wrote
    with Journal(path) as journal:
        assert len(journal.entries) == 2
        sample(exact, problems, protocol, journal)
        assert journal.entries == whole
        with Judge(["puzzle"], Judging()) as judge:
            results = judged(problems, protocol, journal, judge)
            assert 0 < rows(problems, results, judge)[-1]["pass@1"] <= 1.0
    kept = Folder(tmp_path / "out", {"a": 1}, resume=False)
    kept.finish({"results": []}, sample_lines(problems, protocol, results))
    with Journal(kept.samples) as journal:
        assert journal.entries == whole, "finished samples can be taken up, too"


def test_a_damaged_journal_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    line = json.dumps(asdict(drawn(0, 0, 3)))
    path.write_text(f"{line}\nnonsense\n{line}\n")
    with pytest.raises(EvaluationError, match="damaged at byte"):
        Journal(path)


def test_problems_that_do_not_fit(engine: Engine) -> None:
    long = Problem(0, "long", "text", "a", ({"role": "user", "content": "1 " * 300},), "1 " * 300, {}, None)
    with Journal() as journal, pytest.raises(EvaluationError, match=r"long is \d+ tokens long; the context"):
        sample(engine, [long], Protocol(), journal)
    with Journal() as journal, pytest.raises(EvaluationError, match="tokens long"):
        sample(engine, [long], Protocol(chat=False), journal)


def test_a_folder_is_taken_up_only_as_it_was_begun(tmp_path: Path) -> None:
    out = tmp_path / "run"
    Folder(out, {"seed": 0, "date": "then", "sampling": {"samples": 4}}, resume=False)
    with pytest.raises(EvaluationError, match="--resume takes it up"):
        Folder(out, {"seed": 0}, resume=False)
    Folder(out, {"seed": 0, "date": "now", "sampling": {"samples": 4}}, resume=True)
    with pytest.raises(EvaluationError, match="begun with seed 0, now it is 1"):
        Folder(out, {"seed": 1, "date": "now", "sampling": {"samples": 4}}, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(EvaluationError, match="holds no evaluation"):
        Folder(tmp_path / "mine", {}, resume=False)


def test_what_is_written_of_the_model(engine: Engine) -> None:
    told = described(engine)
    assert told["model"] == "hadal-mini" and told["exact"] is False and told["dtype"] == "float32"
    assert len(told["digest"]) == 64 and told["revision"] is None and told["template"] == "hadal-mini"


# --- the command line ---


def test_a_set_from_the_command_line(
    loaded: Engine, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["eval", "--set", str(own), "--samples", "2", "--instruction", "", "--out", str(out)]
    shown = hadal(capsys, *words)
    assert shown.status == 0, shown.err
    assert "PASS@1" in shown.out and "CONS@2" in shown.out and "samples in" in shown.err
    cells = {line.split()[0]: line.split() for line in shown.out.splitlines()}
    assert cells["own"][1:3] == ["1", "100.0%"] and cells["less"][1:3] == ["2", "50.0%"]
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert [row["pass@1"] for row in results["results"]] == pytest.approx([1.0, 0.5, 2 / 3])
    settings = results["settings"]
    assert settings["sampling"] == {"samples": 2, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32768,
                                    "seed": 0, "chat": True, "thinking": None}  # fmt: skip
    assert {"digest", "sha256", "versions", "date", "judging", "device", "quantize"} <= settings.keys()
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 6 and lines[0]["answer"] == "47" and lines[0]["right"] is True
    assert lines[0]["prompt"][0]["content"] == RECORDS[0]["question"] and "**47**" in lines[0]["text"]
    refused = hadal(capsys, *words)
    assert refused.status == 1 and "--resume takes it up" in refused.err and refused.err.count("\n") == 1
    again = hadal(capsys, *words, "--resume", "--json")
    assert json.loads(again.out)["results"] == results["results"]
    other = hadal(capsys, *words, "--resume", "--seed", "3")
    assert other.status == 1 and "was begun with sampling" in other.err


def test_puzzles_are_sampled_on_demand(loaded: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "eval", "--limit", "1", "--samples", "2", "--max-tokens", "2", "--json")
    report = json.loads(shown.out)
    assert report["results"][-1]["problems"] == 15 and report["results"][-1]["truncated"] == 1.0
    assert report["settings"]["sampling"]["temperature"] == 0.6


def test_a_sets_own_answers(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "eval", "--set", str(own), "--check")
    assert shown.status == 0 and "3 of 3 own answers are judged right" in shown.out
    for rules, named in (("boxed,first", "'first'"), ("", "''")):
        refused = hadal(capsys, "eval", "--set", str(own), "--check", "--extract", rules)
        assert refused.status == 2 and f"hadal: --extract names {named}; rules: boxed," in refused.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "a", "--tasks", "b"], "one at a time"),
        (["--include", "a"], "--include goes with --tasks"),
        (["--server", "http://x"], "--server goes with --tasks"),
        (["--check"], "--check goes with --set"),
        (["--extract", "boxed"], "--extract goes with --set"),
        (["--tasks", "gsm8k", "--samples", "3"], "--samples is for puzzles and sets"),
        (["--resume"], "--resume needs the --out"),
        (["--set", "/nowhere.jsonl"], "cannot be read as JSON lines"),
    ],
)
def test_misuse_is_named(words: list[Any], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = hadal(capsys, "eval", *words)
    assert shown.status in (1, 2) and expected in shown.err and shown.err.count("\n") == 1, shown.err
