"""What a training step costs, and how much of the machine that uses (MFU).

Per token 6·N floating-point operations (N: parameters that a token meets, head included, input embedding
not), and for causal attention over a stretch of length S another 3·H·(d_qk + d_v)·S per layer: 2 products,
forward and twice backward, over half of the S² pairs. V3 at 4K: 219.75 + 30.70 = 250.46 GFLOP (Zhao et al.,
ISCA 2025: 250). MFU is the achieved rate over the device's *dense* peak in the model's dtype; recomputation
does not count.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from hadal.config import Gqa, ModelConfig

PEAKS_BF16: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GB200", 2250e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
)
"""Dense BF16 peaks in FLOP/s by what a device's name contains, from the vendors' data sheets."""


@dataclass(frozen=True)
class Peak:
    """A device's matrix-product rate in FLOP/s, and where the number comes from."""

    flops: float
    source: str


def flops_per_token(config: ModelConfig) -> float:
    """6·N of the main model and the MTP modules (the head once for each)."""
    n = config.parameters()
    active = n.active_core + n.head
    if config.num_nextn_predict_layers:
        idle = 0
        if config.moe is not None:
            idle_experts = config.moe.n_routed_experts - config.moe.num_experts_per_tok
            idle = idle_experts * 3 * config.hidden_size * config.moe.moe_intermediate_size
        depths = config.num_nextn_predict_layers
        active += n.mtp_unique - depths * idle + depths * n.head
    return 6.0 * active


def attention_flops_per_pair(config: ModelConfig) -> float:
    """Attention's cost over all blocks for each of the S² pairs of a causal stretch of length S."""
    a = config.attention
    width = 2 * a.head_dim if isinstance(a, Gqa) else a.qk_head_dim + a.v_head_dim
    return (
        3.0
        * config.num_attention_heads
        * width
        * (config.num_hidden_layers + config.num_nextn_predict_layers)
    )


def step_flops(config: ModelConfig, tokens: int, attended_pairs: int) -> float:
    """Operations of one optimizer step over `tokens` tokens whose stretches have Σ S² = `attended_pairs`."""
    return tokens * flops_per_token(config) + attended_pairs * attention_flops_per_pair(config)


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The device's peak: of the data sheet for a known GPU in BF16, else measured by matrix products (0.1
    s)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAKS_BF16:
            if re.search(rf"\b{re.escape(part)}\b", name):
                return Peak(flops, f"{name}: {flops / 1e12:.0f} TFLOP/s dense BF16")
    return Peak(rate := _measure(device, dtype), f"measured matrix products: {rate / 1e9:.0f} GFLOP/s")


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
