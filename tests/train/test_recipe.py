"""Recipes: strict reading, overrides, the resolved form, and the recipes that the project ships."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from hadal.config import preset
from hadal.data.recipe import DataRecipe
from hadal.train import recipe as recipes
from hadal.train.recipe import Recipe, RecipeError

MINIMAL = """
[run]
name = "x"
[data]
source = "puzzles"
[train]
tokens = 1_000_000
context = 64
batch_tokens = 1024
[learning_rate]
peak = 1e-3
[model]
model_type = "deepseek_v3"
"""


def _load(tmp_path, text=MINIMAL, overrides=()):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return recipes.load(path, overrides)


def test_defaults_are_v3s(tmp_path):
    recipe = _load(tmp_path)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.clip) == (0.1, 1.0)
    assert (recipe.mtp.weight, recipe.mtp.weight_late) == (0.3, 0.1)
    assert (recipe.balance.bias_speed, recipe.balance.sequence_alpha) == (0.001, 1e-4)
    assert recipe.train.init_std == 0.006


def test_the_schedule_is_v3s_in_shares(tmp_path):
    text = MINIMAL.replace("1_000_000", "14_800_000_000").replace("peak = 1e-3", "peak = 2.2e-4")
    schedule = _load(tmp_path, text).schedule()
    at = {billions: schedule.at(billions * 1e9) for billions in (5, 9.99, 10.01, 14.4, 14.79)}
    assert at[5].learning_rate == pytest.approx(2.2e-4)
    assert at[14.4].learning_rate == pytest.approx(2.2e-5)
    assert at[14.79].learning_rate == pytest.approx(7.3e-6)
    assert (at[9.99].mtp_weight, at[10.01].mtp_weight) == (0.3, 0.1)
    assert (at[10.01].bias_speed, at[14.4].bias_speed) == (0.001, 0.0)


def test_the_last_step_reaches_the_tokens(tmp_path):
    assert _load(tmp_path).train.steps == 977  # ceil(1,000,000 / 1024)


def test_the_resolved_recipe_reads_back_through_json(tmp_path):
    recipe = _load(tmp_path)
    saved = json.loads(json.dumps(recipe.to_dict()))
    assert recipes.from_dict(saved) == recipe


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.tokens=1e8", "train", "tokens", 100_000_000),
        ("train.tokens = 2_000_000", "train", "tokens", 2_000_000),
        ("train.compile=true", "train", "compile", True),
        ("train.dtype=bfloat16", "train", "dtype", "bfloat16"),
        ('run.name="a b"', "run", "name", "a b"),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("log.every_steps=3", "log", "every_steps", 3),
    ],
)
def test_overrides(tmp_path, override, section, key, value):
    assert getattr(getattr(_load(tmp_path, overrides=[override]), section), key) == value


def test_an_override_reaches_the_model_table(tmp_path):
    assert _load(tmp_path, overrides=["model.hidden_size=48"]).model["hidden_size"] == 48


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("tokens = 1", "token = 1", r"unknown key 'train.token'.*'tokens'"),
        ("[data]", "[date]", r"unknown key 'date'.*'data'"),
        ("peak = 1e-3", 'peak = "high"', r"learning_rate.peak is 'high'; float"),
        ("peak = 1e-3", "peak = true", "learning_rate.peak is True"),
        ("peak = 1e-3", "peak = 0.0", "above 0"),
        ("peak = 1e-3", "peak = 1e-3\nwarmup = 0.9", "in order"),
        ("peak = 1e-3", "peak = 1e-3\nfinals = [0.1]", "as long as"),
        ("context = 64", "context = 64.5", r"train.context is 64.5; int"),
        ("context = 64", "context = 60", "multiple of train.context 60"),
        ("context = 64", "context = 64\nmicro_batch_tokens = 384", "divides train.batch_tokens"),
        ("context = 64", "context = 64\nbatch_tokens_start = 96", "batch_tokens_start is 96.*multiple of 64"),
        ("context = 64", "context = 64\nbatch_tokens_start = 2048", "up to train.batch_tokens 1024"),
        ("context = 64", "context = 64\nbatch_ramp = 2.0", "batch_ramp is 2.0"),
        ("context = 64", 'context = 64\nrecompute = ["norms"]', r"train.recompute is .*norm, up"),
        ("context = 64", 'context = 64\ncompile = true\nrecompute = ["up"]', "empty with train.compile"),
        ("[model]", "[ema]\nrate = 1.0\n[model]", r"ema.rate is 1.0.*in \[0, 1\)"),
        ("context = 64", 'context = 64\ndtype = "fp16"', "train.dtype"),
        ('source = "puzzles"', 'source = "web"', '"puzzles", "needles" or "shards"'),
        ('source = "puzzles"', 'source = "shards"', "data.path"),
        ('name = "x"', 'name = "a/b"', "plain name"),
        ("[model]", "[optimizer]\nbetas = [0.9]\n[model]", "2 values"),
        ("[model]", "[optimizer]\nbetas = [0.9, 1.0]\n[model]", r"in \[0, 1\)"),
        ('[run]\nname = "x"', "", "lacks 'run'"),
        ("tokens = 1_000_000", "tokens = 10", "at least one batch"),
        ("[run]", "[run", "not valid TOML"),
    ],
)
def test_bad_recipes_are_refused_by_name(tmp_path, old, new, match):
    assert old in MINIMAL
    with pytest.raises(RecipeError, match=match):
        _load(tmp_path, MINIMAL.replace(old, new))


@pytest.mark.parametrize("override", ["tokens=1", "train.tokens", "train.a.b=1", "=3"])
def test_malformed_overrides_are_refused(tmp_path, override):
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        _load(tmp_path, overrides=[override])


def test_an_unknown_override_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"train\.tokns.*'tokens'"):
        _load(tmp_path, overrides=["train.tokns=1e8"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at"):
        recipes.load(tmp_path / "none.toml")


def test_differences_ignore_what_may_change_on_resume(tmp_path):
    a = _load(tmp_path).to_dict()
    b = _load(tmp_path, overrides=["log.every_steps=1", "train.max_minutes=9", "checkpoint.keep=5"]).to_dict()
    assert recipes.differences(a, b) == []
    c = _load(
        tmp_path, overrides=["train.tokens=5e6", "learning_rate.peak=1", "model.hidden_size=8"]
    ).to_dict()
    assert recipes.differences(json.loads(json.dumps(a)), c) == [
        "learning_rate.peak", "model.hidden_size", "train.tokens"]  # fmt: skip


def test_differences_see_through_json(tmp_path):
    recipe = _load(tmp_path).to_dict()
    assert recipes.differences(json.loads(json.dumps(recipe)), recipe) == []


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
OTHERS = ("data-", "sft-", "grpo-")  # of `hadal data`, `sft` and `grpo`, which have tests of their own
SHIPPED = [path for path in sorted(RECIPES.glob("*.toml")) if not path.name.startswith(OTHERS)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path):
    assert recipes.load(path).train.steps > 0


@pytest.mark.parametrize(("recipe", "page"), [(Recipe, "training.md"), (DataRecipe, "data.md")])
def test_every_key_stands_in_the_table_of_its_page(recipe, page):
    text = (RECIPES.parent / "docs" / page).read_text("utf-8")
    table = dict(re.findall(r"^\| `\[*(\w+)\]*` \| (.*) \|$", text, re.M))
    kinds, checked = typing.get_type_hints(recipe), 0
    for section in dataclasses.fields(recipe):
        found = (kinds[section.name], *typing.get_args(kinds[section.name]))
        for kind in filter(dataclasses.is_dataclass, found):
            if section.name != "phases":  # which have a page of their own
                missing = [
                    f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in table[section.name]
                ]
                assert not missing, (section.name, missing)
                checked += 1
    assert checked >= 8


def test_the_temperature_that_an_export_asks_for(tmp_path):
    from hadal.train.export import _generation

    recipe = _load(tmp_path, overrides=["export.temperature=0"])
    config = preset("hadal-mini").config
    greedy, drawn = _generation(config, recipe.export.temperature), _generation(config, 0.6)
    assert (greedy["do_sample"], greedy["temperature"]) == (False, 0.0) and "top_p" not in greedy
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"]) == (True, 0.6, 0.95)
    with pytest.raises(RecipeError, match=r"export\.temperature"):
        _load(tmp_path, overrides=["export.temperature=2.5"])
