"""Stream chunks → turns → what the page shows and what the API is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hadal.ui.conversation import (
    Conversation,
    ConversationError,
    Figures,
    Fold,
    Turn,
    api_messages,
    figures_line,
    messages,
    seconds,
    title_of,
    turn_at,
    turn_messages,
)


def chunk(finish: str | None = None, **delta: str) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 1200,
        "prompt_cache_hit_tokens": 1024,
        "completion_tokens": 11,
        "completion_tokens_details": {"reasoning_tokens": 4},
    },
}


def folded(*timed: tuple[float, dict[str, Any]], end: float = 9.0) -> Turn:
    turn = Turn("q")
    fold = Fold(turn, 0.0)
    for now, piece in timed:
        fold.feed(piece, now)
    fold.finish("done", end)
    return turn


def test_reasoning_answer_and_figures_are_told_apart() -> None:
    turn = folded(
        (0.1, chunk(role="assistant", content="")),
        (0.5, chunk(reasoning_content="a", reasoning="a")),
        (1.0, chunk(reasoning_content="b", reasoning="b")),
        (2.0, chunk(content="x")),
        (2.5, chunk(content="y")),
        (2.6, chunk("stop")),
        (2.7, USAGE),
    )
    assert (turn.reasoning, turn.answer, turn.thought_s) == ("ab", "xy", 1.5)
    assert turn.figures == Figures(1200, 1024, 11, 4, 0.5, 10 / 2.0)
    assert turn.finish_reason == "stop" and turn.model == "m"
    assert figures_line(turn) == (
        "5.0 tokens/s · first token after 0.50 s · 11 tokens, 4 of them thought · 1,200 read (1,024 cached)"
    )


def test_cached_tokens_are_also_read_where_openai_has_them() -> None:
    usage = {"prompt_tokens": 8, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 6}}
    turn = folded((1.0, chunk(content="x")), (1.0, {"choices": [], "usage": usage}))
    assert turn.figures is not None and turn.figures.cached_tokens == 6
    assert turn.figures.tokens_per_s is None  # one token has no rate


def test_vllm_style_reasoning_field() -> None:
    assert folded((1.0, chunk(reasoning="r"))).reasoning == "r"


def test_thought_is_open_while_it_lasts_and_folded_after() -> None:
    turn = Turn("q")
    fold = Fold(turn, 0.0)
    assert turn_messages(turn) == [{"role": "user", "content": "q"}]
    fold.feed(chunk(reasoning_content="hm"), 1.0)
    thought = turn_messages(turn)[1]
    assert thought["metadata"] == {"title": "Thinking…", "status": "pending"}
    fold.feed(chunk(content="42"), 2.2)
    thought, answer = turn_messages(turn)[1:]
    assert thought["metadata"] == {"title": "Thought for 1.2 s", "status": "done"}
    assert answer == {"role": "assistant", "content": "42"}


def test_thought_that_was_stopped_has_its_duration_too() -> None:
    turn = Turn("q")
    fold = Fold(turn, 0.0)
    fold.feed(chunk(reasoning_content="hm"), 1.0)
    fold.finish("stopped", 4.0)
    assert turn.thought_s == 3.0
    assert turn_messages(turn)[1]["metadata"]["title"] == "Thought for 3.0 s"
    assert figures_line(turn).startswith("Stopped · first token")


def test_limit_is_said() -> None:
    assert figures_line(folded((1.0, chunk("length", content="x")))).startswith(
        "Cut off: the limit of tokens"
    )


def test_error_is_escaped_and_on_one_line() -> None:
    turn = Turn("q")
    Fold(turn, 0.0).finish("failed", 1.0, "bad <img src=x>\n\n![a](http://e/x.png)")
    content = turn_messages(turn)[1]["content"]
    assert "<img" not in content and "\n" not in content and "&lt;img" in content
    assert figures_line(turn) == ""


def test_model_text_carries_no_html() -> None:
    turn = Turn(
        "q", reasoning="<b>r</b>", answer="![x](http://e/i.png) <script>", status="done", thought_s=1.0
    )
    shown = [m["content"] for m in turn_messages(turn)[1:]]
    assert shown == ["&lt;b>r&lt;/b>", "!&#91;x](http://e/i.png) &lt;script>"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.004, "4 ms"),
        (0.0994, "99 ms"),
        (0.31, "0.31 s"),
        (0.996, "1.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def two_turns() -> Conversation:
    conversation = Conversation.new(5.0)
    for number in (1, 2):
        turn = conversation.ask(f"question {number}", 6.0)
        turn.reasoning, turn.answer, turn.thought_s, turn.status = "r", f"answer {number}", 1.0, "done"
    return conversation


def test_the_api_gets_questions_and_answers_but_no_reasoning() -> None:
    conversation = two_turns()
    conversation.ask("question 3", 7.0)
    assert api_messages(conversation, " be brief ") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "question 1"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "question 2"},
        {"role": "assistant", "content": "answer 2"},
        {"role": "user", "content": "question 3"},
    ]


def test_turns_without_an_answer_are_not_sent() -> None:
    conversation = two_turns()
    conversation.turns[0].answer = ""
    conversation.ask("question 3", 7.0)
    assert [m["content"] for m in api_messages(conversation, "")] == ["question 2", "answer 2", "question 3"]


def test_messages_and_turn_at_agree() -> None:
    conversation = two_turns()
    conversation.turns[0].error = "oops"
    shown = messages(conversation)
    owners = [turn_at(conversation, index) for index in range(len(shown))]
    assert owners == [0, 0, 0, 0, 1, 1, 1]
    assert [m["role"] for m in shown] == ["user", *["assistant"] * 3, "user", *["assistant"] * 2]
    with pytest.raises(IndexError, match="beyond the 7 messages"):
        turn_at(conversation, 7)


def test_round_trip_through_the_browser() -> None:
    conversation = two_turns()
    conversation.turns[0].figures = Figures(1, 0, 2, 1, 0.5, None)
    again = Conversation.from_dict(json.loads(json.dumps(conversation.to_dict())))
    assert again == conversation


def test_a_turn_cut_off_by_a_reload_counts_as_stopped() -> None:
    conversation = Conversation.new(1.0)
    conversation.ask("q", 2.0)
    again = Conversation.from_dict(conversation.to_dict())
    assert again.turns[0].status == "stopped"
    assert figures_line(again.turns[0]) == "Stopped"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], "must be an object, not list"),
        (lambda d: {**d, "id": "../x"}, "not a hexadecimal id"),
        (lambda d: {k: v for k, v in d.items() if k != "id"}, "id is missing"),
        (lambda d: {**d, "title": 3}, "conversation.title must be str, not int"),
        (lambda d: {**d, "owner": "me"}, "conversation.owner is unknown"),
        (lambda d: {**d, "turns": "x"}, "turns must be a list"),
        (lambda d: {**d, "turns": [{"answer": "x"}]}, r"turns\[0\].question is missing"),
        (lambda d: {**d, "turns": [{"question": "x", "status": "odd"}]}, "status 'odd' is unknown"),
        (lambda d: {**d, "turns": [{"question": "x", "thought_s": True}]}, "thought_s must be"),
        (
            lambda d: {**d, "turns": [{"question": "x", "figures": {"prompt_tokens": "1"}}]},
            "prompt_tokens must be int",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        Conversation.from_dict(change(two_turns().to_dict()))


def test_titles() -> None:
    assert title_of("  What\nis 2 + 2?  ") == "What is 2 + 2?"
    assert title_of("word " * 30) == "word " * 8 + "word…"
    assert title_of("x" * 100) == "x" * 48 + "…"
    assert title_of("   ") == "New conversation"
