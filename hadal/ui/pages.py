"""The pages of the site: one entry here is one page, its route and its name in the navigation bar.

A page is a module with a `build(client)` that lays out Gradio components, and one
line in PAGES. The first page lives at `/`; the bar appears as soon as there are two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hadal.ui.api import Client


@dataclass(frozen=True)
class Page:
    """`path`: the route without slashes, empty for the first page. `build` runs inside an open
    `gr.Blocks`."""

    name: str
    path: str
    build: Callable[[Client], None]


def _chat(client: Client) -> None:
    from hadal.ui import chat

    chat.build(client)


def _plan(client: Client) -> None:
    from hadal.ui import plan

    plan.build(client)


def _probe(client: Client) -> None:
    from hadal.ui import probe

    probe.build(client)


PAGES: tuple[Page, ...] = (
    Page("Chat", "", _chat),
    Page("Plan", "plan", _plan),
    Page("Probe", "probe", _probe),
)


def build_site(client: Client, pages: Sequence[Page] = PAGES) -> Any:
    """All pages as one `gr.Blocks`. Imports Gradio (seconds, ~130 MB): call it off the event loop."""
    import gradio as gr
    from gradio.components.navbar import Navbar

    if not pages or pages[0].path:
        raise ValueError('the first page must have the path ""')
    with gr.Blocks(title="Hadal", analytics_enabled=False, fill_height=True, fill_width=True) as site:
        if len(pages) > 1:
            Navbar(main_page_name=pages[0].name)
        pages[0].build(client)
    for page in pages[1:]:
        with site.route(page.name, page.path):
            Navbar(main_page_name=pages[0].name)
            page.build(client)
    site.queue(default_concurrency_limit=None, api_open=False)
    return site
