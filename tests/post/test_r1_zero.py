"""R1-Zero in minutes: its texts computed again, what a model writes counted, the whole chain very short."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.data import zero
from hadal.data.puzzles.task import is_held_out
from hadal.data.shards import ShardError
from hadal.post.rewards import Completion, Rewards
from hadal.post.rewards import read as read_rewards
from hadal.post.rewards.arithmetic import evaluate
from hadal.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import r1_zero

FULL = zero.Mixture(long=1.0)
BOTH = zero.Mixture((("countdown", 0.5), ("chain", 0.5)), countdown=(3, 4), long=0.7, patience=0.6)
REWARDS = [{"kind": "countdown", "tasks": ["countdown"]}, {"kind": "puzzle", "tasks": ["chain"]}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zero.write_tokenizer(tmp_path_factory.mktemp("zero") / "tokenizer")


def rewarded(pairs: list[tuple[zero.Question, str]]) -> list[float]:
    """What the rules of the recipe give."""
    with Rewards(read_rewards(REWARDS)) as rules:
        judged = [Completion(q.record, text, 9, "stop", True, ()) for q, text in pairs]
        return [total.value for total in rules.score(judged, 0.0)]


def test_every_try_of_the_texts_is_right_when_computed_again() -> None:
    for index in range(300):
        question, text = zero.text(index, 3, replace(FULL, countdown=(3, 4)))
        *lines, last = text.split("</think>")[0].splitlines()
        for line in (*lines, last):
            total: float | None = None
            sums, _, verdict = line.partition("?")
            for step in sums.split(" "):
                left, right = step.split("=")
                total = float(evaluate(left if total is None else f"{total:.0f}{left}").value)
                assert total == int(right), line
            target, sign = verdict.split(" ")
            assert int(target) == question.target and total is not None
            assert sign == ("✓" if total == question.target else "<" if total < question.target else ">")
        assert last.endswith("✓") and not any(line.endswith("✓") for line in lines)
        assert len(set(lines)) == len(lines) < FULL.within


def test_full_and_short_answers_earn_the_reward_and_given_up_ones_do_not() -> None:
    mixtures = (replace(BOTH, patience=1.0), replace(BOTH, long=0.0))
    assert rewarded([zero.text(i, 1, m) for m in mixtures for i in range(80)]) == [1.0] * 160
    impatient = [zero.text(i, 1, replace(FULL, patience=0.0)) for i in range(80)]
    first = [zero.read(text, q.numbers, q.target).tries[0] for q, text in impatient]
    assert rewarded(impatient) == [float(one.reaches) for one in first]
    assert 0 < sum(one.reaches for one in first) < 40


def test_attempts_are_all_there_is_to_try_each_once() -> None:
    found = zero.attempts((2, 3, 7))
    assert len(found) == len({one.expression for one in found})
    for one in found:
        assert evaluate(one.expression).value == one.value and sorted(one.numbers) == [2, 3, 7]
        assert all(0 < total <= zero.LIMIT for total in one.totals())
    assert {one.value for one in found} == {
        12, 8, 35, 6, 15, 1, 42, 13, 2, 18, 19, 5, 27, 9, 11, 17, 3, 23, 20, 47
    } & {one.value for one in found}  # fmt: skip
    assert {"(3+2)×7", "(7-3)×2", "(7×3)-2"} <= {one.expression for one in found}


def test_what_is_examined_is_in_no_text_and_no_prompt(tmp_path: Path) -> None:
    texts = {zero.text(i, 1, BOTH)[0].key for i in range(600)}
    assert not any(map(is_held_out, texts))
    for split in ("train", "held-out"):
        zero.write_prompts(tmp_path / split, count=30, seed=1, mixture=BOTH, split=split)
        records = [json.loads(line) for line in (tmp_path / split).read_text("utf-8").splitlines()]
        assert len({record["prompt"] for record in records}) == 30
        for record in records:
            question = zero.Question(record["task"], tuple(record["numbers"]), record["target"])
            assert (
                is_held_out(question.key) == (split == "held-out")
                and json.loads(json.dumps(question.record)) == record
            )
    with pytest.raises(ValueError, match="unknown split"):
        zero.draw(random.Random(0), BOTH, "test")


WRITTEN = """3+7=10 -5=5?50 <
3+7=11 ×5=55?50 >
7-3=4 ×5=20?50 ✓
3+7=10 ×5=50?50 >
3+3=6 ×5=30?50 <
3+7=10 ×5=50?50 ✓
so
7+3=10 ×5=50?5
</think>

