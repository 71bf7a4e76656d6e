"""HTTP: the OpenAI, DeepSeek and Ollama APIs on the engine, with their security, limits and metrics
(docs/api.md).

create_app(engine, Settings(...)) -> FastAPI      an app to mount pages on, or to test
run_server("hadal-mini", Settings(...))           the same behind uvicorn, until a signal
"""

from __future__ import annotations

from hadal.serve.app import create_app
from hadal.serve.run import ServerError, run_server
from hadal.serve.settings import Settings, SettingsError

__all__ = ["ServerError", "Settings", "SettingsError", "create_app", "run_server"]
