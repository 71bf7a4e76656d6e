"""Small models to fine-tune, with hadal-mini's tokenizer, and files of conversations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hadal.config import Fp8, ModelConfig
from hadal.model.transformer import Transformer
from hadal.train.sources import ON_BOARD
from hadal.weights import save
from tests.train import tiny as train_tiny
from tests.weights import tiny

SHAPES: dict[str, tuple[ModelConfig, str]] = {
    "v3": (replace(train_tiny.config(), vocab_size=1024, max_position_embeddings=256), "deepseek-r1"),
    "v2-lite": (replace(tiny.V2_LITE, vocab_size=1024), "deepseek-v2"),
    "qwen2": (replace(tiny.QWEN2, vocab_size=1088, max_position_embeddings=256), "r1-distill-qwen"),
    "llama": (replace(tiny.LLAMA, vocab_size=1024, max_position_embeddings=256), "r1-distill-llama"),
}


def base(folder: Path, kind: str = "v3", *, fp8: bool = False, template: str | None = None) -> Path:
    """A published folder of a random tiny model. `template` "": none is named."""
    config, named = SHAPES[kind]
    config = replace(config, bos_token_id=0, eos_token_id=(1,))
    model = Transformer(config).init_weights(1, 0.06)
    for number, buffer in enumerate(model.buffers()):
        buffer.fill_(0.001 * number)
    save(model, folder, fp8=Fp8() if fp8 else False)
    shutil.copyfile(ON_BOARD / "tokenizer.json", folder / "tokenizer.json")
    table = json.loads((ON_BOARD / "tokenizer_config.json").read_text(encoding="utf-8"))
    table.pop("chat_template")
    table["hadal_template"] = named if template is None else template
    if template == "":
        table.pop("hadal_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(table), encoding="utf-8")
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    thought = {} if reasoning is None else {"reasoning_content": reasoning}
    return {"role": "assistant", "content": content, **thought, **more}


def write(path: Path, chats: Sequence[Sequence[dict[str, Any]]]) -> Path:
    lines = [json.dumps({"messages": list(chat), "id": number}) for number, chat in enumerate(chats)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def chats(count: int, reasoning: bool = True) -> list[list[dict[str, Any]]]:
    """Sums of small numbers."""
    thought = "I add." if reasoning else None
    return [
        [user(f"What is {i} + {i % 7}?"), assistant(f"It is {i + i % 7}.", thought)] for i in range(count)
    ]


def recipe(path: Path, start: Path, files: Sequence[Path], **sections: dict[str, Any]) -> Path:
    """A recipe of six short steps."""
    table: dict[str, dict[str, Any]] = {
        "run": {"name": "try", "seed": 3},
        "model": {"start": str(start)},
        "data": {"files": [str(file) for file in files]},
        "train": {"epochs": 1, "context": 128, "batch_tokens": 256, "micro_batch_tokens": 128},
        "learning_rate": {"peak": 3e-3},
        "log": {"every_steps": 1, "heldout_every_steps": 0, "tensorboard": False},
        "checkpoint": {"every_steps": 0, "keep": 9},
    }
    for name, values in sections.items():
        table[name] = table.get(name, {}) | values
    text = "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in table.items()
    )
    path.write_text(text, encoding="utf-8")
    return path
