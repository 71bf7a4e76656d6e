"""`hadal chat`: the conversation of `hadal run`, with a running server or with a model loaded here."""

from __future__ import annotations

from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError


def chat(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP)] = None,
    url: o.Url = None,
    api_key: o.ApiKey = None,
    system: o.System = None,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    max_tokens: o.MaxTokens = None,
    seed: o.Seed = None,
    think: o.Think = None,
    fold: o.Fold = False,
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
    yes: o.Yes = False,
    force: o.Force = False,
) -> None:
    """Talk to a running server, or to a model loaded here.

    Without MODEL and --url it takes the server that runs on this machine.

    Examples:
        hadal chat
        hadal chat --url http://127.0.0.1:11435
        hadal chat --url https://llm.example.org --api-key "$KEY" --system "Answer in French."
        hadal chat hadal-mini --temperature 0
    """
    from hadal.cli.loading import introduce, load_engine
    from hadal.cli.run import one_shot, read_prompt
    from hadal.cli.session import Session, leave
    from hadal.cli.speaker import LocalSpeaker, RemoteSpeaker, Speaker
    from hadal.cli.state import running

    sampling = o.Sampling(temperature, top_p, None, None, max_tokens, seed)
    sampling.params({})
    if url is None and model is None:
        servers = running()
        if not servers:
            raise CliError(
                "no server runs on this machine: name a MODEL to load here, or start `hadal serve`"
            )
        url = servers[0].url
    speaker: Speaker
    if url is not None:
        speaker = RemoteSpeaker(url, api_key, model)
    else:
        introduce(model or "hadal-mini", quiet=False)
        asked = o.Inference(
            device, dtype, quantize, max_model_len, exact=exact, speculation=speculation,
            num_speculative_tokens=speculative_tokens, offload=offload, expert_cache_gb=expert_cache_gb,
            cache_dtype=cache_dtype,
        )  # fmt: skip
        speaker = LocalSpeaker(load_engine(model or "hadal-mini", asked, yes=yes, force=force))
    session = Session(speaker, sampling, system, think, fold)
    question = read_prompt(None, json=False)
    if question is not None:
        one_shot(session, question, json=False, show_reasoning=True)
        return
    leave(session.loop())
