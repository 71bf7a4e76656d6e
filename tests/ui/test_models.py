"""What the page says about models."""

from __future__ import annotations

from hadal.ui import models
from hadal.ui.api import Model


def test_the_model_on_board_is_called_what_it_is() -> None:
    note = models.note([Model("hadal-mini", 2048, "hadal-mini: deepseek_v3")], "hadal-mini")
    assert "number puzzles only" in note and "2,048 tokens" in note
    for name in ("hadal-mini:latest", "hadal-mini-dense", "hadal-mini-dense:latest"):
        assert models.prompt_hint(name) == "Ask a number puzzle…"
    texts = " ".join(q["text"] for q in models.questions("hadal-mini"))
    assert "What is" in texts and "Combien" in texts and "Coloque" in texts


def test_an_empty_setting_says_what_holds() -> None:
    known = [Model("a", sampling={"temperature": 0.0}), Model("b")]
    assert models.own_value(known, "a", "temperature") == "The model's own: 0"
    assert models.own_value(known, "a", "top_p") == models.own_value(known, "b", "top_p") == "The model's own"


def test_other_models_speak_for_themselves() -> None:
    distill = Model("distill", None, "Qwen2.5-Math-1.5B fine-tuned on R1's outputs; not R1")
    assert models.note([distill], "distill") == (
        "Qwen2.5-Math-1.5B fine-tuned on R1's outputs; not R1. It can be wrong. Check what matters."
    )
    assert models.note([Model("x")], "x") == "It can be wrong. Check what matters."
    assert models.note([], "x") == ""
    assert models.questions("x") != models.questions("hadal-mini")
