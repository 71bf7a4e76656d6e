"""The browser pages: a client of the public HTTP API, mounted on the server by the command line.

`mount(app, base_url=...)` is all that others need. Gradio is imported only when the page is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadal.ui.site import UiError, mount

__all__ = ["UiError", "mount"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from hadal.ui import site

        return getattr(site, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
