"""What the page says about each model, and the questions that it offers to begin with.

The server's own description (`description` in /v1/models) comes first; the models on board have one here,
because people must know before they ask that they solve puzzles and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hadal.ui.api import Model

MINI = ("hadal-mini", "hadal-mini-dense")
MINI_NOTE = (
    "A very small model, trained on number puzzles only. It reasons in English, French and Portuguese."
)
OTHER_NOTE = "It can be wrong. Check what matters."

PUZZLES = (
    "What is 347 + 586?",
    "Use 3, 4 and 8 to make 20.",
    "Combien font 84 × 7 ?",
    "Coloque em ordem crescente: 41, 7, 93, 28, 65.",
    "Solve for x: 3x + 7 = 28",
    "What comes next: 4, 9, 14, 19, …?",
)
QUESTIONS = (
    "How many positive divisors does 360 have?",
    "Prove that the square root of 2 is irrational.",
    "Write a Python function that merges two sorted lists.",
    "Explain why the sky is blue in three sentences.",
)


def is_mini(model: str) -> bool:
    """True for a model on board, whatever tag a client put behind its name."""
    return model.split(":")[0].rsplit("/", 1)[-1] in MINI


def note(models: Sequence[Model], chosen: str | None) -> str:
    """One line under the model's name: what it is and what not to expect of it."""
    model = next((m for m in models if m.id == chosen), None)
    if model is None:
        return ""
    if is_mini(model.id):
        text = MINI_NOTE
    else:
        text = f"{model.description.rstrip('.')}. {OTHER_NOTE}" if model.description else OTHER_NOTE
    return f"{text} Reads {model.context:,} tokens." if model.context else text


def questions(model: str | None) -> list[Any]:
    """Example questions in the form that `gr.Chatbot(examples=…)` takes."""
    chosen = PUZZLES if model is None or is_mini(model) else QUESTIONS
    return [{"text": text, "display_text": text} for text in chosen]


def own_value(models: Sequence[Model], chosen: str | None, setting: str) -> str:
    """Placeholder of an empty setting: what holds then."""
    model = next((m for m in models if m.id == chosen), None)
    value = model.sampling.get(setting) if model else None
    return "The model's own" if value is None else f"The model's own: {value:g}"


def prompt_hint(model: str | None) -> str:
    """Placeholder of the message box."""
    return "Ask a number puzzle…" if model and is_mini(model) else "Ask anything…"
