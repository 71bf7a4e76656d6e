"""The probe page: texts, a slider of layers, a projection, nearest neighbours, and the routers' map.

All layers are fetched at once with POST /v1/probe; moving the slider asks the model nothing. What is kept for
the visit is small: the products of the texts' vectors at each layer (probe_view.py), for an hour.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import gradio as gr

from hadal.ui import probe_view as view
from hadal.ui.api import Client, ServerError
from hadal.ui.probe_view import ProbeInputError, Seen
from hadal.ui.visit import QUIET, key_of

KEPT_S = 3600
LIVE: dict[str, Any] = {**QUIET, "concurrency_limit": None}
POOLINGS = (("mean of the tokens", "mean"), ("last token", "last"), ("later tokens weigh more", "weighted"))
NOTHING = '<p class="hadal-small">Write texts, one a line, and press Look.</p>'
Shown = tuple[str, str, str]


def build(client: Client) -> None:
    """Lay out the page inside the open `gr.Blocks` and connect its events."""
    ProbePage(client)


class ProbePage:
    """The components of the page and what they do."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.key = gr.Textbox(visible=False, label="key")
        self.seen = gr.State(None, time_to_live=KEPT_S)
        with gr.Row(elem_id="hadal-probe", elem_classes="hadal-page", equal_height=False):
            with gr.Column(scale=2, min_width=280, elem_classes="hadal-controls"):
                self._lay_out_texts()
            with gr.Column(scale=5, min_width=320):
                self.layer = gr.Slider(
                    0,
                    8,
                    8,
                    step=1,
                    label="Layer",
                    elem_id="hadal-probe-layer",
                    info="0 is the embedding, the last comes after the final norm",
                )
                with gr.Tabs():
                    with gr.Tab("Projection"):
                        self.projection = gr.HTML(NOTHING, elem_id="hadal-probe-projection", padding=False)
                    with gr.Tab("Neighbours"):
                        self.neighbours = gr.HTML(NOTHING, elem_id="hadal-probe-neighbours", padding=False)
                    with gr.Tab("Routers"):
                        self.text = gr.Dropdown([], label="Text", elem_id="hadal-probe-text")
                        self.routers = gr.HTML(NOTHING, elem_id="hadal-probe-routers", padding=False)
        self._wire()

    def _lay_out_texts(self) -> None:
        names = [*view.EXAMPLES, "Puzzles of hadal-mini"]
        self.model = gr.Dropdown([], label="Model", elem_id="hadal-probe-model", allow_custom_value=True)
        self.lines = gr.Textbox(
            view.example(names[0]),
            label="Texts, one a line (label | text)",
            lines=12,
            max_lines=18,
            elem_id="hadal-probe-lines",
        )
        self.example = gr.Dropdown(names, value=names[0], label="Or an example", filterable=False)
        self.pooling = gr.Dropdown(list(POOLINGS), value="mean", label="One vector from", filterable=False)
        ways = ["PCA", "t-SNE"] if view.has_tsne() else ["PCA"]
        self.way = gr.Radio(ways, value="PCA", label="Projection", visible=len(ways) > 1)
        self.look = gr.Button("Look", variant="primary", elem_id="hadal-probe-look")
        gr.HTML(
            '<p class="hadal-small">hadal-mini knows number puzzles only: what its '
            "plane shows of words is their spelling.</p>",
            padding=False,
        )

    # ── events ──

    def _wire(self) -> None:
        site: Any = gr.context.Context.root_block
        figures = [self.projection, self.neighbours, self.routers]
        begin = site.load(None, None, self.key, js="() => window.hadal.key()", **LIVE)
        begin.then(self.offer, self.key, self.model, **LIVE)
        self.example.input(view.example, self.example, self.lines, **LIVE)
        busy = {**LIVE, "show_progress": "minimal"}
        looked = self.look.click(
            self.fetch,
            [self.key, self.model, self.lines, self.pooling],
            [self.seen, self.layer, self.text, *figures],
            **busy,
        )
        looked.then(self.draw, [self.seen, self.layer, self.way], figures, **LIVE)
        gr.on(
            [self.layer.change, self.way.change],
            self.draw,
            [self.seen, self.layer, self.way],
            figures,
            trigger_mode="always_last",
            **LIVE,
        )
        self.text.input(
            self.route,
            [self.key, self.model, self.seen, self.text, self.layer],
            [self.seen, self.routers],
            **busy,
        )

    async def offer(self, request: gr.Request, key: str | None) -> Any:
        """The models that are served."""
        try:
            names = [model.id for model in await self.client.models(key_of(key, request))]
        except ServerError:  # looking says what is wrong
            return gr.skip()
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    async def fetch(
        self, request: gr.Request, key: str | None, model: str | None, lines: str, pooling: str
    ) -> tuple[Any, ...]:
        """All layers of all texts."""
        try:
            texts, labels = view.read_lines(lines)
            found = await self._look(key_of(key, request), model or "", texts, labels, pooling)
            first = await self._routed(key_of(key, request), model or "", found, 0)
        except (ProbeInputError, ServerError) as error:
            said = view.alarm(str(error))
            return None, gr.skip(), gr.skip(), said, said, said
        last = found.layers[-1]
        choices = [(f"{i + 1}. {text[:60]}", i) for i, text in enumerate(texts)]
        return (
            first,
            gr.Slider(maximum=last, value=last),
            gr.Dropdown(choices=choices, value=0),
            *[gr.skip()] * 3,
        )

    async def _look(self, key: str, model: str, texts: list[str], labels: list[str], pooling: str) -> Seen:
        body = {"model": model, "pooling": pooling, "encoding_format": "base64"}
        answers = [await self.client.post("/v1/probe", {**body, "input": texts[:1]}, key)]
        width, layers = int(answers[0]["width"]), len(answers[0]["identity"]["layers"])
        for part in view.portions(len(texts) - 1, layers, width):
            answers.append(await self.client.post("/v1/probe", {**body, "input": texts[1:][part]}, key))
        return await asyncio.to_thread(view.seen, texts, labels, answers)

    async def _routed(self, key: str, model: str, found: Seen, number: int) -> Seen:
        """`found` with the routers' choices of one text."""
        if not found.experts:
            return found
        body = {"model": model, "input": [found.texts[number]], "layers": [0], "routing": True}
        entry = (await self.client.post("/v1/probe", {**body, "encoding_format": "base64"}, key))["data"][0]
        routing = {int(b): (r["experts"], r["scores"]) for b, r in entry["routing"].items()}
        return replace(found, tokens=list(entry["tokens"]), routing=routing, routed=number)

    async def route(
        self,
        request: gr.Request,
        key: str | None,
        model: str | None,
        seen: Seen | None,
        number: int,
        layer: int,
    ) -> tuple[Any, str]:
        """The routers' map of another text."""
        if seen is None:
            return None, NOTHING
        try:
            seen = await self._routed(key_of(key, request), model or "", seen, int(number))
        except ServerError as error:
            return gr.skip(), view.alarm(str(error))
        return seen, view.router_html(seen, _layer(seen, layer))

    async def draw(self, seen: Seen | None, layer: int, way: str) -> Any:
        """The three figures at a layer, from what is kept."""
        if seen is None:
            return gr.skip(), gr.skip(), gr.skip()
        return await asyncio.to_thread(_drawn, seen, _layer(seen, layer), way)


def _layer(seen: Seen, layer: int) -> int:
    return max(0, min(int(layer), seen.layers[-1]))


def _drawn(seen: Seen, layer: int, way: str) -> Shown:
    return (
        view.projection_html(seen, layer, way),
        view.neighbours_html(seen, layer),
        view.router_html(seen, layer),
    )
