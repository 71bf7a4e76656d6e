"""From a name to a running engine: folder, device, dtype, whether it fits, weights, tokenizer, template."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hadal.config import ModelConfig
from hadal.config.packing import Kind, expert_bytes, expert_count, packed_bytes, resident_kind
from hadal.engine.memory import available_memory, gib
from hadal.engine.request import EngineError
from hadal.engine.speculation import SpeculationOptions
from hadal.text.messages import TemplateError
from hadal.text.templates import template_for
from hadal.text.tokenizer import Tokenizer
from hadal.weights import hub
from hadal.weights import load as load_weights
from hadal.weights.layout import read_config
from hadal.weights.offload import Place, describe_offload

if TYPE_CHECKING:
    from hadal.engine.engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
logger = logging.getLogger(__name__)
_EXPERT_CACHE_SHARE = 0.4  # of what is left beside the other weights, for hot experts
_FP32_SHARE = 0.5  # on CPU, FP32 while the weights take at most this share of the free memory, else BF16


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The first GPU if there is one ("auto"), or what is named. EngineError for one that is not there."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise EngineError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if picked.type not in ("cpu", "cuda"):
        raise EngineError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("device is cuda, but torch finds no CUDA GPU here; use --device cpu")
        if (picked.index or 0) >= torch.cuda.device_count():
            raise EngineError(
                f"device {picked} does not exist; this machine has {torch.cuda.device_count()} GPUs"
            )
        return torch.device("cuda", picked.index or 0)
    return picked


def pick_dtype(
    config: ModelConfig,
    device: torch.device,
    dtype: str | torch.dtype = "auto",
    quantize: Kind | None = None,
) -> torch.dtype:
    """ "auto": BF16 on a GPU; on CPU FP32 for models that leave half of the free memory, BF16 for larger
    ones. What is not quantised, activations and cache included, has this dtype."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise EngineError(f"dtype {dtype} is not supported; use auto, {', '.join(DTYPES)}")
        return dtype
    if dtype == "auto":
        small = weight_bytes(config, torch.float32, quantize) <= _FP32_SHARE * available_memory()
        return torch.float32 if device.type == "cpu" and small else torch.bfloat16
    if dtype not in DTYPES:
        raise EngineError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, quantize: Kind | None = None, *, mtp: bool = False
) -> int:
    """Bytes of the main model's weights in memory, and of its MTP modules' where they are loaded."""
    if quantize is not None:
        return packed_bytes(config, quantize, dtype.itemsize, mtp=mtp)
    need = config.weight_bytes("fp32" if dtype == torch.float32 else "bf16", mtp=mtp)
    copies = config.parameters().mtp_copies * dtype.itemsize if mtp else 0  # embedding and head are shared
    return need - copies


def check_weights_fit(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Kind | None = None,
    *,
    mtp: bool = False,
    elsewhere: int = 0,
) -> int:
    """Bytes that are left on the device beside the weights, `elsewhere` of which are not there. Raises
    EngineError, before anything is read, when the weights alone exceed the free memory."""
    need = weight_bytes(config, dtype, quantize, mtp=mtp) - elsewhere
    free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need <= free:
        return free - need
    what = quantize or str(dtype).removeprefix("torch.")
    hint = ""
    if dtype == torch.float32 and weight_bytes(config, torch.bfloat16, quantize, mtp=mtp) <= free:
        hint = "use dtype bfloat16, "
    elif smaller := [k for k in ("int8", "int4") if weight_bytes(config, torch.bfloat16, k, mtp=mtp) <= free]:
        hint = f"quantize {smaller[0]}, "
    elif config.moe is not None and not elsewhere:
        hint = "offload the experts (offload='disk'), "
    raise EngineError(
        f"the weights take {gib(need)} in {what}, and {gib(free)} are free on {device}: {hint}free memory, "
        "or take a smaller model"
    )


def load_engine(
    engine_class: type[Engine],
    model: str | Path = "hadal-mini",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_model_len: int | None = None,
    speculation: str = "auto",
    offload: Place | None = None,
    expert_cache_gb: float | None = None,
    **options: Any,
) -> Engine:
    """Resolve `model` (a folder, "hadal-mini", a preset's name or a repository in the cache), load it,
    build the engine. quantize: "fp8", "int8" or "int4" keeps the matrices packed (hadal/ops/packed.py), "off"
    unpacks a folder's integers. The MTP module is read only where speculation drafts with it. offload: "cpu"
    or "disk" keeps the routed experts off the device but for expert_cache_gb of hot ones (default: a share of
    what is left).

    Raises NotFoundError, WeightsError, TokenizerError, ConfigError or EngineError, each with cause and
    remedy.
    """
    folder = hub.resolve(model)
    config = read_config(folder)
    where = pick_device(device)
    packing = resident_kind(config, quantize)
    kind = pick_dtype(config, where, dtype, packing)
    if max_model_len is not None and not 2 <= max_model_len <= config.max_position_embeddings:
        raise EngineError(
            f"max_model_len must be from 2 to {config.max_position_embeddings}, not {max_model_len}"
        )
    with_mtp = SpeculationOptions(speculation).resolve(config, where) == "mtp"
    if expert_cache_gb is not None and offload is None:
        raise EngineError("expert_cache_gb is for offloaded experts: give offload 'cpu' or 'disk' with it")
    elsewhere = 0
    if offload is not None:
        elsewhere = expert_bytes(config, packing, kind.itemsize) * expert_count(config, mtp=with_mtp)
        options.setdefault("cuda_graphs", False)  # each layer asks the host for its experts
    left = check_weights_fit(config, where, kind, packing, mtp=with_mtp, elsewhere=elsewhere)
    if offload == "cpu" and elsewhere > available_memory():
        raise EngineError(
            f"the experts take {gib(elsewhere)}, and {gib(available_memory())} of memory are free: leave "
            "them in the files (offload 'disk')"
        )
    hot = left * _EXPERT_CACHE_SHARE if expert_cache_gb is None else expert_cache_gb * 1e9
    tokenizer = Tokenizer.load(folder)
    try:
        template = template_for(folder)
    except TemplateError as error:
        raise EngineError(f"{folder}: {error}") from error
    transformer = load_weights(
        folder,
        dtype=kind,
        device=where,
        progress=progress,
        with_mtp=with_mtp,
        max_positions=max_model_len,
        quantize=packing or "off",
        offload=offload,
        expert_cache_bytes=int(min(hot, elsewhere)),
    )
    if offload is not None and logger.isEnabledFor(logging.INFO):  # it reads a few experts to say so
        logger.info("%s", describe_offload(transformer))
    return engine_class(
        transformer,
        tokenizer,
        template,
        name=options.pop("name", None) or (str(model) if isinstance(model, str) else folder.name),
        folder=folder,
        max_model_len=max_model_len,
        speculation=speculation,
        **options,
    )