**(3+7)×5**"""


def test_what_was_written_is_counted_by_computing_it_again() -> None:
    trace = zero.read(WRITTEN, (3, 7, 5), 50)
    assert [one.sound for one in trace.tries] == [True, False, True, True, True, True]
    assert [one.numbers for one in trace.tries] == [True, True, True, True, False, True]
    assert [one.reaches for one in trace.tries] == [False, False, False, True, False, True]
    assert (trace.claims, trace.true_claims, trace.missed, trace.strange) == (2, 1, 1, 2)
    tally = r1_zero.Tally()
    record = {"numbers": [3, 7, 5], "target": 50}
    tally.add(record, WRITTEN, 70, True, False)
    tally.add(record, "</think>\n\n**(3+7)×5**", 10, True, False)
    tally.add(record, "5×3=15 +7=22?50 ✓\n", 20, False, True)
    assert tally.numbers() == {
        "accuracy": pytest.approx(2 / 3), "length": pytest.approx(100 / 3), "long": pytest.approx(2 / 3),
        "tries": pytest.approx(7 / 3), "sound": pytest.approx(5 / 7), "claims": 1.0,
        "precision": pytest.approx(1 / 3), "missed": pytest.approx(1 / 3), "cut": pytest.approx(1 / 3),
    }  # fmt: skip


def test_a_wrong_target_or_nothing_at_all_is_no_sound_try() -> None:
    assert not zero.read("3+7=10 ×5=50?51 <\n", (3, 5, 7), 50).tries[0].sound
    assert zero.read("", (3, 5, 7), 50) == zero.Trace((), 0)
    assert zero.read("7+8=15 +5=20\n</think>\n\n**0**", (7, 8, 5), 0).tries[0].sound


CHAIN = zero.Mixture((("chain", 1.0),), chain=(6, 6), long=0.5)


def test_chains_are_worked_out_at_a_fixed_distance_and_read_again(tokenizer: Path) -> None:
    """Each running total lies as many tokens behind its number as every other, which is what a small model
    learns them by; what is read is computed again."""
    loaded = Tokenizer.load(tokenizer)
    kinds = set()
    for index in range(60):
        question, text = zero.text(index, 4, CHAIN)
        think = text.split("</think>")[0].strip()
        kinds.add(bool(think))
        trace = zero.read(text, question.numbers, question.target)
        assert len(trace.tries) == bool(think) and not trace.strange
        assert rewarded([(question, text)] if index < 6 else []) == [1.0] * (index < 6)
        if not think:
            continue
        assert trace.tries[0].reaches and trace.tries[0].sound
        asked, worked = loaded.encode(question.prompt)[:11], loaded.encode(think)
        assert len(worked) == 11
        total = 0
        for number, shown in zip(asked[::2], worked[::2], strict=True):
            total = (total + int(loaded.decode([number]))) % 10
            assert int(loaded.decode([shown])) == total
    assert kinds == {True, False}
    for written, sound, complete in (("3,0,4", True, True), ("3,0", True, False), ("3,1,5", False, True)):
        (one,) = zero.read(f"{written}\n</think>\n\n**4**", (3, 7, 4), 4).tries
        assert (one.sound, one.numbers, one.reaches) == (sound, complete, sound and complete)


def test_numbers_are_a_token_each_and_texts_are_what_the_engine_reads(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Shards hold the ids that a prompt has at inference."""
    loaded = Tokenizer.load(tokenizer)
    assert 20 + 256 + 90 < loaded.vocab_size <= zero.VOCABULARY
    assert all(len(loaded.encode(str(number))) == 1 for number in range(100))
    made = zero.write_set(tmp_path / "set", tokenizer, count=40, seed=1, mixture=BOTH)
    lengths = []
    for index in range(40):
        question, text = zero.text(index, 1, BOTH)
        prompt = loaded.encode_with_controls(f"<｜User｜>{question.prompt}<｜Assistant｜><think>\n")
        lengths.append(1 + len(prompt) + len(loaded.encode_with_controls(text)) + 1)
    assert made.tokens == sum(lengths) and made.documents == 40
    assert zero.write_set(tmp_path / "set", tokenizer, count=40, seed=1, mixture=BOTH) == made
    with pytest.raises(ShardError, match="other texts"):
        zero.write_set(tmp_path / "set", tokenizer, count=41, seed=1, mixture=BOTH)


TINY = {
    "texts": ["skills.documents=120", "diluted.documents=60", "prompts.count=20", "examination.count=6",
              "examination.samples=2"],
    "base": ["train.tokens=2048", "train.batch_tokens=1024", "model.hidden_size=32",
             "model.num_hidden_layers=2", "phases.diluted.tokens=1024", "phases.diluted.batch_tokens=1024",
             "log.heldout_every_steps=0"],
    "rl": ["train.steps=2", "sample.prompts=2", "sample.group=2", "train.mini_batches=1",
           "sample.max_tokens=24", "sample.max_tokens_late=32"],
}  # fmt: skip


def test_the_whole_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """From texts to table and picture, by the recipes; the second time nothing is done again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sets = [part for name, items in TINY.items() for item in items for part in ("--set", f"{name}:{item}")]
    monkeypatch.setattr(sys, "argv", ["r1_zero.py", "--out", str(tmp_path), "--seeds", "2", *sets])
    try:
        assert r1_zero.main() == 0
        monkeypatch.setattr(r1_zero, "grpo", None)
        assert r1_zero.main() == 0
    finally:
        torch.set_num_threads(threads)
    (run,) = json.loads((tmp_path / "r1-zero.json").read_text("utf-8"))["runs"]
    assert [record["step"] for record in run["curves"]] == [1, 2] == [r["step"] for r in run["steps"]]
    assert set(run["exams"]) == {"skills", "base", "rl"} and run["seed"] == 2
    assert (tmp_path / "r1-zero.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "verification" not in said and "✓ is right" in said and "seed 2:" in said
