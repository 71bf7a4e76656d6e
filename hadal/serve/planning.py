"""POST /plan: the planner's questions and answers (hadal/plan/answers.py) over HTTP. No model is asked, no
file read; the work is bounded by what a question may hold, and done off the event loop."""

from __future__ import annotations

import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hadal.config import ConfigError
from hadal.plan import PlanError, answer
from hadal.serve.errors import bad
from hadal.serve.fields import shown
from hadal.serve.jsontext import dumps
from hadal.serve.prompts import in_thread
from hadal.serve.state import App
from hadal.serve.streaming import unless_gone

logger = logging.getLogger("hadal.serve")
MAX_QUESTION_BYTES = 1 << 18
"""A published config.json has a few KB; one with a list of layers or classes in it, tens."""
MAX_NUMBER = 1e18
MAX_STRING, MAX_DRAWN, MAX_MESSAGE = 1000, 4096, 2000


def _check(question: dict[str, Any]) -> None:
    """Bounds beyond the planner's own: nothing here may keep a server's processor busy for long."""
    if len(dumps(question)) > MAX_QUESTION_BYTES:
        raise bad(f"a question has at most {MAX_QUESTION_BYTES} bytes")
    open_values: list[Any] = [question]
    while open_values:
        value = open_values.pop()
        if isinstance(value, str) and len(value) > MAX_STRING:
            raise bad(f"a text in a question has at most {MAX_STRING} characters, not {len(value):,}")
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise bad(f"a number in a question is at most {MAX_NUMBER:g}")
        if isinstance(value, dict | list):
            open_values += value.values() if isinstance(value, dict) else value
    if not isinstance(question.get("ask", ""), str):
        raise bad(f"ask must be a string, not {shown(question['ask'])}", "ask")
    stages, batches = question.get("stages"), question.get("micro_batches")
    if isinstance(stages, int) and isinstance(batches, int) and stages * batches > MAX_DRAWN:
        raise bad(f"{stages} stages × {batches} micro-batches; a server draws at most {MAX_DRAWN:,}")


async def plan(request: Request) -> Response:
    """The route. What the planner refuses is a 400 with its own words."""
    visit = await App.of(request).visit(request)
    question = visit.fields.data
    visit.note(ask=str(question.get("ask"))[:20])
    _check(question)
    try:
        found = await unless_gone(request, in_thread(lambda: answer(question)))
    except (PlanError, ConfigError) as error:
        raise bad(str(error)[:MAX_MESSAGE]) from None
    except (ArithmeticError, TypeError, KeyError, ValueError) as error:
        # An answer is a function of its question alone: a config.json or figures that no check foresaw.
        logger.warning("a question to the planner broke off", exc_info=error)
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise bad(f"the planner cannot reckon with these values ({cause}); check the model's config.json "
                  "and the figures") from None  # fmt: skip
    return Response(dumps(found), media_type="application/json")
