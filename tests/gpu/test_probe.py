"""Hidden states, routers and attention of the fused paths on a GPU are the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hadal.probe.extract import extract_all
from tests.weights import tiny
from tests.weights.helpers import random_model

pytestmark = pytest.mark.gpu
LENGTHS = [17, 1, 40, 9, 96]


@pytest.mark.parametrize("name", ["v3", "v2-lite", "qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extraction_on_the_gpu_is_the_cpus(name: str, dtype: torch.dtype) -> None:
    config = tiny.ALL[name]
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    model = random_model(config, seed=4).to(dtype)
    blocks = range(config.num_hidden_layers)
    wanted: dict[str, Any] = {"routing": config.moe is not None, "attention": blocks}
    expected = extract_all(model.float(), texts, **wanted)
    found = extract_all(model.to(dtype).cuda(), texts, **wanted)
    loose = dtype == torch.bfloat16
    for mine, right in zip(found, expected, strict=True):
        for layer, (a, b) in enumerate(zip(mine.hidden_lnD.cpu(), right.hidden_lnD, strict=True)):
            assert torch.linalg.vector_norm(a - b) <= (0.1 if loose else 1e-3) * torch.linalg.vector_norm(
                b
            ), layer
        first = mine.attention[0].cpu()
        torch.testing.assert_close(
            first, right.attention[0], rtol=0.1 if loose else 1e-3, atol=0.02 if loose else 1e-4
        )
        for block, scores in mine.scores.items():
            assert (scores.cpu() - right.scores[block]).abs().max() < (0.1 if loose else 1e-2)


def test_neighbours_do_not_matter_on_the_gpu() -> None:
    model = random_model(tiny.V3, seed=4).to(torch.bfloat16).cuda()
    texts = [[5, 6, 7, 8], [9] * 33, [3]]
    together = extract_all(model, texts)
    for alone, many in zip((extract_all(model, [t])[0] for t in texts), together, strict=True):
        a, b = alone.hidden_lnD, many.hidden_lnD
        assert torch.linalg.vector_norm(a - b) <= 0.03 * torch.linalg.vector_norm(a)
