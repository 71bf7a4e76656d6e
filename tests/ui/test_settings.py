"""The side panel's values and the request that they make."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest

from hadal.ui.conversation import Conversation
from hadal.ui.settings import DEFAULTS, Settings, SettingsError, from_panel, request_body

PANEL = ["m", "sys", True, "0.6", " .95 ", 0, "", None, " key "]


def test_panel_to_settings() -> None:
    assert from_panel(PANEL) == Settings("m", "sys", True, 0.6, 0.95, 0, None, None, "key")
    assert from_panel(["m", None, False, 1, 1, 50, "12", " 0 ", None]) == Settings(
        "m", "", False, 1.0, 1.0, 50, 12, 0, ""
    )
    assert from_panel(astuple(DEFAULTS)) == DEFAULTS


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (3, "2.5", "Temperature is '2.5': it must be empty or a number from 0 to 2"),
        (3, float("nan"), "Temperature is 'nan'"),
        (3, "1e-1", "Temperature is '1e-1'"),
        (3, "٣", "Temperature is '٣'"),
        (4, "0", "Top-p is '0': it must be empty or a number from 0.01 to 1"),
        (5, "-7", "Top-k is '-7'"),
        (6, "0", "Most tokens is '0': it must be empty or a whole number from 1"),
        (6, "1e9", "Most tokens is '1e9'"),
        (7, "-3", "Seed is '-3'"),
        (7, "9" * 5000, "Seed is '9999"),
        (7, "٣", "Seed is '٣'"),
    ],
)
def test_bad_values_are_named(position: int, value: Any, message: str) -> None:
    panel = list(PANEL)
    panel[position] = value
    with pytest.raises(SettingsError) as caught:
        from_panel(panel)
    assert str(caught.value).startswith(message)


def test_request_body() -> None:
    conversation = Conversation.new(0.0)
    conversation.ask("hi", 1.0)
    body = request_body(
        conversation, Settings(model="m", system="s", thinking=False, top_k=5, max_tokens=9, seed=0)
    )
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        "thinking": {"type": "disabled"},
        "top_k": 5,
        "max_tokens": 9,
        "seed": 0,
    }
    own = request_body(conversation, DEFAULTS)
    assert own.keys() == {"model", "messages", "thinking"}  # the rest is the model's own
    assert "thinking" not in request_body(conversation, Settings(thinking=None))
    greedy = request_body(conversation, Settings(temperature=0.0, top_p=1.0))
    assert (greedy["temperature"], greedy["top_p"]) == (0.0, 1.0)
