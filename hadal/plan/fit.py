"""Does a model fit into a machine's memory, before anything is downloaded: the arithmetic, and what would
fit.

    needed = weights + cache + workspace
    weights   = Σ parameters × bytes (FP8: blocks with FP32 scales, the rest BF16), MTP module included
    cache     = context × sequences × kv bytes per token          (V3: 70,272 B in BF16, 61 layers × 576 × 2)
    workspace = activations and logits of one step + what a GPU's runtime itself takes

All experts must be resident: "37B active" is a matter of speed, not of memory. One device holds everything; a
machine counts with 90% of its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hadal.config import PRESETS, Mla, ModelConfig
from hadal.config.packing import packed_bytes

WeightDtype = Literal["int4", "int8", "fp8", "bf16", "fp32"]
USABLE = 0.9
MIN_CONTEXT = 4096
STEP_TOKENS = 2048
STEP_SEQUENCES = 64
GPU_RUNTIME_BYTES = 600_000_000
_DTYPE_NAMES = {"int4": "INT4", "int8": "INT8", "fp8": "FP8 blocks", "bf16": "BF16", "fp32": "FP32"}


@dataclass(frozen=True)
class Need:
    """Bytes by part."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


@dataclass(frozen=True)
class Fit:
    """The verdict. `context`: the tokens that fit (as asked, or fewer); `available`: usable bytes on
    `device`.

    `alternatives`: names of presets that do fit, the largest first; empty when the model fits.
    """

    ok: bool
    device: Literal["gpu", "cpu"]
    dtype: WeightDtype
    context: int
    needed: Need
    available: int
    message: str
    alternatives: tuple[str, ...] = ()


