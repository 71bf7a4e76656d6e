"""The memory that a recipe's training takes (hadal/plan/training.py has the arithmetic)."""

from __future__ import annotations

import torch

from hadal.config import ModelConfig
from hadal.plan.training import SLAB, TrainingMemory, TrainingShape, training_memory
from hadal.train.optimizer import CACHED
from hadal.train.phases import stages
from hadal.train.recipe import Recipe


def peak_memory(recipe: Recipe, config: ModelConfig, *, cuda: bool = True) -> TrainingMemory:
    """Bytes by part of the largest step of a run. `config` is the recipe's model
    (`hadal.train.main.model_config`): its vocabulary comes from the tokenizer."""
    train = recipe.train
    auto = "bfloat16" if cuda else "float32"
    dtype = auto if train.dtype == "auto" else train.dtype
    return training_memory(
        config,
        TrainingShape(
            tokens=max(stage.micro_tokens for stage in stages(recipe) if stage.steps),
            element=2 if dtype == "bfloat16" else 4,
            moment=2 if recipe.optimizer.moments == "bfloat16" else 4,
            recompute=train.recompute,
            fused=cuda,
            masked=recipe.data.mask_documents,
            average=recipe.ema.rate > 0,
            snapshot=recipe.checkpoint.asynchronous,
            fp8=train.fp8,
            slab=SLAB if cuda else min(SLAB, CACHED * torch.get_num_threads()),
            micro_batches=max(
                stage.ramp.last * stage.context // stage.micro_tokens
                for stage in stages(recipe)
                if stage.steps
            ),
        ),
    )
