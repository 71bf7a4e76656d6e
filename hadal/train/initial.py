"""Starting from a finished model: weights of a published folder, whoever trained it (`[init] weights`).

The folder's config.json is the model; keys of the recipe's [model] stand above it, so that a longer context
or another rotary embedding can be asked for. Masters are the folder's weights (FP8 blocks and integers
dequantised), gate biases too; moments and the moving average start anew, at zero and at the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hadal.data.strict import RecipeError
from hadal.model.transformer import Transformer
from hadal.weights import WeightsError, load


def start_table(folder: Path) -> dict[str, Any]:
    """The folder's config.json without its quantisation. Raises RecipeError."""
    try:
        table = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"init.weights is {str(folder)!r}, and holds no model: {error}") from None
    if not isinstance(table, dict):
        raise RecipeError(f"init.weights is {str(folder)!r}, and its config.json holds no table")
    mtp_after_norm = (table.pop("hadal", None) or {}).get("mtp_after_norm", True)
    table.pop("quantization_config", None)
    return table | ({} if mtp_after_norm else {"hadal": {"mtp_after_norm": False}})


@torch.no_grad()
def start_from(model: Transformer, folder: Path) -> None:
    """Put the folder's weights into `model`. Raises RecipeError where they do not fit, WeightsError where
    they cannot be read."""
    with_mtp = bool(len(model.mtp))
    try:
        found = load(folder, dtype=torch.float32, with_mtp=with_mtp, quantize="off")
    except WeightsError as error:
        raise RecipeError(f"init.weights: {error}") from None
    own, theirs = model.state_dict(), found.state_dict()
    differ = sorted(
        name
        for name in own.keys() | theirs.keys()
        if name not in own or name not in theirs or own[name].shape != theirs[name].shape
    )
    if differ:
        raise RecipeError(
            f"init.weights: [model] makes another model than {folder} holds ({len(differ)} tensors differ, "
            f"{differ[0]} first); change only keys that leave the weights' shapes alone"
        )
    model.load_state_dict(theirs)
