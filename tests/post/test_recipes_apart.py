"""A recipe of one verb given to another: the message says whose it is."""

from __future__ import annotations

import dataclasses

import pytest

from hadal.data.recipe import DataRecipe
from hadal.data.strict import SECTIONS_OF, RecipeError, build
from hadal.post.grpo_recipe import GrpoRecipe
from hadal.post.r1_recipe import R1Recipe
from hadal.post.sft_recipe import SftRecipe
from hadal.train.recipe import Recipe

KINDS = {
    "`hadal train`": Recipe,
    "`hadal sft`": SftRecipe,
    "`hadal grpo`": GrpoRecipe,
    "`hadal r1`": R1Recipe,
    "`hadal data prepare`": DataRecipe,
}


@pytest.mark.parametrize("section", SECTIONS_OF)
def test_the_table_of_sections_is_true(section: str) -> None:
    having = [name for name, kind in KINDS.items() if section in {f.name for f in dataclasses.fields(kind)}]
    assert SECTIONS_OF[section] == " and ".join(having)


def test_the_message_names_the_other_verb() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'lora'.*Recipes of `hadal sft` and `hadal grpo`"):
        build(Recipe, {"lora": {}})
    with pytest.raises(RecipeError, match=r"unknown key 'tasks'.*Recipes of `hadal grpo`"):
        build(R1Recipe, {"run": {}, "model": {}, "tasks": []})
