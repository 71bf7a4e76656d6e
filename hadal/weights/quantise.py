"""Which weights of a `Transformer` are quantised, and how they become `Packed` (hadal/ops/packed.py).

Packed: every projection of attention, FFN and experts that DeepSeek publishes in FP8 (V3 report §3.3), except
`kv_b_proj`, whose halves the absorbed attention needs as plain matrices; with INT8 and INT4 also the head, in
INT8. Never packed: embedding, norms, gates, biases, MTP's `eh_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.model.layers import Linear
from hadal.model.offload import OffloadedExperts
from hadal.model.transformer import Transformer
from hadal.ops.packed import Kind, Packed, block_rows
from hadal.weights.names import Slot, slots

HEAD = "lm_head.weight"


def is_packed(slot: Slot, kind: Kind) -> bool:
    """Whether a published tensor is kept packed in memory."""
    if slot.parameter == HEAD:
        return kind != "fp8"
    return slot.kind == "matrix" and "kv_b_proj" not in slot.parameter


def kind_of(parameter: str, kind: Kind) -> Kind:
    """The head stays in INT8: a wrong last product shows in every token."""
    return "int8" if parameter == HEAD else kind


def packed_shapes(
    config: ModelConfig, kind: Kind, *, with_mtp: bool = True
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Parameter → (shape, rows of an FP8 block) of all that is packed."""
    heights: dict[str, dict[int, int]] = {}
    stacks: dict[str, int] = {}
    widths: dict[str, int] = {}
    for slot in slots(config, with_mtp=with_mtp).values():
        if is_packed(slot, kind) and not slot.copy:
            heights.setdefault(slot.parameter, {})[slot.row] = slot.shape[0]
            widths[slot.parameter] = slot.shape[1]
            if slot.index is not None:
                stacks[slot.parameter] = max(stacks.get(slot.parameter, 0), slot.index + 1)
    found = {}
    for name, by_row in heights.items():
        lead = (stacks[name],) if name in stacks else ()
        rows = block_rows([by_row[row] for row in sorted(by_row)])
        found[name] = ((*lead, sum(by_row.values()), widths[name]), rows)
    if config.tie_word_embeddings and kind != "fp8":
        found[HEAD] = ((config.vocab_size, config.hidden_size), 1)
    return found


@torch.no_grad()
def quantise_model(model: Transformer, kind: Kind) -> Transformer:
    """Pack the weights of a model in memory, one after the other, in place; returns it."""
    for name, (shape, rows) in packed_shapes(model.config, kind, with_mtp=len(model.mtp) > 0).items():
        whole = _old_weight(model, name)
        own = kind_of(name, kind)
        packed = Packed(own, shape, rows=rows if own == "fp8" else None, device=whole.device)
        for index, row, part in _pieces(whole):
            packed.write(part, index, row)
        _put(model, name, packed)
        del whole
        packed.prepare()
    return model


def _old_weight(model: Transformer, name: str) -> Tensor:
    if name == HEAD and model.lm_head is None:
        return model.embed_tokens.matrix
    return model.get_parameter(name)


def _pieces(whole: Tensor) -> Iterator[tuple[int | None, int, Tensor]]:
    """(index, first row, rows) of a weight: one matrix of a stack at a time, large matrices by 4,096 rows."""
    if whole.dim() == 3:
        for index, matrix in enumerate(whole):
            yield index, 0, matrix
        return
    for row in range(0, whole.shape[0], 4096):
        yield None, row, whole[row : row + 4096]


def put_packed(model: Transformer, kind: Kind) -> None:
    """Replace weights by empty packed ones on the same device (before anything is loaded)."""
    offloaded = {name for name, m in model.named_modules() if isinstance(m, OffloadedExperts)}
    for name, (shape, rows) in packed_shapes(model.config, kind, with_mtp=len(model.mtp) > 0).items():
        if name.rpartition(".")[0] in offloaded:
            continue
        own = kind_of(name, kind)
        _put(model, name, Packed(own, shape, rows=rows if own == "fp8" else None, device=model.device))


def _put(model: Transformer, name: str, packed: Packed) -> None:
    if name == HEAD and model.lm_head is None:  # tied: the embedding stays as it is, to be looked up
        like = model.embed_tokens.matrix
        model.lm_head = Linear(1, 1, dtype=like.dtype, device=like.device)
    path, _, attribute = name.rpartition(".")
    owner: nn.Module = model.get_submodule(path)
    delattr(owner, attribute)
    setattr(owner, attribute, packed)


def packed_weights(model: Transformer) -> dict[str, Packed]:
    """Every packed weight by the name of its parameter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def copy_fp8(packed: Packed, codes: Tensor, scale: Tensor, slot: Slot, start: int, block_rows_: int) -> None:
    """Take over published FP8 blocks as they are; taller blocks are split, their scale repeated."""
    repeat = block_rows_ // packed.rows
    kept = scale.repeat_interleave(repeat, 0)[: ceil(codes.shape[0] / packed.rows)]
    packed.write_codes(codes, kept, slot.index, slot.row + start)
