"""`hadal grpo`, whole runs on tiny random models: that a reward is learnt, and that every number is right."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hadal.engine import Engine, SamplingParams
from hadal.post.grpo import GrpoRun, grpo, open_run
from hadal.post.grpo_recipe import RecipeError, from_dict, load
from hadal.train import state
from hadal.weights import load as load_weights
from tests.post.bases import base, user
from tests.post.grpo_runs import QUIET, needs_exact, parameters, recipe, records, run

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("variant", "rank"), [("grpo", 0), ("dapo", 8)], ids=["grpo-all", "dapo-lora"])
def test_the_reward_rises(variant: str, rank: int, tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    path = recipe(
        tmp_path / "r", start, objective={"variant": variant},
        lora={"rank": rank, "modules": ["all", "lm_head"]},
        train={"steps": 12}, sample={"group": 16, "max_tokens": 4}, learning_rate={"peak": 3e-2},
        export={"adapters": rank > 0},
    )  # fmt: skip
    outcome = run(path, tmp_path / "run")
    assert outcome.finished
    steps = records(tmp_path / "run")
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1, rewards
    assert steps[-1]["entropy"] < steps[0]["entropy"] and all(step["grad_norm"] > 0 for step in steps)
    assert (steps[0]["kl"] == pytest.approx(0, abs=1e-6)) if variant == "grpo" else steps[0]["kl"] is None
    if variant == "grpo":
        assert steps[-1]["kl"] > 1e-4
    assert steps[0]["mtp_loss"] > 0
    before, after = parameters(start), parameters(outcome.export)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any("self_attn" in name for name in moved)
    assert ("embed_tokens.weight" in moved) == (rank == 0)
    biases = [dict(load_weights(f).named_buffers()) for f in (start, outcome.export)]
    assert all(torch.equal(value, biases[1][name]) for name, value in biases[0].items())
    assert (tmp_path / "run" / "export-adapters" / "adapter_config.json").is_file() == (rank > 0)
    engine = Engine.load(outcome.export, device="cpu", max_num_seqs=1, max_model_len=64)
    assert engine.chat([user("Say 1")], SamplingParams(max_tokens=4)).token_ids


@needs_exact
@pytest.mark.parametrize("kind", ["v3", "qwen2"])
def test_in_exact_mode_the_gap_is_zero_over_the_run(kind: str, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r", base(tmp_path / "base", kind), train={"steps": 4})
    run(path, tmp_path / "exact", "train.exact=true")
    run(path, tmp_path / "plain")
    assert [step["gap_max"] for step in records(tmp_path / "exact")] == [0.0] * 4
    assert [step["gap_mean"] for step in records(tmp_path / "exact")] == [0.0] * 4
    assert all(0 < step["gap_max"] < 1e-3 for step in records(tmp_path / "plain"))


@needs_exact
@pytest.mark.parametrize("rank", [0, 4], ids=["all", "lora"])
def test_a_resumed_run_is_the_same_run(rank: int, tmp_path: Path) -> None:
    """With a reference that is refreshed before and after the break, and two updates a step."""
    path = recipe(
        tmp_path / "r", base(tmp_path / "base"), lora={"rank": rank},
        objective={"variant": "grpo", "reference_every": 2, "reference_on": "host"},
        train={"steps": 5, "exact": True, "mini_batches": 2}, checkpoint={"every_steps": 3},
    )  # fmt: skip
    whole = run(path, tmp_path / "whole")
    with open_run(path, False, (), tmp_path / "cut", "cpu", QUIET) as first:
        assert isinstance(first, GrpoRun)
        for _ in range(3):
            first.policy.step()
        first.save()
    resumed = run(path, tmp_path / "cut", resume=True)
    assert resumed.step == whole.step and resumed.tokens == whole.tokens
    one, other = (state.load(state.latest(f / "checkpoints")) for f in (whole.folder, resumed.folder))
    assert one[0].keys() == other[0].keys() and any(name.startswith("reference.") for name in one[0])
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())
    pairs = zip(records(whole.folder)[3:], records(resumed.folder), strict=True)
    timed = ("seconds", "per_second", "mfu")
    for a, b in pairs:
        assert {k: v for k, v in a.items() if not k.endswith(timed)} == {
            k: v for k, v in b.items() if not k.endswith(timed)
        }
    assert records(whole.folder)[0]["updates"] == 2
    with pytest.raises(RecipeError, match=r"differs .* sample\.group"):
        run(path, tmp_path / "cut", "sample.group=5", resume=True)


def test_groups_of_equal_rewards_teach_nothing(tmp_path: Path) -> None:
    start = base(tmp_path / "base")
    outcome = run(recipe(tmp_path / "r", start, "always"), tmp_path / "run")
    for step in records(tmp_path / "run"):
        assert step["zero_variance"] == 4 and step["updates"] == 0 and step["reward"] == 0.5
        assert step["gap_max"] is None and step["grad_norm"] is None
    before, after = parameters(start), parameters(outcome.export)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_reward_that_raises_is_0_and_the_run_goes_on(tmp_path: Path) -> None:
    said = io.StringIO()
    path = recipe(tmp_path / "r", base(tmp_path / "base"), "raises")
    outcome = grpo(path, out=tmp_path / "run", device="cpu", console=Console(file=said, width=200))
    assert said.getvalue().count("reward custom has failed, and counts 0 there: raised ValueError") == 1
    assert [step["failed"] for step in records(tmp_path / "run")] == [16] * 3
    assert outcome.finished and [step["reward"] for step in records(tmp_path / "run")] == [0.0] * 3
    failures = records(tmp_path / "run", "stop")[0]["failures"]
    assert sum(failures.values()) == 3 * 16 and next(iter(failures)).startswith("custom: raised ValueError")
    line = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert len(line["completions"]) == 4 and line["record"]["task"] == "say"
    assert "no such luck" in json.dumps(line)


def test_refill_replaces_groups_that_say_nothing(tmp_path: Path) -> None:
    """A reward of which most groups have only zeros."""
    path = recipe(
        tmp_path / "r", base(tmp_path / "base"), "rare", sample={"group": 2, "max_tokens": 3},
    )  # fmt: skip
    run(path, tmp_path / "plain", "train.steps=1")
    run(path, tmp_path / "dapo", "train.steps=1", "sample.refill=12")
    plain, dapo = records(tmp_path / "plain")[0], records(tmp_path / "dapo")[0]
    assert plain["zero_variance"] > 0 == dapo["zero_variance"]
    assert dapo["replaced"] > 0 and dapo["tokens"] > plain["tokens"]


def test_masked_completions_have_no_part_in_the_loss(tmp_path: Path) -> None:
    """All are cut off at 12 tokens by a model that hardly ever ends: nothing is left."""
    path = recipe(tmp_path / "r", base(tmp_path / "base"), sample={"truncated": "mask", "max_tokens": 3})
    run(path, tmp_path / "run", "train.steps=1")
    step = records(tmp_path / "run")[0]
    assert step["truncated"] == 1.0 and step["updates"] == 0 and step["zero_variance"] < 4


def test_an_update_is_the_gradient_of_the_whole_mini_batch(tmp_path: Path) -> None:
    """Whatever packs it is cut into: what the optimizer has gathered is the same within rounding."""
    found = []
    for size in (40, 4000):
        path = recipe(tmp_path / "r", base(tmp_path / f"base{size}"), train={"max_pack_tokens": size})
        with open_run(path, False, (), tmp_path / f"run{size}", "cpu", QUIET) as one:
            one.policy.step()
            found.append(one.trainer.optimizer.exp_avg_N.float().clone())
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-6)
    assert found[0].abs().max() > 1e-4


def test_nothing_but_the_temperature_stands_between_sampler_and_trainer(tmp_path: Path) -> None:
    """A folder's settings for its users (top_p, top_k, a temperature) are not those of roll-outs, and no
    recipe can ask for a cut: the trainer would score another distribution than the one drawn from."""
    start = base(tmp_path / "base")
    settings = {"do_sample": True, "temperature": 0.3, "top_p": 0.2, "top_k": 1, "min_p": 0.5}
    (start / "generation_config.json").write_text(json.dumps(settings))
    path = recipe(tmp_path / "r", start, sample={"temperature": 0.8})
    for key in ("top_p", "top_k", "min_p", "repetition_penalty"):
        with pytest.raises(RecipeError, match=key):
            load(path, [f"sample.{key}=1"])
    with open_run(path, False, (), tmp_path / "run", "cpu", QUIET) as one:
        sampler = one.policy.sampler
        params = sampler._params(4, 1)
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.8, 1.0, 0, 0.0)
        assert not params.has_penalties and not params.logit_bias
        assert (sampler.law.temperature, sampler.law.bias) == (0.8, ())
        rollout, stats = one.policy.step()
        first = {answer.token_ids[0] for group in rollout.groups for answer in group.answers}
    assert len(first) > 4, "top_k of the folder's settings would leave one token a prompt"
    assert stats.gap_max is not None and stats.gap_max < 1e-3


def test_the_recipe_teaches(tmp_path: Path) -> None:
    path = recipe(tmp_path / "r", base(tmp_path / "base"))
    for override, words in (
        ("sample.gruop=4", "Did you mean 'group'"),
        ("sample.group=1", "its own baseline"),
        ("sample.temperature=0", "greedy completions are all alike"),
        ("objective.variant=ppo", "one of grpo, r1-zero"),
        ("train.mini_batches=9", "at most sample.prompts 4"),
        ("sample.max_tokens_late=3", "at least sample.max_tokens 12"),
        ("export.adapters=true", "false without lora.rank"),
    ):
        with pytest.raises(RecipeError, match=words):
            load(path, [override])
    with pytest.raises(RecipeError, match="the model has 256 positions"):
        run(path, tmp_path / "long", "sample.max_tokens=250")
    with pytest.raises(RecipeError, match=r"longer than sample\.max_prompt_tokens"):
        run(path, tmp_path / "short", "sample.max_prompt_tokens=2")
    again = load(path)
    assert from_dict(json.loads(json.dumps(again.to_dict()))).to_dict() == again.to_dict()


def test_the_recipe_that_comes_along_is_sound() -> None:
    found = load(ROOT / "recipes" / "grpo-smoke.toml")
    assert found.train.exact and found.sample.group >= 4


def test_the_command(tmp_path: Path) -> None:
    from hadal.cli.app import app

    path = recipe(tmp_path / "r", base(tmp_path / "base"), train={"steps": 1})
    arguments = ["grpo", str(path), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == 1
    assert CliRunner().invoke(app, arguments).exit_code == 2  # the folder holds a run
