"""Experts that stay in the folder's files: mapped, read when they are routed to (hadal/model/offload.py).

The system keeps in memory what is read often, as far as there is room. Where the file's numbers are those
that the model computes with, nothing is copied at all; FP8 blocks and integers become `Packed` or plain
weights.
"""

from __future__ import annotations

import time
from typing import Literal, cast

import torch
from torch import Tensor

from hadal.config.packing import Kind
from hadal.model.block import Block
from hadal.model.moe import Moe
from hadal.model.mtp import Mtp
from hadal.model.offload import ExpertCache, InMemory, OffloadedExperts, Source, Weights
from hadal.model.transformer import Transformer
from hadal.ops.fp8 import dequantise_blocks
from hadal.ops.packed import Packed, dequantise
from hadal.plan.fit import gigabytes
from hadal.weights.errors import WeightsError
from hadal.weights.folder import check_finite, int_rows, stored_scale
from hadal.weights.layout import Folder
from hadal.weights.manifest import Progress
from hadal.weights.mapped import Mapping
from hadal.weights.names import CODES_SUFFIX, Slot

Place = Literal["cpu", "disk"]
PLACES: tuple[Place, ...] = ("cpu", "disk")


class MappedExperts:
    """The routed experts of a folder, straight from its mapped files. Each is searched for NaN once."""

    def __init__(self, folder: Folder, dtype: torch.dtype, kind: Kind | None, prepare: bool) -> None:
        self.folder, self.dtype, self.kind, self.prepare = folder, dtype, kind, prepare
        self.files = Mapping()
        self.slots: dict[tuple[int, int], dict[str, Slot]] = {}
        for expected in folder.expected.values():
            slot = expected.slot
            if slot.index is not None and ".mlp.experts." in slot.name:
                layer = int(slot.name.split(".")[2])
                part = slot.name.split(".")[-2].removesuffix("_proj")
                self.slots.setdefault((layer, slot.index), {})[part] = slot
        self._checked: set[str] = set()
        stored = {s.dtype for s in folder.stored.values()}
        same = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        self.copies = kind is not None or folder.config.fp8 is not None or folder.config.ints is not None
        self.copies = self.copies or same not in stored

    def get(self, layer: int, expert: int) -> Weights:
        """An expert in the model's dtype, or packed. WeightsError for NaN, at the first use."""
        slots = self.slots[layer, expert]
        return Weights(*(self._part(slots[part]) for part in ("gate", "up", "down")))

    def _part(self, slot: Slot) -> Tensor | Packed:
        rows = self._rows(slot)
        if slot.name not in self._checked:
            stored = self.folder.stored.get(slot.name) or self.folder.stored[slot.name + CODES_SUFFIX]
            check_finite(slot, stored, rows)
            self._checked.add(slot.name)
        if self.kind is None:
            return rows.to(self.dtype)
        packed = Packed(self.kind, slot.shape)
        packed.write(rows)
        return packed.prepare() if self.prepare else packed

    def _rows(self, slot: Slot) -> Tensor:
        """The matrix as the file has it, dequantised to FP32 where it is quantised."""
        folder, width = self.folder, slot.shape[1]
        if slot.name + CODES_SUFFIX in folder.stored and folder.config.ints is not None:
            kind: Kind = "int4" if folder.config.ints.num_bits == 4 else "int8"
            group = folder.config.ints.group_size or width
            parts = [
                dequantise(codes, scale, kind, width, group, 1, torch.float32)
                for _, _, codes, scale in int_rows(folder, self.files, slot)
            ]
            return torch.cat(parts)
        stored = folder.stored[slot.name]
        rows = self.files.rows(stored, 0, stored.shape[0])
        scale = stored_scale(folder, self.files, slot)
        if scale is None or folder.config.fp8 is None:
            return rows
        return dequantise_blocks(rows, scale, folder.config.fp8.weight_block_size)


def offload_experts(
    model: Transformer,
    folder: Folder,
    place: Place,
    device: torch.device,
    *,
    dtype: torch.dtype,
    kind: Kind | None = None,
    cache_bytes: int = 0,
    progress: Progress | None = None,
) -> ExpertCache:
    """Replace the routed experts of every layer (of a model on `meta`, not yet loaded) by offloaded ones.

    place: "cpu" reads them all into host memory now, "disk" leaves them in the files. cache_bytes: for the
    hottest on the model's device. WeightsError for a model without experts.
    """
    if model.config.moe is None:
        raise WeightsError(f"a {model.config.model_type} model has no experts that could be offloaded")
    if place not in PLACES:
        raise WeightsError(f"offload is {place!r}; use {' or '.join(PLACES)}")
    source: Source = MappedExperts(folder, dtype, kind, prepare=device.type == "cpu")
    blocks = [cast(Block, b) for b in (*model.layers, *(cast(Mtp, m).block for m in model.mtp))]
    sparse = [(block.layer, block.mlp) for block in blocks if isinstance(block.mlp, Moe)]
    if place == "cpu":
        layers, pin = [layer for layer, _ in sparse], device.type == "cuda"
        source = InMemory(source, layers, model.config.moe.n_routed_experts, pin=pin, progress=progress)
    cache = ExpertCache(source, device, cache_bytes)
    for layer, moe in sparse:
        moe.experts = OffloadedExperts(layer, cache)
    return cache


def expert_seconds(cache: ExpertCache, samples: int = 4) -> float:
    """Median time to read an expert where it lies, as far as a few of them tell."""
    source = cache.source
    slots = sorted(source.slots) if isinstance(source, MappedExperts) else []
    taken = []
    for layer, expert in slots[:: max(1, len(slots) // samples)][:samples]:
        began = time.perf_counter()
        for part in source.get(layer, expert).parts:
            (part.codes if isinstance(part, Packed) else part).view(torch.uint8).sum()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2] if taken else 0.0


def describe_offload(model: Transformer) -> str:
    """What to expect of an offloaded model on this machine, in one sentence."""
    cache = next(m.cache for m in model.modules() if isinstance(m, OffloadedExperts))
    moe = model.config.moe
    assert moe is not None
    layers = sum(isinstance(m, OffloadedExperts) for m in model.modules())
    one = cache.source.get(
        next(m.layer for m in model.modules() if isinstance(m, OffloadedExperts)), 0
    ).nbytes
    total, uses = one * layers * moe.n_routed_experts, layers * moe.num_experts_per_tok
    where = "in host memory" if isinstance(cache.source, InMemory) else "in the files"
    text = f"experts {where}: {gigabytes(total)}"
    if cache.capacity:
        text += f", the hottest {gigabytes(min(cache.capacity, total))} kept on {cache.device.type}"
    seconds = expert_seconds(cache)
    if seconds:
        text += f"; a token needs {uses} of them, {seconds * 1e3:,.2f} ms each to read: about "
        text += f"{1 / (uses * seconds):,.2g} tokens/s where none is hot"
    return text
