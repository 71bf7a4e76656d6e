"""Task sources: files, puzzles, reasoning-gym; their mixture is a function of the prompt's number."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hadal.data.puzzles import is_held_out
from hadal.data.strict import RecipeError
from hadal.post.rewards import Completion, Rewards, sandbox
from hadal.post.rewards import read as read_rewards
from hadal.post.tasks import Prompts, chat, check, read, read_jsonl


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_file_is_shuffled_anew_each_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": f"q{i}", "answer": str(i)} for i in range(10)])
    prompts = Prompts(read([{"source": "jsonl", "path": path, "instruction": "Box it.", "task": "math"}]), 3)
    got = prompts.records(0, 20)
    first, second = ([r["answer"] for r in got[at : at + 10]] for at in (0, 10))
    assert sorted(first) == sorted(second) == [str(i) for i in range(10)] and first != second
    assert got[0]["prompt"].endswith("\n\nBox it.") and {r["task"] for r in got} == {"math"}
    again = Prompts(prompts.recipes, 3)
    assert again.record(15) == got[15] and again.record(2) == got[2]


def test_a_mixture_has_its_shares_and_is_a_function_of_the_number(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": str(i), "task": f"t{i % 2}"} for i in range(7)])
    tables = [{"source": "jsonl", "path": path, "weight": 1}, {"source": "puzzles", "weight": 3}]
    prompts = Prompts(read(tables), 1)
    got = prompts.records(0, 1000)
    counts = Counter(record["task"] for record in got)
    assert counts["puzzles"] == 750 and counts["t0"] + counts["t1"] == 250  # the file's own names stay
    one = Prompts(read(tables), 1)
    assert [one.record(n) for n in (999, 0, 500)] == [got[n] for n in (999, 0, 500)]
    plain = [record["prompt"] for record in got if record["task"] != "puzzles"]
    assert all(set(plain[at : at + 7]) == set(map(str, range(7))) for at in range(0, 245, 7))
    after = prompts.records(1000, 4)
    assert not any(record in got for record in after if record["task"] == "puzzles")


def test_puzzles_come_with_what_their_rewards_need() -> None:
    tables = [{"source": "puzzles", "name": "countdown/3", "language": "fr", "split": "held-out"}]
    prompts = Prompts(read(tables))
    rewards = [{"kind": "puzzle"}, {"kind": "countdown"}, {"kind": "language"}]
    with Rewards(read_rewards(rewards)) as made:
        records = json.loads(json.dumps(prompts.records(0, 20)))
        made.check(records)
    assert all(is_held_out(r["puzzle"]["key"]) and r["language"] == "fr" for r in records)
    assert len(records[0]["numbers"]) == 3 and records[0]["task"] == "countdown/3"
    assert (
        len({r["puzzle"]["key"] for r in Prompts(read([{"source": "puzzles", "size": 5}])).records(0, 9)})
        == 5
    )


def test_all_records_of_files_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", "task": "t"}\n')
    path = str(tmp_path / "p.jsonl")
    tables = [{"source": "puzzles"}, {"source": "jsonl", "path": path, "instruction": "Box it."}]
    assert list(Prompts(read(tables)).placed()) == [
        (f"{path}, line 1", {"prompt": "a\n\nBox it.", "task": "jsonl"}),
        (f"{path}, line 3", {"prompt": "b\n\nBox it.", "task": "t"}),
    ]


def test_gsm8k_and_humaneval_files(tmp_path: Path) -> None:
    gsm = write(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "2*600=<<..>>\n#### 1,200"}])
    record = Prompts(read([{"source": "gsm8k", "path": gsm}])).record(0)
    assert record == {"prompt": "How many?", "answer": "1200", "task": "gsm8k"}
    raw = {"task_id": "T/0", "prompt": "def f():\n", "test": "def check(c): pass", "entry_point": "f",
           "canonical_solution": "    pass"}  # fmt: skip
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(json.dumps(raw) + "\n")
    table = {"source": "humaneval", "path": str(tmp_path / "h.jsonl.gz")}
    record = Prompts(read([table])).record(0)
    assert "canonical_solution" not in record and record["prompt"] == "def f():\n"
    asked = Prompts(read([{**table, "instruction": "In a block."}])).record(0)
    assert asked["prompt"] == "def f():\n" and chat(asked)[0]["content"] == "def f():\n\n\nIn a block."


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "x is no JSON object"),
        ({}, "needs either `prompt` or `messages`"),
        ({"prompt": "a", "messages": []}, "needs either"),
        ({"prompt": ""}, "prompt is ''; a text is wanted"),
        ({"messages": []}, "a list of objects with `role` and `content`"),
        ({"messages": [{"role": "user"}]}, "a list of objects"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message is the assistant's"),
    ],
)
def test_records_are_checked(record: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(record, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record"),
        ('{"a": 1}\n{', "line 2 is not JSON"),
        ("[1]", "line 1 is no JSON object"),
        ('{"prompt": "a"}\n{"prompt": "\\ud800"}', r"line 2 holds a lone surrogate U\+D800"),
    ],
)
def test_files_are_checked(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_jsonl(path)


def test_a_file_may_begin_with_a_byte_order_mark_and_leave_lines_empty(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert read_jsonl(tmp_path / "p.jsonl") == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"source": "json"}, r"tasks\[0\]: source is 'json'; it must be one of jsonl"),
        ({"source": "jsonl"}, "path is ''; it must be a file"),
        ({"source": "puzzles", "path": "x"}, "path is 'x'; it must be left out"),
        ({"source": "gym"}, "name is ''; it must be a data set of reasoning-gym"),
        ({"source": "puzzles", "weight": 0}, "weight is 0.0; it must be above 0"),
        (
            {"source": "puzzles", "langage": "en"},
            "unknown key 'langage' in the recipe. Did you mean 'language'",
        ),
        (
            {"source": "puzzles", "language": "zh"},
            "language is 'zh'; it must be for puzzles, one of en, fr, pt",
        ),
        ({"source": "puzzles", "config": {"a": 1}}, "config is"),
    ],
)
def test_errors_of_tables_teach(table: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read([table])


def test_errors_of_sources_name_the_table(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no \[\[tasks\]\]"):
        read([])
    with pytest.raises(RecipeError, match=r"tasks\[1\]: unknown task 'cowntdown'; did you mean 'countdown'"):
        Prompts(read([{"source": "puzzles"}, {"source": "puzzles", "name": "cowntdown"}]))
    with pytest.raises(RecipeError, match=r"tasks\[0\]: .*nothing.jsonl cannot be read"):
        Prompts(read([{"source": "jsonl", "path": str(tmp_path / "nothing.jsonl")}]))
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"question": "a"}])
    with pytest.raises(RecipeError, match=r"p\.jsonl, line 2 needs either"):
        Prompts(read([{"source": "jsonl", "path": path}]))
    with pytest.raises(RecipeError, match=r"line 1: a record of GSM8K has `question`"):
        Prompts(read([{"source": "gsm8k", "path": path}]))


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra rl")
    if not sandbox.guarantees()["seccomp"]:
        pytest.skip("needs Linux with seccomp, for locked workers")
    with pytest.raises(RecipeError, match=r"no task 'cowntdown'; did you mean 'countdown'"):
        Prompts(read([{"source": "gym", "name": "cowntdown"}]))
    with pytest.raises(RecipeError, match="countdown refuses its settings"):
        Prompts(read([{"source": "gym", "name": "countdown", "config": {"min_number": 3}}]))
    names = ("countdown", "chain_sum", "polynomial_multiplication")  # the last depends on the order of a set
    tables = [{"source": "gym", "name": name, "size": 20} for name in names]
    records = json.loads(json.dumps(Prompts(read(tables)).records(0, 12)))
    assert {record["task"] for record in records} == set(names)
    hostile = "__import__('os')._exit(0)"
    table = {"kind": "gym", "threshold": 0.1}
    with Rewards(read_rewards([table]), workers=1) as rewards:
        right = rewards.score([Completion(r, f"<answer>{r['answer']}</answer>", 1) for r in records])
        wrong = rewards.score([Completion(r, "<answer>7</answer>", 1) for r in records])
        assert [t.value for t in right] == [1.0] * 12 and sum(t.value for t in wrong) < 2
        count = next(r for r in records if r["task"] == "countdown")
        escaped = rewards.score([Completion(count, f"<answer>{hostile}</answer>", 1)] * 2)
        assert [t.value for t in escaped] == [0.0, 0.0]
