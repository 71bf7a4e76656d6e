"""Files of problems: their forms, what is asked, what is refused, and their own answers judged."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hadal.evals.judges import Judge, Judging, normal_form, plain
from hadal.evals.samples import EvaluationError, own_solutions
from hadal.evals.sets import INSTRUCTIONS, SetError, form_of, puzzle_problems, read_set, sha256_of
from hadal.post.rewards import Completion, RewardError

DATA = Path(os.environ.get("HADAL_TEST_DATA", "/nowhere"))

GSM8K = {"question": "Two dozen eggs, 6 are broken. How many are whole?",
         "answer": "Two dozen are 2*12=<<2*12=24>>24.\n24-6=<<24-6=18>>18 are whole.\n#### 18"}  # fmt: skip
THOUSANDS = {"question": "How many metres are 1.2 km?", "answer": "1.2*1000\n#### 1,200"}
HUMANEVAL = {
    "task_id": "Own/0",
    "prompt": 'def twice(x: int) -> int:\n    """Two times x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}
WRONG = {**HUMANEVAL, "task_id": "Own/1", "canonical_solution": "    return x + 2\n"}


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, "utf-8")
    return path


def test_forms_are_told_from_the_record() -> None:
    assert form_of(GSM8K) == "gsm8k" and form_of(HUMANEVAL) == "humaneval"
    assert form_of({"question": "1+1?", "answer": "2"}) == "own"
    assert form_of({**HUMANEVAL, "kind": "code"}) == "own"


def test_gsm8k_and_humaneval(tmp_path: Path) -> None:
    path = written(tmp_path / "both.jsonl.gz", [GSM8K, THOUSANDS, HUMANEVAL])
    eggs, metres, twice = read_set(path)
    assert (eggs.kind, eggs.group, eggs.record["answer"]) == ("math", "gsm8k", ["18"])
    assert metres.record["answer"] == ["1200"]
    assert eggs.text == GSM8K["question"]
    assert eggs.messages[-1]["content"] == f"{GSM8K['question']}\n\n{INSTRUCTIONS['math']}"
    assert (twice.name, twice.kind, twice.group) == ("Own/0", "code", "humaneval")
    assert twice.text == HUMANEVAL["prompt"] and "canonical_solution" not in twice.record
    asked = twice.messages[-1]["content"]
    assert asked.startswith(INSTRUCTIONS["code"]) and asked.endswith('"""Two times x."""\n```')
    assert len(read_set(path, limit=2)) == 2
    assert read_set(path, instruction="")[0].messages[-1]["content"] == GSM8K["question"]
    assert len(sha256_of(path)) == 64


def test_records_of_ones_own(tmp_path: Path) -> None:
    path = written(
        tmp_path / "own.jsonl",
        [
            {"problem": "2+2?", "answer": 4, "id": "sum", "task": "easy"},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
             "answer": ["Ada", "Ada Lovelace"], "kind": "text"},
            {"prompt": "Print 1.", "io": [{"input": "", "output": "1"}]},
        ],
    )  # fmt: skip
    first, second, third = read_set(path)
    assert (first.name, first.group, first.kind, first.record["answer"]) == ("sum", "easy", "math", ["4"])
    assert (second.group, second.kind, second.text) == ("own", "text", "Who?")
    assert second.messages[0]["content"] == "Be brief."
    assert (third.kind, third.solution) == ("code", None)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"answer": "4"}, "line 2: it asks nothing: one of prompt, problem, question or messages"),
        ({"prompt": "2+2?"}, "line 2: answer is None; a text, a number"),
        ({"prompt": "2+2?", "answer": []}, "answer is"),
        ({"prompt": "2+2?", "answer": "4", "kind": "maths"}, "kind is 'maths'; kinds: math, text, code"),
        ({"messages": [{"role": "assistant", "content": "Hi"}], "answer": "4"}, "last message is not the"),
    ],
)
def test_what_cannot_be_asked_is_named(record: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = written(tmp_path / "own.jsonl", [{"prompt": "1+1?", "answer": "2"}, record])
    with pytest.raises(SetError, match=r"own\.jsonl") as caught:
        read_set(path)
    assert complaint in str(caught.value)


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "half.jsonl", [GSM8K, {"prompt": "a \ud83d?", "answer": "2"}])
    with pytest.raises(SetError, match=r"half\.jsonl, line 2 holds a lone surrogate U\+D83D behind .*a '"):
        read_set(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SetError, match="cannot be read"):
        read_set(tmp_path / "none.jsonl")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "1')
    with pytest.raises(SetError, match="line 1 is not JSON"):
        read_set(tmp_path / "torn.jsonl")


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """One worker of each kind, for all tests here: starting them is what takes long."""
    with Judge(["math", "code"], Judging(workers=1, seconds=30)) as made:
        yield made


