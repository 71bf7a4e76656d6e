"""What the pages share: events that show nothing of themselves, and whose key a question is asked with."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hadal.ui.api import presented_key

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# preprocess=False: values come as they are, and are checked by the page or the server. Gradio would check
# them against a session that forgets the lists of choices when the server restarts.
RAW: dict[str, Any] = {**QUIET, "preprocess": False}


def key_of(given: str | None, request: gr.Request) -> str:
    """The visitor's key: typed into the chat page, which keeps it in the browser, or else the one with which
    the browser opened this page."""
    return (given or "").strip() or presented_key(str(request.headers.get("authorization") or ""))
