"""From a name to an engine: what the model truly is, whether it fits, where it lies, and its loading.

Nothing is downloaded or allocated before the fit is known.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hadal.cli.terminal import BOLD, CliError, bar, human_bytes, human_count, is_terminal, note, paint
from hadal.config import PRESETS, ModelConfig, Preset

if TYPE_CHECKING:
    from hadal.engine import Engine
    from hadal.weights.hub import ModelEntry


@dataclass(frozen=True)
class Identity:
    """What a name stands for."""

    name: str
    config: ModelConfig
    title: str
    preset: Preset | None
    folder: Path | None

    @property
    def context(self) -> int:
        """Tokens that the authors state, which may be fewer than the position table's."""
        return self.preset.context if self.preset else self.config.max_position_embeddings


def identify(name: str) -> Identity:
    """A preset, a downloaded model or a folder; else `NotFoundError` or `ConfigError` with what to do."""
    from hadal.weights import NotFoundError, hub

    known = hub.find_preset(name)
    try:
        folder: Path | None = hub.resolve(name)
    except NotFoundError:
        if known is None:
            raise
        folder = None
    if known is not None and (folder is None or known.repo_id is not None):
        return Identity(known.name, known.config, known.title, known, folder)
    from hadal.weights.layout import read_config

    assert folder is not None
    config = read_config(folder)
    shown = known.name if known else folder.name
    return Identity(shown, config, known.title if known else _title(shown, config), known, folder)


def _title(name: str, config: ModelConfig) -> str:
    """What a folder holds, by its configuration alone: the shape of a released model, or one of its own."""
    total = human_count(config.parameters().main)
    alike = [p.name for p in PRESETS.values() if p.config.to_hf() == config.to_hf()]
    if not alike:
        return f"{name}: a {config.model_type} model with {total} parameters"
    return f"{name}: the shape of {alike[0]} ({total} parameters); the name alone does not say whose weights"


def introduce(model: str, *, quiet: bool, always: bool = False) -> None:
    """Say in one line, on stderr, what the model truly is; not for the model on board unless `always`."""
    if quiet or (model == "hadal-mini" and not always):
        return
    print(paint(identify(model).title, BOLD, sys.stderr), file=sys.stderr, flush=True)


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


def engine_options(
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    gpu_memory_utilization: float | None = None,
) -> dict[str, Any]:
    """Keywords of `Engine.load`; what was not asked for is left to the engine."""
    asked = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    return {"device": device, "dtype": dtype, **{k: v for k, v in asked.items() if v is not None}}


def prepare_model(model: str, *, device: str, dtype: str, yes: bool = False, force: bool = False) -> Path:
    """The model's folder: checked for fit first, downloaded if it is missing and the user agrees."""
    from hadal.weights import NotFoundError, hub

    if model != "hadal-mini" and not force:
        check_fit(model, device=device, dtype=dtype)
    try:
        return Path(hub.resolve(model))
    except NotFoundError:
        known = hub.find_preset(model)
        if known is None or known.repo_id is None or not _may_download(known, yes):
            raise
    from hadal.cli.pull import download

    return download(model, quiet=False)


def _may_download(known: Preset, yes: bool) -> bool:
    if yes:
        return True
    size = known.config.weight_bytes("fp8" if known.config.fp8 else "bf16")
    return is_terminal(sys.stdin) and typer.confirm(f"Download {known.name} ({human_bytes(size)})?")


def load_engine(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    yes: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> Engine:
    """The engine of a model, with a bar if loading takes more than two seconds."""
    prepare_model(model, device=device, dtype=dtype, yes=yes, force=force)
    from hadal.engine import Engine

    options = engine_options(
        device=device, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs
    )
    with bar(f"loading {model}", quiet=quiet) as update:
        return Engine.load(model, **options, name=identify(model).name, progress=update)


def random_engine(
    model: str, *, device: str, dtype: str, max_model_len: int, max_num_seqs: int, force: bool
) -> Engine:
    """An engine with the shape of a known model, or of a folder's config.json, and random weights."""
    from dataclasses import replace

    from hadal.engine import Engine
    from hadal.engine.loading import check_weights_fit, pick_device, pick_dtype
    from hadal.model.transformer import Transformer

    identity = identify(model)
    config = replace(identity.config, num_nextn_predict_layers=0)
    where = pick_device(device)
    kind = pick_dtype(config, where, dtype)
    if not force:
        check_weights_fit(config, where, kind)
    network = Transformer(config, dtype=kind, device=where).init_weights(0)
    name = f"{identity.name} (random weights)"
    return Engine(network, name=name, max_model_len=max_model_len, max_num_seqs=max_num_seqs, seed=0)
