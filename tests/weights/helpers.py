"""Helpers: tiny saved models, editing of safetensors files, equality of models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hadal.config import ModelConfig
from hadal.model.transformer import Transformer
from hadal.weights import save

Tensors = dict[str, Tensor]


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose every parameter is random and different, gate biases and norms too."""
    model = Transformer(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            values = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.copy_(values + 1 if "norm" in name else values)
    return model.eval()


def saved(model: Transformer, folder: Path, **options: object) -> Path:
    return save(model, folder, **options)  # type: ignore[arg-type]


def same(a: Transformer, b: Transformer) -> None:
    """Every parameter bitwise equal."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def edit(file: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite a safetensors file after `change`; the manifest goes, so that only the edit is at fault."""
    from safetensors.torch import load_file, save_file

    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    (file.parent / "manifest.json").unlink(missing_ok=True)


def rewrite_header(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Replace the JSON header of a safetensors file by what `change` returns (or made of it)."""
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + n])
    result = change(table)
    text = result if isinstance(result, bytes) else json.dumps(result or table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])
    (file.parent / "manifest.json").unlink(missing_ok=True)
