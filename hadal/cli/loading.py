"""From a name to an engine: what the model truly is, whether it fits, where it lies, and its loading.

Nothing is downloaded or allocated before the fit is known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hadal.cli.options import Inference
from hadal.cli.terminal import BOLD, CliError, bar, human_bytes, human_count, is_terminal, note, paint
from hadal.config import PRESETS, ModelConfig
from hadal.config.packing import Kind, resident_kind

if TYPE_CHECKING:
    from hadal.engine import Engine
    from hadal.weights.hub import ModelEntry
    from hadal.weights.info import ModelInfo


def name_of(info: ModelInfo) -> str:
    """What to call a model: its preset's or repository's name, or its folder's last part."""
    if info.preset is None and info.folder is not None and info.name.startswith((".", "/", "~")):
        return info.folder.resolve().name
    return info.name


def title_of(info: ModelInfo) -> str:
    """What a model truly is, in one line."""
    if info.preset is not None:
        return info.title
    size = human_count(info.parameters_total)
    return f"{name_of(info)}: a {info.config.model_type} model with {size} parameters"


def introduce(model: str, *, quiet: bool, always: bool = False) -> None:
    """Say in one line, on stderr, what the model truly is; not for the model on board unless `always`."""
    if quiet or (model == "hadal-mini" and not always):
        return
    from hadal.weights.info import inspect

    print(paint(title_of(inspect(model)), BOLD, sys.stderr), file=sys.stderr, flush=True)


def installed(name: str) -> ModelEntry | None:
    """The entry of `hadal list` for a name, ORG/REPO or preset; None if it is not on this machine."""
    from hadal.weights import hub

    known = hub.find_preset(name)
    names = {name.lower()} | ({known.name, str(known.repo_id).lower()} if known else set())
    return next((entry for entry in hub.list_models() if entry.name.lower() in names), None)


def installed_names() -> set[str]:
    """Preset names of the models on this machine."""
    from hadal.weights import hub

    entries = {entry.name.lower() for entry in hub.list_models()}
    return {p.name for p in PRESETS.values() if {p.name, str(p.repo_id).lower()} & entries}


_DISK = "--offload disk leaves the experts in the files, "


@dataclass(frozen=True)
class Verdict:
    """Whether a model runs here; `reason` says why, and what would where it does not."""

    runs: bool
    reason: str


def judge(config: ModelConfig, asked: Inference | None = None) -> Verdict:
    """Whether a model of this configuration runs on this machine now, by arithmetic alone.

    The engine holds weights in BF16 or FP32 or as --quantize says, on the first GPU if there is one; with the
    MTP module only where --speculation is mtp.
    """
    asked = asked or Inference()
    device = asked.device
    from hadal.cli import machine
    from hadal.plan.fit import WeightDtype, fit

    if config.dsa is not None:
        return Verdict(
            False, "sparse attention (V3.2) is not implemented; deepseek-v3.1-terminus is its base"
        )
    gpus = [] if device == "cpu" else machine.gpus()
    index = int(device.partition(":")[2]) if device.startswith("cuda:") and device[5:].isdigit() else 0
    vram = gpus[index].free if index < len(gpus) else 0
    packed = resident_kind(config, asked.quantize)
    kind: WeightDtype = packed or ("fp32" if asked.dtype == "float32" else "bf16")
    found = fit(
        config,
        kind,
        machine.memory().available,
        vram,
        with_mtp=asked.speculation == "mtp",
        offload=asked.offload if config.moe is not None else None,
        cache="fp8" if asked.cache_dtype == "fp8" else None,
    )
    if found.ok and found.device == "cpu" and vram:
        return Verdict(
            False,
            f"it is too large for the GPU ({human_bytes(vram)} free); with --device cpu it {found.message}",
        )
    return Verdict(found.ok, found.message)


def check_fit(model: str, asked: Inference | None = None) -> None:
    """Refuse what cannot run here, before anything is downloaded or read; says what would fit."""
    from hadal.weights.info import inspect

    info, asked = inspect(model), asked or Inference()
    verdict = judge(info.config, asked)
    if not verdict.runs:
        smaller: tuple[Kind, ...] = ("int8", "int4")
        for kind in smaller:
            if asked.quantize is None and judge(info.config, replace(asked, quantize=kind)).runs:
                raise CliError(f"{name_of(info)} {verdict.reason}; with --quantize {kind} it would fit")
        other = "" if info.config.moe is None or asked.offload == "disk" else _DISK
        raise CliError(f"{name_of(info)} {verdict.reason}; {other}--force tries all the same")


def prepare_model(model: str, asked: Inference, *, yes: bool = False, force: bool = False) -> Path:
    """The model's folder: checked for fit first, downloaded if it is missing and the user agrees."""
    from hadal.weights import NotFoundError, hub

    if model != "hadal-mini" and not force:
        check_fit(model, asked)
    try:
        return Path(hub.resolve(model))
    except NotFoundError:
        if not _may_download(model, yes):
            raise  # it names the command that downloads
    from hadal.cli.pull import download

    return download(model, quiet=False)


def _may_download(model: str, yes: bool) -> bool:
    """Whether the user wants the download: said so before, or says so now on a terminal."""
    if yes or not is_terminal(sys.stdin):
        return yes
    from hadal.weights.info import inspect

    return typer.confirm(f"Download {model} ({human_bytes(inspect(model).size_bytes)})?")


def load_engine(
    model: str, asked: Inference, *, yes: bool = False, force: bool = False, quiet: bool = False
) -> Engine:
    """The engine of a model, with a bar if loading takes more than two seconds."""
    prepare_model(model, asked, yes=yes, force=force)
    from hadal.engine import Engine
    from hadal.weights.info import inspect

    with bar(f"loading {model}", quiet=quiet) as update:
        engine = Engine.load(model, **asked.keywords(), name=name_of(inspect(model)), progress=update)
    if asked.offload is not None and not quiet:
        from hadal.weights.offload import describe_offload

        note(describe_offload(engine.model))
    return engine
