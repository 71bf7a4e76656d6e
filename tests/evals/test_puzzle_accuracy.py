"""The examination: right answers count, wrong ones do not, problems are unseen, all is written down."""

from __future__ import annotations

import json

import pytest

from hadal.data.puzzles import LANGUAGES, TASKS, is_held_out
from hadal.evals.puzzles import (
    accuracy_section,
    engine_generate,
    evaluate,
    problems,
    table,
    wilson,
)


def known(samples: int, seed: int = 0) -> dict[str, str]:
    return {one.prompt: one.completion for one in problems(samples, seed)}


def test_problems_are_unseen_distinct_and_in_all_languages() -> None:
    asked = problems(200)
    assert len(asked) == len(TASKS) * 200
    assert len({(one.task, one.problem.key) for one in asked}) == len(asked)
    assert all(is_held_out(one.problem.key) for one in asked)
    for name in TASKS:
        for language in LANGUAGES:
            count = sum(one.task == name and one.language == language for one in asked)
            assert count == (66 if language == LANGUAGES[-1] else 67)
    assert [one.language for one in problems(5, 0, ["sorting"])] == ["en", "en", "fr", "fr", "pt"]
    assert [one.language for one in problems(1, 0, ["sorting"])] == ["en"]
    assert problems(4, 3) == problems(4, 3) != problems(4, 4)


def test_a_perfect_and_a_silent_model() -> None:
    answers = known(12)
    report = evaluate(lambda prompts: [answers[prompt] for prompt in prompts], samples=12)
    assert report["accuracy"] == 1.0 and not report["failures"]
    assert all(row["correct"] == row["total"] == 12 and row["unfinished"] == 0 for row in report["tasks"])
    silent = evaluate(lambda prompts: [""] * len(prompts), samples=12)
    assert silent["accuracy"] == 0.0 and all(row["unfinished"] == 12 for row in silent["tasks"])
    assert len(silent["failures"]) == 5 * len(TASKS)
    assert silent["failures"][0]["completion"] == ""


def test_counts_by_language_and_kind_add_up() -> None:
    answers = known(30)
    french = {one.prompt for one in problems(30) if one.language == "fr"}
    seen: list[tuple[int, int]] = []
    report = evaluate(
        lambda prompts: ["</think>no" if prompt in french else answers[prompt] for prompt in prompts],
        samples=30,
        progress=lambda done, total: seen.append((done, total)),
        count_tokens=lambda text: 7,
        settings={"dtype": "float32"},
    )
    assert seen[-1] == (30 * len(TASKS), 30 * len(TASKS)) and len(seen) == 2
    for row in report["by_language"]:
        assert row["accuracy"] == (0.0 if row["language"] == "fr" else 1.0) and row["total"] == 10
    for row in report["tasks"]:
        kinds = [kind for kind in report["by_kind"] if kind["task"] == row["task"]]
        assert row["correct"] == 20 and row["length"] == 7
        assert not kinds or sum(kind["total"] for kind in kinds) == 30
        assert not kinds or sum(kind["correct"] for kind in kinds) == 20
    assert report["accuracy"] == pytest.approx(2 / 3)
    settings = report["settings"]
    assert settings["dtype"] == "float32" and settings["length_unit"] == "tokens" and settings["seed"] == 0
    assert json.loads(json.dumps(report)) == report


def test_the_chat_task_asks_for_polite_refusals() -> None:
    chat = [one for one in problems(60) if one.task == "chat"]
    assert {one.problem.kind for one in chat} <= {"off-topic", "zero", "too-long"}
    answer = "</think>\n\nThe capital is **Paris**."
    report = evaluate(lambda prompts: [answer] * len(prompts), samples=60, tasks=["chat"])
    assert report["accuracy"] == 0.0


def test_wilson() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'sorting'"):
        problems(3, tasks=["sortin"])
    with pytest.raises(ValueError, match="at least 1"):
        problems(0)
    with pytest.raises(ValueError, match="1 completions for 15 prompts"):
        evaluate(lambda prompts: ["x"], samples=3, tasks=["addition", "digits", "chat", "chain", "modular"])


def test_an_engine_is_asked_greedily_in_its_own_template() -> None:
    class Said:
        text = "1\n</think>\n\n**2**"

    class Engine:
        params: object = None
        messages: list[object]

        def __init__(self) -> None:
            self.messages = []

        def encode_chat(self, messages: object) -> list[int]:
            self.messages.append(messages)
            return [1, 2]

        def generate(self, prompts: list[list[int]], params: object = None) -> list[Said]:
            self.params = params
            return [Said()] * len(prompts)

    engine = Engine()
    assert engine_generate(engine, 99)(["1+1?", "2+0"]) == [Said.text] * 2
    assert engine.messages[0] == [{"role": "user", "content": "1+1?"}]
    assert engine.params.temperature == 0.0 and engine.params.max_tokens == 99  # type: ignore[attr-defined]
    assert evaluate(engine, samples=3, tasks=["addition"])["tasks"][0]["total"] == 3


def test_table() -> None:
    answers = known(30)
    report = evaluate(
        lambda prompts: [answers[p] if "÷" not in answers[p] else "</think>?" for p in prompts], samples=30
    )
    lines = table(report).splitlines()
    assert len(lines) == 2 + len(TASKS) + 1
    assert lines[2].startswith("| Addition (to 6 digits) | 30/30 | 100.0% | 88.6–100.0% | 100.0% | 100")
    assert "0/30 | 0.0% | 0.0–11.4%" in lines[5]
    assert "450 distinct problems" in accuracy_section(report) and "seed 0" in accuracy_section(report)
