"""`hadal serve`: the HTTP server, with the chat page mounted where Gradio is installed."""

from __future__ import annotations

import contextlib
import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import bar, note, say

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hadal.serve import Settings

LOOPBACK = "127.0.0.1"

Host = Annotated[str, typer.Option(help="Address to listen on; all but loopback need --api-key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
ApiKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="HADAL_API_KEY",
        metavar="KEY",
        help="Ask for this key; may be given again. The variable keeps it out of the process list.",
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option("--max-num-seqs", min=1, metavar="N", help="Most sequences that run at once."),
]
GpuShare = Annotated[
    float,
    typer.Option("--gpu-memory-utilization", min=0.05, max=1.0, help="Share of the GPU's memory to use."),
]
ServedNames = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name", metavar="NAME", help="A further name for the model; may be given again."
    ),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", metavar="NAME", help="A further name that clients may call this machine."),
]
AllowedOrigins = Annotated[
    list[str] | None,
    typer.Option("--allowed-origin", metavar="URL", help="A web page's origin that may call the API."),
]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", min=0, metavar="N", help="Sequences that may wait; more get 503.")
]


def serve(
    model: o.Model = "hadal-mini",
    host: Host = LOOPBACK,
    port: Port = 11435,
    api_key: ApiKeys = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    cache_dtype: o.CacheDtype = "auto",
    offload: o.Offload = None,
    expert_cache_gb: o.ExpertCache = None,
    max_model_len: o.MaxModelLen = None,
    exact: o.Exact = False,
    speculation: o.Speculation = None,
    speculative_tokens: o.SpeculativeTokens = None,
    max_num_seqs: MaxNumSeqs = None,
    gpu_memory_utilization: GpuShare = 0.9,
    served_model_name: ServedNames = None,
    allowed_host: AllowedHosts = None,
    allowed_origin: AllowedOrigins = None,
    max_queue: MaxQueue = 256,
    allow_pull: Annotated[bool, typer.Option("--allow-pull", help="Let clients download models.")] = False,
    allow_delete: Annotated[bool, typer.Option("--allow-delete", help="Let clients remove models.")] = False,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Without the chat page.")] = False,
    yes: o.Yes = False,
    force: o.Force = False,
) -> None:
    """Serve a model: OpenAI, DeepSeek and Ollama API, chat page.

    Prints the address of the page and of each API. Ctrl-C (or SIGTERM) lets running answers end; a second one
    ends at once.

    Examples:
        hadal serve
        hadal serve deepseek-r1-distill-qwen-7b --max-model-len 16384
        HADAL_API_KEY=$(openssl rand -hex 16) hadal serve --host 0.0.0.0 --allowed-host llm.example.org
        hadal serve --port 11434     # where Ollama's clients look
    """
    from hadal.cli.loading import introduce, prepare_model
    from hadal.serve import Settings

    settings = Settings(
        host=host, port=port, api_keys=tuple(api_key or ()), allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()), served_names=tuple(served_model_name or ()),
        max_queue=max_queue, allow_pull=allow_pull, allow_delete=allow_delete,
    )  # fmt: skip
    introduce(model, quiet=False)
    asked = o.Inference(
        device, dtype, quantize, max_model_len, max_num_seqs, gpu_memory_utilization, exact,
        speculation=speculation, num_speculative_tokens=speculative_tokens, offload=offload,
        expert_cache_gb=expert_cache_gb, cache_dtype=cache_dtype,
    )  # fmt: skip
    prepare_model(model, asked, yes=yes, force=force)
    _log_to_stderr()
    _serve(model, settings, asked, no_ui)


def _serve(model: str, settings: Settings, asked: o.Inference, no_ui: bool) -> None:
    """Load the model and answer until something says stop."""
    from hadal.cli.loading import name_of
    from hadal.serve import run_server
    from hadal.weights.info import inspect

    options = asked.keywords()
    options["name"] = name_of(inspect(model))
    with contextlib.ExitStack() as stack:
        options["progress"] = stack.enter_context(bar(f"loading {model}"))

        def prepare(app: FastAPI, url: str) -> None:
            from hadal.cli.state import registered

            if not no_ui:
                _mount_page(app, url)
            stack.enter_context(registered(url, str(options["name"])))

        run_server(model, settings, engine_options=options, prepare=prepare, say=say)


def _mount_page(app: FastAPI, url: str) -> None:
    """Add the chat page, or say what is missing for it."""
    if find_spec("gradio") is None:
        note("No chat page: Gradio is not installed; `pip install 'hadal[ui]'` gives it.")
        return
    from hadal import ui

    ui.mount(app, base_url=url)
    say(f"Chat page:                   {url}/")


def _log_to_stderr() -> None:
    """The server's own log, one line a request, beside the addresses on stdout."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("hadal")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
