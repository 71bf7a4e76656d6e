"""The model that a run of post-training starts from, and the published folder that it leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from hadal.data.strict import RecipeError
from hadal.model.transformer import Transformer
from hadal.post.card import Started
from hadal.post.lora import Adapters
from hadal.post.sft_recipe import BaseRecipe
from hadal.text.templates import Template, template_for
from hadal.text.tokenizer import Tokenizer
from hadal.train.export import CARD, Facts
from hadal.train.main import DTYPES, dtype_of
from hadal.train.opening import Changed
from hadal.train.recipe import differences
from hadal.weights import hub
from hadal.weights import load as load_weights
from hadal.weights import save as save_weights
from hadal.weights.layout import read_config, read_config_json
from hadal.weights.writer import SIDE_FILES


@dataclass(frozen=True)
class Base:
    """A published folder on this machine, its tokenizer, and the template that conversations get."""

    name: str
    folder: Path
    tokenizer: Tokenizer
    template: Template

    @classmethod
    def of(cls, model: BaseRecipe) -> Base:
        """A recipe's model. Raises NotFoundError, TemplateError, TokenizerError."""
        folder = Path(hub.resolve(model.start))
        if not (folder / "config.json").is_file():
            raise RecipeError(f"model.start is {model.start!r}, which is no model: it has no config.json")
        template = template_for(model.template or folder)
        if template.name == "plain":
            raise RecipeError(f"{model.start} has no chat template; name one in model.template (docs/sft.md)")
        return cls(model.start, folder, Tokenizer.load(folder), template)

    def started(self) -> Started:
        """What identifies it, for the recipe that is saved and the card."""
        return Started(self.name, str(self.folder), hub.digest(self.folder), self.template.name)

    @property
    def pad_id(self) -> int:
        """What fills rows; it is never attended to nor counted, whatever it is."""
        return self.tokenizer.special.get(
            "<｜▁pad▁｜>", self.tokenizer.eos_ids[0] if self.tokenizer.eos_ids else 0
        )

    def load(self, dtype: str, device: torch.device, seed: int) -> Transformer:
        """Its weights as numbers that can be trained, on `device`; `dtype` as in recipes."""
        torch.manual_seed(seed)
        return load_weights(self.folder, dtype=dtype_of(dtype, device), device=device, quantize="off")


class PlainRecipe(Protocol):
    """A recipe that knows itself as plain data."""

    def to_dict(self) -> dict[str, Any]: ...


def changed_since(
    recipe: PlainRecipe, started: Started, read: Callable[[Mapping[str, Any]], PlainRecipe]
) -> Changed:
    """What says how a saved recipe differs from `recipe`, and whether the model that it started from is
    another by now."""

    def changed(before: Mapping[str, Any], step: int) -> list[str]:
        saved = dict(before)
        digest = saved.pop("started", {}).get("digest")
        found = differences(read(saved).to_dict(), recipe.to_dict())
        return [*found, *(["the files of model.start"] if digest != started.digest else [])]

    return changed


# --- what is left ---
class ExportFormat(Protocol):
    """What `[export]` says of the folder."""

    @property
    def format(self) -> str: ...
    @property
    def adapters(self) -> bool: ...
    @property
    def max_shard_mib(self) -> int: ...


def write_export(
    model: Transformer,
    target: Path,
    base: Base,
    wanted: ExportFormat,
    *,
    template: str,
    adapters: Adapters | None,
    facts: Facts,
    metadata: Mapping[str, str],
    card: str,
) -> None:
    """Write a model as a published folder with the base's tokenizer and settings and a card; beside it
    NAME-adapters, where the recipe wants them."""
    fp8, dtype = export_format(wanted.format, base.folder)
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    try:
        side_files(base, template, temporary)
        save_weights(
            model, target, fp8=fp8, dtype=dtype, max_shard_bytes=wanted.max_shard_mib * 2**20,
            metadata=dict(metadata) | {"base": base.name} | dataclasses.asdict(facts), files_from=temporary,
            overwrite=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(temporary)
    (target / CARD).write_text(card, encoding="utf-8")
    if adapters is not None and wanted.adapters:
        adapters.save(target.with_name(f"{target.name}-adapters"), base.name)


def side_files(base: Base, template: str, folder: Path) -> None:
    """Tokenizer, template and sampling settings of the base; a template that the recipe names is noted
    there."""
    for name in SIDE_FILES:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    if template:
        path = folder / "tokenizer_config.json"
        table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        table["hadal_template"] = template
        path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_format(wanted: str, base: Path) -> tuple[bool, torch.dtype]:
    """(in FP8 blocks?, dtype of the rest) of an export; "auto": as the folder `base` has them."""
    table = read_config_json(base)
    if wanted == "fp8" or (wanted == "auto" and read_config(base).fp8 is not None):
        return True, torch.bfloat16
    name = str(table.get("torch_dtype", table.get("dtype"))) if wanted == "auto" else wanted
    return False, {**DTYPES, "float16": torch.float16}.get(name, torch.bfloat16)
