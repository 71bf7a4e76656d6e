"""`hadal grpo`: trains a model by rewards."""

from __future__ import annotations

from hadal.cli import options as o
from hadal.cli.outcome import command, tell


def grpo(
    recipe: o.Recipe,
    resume: o.Resume = False,
    override: o.Overrides = None,
    out: o.RunFolder = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Train a model by rewards, by a recipe.

    Each step samples groups of completions from the very weights that are trained, judges them, and makes
    those that beat their group likelier. The model that comes out lies in FOLDER/export, completions with
    their rewards in FOLDER/samples.jsonl.

    Examples:
        hadal grpo recipes/grpo-smoke.toml
        hadal grpo recipes/grpo-smoke.toml --set objective.variant=dapo --set train.exact=true
        hadal grpo recipes/grpo-smoke.toml --resume
    """
    from hadal.post.grpo import grpo as run

    outcome = run(recipe, resume=resume, overrides=override or [], out=out, device=device)
    tell(outcome, json, command("grpo", recipe, override, out, "--resume"), tokens="tokens sampled")
