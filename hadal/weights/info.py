"""What a model truly is, said before it is downloaded or run: a distill is not R1.

From a preset's data, a folder's own configuration and headers, or (for an unknown repository) the
configuration alone, fetched from the hub. Weights are never downloaded here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hadal.config import ModelConfig, Preset
from hadal.weights import hub
from hadal.weights.errors import NotFoundError, WeightsError
from hadal.weights.header import read_header
from hadal.weights.layout import read_config

_STORED = {"F8_E4M3": "FP8 blocks", "I32": "integers", "BF16": "BF16", "F16": "FP16", "F32": "FP32"}


@dataclass(frozen=True)
class ModelInfo:
    """`folder` None: not on this machine, and then `size_bytes` is what a download would take.

    parameters_active: per token, with the head and without the input embedding. context: tokens that the
    authors state. kv_bytes_per_token: of a BF16 cache. dtype: how the weights are stored.
    """

    name: str
    title: str
    config: ModelConfig
    preset: Preset | None
    folder: Path | None
    base: str | None
    is_distill: bool
    dtype: str
    size_bytes: int
    parameters_total: int
    parameters_active: int
    parameters_mtp: int
    context: int
    kv_bytes_per_token: int


def inspect(name: str | Path) -> ModelInfo:
    """What the model of that name or folder is.

    Raises NotFoundError, ConfigError (an architecture that we do not run), PullError (no way to its config).
    """
    known = None if isinstance(name, Path) else hub.find_preset(name)
    try:
        folder: Path | None = hub.resolve(name)
    except NotFoundError:
        if known is None and (isinstance(name, Path) or "/" not in name):
            raise
        folder = None
    if folder is not None:
        return _info(str(name), known, read_config(folder), folder)
    if known is not None:
        return _info(known.name, known, known.config, None)
    return _info(str(name), None, _fetch_config(str(name)), None)


def _fetch_config(name: str) -> ModelConfig:
    from hadal.weights.download import fetch_config

    return fetch_config(name)


def _info(name: str, known: Preset | None, config: ModelConfig, folder: Path | None) -> ModelInfo:
    n = config.parameters()
    stored: Literal["fp8", "bf16"] = "fp8" if config.fp8 is not None else "bf16"
    dtype, size = (stored.upper(), config.weight_bytes(stored)) if folder is None else _on_disk(folder)
    return ModelInfo(
        name=known.name if known else name,
        title=known.title
        if known
        else f"{name}: a {config.model_type} model, {n.main / 1e9:.2f}B parameters",
        config=config,
        preset=known,
        folder=folder,
        base=known.base if known else None,
        is_distill=known is not None and known.is_distill,
        dtype=_STORED["F8_E4M3"] if dtype == "FP8" else dtype,
        size_bytes=size,
        parameters_total=n.main,
        parameters_active=n.active_with_head,
        parameters_mtp=n.mtp_unique,
        context=known.context if known else config.max_position_embeddings,
        kv_bytes_per_token=int(config.kv_bytes_per_token()),
    )


def _on_disk(folder: Path) -> tuple[str, int]:
    """The dtype that most bytes of a folder have, and the size of its weight files."""
    sizes: Counter[str] = Counter()
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += file.stat().st_size
        for stored in read_header(file).values():
            sizes[stored.dtype] += stored.nbytes
    if not sizes:
        raise WeightsError(f"{folder} holds no *.safetensors; is the download complete?")
    most = sizes.most_common(1)[0][0]
    return _STORED.get(most, most), total
