"""The chat page: conversations on the left, settings on the right, the talk in the middle.

The visitor's conversations and settings live in the browser (static/page.js); with each question the page
sends the one that is open. Nothing of it stays on the server.
"""

from __future__ import annotations

import html
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import astuple, replace
from typing import Any, cast

import gradio as gr

from hadal.ui import models as about
from hadal.ui.answer import Runs
from hadal.ui.api import Client, Model, ServerError
from hadal.ui.conversation import UNTITLED, Conversation, ConversationError, messages, title_of, turn_at
from hadal.ui.settings import DEFAULTS, SettingsError, from_panel
from hadal.ui.visit import RAW, key_of

LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
# Tags that no message needs: they are shown as text. What remains is sanitised, and the page's policy
# (site.py) runs no inline script and loads nothing from elsewhere.
INERT_TAGS = (
    "script style link meta base iframe frame object embed applet form input textarea select option img "
    "picture source video audio track canvas marquee dialog template noscript title think answer tool_call"
).split()
WELCOME = (
    '<div class="hadal-welcome"><span class="hadal-mark"></span><h1>Hadal</h1>'
    "<p>A DeepSeek model that shows its reasoning.</p></div>"
)

Update = tuple[Any, Any, Any]


def build(client: Client) -> None:
    """Lay out the page inside the open `gr.Blocks` and connect its events."""
    ChatPage(client)


def read(current: object) -> Conversation:
    """The open conversation as the browser sent it; a broken one is replaced by a new one, with a warning."""
    if current is None:
        return Conversation.new(time.time())
    try:
        return Conversation.from_dict(current)
    except ConversationError as error:
        gr.Warning(f"This conversation could not be read and was set aside: {error}")
        return Conversation.new(time.time())


