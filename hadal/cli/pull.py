"""`hadal pull`: downloads a model, after saying what it is and checking that it fits."""

from __future__ import annotations

from pathlib import Path

from hadal.cli import options as o
from hadal.cli.terminal import bar, print_json, say


def pull(model: o.Model, force: o.Force = False, json: o.Json = False) -> None:
    """Download a model; one that was cut goes on where it ended.

    It goes into the hub's cache. HF_HOME moves that cache, HF_ENDPOINT names another hub, HF_TOKEN opens
    gated models, HF_HUB_OFFLINE=1 forbids the network. What cannot run here is refused before the download.

    Examples:
        hadal pull deepseek-r1-distill-qwen-1.5b
        hadal pull deepseek-ai/DeepSeek-V2-Lite-Chat
        HF_HOME=/big/disk hadal pull deepseek-r1 --force
    """
    from hadal.cli.loading import check_fit, introduce

    introduce(model, quiet=json, always=True)
    if not force:
        check_fit(model)
    folder = download(model, quiet=json)
    if json:
        print_json({"name": model, "path": str(folder)})
    else:
        say(str(folder))


def download(model: str, *, quiet: bool) -> Path:
    """Pull with a progress bar; the folder."""
    from hadal.weights import hub

    with bar(f"downloading {model}", quiet=quiet) as update:
        return Path(hub.pull(model, progress=update))
