"""The mean of models in their weights: a fine-tuned model and the one that it began with keep what both can
do (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903). A stage of `hadal r1`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hadal.model.transformer import Transformer
from hadal.post.base import Base, export_format, side_files
from hadal.post.grpo_recipe import RecipeError
from hadal.post.sft_recipe import BaseRecipe
from hadal.train.export import ACCURACY_BEGIN, ACCURACY_END, CARD
from hadal.weights import hub, load, save
from hadal.weights.layout import read_config_json


@torch.no_grad()
def average(folders: Sequence[Path]) -> Transformer:
    """The mean of published models of one shape, in FP32 from sums in FP64: parameters and router biases.
    Raises RecipeError where one has other weights than the first."""
    models = [load(folder, dtype=torch.float32, quantize="off") for folder in folders]
    first, *others = (dict(model.state_dict()) for model in models)
    for folder, other in zip(folders[1:], others, strict=True):
        if {name: part.shape for name, part in other.items()} != {n: p.shape for n, p in first.items()}:
            raise RecipeError(
                f"{folder} has other weights than {folders[0]}; only models of one shape can be averaged"
            )
    for name, part in first.items():
        if part.is_floating_point():
            part.copy_(torch.stack([one[name].double() for one in (first, *others)]).mean(0))
    return models[0]


def write(folders: Sequence[Path], target: Path, wanted: str, name: str, title: str) -> None:
    """The mean as a published folder, with the first's tokenizer and settings. `wanted`: its format."""
    base = Base.of(BaseRecipe(str(folders[0])))
    fp8, dtype = export_format(wanted, base.folder)
    before: dict[str, Any] = read_config_json(base.folder).get("hadal") or {}
    metadata = {
        "name": name, "trained_by": "hadal r1", "average_of": [str(folder) for folder in folders],
        "device": before.get("device", "cpu"), "torch": before.get("torch", torch.__version__),
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as side:
        side_files(base, "", Path(side))
        model = average(folders)
        save(model, target, fp8=fp8, dtype=dtype, metadata=metadata, files_from=side, overwrite=True)
    (target / CARD).write_text(card(folders, name, title), encoding="utf-8")


def card(folders: Sequence[Path], name: str, title: str) -> str:
    """The card of a mean, as Markdown."""
    lines = [
        f"# {name}", "", title or "A mean of models in their weights.", "",
        "| the mean of | files |", "|---|---|",
        *(f"| {folder} | {hub.digest(folder)[:16]}… |" for folder in folders), "",
        "## Accuracy", "", ACCURACY_BEGIN, "Not measured yet.", ACCURACY_END, "",
    ]  # fmt: skip
    return "\n".join(lines)
