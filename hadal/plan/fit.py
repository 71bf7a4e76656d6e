"""Does a model fit into a machine's memory, before anything is downloaded: the verdict for one device, and
what would fit.

    needed = weights + cache + workspace            (hadal/plan/memory.py has the arithmetic)

All experts must be resident, or streamed from host memory or the files (offloading). One device holds the
rest; a machine counts with 90% of its memory. More devices: hadal/plan/placing.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hadal.config import PRESETS, ModelConfig
from hadal.plan.machines import USABLE
from hadal.plan.memory import (
    DTYPE_NAMES,
    CacheDtype,
    WeightDtype,
    cache_bytes_per_token,
    cache_dtype_of,
    expert_group_bytes,
    memory_bytes,
    value_bytes,
    workspace,
)

__all__ = [
    "USABLE",
    "Fit",
    "Need",
    "WeightDtype",
    "alternatives",
    "fit",
    "gigabytes",
    "memory_bytes",
    "needed",
]

MIN_CONTEXT = 4096
Offload = Literal["cpu", "disk"]


@dataclass(frozen=True)
class Need:
    """Bytes by part."""

    weights: int
    cache: int
    workspace: int
    elsewhere: int = 0  # routed experts that are offloaded: in host memory, or in the files

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
    offload: Offload | None = None,
    cache: CacheDtype | None = None,
) -> Fit:
    """Whether weights, workspace and a cache for `context` tokens (default: all) fit on the GPU, else in RAM.

    weight_dtype: how weights lie in memory. vram_bytes: of one GPU, 0 without. Where the weights fit but the
    whole context does not, the verdict is yes with the context that does, at least 4,096 tokens. with_mtp:
    the module is loaded and drafts, with a cache of its own. offload: where the routed experts are instead.
    """
    for name, value in (("ram_bytes", ram_bytes), ("vram_bytes", vram_bytes)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    if sequences < 1 or (context is not None and context < 1):
        raise ValueError(f"sequences is {sequences} and context {context}; both must be at least 1")
    wanted = min(context or config.max_position_embeddings, config.max_position_embeddings)
    verdict: Fit | None = None
    asked = _Asked(config, weight_dtype, wanted, sequences, with_mtp, offload, cache)
    for device, memory in _devices(ram_bytes, vram_bytes):
        if offload is not None and vram_bytes and device == "cpu":
            break  # it was to run on the GPU, with its experts elsewhere
        verdict = _on(asked, device, int(memory * USABLE), int(ram_bytes * USABLE))
        if verdict.ok:
            return verdict
    assert verdict is not None
    return _with_alternatives(verdict, config, ram_bytes, vram_bytes)


@dataclass(frozen=True)
class _Asked:
    """The question, once its values were judged."""

    config: ModelConfig
    dtype: WeightDtype
    context: int
    sequences: int
    with_mtp: bool
    offload: Offload | None
    cache: CacheDtype | None

    def needed(self, context: int, device: Literal["gpu", "cpu"]) -> Need:
        return needed(
            self.config,
            self.dtype,
            context,
            sequences=self.sequences,
            device=device,
            with_mtp=self.with_mtp,
            offload=self.offload,
            cache=self.cache,
        )

    def per_token(self) -> float:
        cache = self.cache or cache_dtype_of(self.dtype)
        return cache_bytes_per_token(self.config, cache, with_mtp=self.with_mtp) * self.sequences


def needed(
    config: ModelConfig,
    weight_dtype: WeightDtype,
    context: int,
    *,
    sequences: int = 1,
    device: Literal["gpu", "cpu"] = "cpu",
    with_mtp: bool = True,
    offload: Offload | None = None,
    cache: CacheDtype | None = None,
) -> Need:
    """Bytes that a model takes in memory, by part; what is offloaded is not there. A processor's experts are
    in host memory anyway."""
    kept = cache or cache_dtype_of(weight_dtype)
    away = 0
    if offload == "disk" or (offload == "cpu" and device == "gpu"):
        away = expert_group_bytes(config, weight_dtype, with_mtp=with_mtp)
    return Need(
        weights=memory_bytes(config, weight_dtype, with_mtp=with_mtp) - away,
        cache=int(cache_bytes_per_token(config, kept, with_mtp=with_mtp) * context) * sequences,
        workspace=workspace(config, value_bytes(weight_dtype), device),
        elsewhere=away,
    )


def _devices(ram_bytes: int, vram_bytes: int) -> Iterator[tuple[Literal["gpu", "cpu"], int]]:
    if vram_bytes:
        yield "gpu", vram_bytes
    yield "cpu", ram_bytes


def _on(asked: _Asked, device: Literal["gpu", "cpu"], available: int, ram: int) -> Fit:
    """The verdict for one device: the whole context, else as much of it as fits."""
    wanted = asked.context
    full = asked.needed(wanted, device)
    host_short = asked.offload == "cpu" and device == "gpu" and full.elsewhere > ram
    context, text = wanted, ""
    if full.total > available and not host_short:
        room = (available - full.weights - full.workspace) // max(1, int(asked.per_token()))
        context = room // 64 * 64
        text = f", with {context:,} of {wanted:,} tokens of context"
    ok = not host_short and context >= min(MIN_CONTEXT, wanted)
    if not ok:
        context, text = wanted, ""
    need = asked.needed(context, device)
    message = _message(asked, device, context, need, available, ok)
    if host_short:
        message += (
            f"; its experts take {gigabytes(full.elsewhere)} of host memory and {gigabytes(ram)} are usable"
        )
    return Fit(ok, device, asked.dtype, context, need, available, message + text)


def _message(asked: _Asked, device: str, context: int, need: Need, available: int, ok: bool) -> str:
    place = "GPU memory" if device == "gpu" else "RAM"
    away = ""
    if need.elsewhere:
        where = "in host memory" if asked.offload == "cpu" else "in the files"
        away = f" beside {gigabytes(need.elsewhere)} of experts {where}"
    return (
        f"{'fits' if ok else 'does not fit'}: {gigabytes(need.weights)} of weights in "
        f"{DTYPE_NAMES[asked.dtype]}{away} + {gigabytes(need.cache)} of cache "
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
    return replace(verdict, message=message, alternatives=names)


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
            need = needed(preset.config, weight_dtype, wanted, device=device, with_mtp=False)
            if need.total <= int(memory * USABLE):
                found[total] = name
    return tuple(found[total] for total in sorted(found, reverse=True)[:limit])
