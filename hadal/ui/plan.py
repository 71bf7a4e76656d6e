"""The plan page: a model and a machine on the left, on the right whether it runs, how fast, at what cost, and
what training takes. It asks POST /v1/plan; no model needs to be loaded for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from hadal.ui import plan_view as view
from hadal.ui.api import Client, ServerError
from hadal.ui.plan_view import QuestionError
from hadal.ui.visit import RAW, key_of

# "always_last": of a slider's many values while one answer is being made, the last is asked for next.
LIVE: dict[str, Any] = {**RAW, "trigger_mode": "always_last", "concurrency_limit": None}
FIRST: dict[str, Any] = {"model": "deepseek-v3", "device": "h200", "count": 8, "batch": 32}
WAITING = '<p class="hadal-small">Reckoning …</p>'


def build(client: Client) -> None:
    """Lay out the page inside the open `gr.Blocks` and connect its events."""
    PlanPage(client)


class PlanPage:
    """The components of the page and what they do."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.parts: dict[str, Any] = {}
        self.key = gr.Textbox(visible=False, label="key")
        with gr.Row(elem_id="hadal-plan", elem_classes="hadal-page", equal_height=False):
            with gr.Column(scale=2, min_width=280, elem_classes="hadal-controls"):
                self._lay_out_model()
                self._lay_out_machine()
                self._lay_out_load()
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Will it run"):
                    self.run = gr.HTML(WAITING, elem_id="hadal-plan-run", padding=False)
                with gr.Tab("Cost"):
                    self._lay_out_cost()
                with gr.Tab("Training"):
                    self._lay_out_training()
        self._wire()

    def _lay_out_model(self) -> None:
        p = self.parts
        p["model"] = gr.Dropdown(
            [FIRST["model"]],
            value=FIRST["model"],
            label="Model",
            elem_id="hadal-plan-model",
            allow_custom_value=True,
        )
        with gr.Accordion("Another model: paste its config.json", open=False):
            p["config"] = gr.Textbox(
                show_label=False,
                label="config.json",
                lines=4,
                max_lines=12,
                container=False,
                placeholder='{"model_type": "deepseek_v3", …}',
                elem_id="hadal-plan-config",
            )

    def _lay_out_machine(self) -> None:
        p = self.parts
        p["device"] = gr.Dropdown(
            [FIRST["device"]],
            value=FIRST["device"],
            label="Device",
            elem_id="hadal-plan-device",
            allow_custom_value=True,
        )
        p["count"] = gr.Slider(
            1, 256, FIRST["count"], step=1, label="Number of devices", elem_id="hadal-plan-count"
        )
        p["ram"] = gr.Slider(0, 2048, 0, step=4, label="Host memory, GB", info="0: not counted")
        p["other"] = gr.Textbox(
            label="Or any machine, by its figures",
            max_lines=1,
            elem_id="hadal-plan-other",
            placeholder="memory=24GB, bandwidth=1008GB/s, bf16=165TFLOPS",
        )

    def _lay_out_load(self) -> None:
        p = self.parts
        p["context"] = gr.Slider(0, 163840, 0, step=1024, label="Context, tokens", info="0: as much as fits")
        p["batch"] = gr.Slider(
            1, 1024, FIRST["batch"], step=1, label="Sequences at once", elem_id="hadal-plan-batch"
        )
        p["prompt"] = gr.Slider(16, 32768, 1024, step=16, label="Prompt, tokens")
        p["dtype"] = gr.Dropdown(list(view.DTYPES), value="", label="Weights", filterable=False)
        p["kv_dtype"] = gr.Dropdown(list(view.CACHES), value="", label="Cache", filterable=False)
        p["offload"] = gr.Dropdown(list(view.OFFLOADS), value="", label="Offload", filterable=False)
        with gr.Accordion("Layout and drafts", open=False):
            gr.HTML('<p class="hadal-small">0 leaves it to the planner.</p>', padding=False)
            for name, label in (
                ("tp", "Tensor parallel (TP)"),
                ("dp", "Data parallel (DP)"),
                ("pp", "Pipeline (PP)"),
                ("ep", "Experts (EP)"),
            ):
                p[name] = gr.Slider(0, 256 if name in ("dp", "ep") else 64, 0, step=1, label=label)
            p["mtp"] = gr.Slider(0, 4, 0, step=1, label="Drafts of the MTP module")
            p["acceptance"] = gr.Slider(
                0,
                1,
                0.85,
                step=0.01,
                label="Share of drafts accepted",
                info="DeepSeek: 0.85 to 0.9; it depends on the text",
            )

    def _lay_out_cost(self) -> None:
        p = self.parts
        with gr.Row():
            p["tokens_in"] = gr.Number(10, label="Million tokens in", minimum=0)
            p["tokens_out"] = gr.Number(1, label="Million tokens out", minimum=0)
            p["cache_hits"] = gr.Slider(0, 1, 0, step=0.01, label="Share found in the API's cache")
        with gr.Row():
            p["api"] = gr.Dropdown(["deepseek-chat"], value="deepseek-chat", label="API", filterable=False)
            p["hourly"] = gr.Textbox(label="Rent, $ a device and hour", placeholder="as known", max_lines=1)
            p["owned"] = gr.Textbox(label="Bought for, $", placeholder="rented", max_lines=1)
        self.cost = gr.HTML("", elem_id="hadal-plan-cost", padding=False)

    def _lay_out_training(self) -> None:
        p = self.parts
        with gr.Row():
            p["train_on"] = gr.Textbox("2048xh800", label="Machine", max_lines=1)
            p["train_tokens"] = gr.Number(14.8, label="Trillion tokens", minimum=0)
            p["mfu"] = gr.Slider(0, 0.7, 0, step=0.0001, label="MFU (0: a range)")
            p["goodput"] = gr.Slider(0.1, 1, 1, step=0.01, label="Goodput")
        with gr.Row():
            p["train_tp"] = gr.Slider(0, 64, 1, step=1, label="TP")
            p["train_pp"] = gr.Slider(0, 64, 16, step=1, label="PP")
            p["train_ep"] = gr.Slider(0, 256, 64, step=1, label="EP")
            p["zero"] = gr.Slider(0, 3, 1, step=1, label="ZeRO stage")
        gr.HTML('<p class="hadal-small">TP, PP and EP at 0: the planner proposes them.</p>', padding=False)
        with gr.Row():
            p["schedule"] = gr.Dropdown(
                list(view.SCHEDULES), value="dualpipe", label="Schedule", filterable=False
            )
            p["recompute"] = gr.CheckboxGroup(
                ["norm", "up", "swiglu", "rows"], value=["norm", "up", "swiglu"], label="Recompute"
            )
            p["fp8"] = gr.Checkbox(True, label="FP8")
        self.training = gr.HTML("", elem_id="hadal-plan-training", padding=False)

    # ── events ──

    def _wire(self) -> None:
        site: Any = gr.context.Context.root_block
        lists = [self.parts["model"], self.parts["device"], self.parts["api"]]
        start = site.load(None, None, self.key, js="() => window.hadal.key()", **LIVE)
        start = start.then(self.offer, self.key, lists, **LIVE)
        answers: tuple[tuple[Callable[..., Any], Sequence[str], Any], ...] = (
            (self.will_it_run, view.RUN, self.run),
            (self.at_what_cost, (*view.RUN, *view.COST), self.cost),
            (self.what_training_takes, ("model", "config", *view.TRAINING), self.training),
        )
        for handler, names, output in answers:
            inputs = [self.key, *(self.parts[name] for name in names)]
            start.then(handler, inputs, output, **LIVE)
            gr.on([self.parts[name].change for name in names], handler, inputs, output, **LIVE)

    async def _answer(self, request: gr.Request, key: str | None, question: dict[str, Any]) -> dict[str, Any]:
        return await self.client.post("/v1/plan", question, key_of(key, request))

    async def offer(self, request: gr.Request, key: str | None) -> tuple[Any, Any, Any]:
        """The names to choose from, as the planner knows them."""
        try:
            models, devices, prices = [
                await self._answer(request, key, {"ask": ask}) for ask in ("models", "devices", "prices")
            ]
        except ServerError:  # the answers themselves say what is wrong
            return gr.skip(), gr.skip(), gr.skip()
        named = [(f"{d['title']}  ({d['name']})", d["name"]) for d in devices["devices"]]
        apis = sorted({p["name"] for p in prices["api"]})
        return (
            gr.Dropdown(choices=[m["name"] for m in models["models"]], value=FIRST["model"]),
            gr.Dropdown(choices=named, value=FIRST["device"]),
            gr.Dropdown(choices=apis, value=apis[0]),
        )

    async def will_it_run(self, request: gr.Request, key: str | None, *values: Any) -> str:
        """Memory and speeds."""
        try:
            question = view.run_question(dict(zip(view.RUN, values, strict=True)))
            return view.run_html(await self._answer(request, key, question))
        except (QuestionError, ServerError) as error:
            return view.alarm(str(error))

    async def at_what_cost(self, request: gr.Request, key: str | None, *values: Any) -> str:
        """Hours and dollars here and by API."""
        try:
            question = view.cost_question(dict(zip((*view.RUN, *view.COST), values, strict=True)))
            prices = await self._answer(request, key, {"ask": "prices"})
            return view.cost_html(await self._answer(request, key, question), prices)
        except (QuestionError, ServerError) as error:
            return view.alarm(str(error))

    async def what_training_takes(self, request: gr.Request, key: str | None, *values: Any) -> str:
        """Hours, dollars, memory and bubbles of a training run."""
        try:
            question = view.training_question(
                dict(zip(("model", "config", *view.TRAINING), values, strict=True))
            )
            return view.training_html(await self._answer(request, key, question))
        except (QuestionError, ServerError) as error:
            return view.alarm(str(error))