def test_own_answers_are_judged_by_the_verifiers(tmp_path: Path, judge: Judge) -> None:
    path = written(tmp_path / "both.jsonl", [GSM8K, THOUSANDS, HUMANEVAL, WRONG])
    raw = replace(judge.judging, code="raw")
    problems = read_set(path)
    with Judge(["code"], raw) as continued:
        verdicts = own_solutions(problems[:2], raw, judge=judge)
        verdicts += own_solutions(problems[2:], raw, judge=continued)
    assert [verdict.right for verdict in verdicts] == [True, True, True, False]
    assert verdicts[0].answer == "18" and verdicts[3].details["status"] == "failed"
    nothing = written(tmp_path / "io.jsonl", [{"prompt": "1", "io": [{"input": "", "output": "1"}]}])
    with pytest.raises(EvaluationError, match="problem 0 has no solution"):
        own_solutions(read_set(nothing), Judging(workers=1))


def test_answers_that_cannot_be_read_are_named_beforehand(tmp_path: Path, judge: Judge) -> None:
    sound = [GSM8K, {"prompt": "1+1?", "answer": ["2", "two"]}, HUMANEVAL]
    judge.check(read_set(written(tmp_path / "sound.jsonl", sound)))
    torn = {"prompt": "A half?", "answer": "\\frac{1}{"}
    path = written(tmp_path / "torn.jsonl", [GSM8K, torn, {**torn, "answer": "(("}, torn])
    with pytest.raises(RewardError) as caught:
        judge.check(read_set(path))
    fault = r"line 2: the record's answer '\\frac{1}{' cannot be parsed (reward math), the first of 2;"
    assert str(caught.value).startswith(f"{path}, {fault}")  # line 4 says the same as line 2
    verdicts = own_solutions(read_set(path), judge.judging, judge=judge)
    assert [verdict.right for verdict in verdicts] == [True, False, False, False]


def test_the_answer_in_a_block_of_code(tmp_path: Path, judge: Judge) -> None:
    """As a chat answers: the whole function, in a fenced block."""
    problems = read_set(written(tmp_path / "code.jsonl", [HUMANEVAL]))
    texts = ["```python\ndef twice(x):\n    return x + x\n```", "def twice(x): return 2 * x",
             "```python\ndef twice(x):\n    return 4\n```"]  # fmt: skip
    said = [Completion(problems[0].record, text, 9) for text in texts]
    verdicts = judge.judge(problems * 3, said)
    assert [verdict.right for verdict in verdicts] == [True, False, False]
    assert verdicts[1].details["why"] == "no block of code"


def test_texts_and_puzzles_are_judged_here() -> None:
    from hadal.evals.puzzles import problems

    (sum_,) = puzzle_problems(problems(1, 0, ["addition"])[:1])
    with Judge(["puzzle", "text"], Judging()) as judge:
        right = Completion(sum_.record, str(sum_.solution), 5)
        assert judge.judge([sum_], [right])[0].right
        named = {"answer": ["Ada Lovelace"]}
        told = ["It was \\boxed{ada  LOVELACE}", "**Ada**", "Ada Lovelace", "<think>Ada Lovelace"]
        text = [judge._judge("text", [Completion(named, one, 3)])[0] for one in told]
    assert [verdict.right for verdict in text] == [True, False, True, False]
    assert text[3].answer is None


def test_equal_answers_have_one_number(judge: Judge) -> None:
    groups = judge.groups(
        "math",
        [
            ["1/2", "0.5", "\\frac{1}{2}", None, "0.25"],
            ["x+1", "1+x", "$x + 1$", "2"],
            ["1,000", "1000", "1000.0000001", "((("],
            [None, None],
        ],
    )
    assert groups == [[0, 0, 0, None, 1], [0, 0, 0, 1], [0, 0, 0, 1], [None, None]]
    assert normal_form(" 1,234.50 ") == "=2469/2" and normal_form("1/0") == "1/0"
    assert normal_form("−3") == "=-3" and normal_form("x + 1") == "x+1"
    assert plain("  São  PAULO ") == "são paulo"


def test_a_rule_that_there_is_not_is_refused() -> None:
    with pytest.raises(RewardError, match="rules: boxed"):
        Judge(["math"], Judging(extract=("box",)))


@pytest.mark.skipif(
    not (DATA / "gsm8k-test.jsonl").is_file() or not (DATA / "humaneval.jsonl.gz").is_file(),
    reason="HADAL_TEST_DATA names no such files",
)
def test_the_published_sets_agree_with_themselves() -> None:
    for name, count in (("gsm8k-test.jsonl", 1319), ("humaneval.jsonl.gz", 164)):
        problems = read_set(DATA / name)
        verdicts = own_solutions(problems, Judging(seconds=30))
        assert len(problems) == count and all(verdict.right for verdict in verdicts)
