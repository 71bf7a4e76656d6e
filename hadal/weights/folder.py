"""Load a published folder into a `Transformer`: mapped, shard by shard, straight into place.

The model is allocated uninitialised on its device; each stored tensor is then read in pieces of 4 MiB
and written to the rows that `names` gives it. FP8 blocks are dequantised on the way
(w = float(q) · scale_inv, DeepSeek-V3 §3.3), on the target device. Every piece is searched for NaN and
infinity. Peak host memory is the weights plus a few pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Mapping as Named
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hadal.config.packing import resident_kind
from hadal.model.offload import OffloadedExperts
from hadal.model.transformer import Transformer
from hadal.ops.fp8 import dequantise_blocks
from hadal.ops.packed import Kind, Packed, dequantise, from_words
from hadal.weights.errors import WeightsError
from hadal.weights.header import Stored
from hadal.weights.layout import CONFIG, Folder, open_folder
from hadal.weights.manifest import Progress, verify_files
from hadal.weights.mapped import Mapping
from hadal.weights.names import CODES_SUFFIX, GROUPS_SUFFIX, SCALE_SUFFIX, SHAPE_SUFFIX, Slot
from hadal.weights.quantise import HEAD, copy_fp8, packed_weights, put_packed

if TYPE_CHECKING:
    from hadal.weights.offload import Place

_THREADS = 4
_THREADS_FROM_BYTES = 1_000_000_000  # each thread keeps about 10 MB: too much beside a small model


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    with_mtp: bool = True,
    verify: Literal["header", "full"] = "header",
    max_positions: int | None = None,
    quantize: str | None = None,
    offload: Place | None = None,
    expert_cache_bytes: int = 0,
) -> Transformer:
    """The model of a published folder, on `device` in `dtype` (gate biases stay FP32), in eval mode.

    quantize: "fp8", "int8" or "int4" keeps the matrices packed (hadal/weights/quantise.py), quantised as
    they are read; published FP8 blocks are taken over unchanged by "fp8". None: integers of a folder stay
    packed, FP8 blocks are dequantised; "off": both are. with_mtp: False leaves the MTP
    modules out. verify: "full" first compares every file with its SHA-256 (from `manifest.json`, or the hub
    cache's blob names). progress: called with (bytes read, bytes in all).
    offload: "cpu" or "disk" keeps the routed experts off the device (hadal/weights/offload.py), but for as
    many hot ones as take `expert_cache_bytes`.
    Raises WeightsError or ConfigError, naming file and tensor; a partly loaded model is never returned.
    """
    path = Path(folder)
    if verify not in ("header", "full"):
        raise WeightsError(f'verify is {verify!r}; it is "header" or "full"')
    opened = open_folder(path, with_mtp=with_mtp)
    if verify == "full":
        verify_files(path, [*opened.files, CONFIG])
    config = opened.config if with_mtp else replace(opened.config, num_nextn_predict_layers=0)
    kind = resident_kind(config, quantize)
    with torch.inference_mode(False):  # its tensors must be ordinary ones: the model may be trained later
        build_on = "meta" if kind or offload else device
        model = Transformer(config, dtype=dtype, device=build_on, max_positions=max_positions)
        if offload:
            from hadal.weights.offload import offload_experts

            how: dict[str, Any] = {"dtype": dtype, "kind": kind, "cache_bytes": expert_cache_bytes}
            offload_experts(model, opened, offload, torch.device(device), **how)
        if kind:
            put_packed(model, kind)
        if kind or offload:
            model.to_empty(device=device)
        load_into(model, opened, progress=progress)
    return model.eval()


@torch.no_grad()
def load_into(model: Transformer, folder: Folder, *, progress: Progress | None = None) -> None:
    """Fill every parameter of a model from an opened folder. The model's shapes must be the folder's."""
    packed = packed_weights(model)
    state: dict[str, Tensor | Packed] = {
        name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in packed
    }
    state |= packed
    tied_head = packed.get(HEAD) if folder.config.tie_word_embeddings else None
    unfilled = set(state) - {slot.slot.parameter for slot in folder.expected.values()}
    unfilled -= {HEAD} if tied_head is not None else set()
    elsewhere = offloaded(model)
    if unfilled:
        raise WeightsError(f"{folder.path} does not fill {sorted(unfilled)[0]}; load its own {CONFIG}")
    wanted = [s for s in folder.stored if not s.startswith(elsewhere)] if elsewhere else list(folder.stored)
    counter = _Counter(sum(folder.stored[name].nbytes for name in wanted), progress)
    with Mapping() as files:
        work = _Work(folder, state, files, counter)
        tensors, copies = _by_shard(folder, set(wanted))
        threads = _THREADS if folder.nbytes >= _THREADS_FROM_BYTES else 1
        with ThreadPoolExecutor(threads, "hadal-load") as pool:
            for shard in tensors:
                _run(pool, work.fill, shard)
            _run(pool, work.compare, copies)
    if tied_head is not None:
        tied_head.write(model.embed_tokens.matrix)
    for weight in packed.values():
        weight.prepare()


def offloaded(model: Transformer) -> tuple[str, ...]:
    """Beginnings of the published names of tensors that stay where they are (hadal/weights/offload.py)."""
    layers = [module.layer for module in model.modules() if isinstance(module, OffloadedExperts)]
    return tuple(f"model.layers.{layer}.mlp.experts." for layer in layers)


def _by_shard(folder: Folder, wanted: set[str]) -> tuple[list[list[Slot]], list[Slot]]:
    """Slots to fill, shard after shard in file order; and the copies to compare once all is filled."""
    shards: dict[str, list[Slot]] = {name: [] for name in folder.files}
    copies = []
    for name, stored in sorted(folder.stored.items(), key=lambda item: item[1].begin):
        if name not in wanted:
            continue
        if name not in folder.expected:
            copies.append(folder.optional[name])
        elif folder.expected[name].dtype not in ("scale", "groups", "shape"):
            slot = folder.expected[name].slot
            (copies if slot.copy else shards[stored.file.name]).append(slot)
    return list(shards.values()), copies


def _run(pool: ThreadPoolExecutor, work: Callable[[Slot], None], slots: list[Slot]) -> None:
    """Do all slots; the first error stops what has not begun."""
    futures = [pool.submit(work, slot) for slot in slots]
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


@dataclass(frozen=True)
class _Work:
    folder: Folder
    state: dict[str, Tensor | Packed]
    files: Mapping
    counter: _Counter

    def fill(self, slot: Slot) -> None:
        """Copy one stored tensor to its rows, dequantised and converted, and check that it is finite."""
        weight = self.state[slot.parameter]
        if slot.name + CODES_SUFFIX in self.folder.stored:
            return self._fill_from_ints(slot, weight)
        stored = self.folder.stored[slot.name]
        if isinstance(weight, Packed):
            return self._fill_packed(slot, stored, weight)
        target = place(self.state, slot)
        scale = self._scale(slot)
        block = self.folder.config.fp8.weight_block_size if self.folder.config.fp8 else (1, 1)
        for start, stop, rows in self.files.pieces(stored, block[0] if scale is not None else 1):
            part = target[start:stop]
            if scale is not None:
                some = scale[start // block[0] : -(-stop // block[0])]
                rows = dequantise_blocks(rows.to(part.device), some.to(part.device), block, part.dtype)
            part.copy_(rows)
            del rows
            check_finite(slot, stored, part)
            self.counter.add((stop - start) * (stored.nbytes // stored.shape[0]))

    def _fill_packed(self, slot: Slot, stored: Stored, weight: Packed) -> None:
        """Quantise one stored tensor into its rows; FP8 blocks that may stay FP8 are copied."""
        scale, fp8 = self._scale(slot), self.folder.config.fp8
        block = fp8.weight_block_size if fp8 and scale is not None else (1, 1)
        same = scale is not None and weight.kind == "fp8" and block[1] == weight.group
        for start, stop, rows in self.files.pieces(stored, max(block[0], weight.rows)):
            some = None if scale is None else scale[start // block[0] : -(-stop // block[0])]
            if same and some is not None and block[0] % weight.rows == 0:
                _check_codes(slot, stored, rows)
                copy_fp8(weight, rows, some, slot, start, block[0])
            else:
                part = rows.to(weight.device)
                if some is not None:
                    part = dequantise_blocks(part, some.to(part.device), block)
                check_finite(slot, stored, part)
                weight.write(part, slot.index, slot.row + start)
            del rows
            self.counter.add((stop - start) * (stored.nbytes // stored.shape[0]))

    def _fill_from_ints(self, slot: Slot, weight: Tensor | Packed) -> None:
        """Integers of the folder: copied where the weight is packed in the same way, else dequantised."""
        for start, stop, codes, scale in int_rows(self.folder, self.files, slot):
            ints = self.folder.config.ints
            assert ints is not None
            kind: Kind = "int4" if ints.num_bits == 4 else "int8"
            width = slot.shape[1]
            group = ints.group_size or width
            repeat = group // weight.group if isinstance(weight, Packed) else 0
            if isinstance(weight, Packed) and weight.kind == kind and repeat * weight.group == group:
                some = scale.repeat_interleave(repeat, -1)[:, : ceil(width / weight.group)]
                weight.write_codes(codes, some, slot.index, slot.row + start)
            else:
                rows = dequantise(codes, scale, kind, width, group, 1, torch.float32)
                if isinstance(weight, Packed):
                    weight.write(rows, slot.index, slot.row + start)
                else:
                    place(self.state, slot)[start:stop].copy_(rows)
            self.counter.add(codes.nbytes + scale.nbytes)

    def _scale(self, slot: Slot) -> Tensor | None:
        scale = stored_scale(self.folder, self.files, slot)
        if scale is not None:
            self.counter.add(scale.nbytes)
        return scale

    def compare(self, slot: Slot) -> None:
        """A stored copy (MTP's embedding and head, a tied head) must equal the parameter that it repeats."""
        stored = self.folder.stored[slot.name]
        if isinstance(self.state[slot.parameter], Packed):
            self.counter.add(stored.nbytes)  # a packed head holds no more what could be compared
            return
        target = place(self.state, slot)
        for start, stop, rows in self.files.pieces(stored):
            part = target[start:stop]
            if not torch.equal(rows.to(part.device).to(part.dtype), part):
                raise WeightsError(
                    f"{stored.file}: {slot.name} differs from {slot.parameter}, which it must repeat; "
                    f"fetch the file again{', or load with with_mtp=False' if not slot.optional else ''}"
                )
            self.counter.add((stop - start) * (stored.nbytes // stored.shape[0]))


def int_rows(folder: Folder, files: Mapping, slot: Slot) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, codes, scales) of a matrix that a folder holds in integers, piece by piece."""
    stored, at = folder.stored[slot.name + CODES_SUFFIX], folder.stored[slot.name + GROUPS_SUFFIX]
    shape_at = folder.stored[slot.name + SHAPE_SUFFIX]
    shape = tuple(files.rows(shape_at, 0, 2).tolist())
    if shape != slot.shape:
        raise WeightsError(
            f"{shape_at.file}: {slot.name}{SHAPE_SUFFIX} says {list(shape)}, a model with this {CONFIG} "
            f"needs {list(slot.shape)}"
        )
    scale = files.rows(at, 0, at.shape[0]).clone()
    files.release(at, 0, at.shape[0])
    if not bool(torch.isfinite(scale).all()):
        raise WeightsError(f"{at.file}: {slot.name}{GROUPS_SUFFIX} has NaN or infinity; fetch the file again")
    kind: Kind = "int4" if folder.config.ints and folder.config.ints.num_bits == 4 else "int8"
    for start, stop, words in files.pieces(stored):
        yield start, stop, from_words(words.clone(), kind, slot.shape[1]), scale[start:stop]


def stored_scale(folder: Folder, files: Mapping, slot: Slot) -> Tensor | None:
    """The block scales of an FP8 matrix, copied out of their file (it may be another shard); None without."""
    stored = folder.stored.get(slot.name + SCALE_SUFFIX)
    if stored is None:
        return None
    scale = files.rows(stored, 0, stored.shape[0]).clone()
    files.release(stored, 0, stored.shape[0])
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise WeightsError(
            f"{stored.file}: {slot.name}{SCALE_SUFFIX} has NaN, infinite or negative scales; "
            "fetch the file again"
        )
    return scale


def place(state: Named[str, Tensor | Packed], slot: Slot) -> Tensor:
    """The rows of a parameter that a slot names (a view). WeightsError for a parameter of another shape."""
    parameter = state[slot.parameter]
    assert isinstance(parameter, Tensor), f"{slot.parameter} is packed"
    if slot.index is not None:
        parameter = parameter[slot.index]
    rows = parameter[slot.row : slot.row + slot.shape[0]]
    if tuple(rows.shape) != slot.shape:
        raise WeightsError(
            f"parameter {slot.parameter} has shape {list(parameter.shape)}, {slot.name} "
            f"{list(slot.shape)} does not fit at row {slot.row}; load the folder's own {CONFIG}"
        )
    return rows


def check_finite(slot: Slot, stored: Stored, rows: Tensor) -> None:
    """`aminmax` hands NaN on and costs a tenth of `isfinite` on a CPU."""
    low, high = torch.aminmax(rows)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        as_read = "" if str(rows.dtype) in _EXACT.get(stored.dtype, ()) else f" (read as {rows.dtype})"
        raise WeightsError(f"{stored.file}: {slot.name} holds NaN or infinity{as_read}; fetch the file again")


def _check_codes(slot: Slot, stored: Stored, rows: Tensor) -> None:
    """E4M3 has NaN (0x7F, 0xFF) but no infinity."""
    if bool(((rows.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise WeightsError(f"{stored.file}: {slot.name} holds NaN; fetch the file again")


_EXACT = {"F32": ("torch.float32",), "BF16": ("torch.bfloat16", "torch.float32"), "F16": ("torch.float16",)}


class _Counter:
    """Bytes done, reported from several threads one at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._done, self._progress, self._lock = total, 0, progress, Lock()

    def add(self, n: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += n
            self._progress(self._done, self._total)