class ChatPage:
    """The components of the page and what they do."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.runs = Runs()
        self.offered: dict[str, Model] = {}  # as the server last listed them
        self.current = gr.BrowserState(None, storage_key="hadal.current", secret="not-a-secret")
        with gr.Sidebar(position="left", width=280, elem_id="hadal-left") as self.left:
            self._lay_out_list()
        with gr.Sidebar(position="right", width=320, open=False, elem_id="hadal-right"):
            self._lay_out_settings()
        with gr.Column(elem_id="hadal-main"):
            self._lay_out_talk()
        self.settings: list[Any] = [
            self.model,
            self.system,
            self.thinking,
            self.temperature,
            self.top_p,
            self.top_k,
            self.max_tokens,
            self.seed,
            self.key,
        ]
        self._wire_start()
        self._wire_talk()
        self._wire_list()

    # ── layout ──

    def _lay_out_list(self) -> None:
        gr.HTML('<div class="hadal-brand"><span class="hadal-mark"></span>Hadal</div>', padding=False)
        self.new = gr.Button("New conversation", elem_id="hadal-new", variant="secondary")
        self.list = gr.Radio(
            [], label="Conversations", elem_id="hadal-list", container=False, show_label=False
        )
        self.title = gr.Textbox(
            visible=False, label="New name", elem_id="hadal-title", max_length=80, submit_btn="Save"
        )
        with gr.Row(elem_id="hadal-list-actions"):
            self.rename = gr.Button("Rename", size="sm", elem_id="hadal-rename")
            self.export = gr.Button("Export", size="sm", elem_id="hadal-export")
            self.delete = gr.Button("Delete", size="sm", elem_id="hadal-delete")
        gr.HTML(
            '<p class="hadal-small">Kept in this browser only.</p>',
            padding=False,
        )

    def _lay_out_settings(self) -> None:
        gr.HTML('<h2 class="hadal-heading">Settings</h2>', padding=False)
        self.system = gr.Textbox(
            label="System prompt", lines=3, max_lines=10, placeholder="None", elem_id="hadal-system"
        )
        self.thinking = gr.Checkbox(
            bool(DEFAULTS.thinking), label="Think before answering", elem_id="hadal-thinking"
        )
        own = about.own_value((), None, "temperature")
        self.temperature = gr.Textbox(
            label="Temperature", info="0 always takes the likeliest token", placeholder=own, max_lines=1
        )
        self.top_p = gr.Textbox(label="Top-p", info="1 is off", placeholder=own, max_lines=1)
        self.top_k = gr.Slider(0, 200, DEFAULTS.top_k, step=1, label="Top-k", info="0 is off")
        self.max_tokens = gr.Textbox(
            label="Most tokens", placeholder="As many as the context holds", max_lines=1
        )
        self.seed = gr.Textbox(label="Seed", placeholder="A new one each time", max_lines=1)
        self.reset = gr.Button("Back to defaults", size="sm")
        self.key = gr.Textbox(
            type="password",
            label="API key",
            placeholder="Only if the server asks for one",
            info="Kept in this browser and sent to this server only.",
            elem_id="hadal-key",
        )

    def _lay_out_talk(self) -> None:
        with gr.Row(elem_id="hadal-top"):
            self.model = gr.Dropdown(
                [],
                show_label=False,
                label="Model",
                container=False,
                filterable=False,
                elem_id="hadal-model",
                min_width=160,
                scale=0,
            )
            self.note = gr.HTML("", elem_id="hadal-note", padding=False)
        self.chat = gr.Chatbot(
            show_label=False,
            label="Conversation",
            elem_id="hadal-chat",
            height="100%",
            scale=1,
            layout="bubble",
            buttons=["copy"],
            editable="user",
            latex_delimiters=LATEX,
            sanitize_html=True,
            allow_tags=INERT_TAGS,
            feedback_options=None,
            allow_file_downloads=False,
            placeholder=WELCOME,
            examples=about.questions(None),
        )
        self.box = gr.Textbox(
            show_label=False,
            label="Message",
            container=False,
            lines=1,
            max_lines=8,
            placeholder=about.prompt_hint(None),
            submit_btn=True,
            autofocus=True,
            elem_id="hadal-box",
        )

    # ── events ──

    def _wire_start(self) -> None:
        """On load: the browser's memory first, then the conversation, then the server's models."""
        site: Any = gr.context.Context.root_block
        advice = [self.thinking, self.temperature, self.top_p]
        facts = [self.model, self.note, self.chat, self.box, self.key, *advice]
        start = site.load(
            None,
            self.settings,
            [self.current, self.left, *self.settings],
            js="(...v) => window.hadal.boot(v)",
            **RAW,
        )
        shown = start.then(self.show, self.current, [self.chat], **RAW)
        shown = shown.then(None, None, [], js="() => window.hadal.settled()", **RAW)
        shown.then(self.connect, [self.model, self.key], facts, **RAW)
        gr.on([self.key.submit, self.key.blur], self.connect, [self.model, self.key], facts, **RAW)
        self.model.input(self.connect, [self.model, self.key], facts, **RAW)
        keep: dict[str, Any] = {"js": "(...v) => { window.hadal.keep(v); return []; }", **RAW}
        gr.on([c.input for c in self.settings], None, self.settings, [], **keep)
        back = [c for c in self.settings if c not in (self.model, self.key)]
        self.reset.click(
            lambda: [v if v is not None else "" for v in astuple(DEFAULTS)[1:-1]], None, back, **RAW
        ).then(None, self.settings, [], **keep)

    def _wire_talk(self) -> None:
        outputs = [self.chat, self.current, self.box]
        streams: tuple[tuple[Any, Callable[..., Any], list[Any]], ...] = (
            (self.box.submit, self.send, [self.box]),
            (self.chat.example_select, self.example, []),
            (self.chat.retry, self.retry, []),
            (self.chat.edit, self.edit, []),
        )
        for event, handler, extra in streams:
            event(handler, [*extra, self.current, *self.settings], outputs, concurrency_limit=None, **RAW)
        self.box.stop(self.halt, None, None, **RAW)
        self.chat.undo(self.undo, self.current, outputs, **RAW)
        self.chat.clear(self.halt, None, None, **RAW).then(self.clear, self.current, outputs, **RAW)

    def _wire_list(self) -> None:
        self.current.change(None, self.current, self.list, js="(c) => window.hadal.save(c)", **RAW)

        def switch(event: Any, js: str, inputs: Any) -> None:
            """Stop what runs, let the browser choose the conversation, show it."""
            step = event(self.halt, None, None, **RAW)
            step = step.then(None, inputs, [self.current, self.list, self.title], js=js, **RAW)
            step = step.then(self.show, self.current, self.chat, **RAW)
            step.then(None, None, [], js="() => window.hadal.settled()", **RAW)

        switch(self.new.click, "() => window.hadal.fresh()", None)
        switch(self.list.input, "(id) => window.hadal.open(id)", self.list)
        switch(self.delete.click, "(c) => window.hadal.remove(c)", self.current)
        self.export.click(None, self.current, [], js="(c) => { window.hadal.download(c); return []; }", **RAW)
        self.rename.click(None, self.current, self.title, js="(c) => window.hadal.askTitle(c)", **RAW)
        self.title.submit(
            None,
            [self.current, self.title],
            [self.current, self.title],
            js="(c, title) => window.hadal.rename(c, title)",
            **RAW,
        )

    # ── handlers ──

    async def connect(self, request: gr.Request, chosen: str | None, key: str | None) -> tuple[Any, ...]:
        """Ask the server for its models; say what the chosen one is."""
        try:
            offered = await self.client.models(key_of(key, request))
        except ServerError as error:
            alarm = gr.HTML(value=f'<span class="hadal-alarm">{html.escape(str(error))}</span>')
            wanted = ["hadal-wanted"] if error.status == 401 else []
            return gr.skip(), alarm, gr.skip(), gr.skip(), gr.Textbox(elem_classes=wanted), *[gr.skip()] * 3
        self.offered = {model.id: model for model in offered}
        ids = list(self.offered)
        chosen = chosen if chosen in ids else next(iter(ids), None)
        return (
            gr.Dropdown(choices=ids, value=chosen),
            gr.HTML(value=f"<span>{html.escape(about.note(offered, chosen))}</span>"),
            gr.Chatbot(examples=about.questions(chosen)),
            gr.Textbox(placeholder=about.prompt_hint(chosen)),
            gr.Textbox(elem_classes=[]),
            gr.Checkbox(visible=chosen is None or self.offered[chosen].lets_choose_thinking),
            gr.Textbox(placeholder=about.own_value(offered, chosen, "temperature")),
            gr.Textbox(placeholder=about.own_value(offered, chosen, "top_p")),
        )

    def show(self, current: object) -> Any:
        """Draw the open conversation."""
        return messages(read(current))

    async def send(
        self, request: gr.Request, question: str, current: object, *values: Any
    ) -> AsyncIterator[Update]:
        """Ask what is in the message box."""
        if not question.strip():
            yield gr.skip(), gr.skip(), gr.skip()
            return
        conversation = read(current)
        async for update in self._ask(conversation, question.strip(), values, request):
            yield update

    async def example(
        self, request: gr.Request, data: gr.SelectData, current: object, *values: Any
    ) -> AsyncIterator[Update]:
        """Ask one of the example questions."""
        async for update in self._ask(read(current), str(data.value["text"]), values, request):
            yield update

    async def retry(self, request: gr.Request, current: object, *values: Any) -> AsyncIterator[Update]:
        """Ask the last question again."""
        conversation = read(current)
        if conversation.turns:
            question = conversation.turns.pop().question
            async for update in self._ask(conversation, question, values, request):
                yield update

    async def edit(
        self, request: gr.Request, data: gr.EditData, current: object, *values: Any
    ) -> AsyncIterator[Update]:
        """Ask a changed question in place of an earlier one; what followed it is dropped."""
        conversation = read(current)
        number = turn_at(conversation, cast(int, data.index))
        if number == 0 and conversation.title == title_of(conversation.turns[0].question):
            conversation.title = UNTITLED
        question = str(data.value).strip() or conversation.turns[number].question
        del conversation.turns[number:]
        async for update in self._ask(conversation, question, values, request):
            yield update

    async def _ask(
        self, conversation: Conversation, question: str, values: tuple[Any, ...], request: gr.Request
    ) -> AsyncIterator[Update]:
        try:
            settings = from_panel(values)
            settings = replace(settings, key=key_of(settings.key, request))
            model = self.offered.get(settings.model or "")
            if model and not model.lets_choose_thinking:
                settings = replace(settings, thinking=None)
        except SettingsError as error:
            raise gr.Error(str(error), title="Settings", print_exception=False) from error
        conversation.ask(question, time.time())
        busy: Any = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        async for step in self.runs.answer(self.client, conversation, settings, str(request.session_hash)):
            if step == "end":
                busy = gr.Textbox(submit_btn=True, stop_btn=False)
            kept = gr.skip() if step == "draw" else conversation.to_dict()
            yield messages(conversation), kept, busy
            busy = gr.skip()

    async def halt(self, request: gr.Request) -> None:
        """Stop the answer that runs in this tab, if any."""
        await self.runs.halt(str(request.session_hash))

    def undo(self, current: object) -> Update:
        """Take the last turn back; its question returns to the message box."""
        conversation = read(current)
        question = conversation.turns.pop().question if conversation.turns else ""
        conversation.updated = time.time()
        return messages(conversation), conversation.to_dict(), gr.Textbox(value=question)

    def clear(self, current: object) -> Update:
        """Forget all turns of the open conversation."""
        conversation = read(current)
        conversation.turns.clear()
        conversation.updated = time.time()
        return [], conversation.to_dict(), gr.skip()