def fit(
    config: ModelConfig,
    weight_dtype: WeightDtype,
    ram_bytes: int,
    vram_bytes: int = 0,
    context: int | None = None,
    *,
    sequences: int = 1,
    with_mtp: bool = True,
) -> Fit:
    """Whether weights, workspace and a cache for `context` tokens (default: all) fit on the GPU, else in RAM.

    weight_dtype: how weights lie in memory. vram_bytes: of one GPU, 0 without. Where the weights fit but the
    whole context does not, the verdict is yes with the context that does, at least 4,096 tokens.
    """
    for name, value in (("ram_bytes", ram_bytes), ("vram_bytes", vram_bytes)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    if sequences < 1 or (context is not None and context < 1):
        raise ValueError(f"sequences is {sequences} and context {context}; both must be at least 1")
    wanted = min(context or config.max_position_embeddings, config.max_position_embeddings)
    verdict: Fit | None = None
    for device, memory in _devices(ram_bytes, vram_bytes):
        verdict = _on(config, weight_dtype, device, int(memory * USABLE), wanted, sequences, with_mtp)
        if verdict.ok:
            return verdict
    assert verdict is not None
    return _with_alternatives(verdict, config, ram_bytes, vram_bytes)


def needed(
    config: ModelConfig,
    weight_dtype: WeightDtype,
    context: int,
    *,
    sequences: int = 1,
    device: Literal["gpu", "cpu"] = "cpu",
    with_mtp: bool = True,
) -> Need:
    """Bytes that a model takes in memory, by part."""
    value_bytes = 4 if weight_dtype == "fp32" else 2
    return Need(
        weights=memory_bytes(config, weight_dtype, with_mtp=with_mtp),
        cache=int(config.kv_bytes_per_token(value_bytes) * context) * sequences,
        workspace=_workspace(config, value_bytes, device),
    )


def memory_bytes(config: ModelConfig, weight_dtype: WeightDtype, *, with_mtp: bool = True) -> int:
    """Bytes of the weights in memory: as the engine keeps them, embedding and head of MTP modules shared."""
    if weight_dtype == "fp8" or weight_dtype == "int8" or weight_dtype == "int4":
        return packed_bytes(config, weight_dtype, mtp=with_mtp)
    if not with_mtp:
        config = replace(config, num_nextn_predict_layers=0)
    copies = config.parameters().mtp_copies * (4 if weight_dtype == "fp32" else 2)
    return config.weight_bytes(weight_dtype) - copies


def _workspace(config: ModelConfig, value_bytes: int, device: str) -> int:
    """Activations of one step of 2,048 tokens, FP32 logits of 64 sequences; CUDA's own share on a GPU."""
    a, heads = config.attention, config.num_attention_heads
    attention = (
        heads * (2 * a.qk_head_dim + 2 * a.v_head_dim) if isinstance(a, Mla) else 4 * heads * a.head_dim
    )
    width = config.intermediate_size
    if config.moe is not None:
        width = max(width, config.moe.num_experts_per_tok * config.moe.moe_intermediate_size)
    per_token = (4 * config.hidden_size + attention + 3 * width) * value_bytes
    tokens = min(STEP_TOKENS, config.max_position_embeddings)
    logits = STEP_SEQUENCES * config.vocab_size * 4
    return tokens * per_token + logits + (GPU_RUNTIME_BYTES if device == "gpu" else 0)


def _devices(ram_bytes: int, vram_bytes: int) -> Iterator[tuple[Literal["gpu", "cpu"], int]]:
    if vram_bytes:
        yield "gpu", vram_bytes
    yield "cpu", ram_bytes


def _on(
    config: ModelConfig,
    dtype: WeightDtype,
    device: Literal["gpu", "cpu"],
    available: int,
    wanted: int,
    sequences: int,
    with_mtp: bool,
) -> Fit:
    """The verdict for one device: the whole context, else as much of it as fits."""
    full = needed(config, dtype, wanted, sequences=sequences, device=device, with_mtp=with_mtp)
    if full.total <= available:
        return Fit(
            True,
            device,
            dtype,
            wanted,
            full,
            available,
            _message(config, dtype, device, wanted, full, available),
        )
    per_token = int(config.kv_bytes_per_token(4 if dtype == "fp32" else 2)) * sequences
    room = (available - full.weights - full.workspace) // per_token
    context = room // 64 * 64
    if context < min(MIN_CONTEXT, wanted):
        return Fit(
            False,
            device,
            dtype,
            wanted,
            full,
            available,
            _message(config, dtype, device, wanted, full, available),
        )
    less = needed(config, dtype, context, sequences=sequences, device=device, with_mtp=with_mtp)
    text = _message(config, dtype, device, context, less, available)
    return Fit(
        True,
        device,
        dtype,
        context,
        less,
        available,
        f"{text}, with {context:,} of {wanted:,} tokens of context",
    )


def _message(
    config: ModelConfig, dtype: WeightDtype, device: str, context: int, need: Need, available: int
) -> str:
    place = "GPU memory" if device == "gpu" else "RAM"
    verb = "fits" if need.total <= available else "does not fit"
    return (
        f"{verb}: {gigabytes(need.weights)} of weights in {_DTYPE_NAMES[dtype]} + "
        f"{gigabytes(need.cache)} of cache "
        f"for {context:,} tokens + {gigabytes(need.workspace)} of workspace = {gigabytes(need.total)}; "
        f"{gigabytes(available)} of {place} are usable"
    )


def gigabytes(n: int) -> str:
    """Decimal gigabytes, as disks and memory are sold; megabytes below one."""
    if n < 1e9:
        return f"{n / 1e6:,.0f} MB"
    return f"{n / 1e9:,.1f} GB"


# --- what would fit ----------------------------------------------------------------------------------------
def _with_alternatives(verdict: Fit, config: ModelConfig, ram_bytes: int, vram_bytes: int) -> Fit:
    names = alternatives(config, verdict.dtype, ram_bytes, vram_bytes)
    need = f"a machine with {gigabytes(int(verdict.needed.total / USABLE))} on one device would hold it"
    smaller = f"; here fit {', '.join(names)}" if names else ""
    message = f"{verdict.message}; {need}{smaller}"
    return Fit(
        False,
        verdict.device,
        verdict.dtype,
        verdict.context,
        verdict.needed,
        verdict.available,
        message,
        names,
    )


def alternatives(
    config: ModelConfig, weight_dtype: WeightDtype, ram_bytes: int, vram_bytes: int = 0, *, limit: int = 3
) -> tuple[str, ...]:
    """Presets smaller than `config` that fit here with 4,096 tokens, largest first, one name for a shape."""
    size = config.parameters().main
    found: dict[int, str] = {}
    for name, preset in PRESETS.items():
        total = preset.config.parameters().main
        if total >= size or total in found or preset.template == "plain" or preset.config.dsa is not None:
            continue
        for device, memory in _devices(ram_bytes, vram_bytes):
            wanted = min(MIN_CONTEXT, preset.config.max_position_embeddings)
            need = needed(preset.config, weight_dtype, wanted, device=device)
            if need.total <= int(memory * USABLE):
                found[total] = name
    return tuple(found[total] for total in sorted(found, reverse=True)[:limit])
