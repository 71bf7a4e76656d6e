"""The mean of models in their weights, and the stage of `hadal r1` that makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.post import average
from hadal.post.r1_recipe import RecipeError, from_dict
from hadal.post.r1_stages import files_of
from hadal.weights import load
from hadal.weights.layout import read_config
from tests.post.bases import base


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder, dtype=torch.float32, quantize="off").state_dict())


def changed(folder: Path, factor: float) -> Path:
    """The model with all of its numbers multiplied."""
    from hadal.weights import save

    model = load(folder, dtype=torch.float32)
    for part in model.state_dict().values():
        if part.is_floating_point():
            part.mul_(factor)
    target = folder.with_name(f"{folder.name}-{factor}")
    save(model, target, dtype=torch.float32, files_from=folder)
    return target


def test_the_mean_is_the_mean_and_published(tmp_path: Path) -> None:
    first = base(tmp_path / "first")
    folders = [first, changed(first, 2.0), changed(first, -0.5)]
    average.write(folders, tmp_path / "run" / "export", "float32", "mean", "A mean.")
    found, parts = weights(tmp_path / "run" / "export"), [weights(folder) for folder in folders]
    for name, part in found.items():
        torch.testing.assert_close(part, sum(one[name] for one in parts) / 3, rtol=1e-6, atol=1e-7)
    assert any("bias" in name and part.abs().sum() > 0 for name, part in found.items())  # the router's, too
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / "export" / name).read_bytes() == (first / name).read_bytes()
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert card.startswith("# mean\n\nA mean.\n") and str(folders[1]) in card


def test_formats(tmp_path: Path) -> None:
    first = base(tmp_path / "first", fp8=True)
    average.write([first, first], tmp_path / "same", "auto", "mean", "")
    assert read_config(tmp_path / "same").fp8 is not None
    want = weights(first)
    for name, part in weights(tmp_path / "same").items():
        assert torch.equal(part, want[name]), name


def test_models_of_several_shapes_are_refused(tmp_path: Path) -> None:
    folders = [base(tmp_path / "v3"), base(tmp_path / "qwen", "qwen2")]
    with pytest.raises(RecipeError, match=r"other weights than .*one shape"):
        average.average(folders)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "int3"}, r"stages.mean: .*format"),
        ({"models": ["hadal-mini"]}, r"stages.mean: .*two models"),
        ({"models": ["@rows", "hadal-mini"]}, r"@rows is of kind prompts"),
    ],
)
def test_wrong_recipes_are_refused(change: dict[str, Any], said: str) -> None:
    mean = {"kind": "average", "models": ["hadal-mini", "hadal-mini"]}
    rows = {"kind": "prompts", "tasks": [{"name": "addition"}], "count": 3}
    table = {"run": {"name": "x"}, "measure": {"tasks": [{"name": "addition"}]}}
    from_dict({**table, "stages": {"rows": rows, "mean": mean}})
    with pytest.raises(RecipeError, match=said):
        from_dict({**table, "stages": {"rows": rows, "mean": mean | change}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/no-such/export", "there is no such folder: make it first"),
        ("hadal-mimi", "Did you mean 'hadal-mini'"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, said: str, tmp_path: Path) -> None:
    mean = {"kind": "average", "models": ["hadal-mini", name]}
    recipe = from_dict(
        {"run": {"name": "x"}, "measure": {"tasks": [{"name": "addition"}]}, "stages": {"mean": mean}}
    )
    with pytest.raises(RecipeError, match=f"stages.mean.*{said}"):
        files_of(recipe.stage("mean"), tmp_path)
