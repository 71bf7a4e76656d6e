"""The FP8 latent cache: its bytes, what it loses, and decode over it."""

from __future__ import annotations

import pytest
import torch

from hadal.ops import latent_fp8, paged, rope
from hadal.ops.mla import latent_entry


def test_layout_by_hand() -> None:
    assert latent_fp8.entry_bytes(512, 64) == 656
    entry = torch.zeros(1, 576)
    entry[0, 0], entry[0, 1], entry[0, 511], entry[0, 512] = 448.0, -1.0, 0.5, 3.0
    stored = latent_fp8.quantise_entries(entry, 512)
    assert stored.shape == (1, 656) and stored.dtype == torch.uint8
    codes = stored[0, :512].view(torch.float8_e4m3fn).float()
    assert codes[0] == 448 and codes[1] == -1 and codes[511] == 448
    scales = stored[0, 512:528].view(torch.float32)
    assert scales[0] == 1 and scales[3] == torch.tensor(0.5) / 448
    assert scales[1] == torch.tensor(1e-4) / 448
    assert stored[0, 528:].view(torch.bfloat16)[0] == 3
    assert torch.allclose(latent_fp8.dequantise_entries(stored, 512), entry, rtol=1e-6)
    with pytest.raises(ValueError, match="multiples of 128, got 96"):
        latent_fp8.entry_bytes(96, 64)


def test_what_it_loses() -> None:
    torch.manual_seed(0)
    entry = torch.randn(300, 576).bfloat16()
    back = latent_fp8.dequantise_entries(latent_fp8.quantise_entries(entry, 512), 512, torch.bfloat16)
    error = (back.float() - entry.float()).norm() / entry.float().norm()
    assert 0.01 < error < 0.03
    assert torch.equal(back[:, 512:], entry[:, 512:])
    bad = entry.clone()
    bad[3, 7] = float("nan")
    kept = latent_fp8.dequantise_entries(latent_fp8.quantise_entries(bad, 512), 512)
    assert kept[3, :128].isnan().all() and kept[3, 128:].isfinite().all()


@pytest.mark.parametrize("heads", [1, 5])
def test_written_and_decoded(heads: int) -> None:
    torch.manual_seed(1)
    rank, rope_dim, tokens, page = 128, 16, 40, 8
    kv, norm = torch.randn(tokens, rank + rope_dim), 1 + 0.1 * torch.randn(rank)
    rotation = rope.rotation_table(rope.Rope(), rope_dim, 50)[torch.arange(tokens)]
    size = latent_fp8.entry_bytes(rank, rope_dim)
    cache = torch.full((9, page, size), 0xFF, dtype=torch.uint8)
    plain = torch.zeros(9, page, rank + rope_dim)
    table = torch.tensor([[3, 1, 8, 2, 5]])
    slot = table[0, torch.arange(tokens) // page] * page + torch.arange(tokens) % page
    entry = latent_fp8.write_latent(kv, norm, 1e-6, rotation, cache, slot)
    assert torch.allclose(entry, latent_entry(kv, norm, 1e-6, rotation), atol=1e-5)
    plain.flatten(0, 1)[slot] = entry
    gathered = latent_fp8.gather_entries(cache, table[0], tokens, rank, torch.float32)
    assert (gathered - entry).norm() / entry.norm() < 0.03
    q, context = torch.randn(1, heads, rank + rope_dim), torch.tensor([tokens - 3])
    exact = paged.mla_decode_reference(q, plain, table, context, rank, 0.1)
    out = latent_fp8.decode(q, cache, table, context, rank, 0.1)
    assert out.isfinite().all()
    assert (out - exact).norm() / exact.norm() < 0.05
