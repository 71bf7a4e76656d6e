"""Engines to measure: the shape of a known model with random weights, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hadal.config import ModelConfig
from hadal.config.packing import resident_kind
from hadal.engine import Engine
from hadal.engine.loading import check_weights_fit, pick_device, pick_dtype
from hadal.model.transformer import Transformer
from hadal.ops.packed import Packed
from hadal.weights.quantise import put_packed

# The scale at which random codes have a standard deviation of 0.02 or so.
_BLOCK = (1 << 20) + 7  # bytes; odd, so that rows differ
_SCALE = {"fp8": 1e-4, "int8": 0.02 / 73, "int4": 0.02 / 4.6}


def fill_random(weight: Packed) -> Packed:
    """Random codes and one scale, in the order of this device's kernel: what quantised weights look like,
    without quantising. One block of codes is repeated, as gigabytes of random numbers take minutes."""
    flat = weight.codes.view(torch.uint8).flatten()
    block = torch.randint(0, 256, (min(_BLOCK, flat.numel()),), dtype=torch.uint8, device=flat.device)
    if weight.kind == "fp8":
        block = (block & 0x80) | (block & 0x7F).clamp(max=0x77)  # finite
    elif weight.kind == "int8":
        block = block.view(torch.int8).clamp(-127, 127).view(torch.uint8)
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])
    weight.scale.fill_(_SCALE[weight.kind])
    return weight.prepare()


@torch.no_grad()
def random_engine(
    config: ModelConfig,
    *,
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    force: bool = False,
    progress: Callable[[float, float], None] | None = None,
    **options: Any,
) -> Engine:
    """An engine of this configuration with random weights, without a tokenizer unless it is among the
    options, and with an MTP module only where speculation is "mtp" (whether the model has one or not).
    progress: packed matrices made, of how many. Further options are the engine's. Raises EngineError where
    the weights do not fit, unless `force`."""
    mtp = options.get("speculation") == "mtp"
    config = replace(config, num_nextn_predict_layers=int(mtp))
    packing = resident_kind(config, quantize)
    where = pick_device(device)
    kind = pick_dtype(config, where, dtype, packing)
    if not force:
        check_weights_fit(config, where, kind, packing, mtp=mtp)
    network = Transformer(config, dtype=kind, device="meta")
    if packing is not None:
        put_packed(network, packing)
    network.to_empty(device=where)
    network.init_weights(0).eval()
    packed = [module for module in network.modules() if isinstance(module, Packed)]
    for number, module in enumerate(packed):
        fill_random(module)
        if progress is not None:
            progress(number + 1, len(packed))
    return Engine(network, name=name, seed=0, **options)
