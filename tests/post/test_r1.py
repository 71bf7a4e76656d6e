"""`hadal r1`: what is made again and what stays, what is kept of samples and why, what the figures say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hadal.cli.app import app
from hadal.config import ModelConfig, preset
from hadal.data.puzzles import TASKS as TASKS_OF_PUZZLES
from hadal.data.puzzles import verify
from hadal.data.puzzles.task import is_held_out
from hadal.post import preference, r1_stages, rejection
from hadal.post import worked as worked_rows
from hadal.post.r1 import Outcome, Run, plan, r1
from hadal.post.r1_card import overview
from hadal.post.r1_measure import judged, problems, summary
from hadal.post.r1_recipe import (
    MeasureRecipe,
    PromptsRecipe,
    RecipeError,
    WorkedRecipe,
    from_dict,
    load,
)
from hadal.post.rejection import Drawn, FilterRecipe, Sieve
from hadal.post.rewards import Completion, Rewards, read
from hadal.post.rewards.language import count
from hadal.post.rewards.model import RewardModel
from hadal.post.tasks import TaskRecipe
from hadal.post.worked import Faults, WorkedTask, conversation, draw, prompt_record, rows, write_prompts
from hadal.text.templates import template_for
from hadal.text.tokenizer import Tokenizer
from hadal.train.sources import ON_BOARD
from hadal.weights import load as load_weights
from hadal.weights.layout import read_config

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Console(quiet=True)
ROOT = Path(__file__).resolve().parents[2]
TASKS = [{"name": "steps/2"}, {"name": "steps/3"}]
TINY = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip
TOKENS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1}


def table() -> dict[str, Any]:
    """A recipe of seven stages that takes seconds."""
    small = {"epochs": 1, "context": 64, "batch_tokens": 256}
    silent = {"every_steps": 50, "heldout_every_steps": 0, "tensorboard": False}
    sft = {"kind": "sft", "train": small, "learning_rate": {"peak": 3e-3}, "log": silent,
           "checkpoint": {"every_steps": 0, "keep": 1}}  # fmt: skip
    return {
        "run": {"name": "try", "seed": 1},
        "measure": {"tasks": [{"name": "steps/3"}], "count": 2, "samples": 2, "max_tokens": 6},
        "stages": {
            "nothing": {"kind": "init", "std": 0.05, "model": TINY},
            "corpus": {"kind": "worked", "tasks": TASKS, "count": 24, "faults": {"mixed": 0.5}},
            "base": {**sft, "model": {"start": "@nothing"}, "data": {"files": ["@corpus"]}},
            "sums": {"kind": "prompts", "tasks": TASKS, "count": 20, "seed": 2},
            "rl": {
                "kind": "grpo", "model": {"start": "@base"}, "tasks": [{"source": "jsonl", "path": "@sums"}],
                "reward": [{"kind": "puzzle"}, {"kind": "language"}],
                "sample": {"prompts": 2, "group": 2, "max_tokens": 6, "max_prompt_tokens": 60},
                "train": {"steps": 2}, "learning_rate": {"peak": 1e-3},
            },
            "kept": {
                "kind": "rejection", "model": "@rl", "tasks": [{"source": "jsonl", "path": "@sums"}],
                "reward": [{"kind": "puzzle"}, {"kind": "language"}], "prompts": 4, "samples": 2,
            },
            "student": {**sft, "model": {"start": "@nothing"}, "data": {"files": ["@kept", "@corpus"]}},
        },
    }  # fmt: skip


def write(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def run(path: Path, out: Path, **options: Any) -> Outcome:
    return r1(path, out=out, device="cpu", console=QUIET, **options)


def does(path: Path, out: Path, **options: Any) -> dict[str, str]:
    return {step.stage.name: step.does for step in plan(path, out=out, **options)[1]}


def right_samples(engine: Any, recipe: Any, prompts: Any, judge: Any, tell: Any) -> Iterator[Drawn]:
    """What a model that knows would write, in the place of the tiny random one."""
    for number in range(recipe.prompts):
        record = prompts.record(number)
        for index in range(recipe.samples):
            text = f"Let me see: {index}\n</think>\n\n**{record['answer']}**"
            said = Completion(record, text, 12, "stop", True)
            yield Drawn(number, index, 7 + index, record, said, judge.score([said])[0])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, and its recipe beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("r1")
    path = write(folder / "recipe.json", table())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rejection, "draw", right_samples)
        outcome = run(path, folder / "run")
    assert outcome.finished and outcome.ran == tuple(table()["stages"])
    return folder


# --- the whole ---


def test_every_stage_leaves_a_model_or_data_and_a_card(done: Path) -> None:
    out = done / "run"
    for name in ("corpus", "sums", "kept"):
        assert (out / name / f"{name}.jsonl").is_file() and (out / name / "README.md").is_file()
    for name in ("nothing", "base", "rl", "student"):
        assert (out / name / "export" / "config.json").is_file()
        assert (out / name / "export" / "README.md").is_file()
    assert load_weights(out / "student" / "export").config.hidden_size == 16
    card = (out / "base" / "export" / "README.md").read_text()
    assert "cons@2" in card and "Stage `base`" in card and "Not measured yet" not in card
    both = (out / "student" / "student.jsonl").read_text().splitlines()
    assert len(both) == 24 + len((out / "kept" / "kept.jsonl").read_text().splitlines())
    shown = (out / "README.md").read_text()
    assert all(f"| {name} |" in shown for name in table()["stages"]) and "not done" not in shown
    manifest = json.loads((out / "manifest.json").read_text())["stages"]
    assert manifest["rl"]["material"]["inputs"]["base"] == manifest["base"]["digest"]
    assert manifest["rl"]["facts"]["sampled_tokens"] > 0 and manifest["rl"]["facts"]["steps"] == 2
    assert manifest["base"]["facts"]["operations"] > 0 and set(manifest["base"]["measured"]) >= {
        "all",
        "tasks",
    }


def test_what_is_done_stays(done: Path) -> None:
    assert set(does(done / "recipe.json", done / "run").values()) == {"keep"}
    assert run(done / "recipe.json", done / "run").ran == ()


def test_a_changed_section_remakes_what_is_made_of_it_only(done: Path) -> None:
    changed = table()
    changed["stages"]["sums"]["count"] = 30
    path = write(done / "changed.json", changed)
    steps = {step.stage.name: step for step in plan(path, out=done / "run")[1]}
    assert {name: step.does for name, step in steps.items()} == {
        "nothing": "keep", "corpus": "keep", "base": "keep", "sums": "run", "rl": "perhaps",
        "kept": "perhaps", "student": "perhaps",
    }  # fmt: skip
    assert steps["sums"].why == "changed: count" and "if sums comes out" in steps["rl"].why
    assert does(done / "recipe.json", done / "run")["sums"] == "keep"  # a plan changes nothing


def test_a_stage_that_comes_out_as_it_was_leaves_the_others(done: Path, tmp_path: Path) -> None:
    changed = table()
    del changed["stages"]["student"], changed["stages"]["kept"], changed["stages"]["rl"]
    changed["stages"]["base"]["train"] = {**changed["stages"]["base"]["train"], "max_minutes": 0}
    path, out = write(tmp_path / "a.json", changed), tmp_path / "run"
    assert run(path, out).ran == ("nothing", "corpus", "base", "sums")
    changed["stages"]["corpus"]["tasks"] = [
        {"name": "steps/2", "weight": 3.0},
        {"name": "steps/3", "weight": 3.0},
    ]
    path = write(tmp_path / "b.json", changed)  # other weights, the same shares: the same rows
    assert does(path, out) == {"nothing": "keep", "corpus": "run", "base": "perhaps", "sums": "keep"}
    assert run(path, out).ran == ("corpus",)
    changed["measure"]["count"] = 1
    path = write(tmp_path / "c.json", changed)
    assert does(path, out) == {"nothing": "keep", "corpus": "keep", "base": "measure", "sums": "keep"}
    assert run(path, out).ran == () and does(path, out)["base"] == "keep"
    (out / "sums" / "sums.jsonl").write_text("spoilt\n")
    steps = {step.stage.name: step for step in plan(path, out=out)[1]}
    assert steps["sums"].does == "run" and "is not what was written" in steps["sums"].why


def test_calls_at_different_stages_share_a_folder(tmp_path: Path) -> None:
    path, out = write(tmp_path / "recipe.json", table()), tmp_path / "run"
    first = Run(load(path), out, "cpu", QUIET)
    steps = first.plan(("nothing", "corpus", "sums"))
    assert [step.does for step in steps] == ["run"] * 3
    assert run(path, out, stages=("sums",)).ran == ("sums",)
    assert first.go(steps).ran == ("nothing", "corpus")
    assert list(json.loads((out / "manifest.json").read_text())["stages"]) == ["nothing", "corpus", "sums"]


def test_one_stage_alone_needs_what_it_is_made_of(done: Path, tmp_path: Path) -> None:
    path = done / "recipe.json"
    with pytest.raises(RecipeError, match=r"recipe has it: nothing, corpus; add --stage nothing --stage cor"):
        plan(path, stages=["base"], out=tmp_path / "none")
    chain = "--stage nothing --stage corpus --stage base --stage sums, or"
    with pytest.raises(RecipeError, match=chain):  # to the first link, not its parents alone
        plan(path, stages=["rl"], out=tmp_path / "none")
    with pytest.raises(RecipeError, match="it: corpus, sums, rl, kept; add --stage corpus"):
        plan(path, stages=["nothing", "base", "student"], out=tmp_path / "none")
    assert does(path, done / "run", stages=["rl"]) == {"rl": "keep"}
    assert does(path, done / "run", stages=["rl"], again=True) == {"rl": "run"}
    with pytest.raises(RecipeError, match="no stage 'bse'; did you mean 'base'"):
        plan(path, stages=["bse"], out=done / "run")
    with pytest.raises(RecipeError, match="--again is for --stage"):
        plan(path, again=True, out=done / "run")


def test_a_stopped_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = table()
    recipe["stages"] = {name: recipe["stages"][name] for name in ("nothing", "corpus", "base")}
    path, out = write(tmp_path / "r.json", recipe), tmp_path / "run"
    real, seen = r1_stages.MAKERS["sft"], []

    def stopped(job: r1_stages.Job) -> r1_stages.Made:
        seen.append(job.resume)
        return real(job) if job.resume else r1_stages.Made(False)

    monkeypatch.setattr(r1_stages, "MAKERS", {**r1_stages.MAKERS, "sft": stopped})
    outcome = run(path, out)
    assert not outcome.finished and outcome.ran == ("nothing", "corpus", "base")
    assert does(path, out) == {"nothing": "keep", "corpus": "keep", "base": "resume"}
    recipe["stages"]["base"]["learning_rate"] = {"peak": 1e-3}
    assert does(write(tmp_path / "other.json", recipe), out)["base"] == "run"
    assert run(path, out).finished and seen == [False, True]


def test_an_interrupted_stage_begins_anew_or_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = table()
    recipe["stages"] = {name: recipe["stages"][name] for name in ("nothing", "corpus")}
    path, out = write(tmp_path / "r.json", recipe), tmp_path / "run"

    def interrupted(job: r1_stages.Job) -> r1_stages.Made:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(r1_stages, "MAKERS", {**r1_stages.MAKERS, "worked": interrupted})
        with pytest.raises(KeyboardInterrupt):
            run(path, out)
    assert does(path, out) == {"nothing": "keep", "corpus": "resume"}
    assert run(path, out).ran == ("corpus",)


def test_the_command_line_shows_a_plan(done: Path) -> None:
    arguments = ["r1", str(done / "recipe.json"), "--out", str(done / "run"), "--dry-run"]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert [stage["stage"] for stage in told["stages"]] == list(table()["stages"])
    assert told["seconds"] == 0 and told["stages"][2]["known"]
    changed = CliRunner().invoke(app, [*arguments, "--set", "stages.base.train.epochs=2"])
    assert changed.exit_code == 0 and "changed: train.epochs" in changed.output


# --- recipes ---


def test_the_recipes_in_the_repository_can_be_read() -> None:
    for path in sorted((ROOT / "recipes" / "r1").glob("*.toml")):
        recipe = load(path)
        kinds = Counter(stage.kind for stage in recipe.stages)
        assert (
            kinds["grpo"] >= 4 and kinds["rejection"] >= 2 and kinds["sft"] >= 4 and kinds["preference"] == 1
        )
        paid = [stage.name for stage in recipe.stages if stage.table.get("preference") == "@preference"]
        assert paid in (["r1"], ["rl2"]), path.name


def test_the_recipe_of_the_model_on_board_makes_what_the_package_names() -> None:
    recipe = load(ROOT / "recipes" / "r1" / "mini.toml")
    stages = {stage.name: stage.recipe for stage in recipe.stages}
    assert {task.name for task in recipe.measure.tasks} == set(TASKS_OF_PUZZLES)
    sets = [r for r in stages.values() if isinstance(r, WorkedRecipe | PromptsRecipe)]
    assert len(sets) == 6 and all(r.examined == 300 for r in sets)
    assert stages["r1"].name == "hadal-mini" and stages["r1"].format == "fp8"
    assert stages["dense-distilled"].run.name == "hadal-mini-dense"
    dense = ModelConfig.from_hf(TOKENS | dict(stages["dense-base"].model))
    assert dense == preset("hadal-mini-dense").config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {"kind": "stf"}}, "stages.base: there is no kind 'stf'; did you mean 'sft'"),
        ({"base": {"model": {"start": "@later"}}}, "names @later, which is no earlier stage"),
        ({"base": {"model": {"start": "@corpus"}}}, "model.start.*@corpus is of kind worked"),
        ({"base": {"data": {"files": ["@nothing"]}}}, "data.files.*@nothing is of kind init"),
        ({"corpus": {"cuont": 3}}, "stages.corpus: unknown key 'cuont'.*'count'"),
        ({"corpus": {"tasks": [{"name": "step/3"}]}}, "stages.corpus: .*unknown task 'step'"),
        ({"kept": {"reward": [{"kind": "language"}]}}, "filter.accuracy"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    recipe = table()
    for name, values in change.items():
        recipe["stages"][name] = recipe["stages"][name] | values
    with pytest.raises(RecipeError, match=said):
        from_dict(recipe)


# --- worked problems ---


def test_worked_answers_are_right_and_in_the_language_asked_for() -> None:
    tasks = [WorkedTask("steps/4"), WorkedTask("countdown/3"), WorkedTask("extreme")]
    for number, worked in rows(tasks, 60, 3):
        made = worked.sample
        assert not is_held_out(made.problem.key)
        assert verify(made, f"<think>\n{made.think}\n</think>\n\n{made.answer}")
        assert "\n".join(worked.lines[made.language]) == made.think
        record = prompt_record(worked)
        said = Completion(record, f"{made.think}\n</think>\n\n{made.answer}", 9, opened=True)
        with Rewards(read([{"kind": "puzzle"}, {"kind": "language"}])) as rewards:
            total = rewards.score([said])[0]
        assert total.accuracy == 1.0 and total.parts["language"].value == 1.0, (number, made.think)


def test_questions_of_the_examination_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another problem may be asked in the words of one that is held out."""
    tasks = [WorkedTask("chat/off-topic")]
    whole = [number for number, _ in rows(tasks, 20, 3)]
    asked = next(rows(tasks, 20, 3))[1].sample
    shouted = replace(asked, prompt=f" {asked.prompt.upper()}!")
    monkeypatch.setattr(worked_rows, "problems", lambda samples: [shouted])
    worked_rows.examination.cache_clear()
    assert [number for number, _ in rows(tasks, 20, 3, examined=1)] == whole[1:]
    worked_rows.examination.cache_clear()


def test_held_out_sums_are_none_of_training() -> None:
    task = WorkedTask("steps/3")
    held = {draw(task, n, 1, "held-out").sample.problem.key for n in range(50)}
    assert all(is_held_out(key) for key in held)
    assert held.isdisjoint(draw(task, n, 1).sample.problem.key for n in range(300))


def test_consistency_before_and_after_is_counted() -> None:
    """Of mixed work a third of the words or so, of work in one language all."""
    import random

    def share(faults: Faults) -> float:
        found = []
        for number, worked in rows([WorkedTask("steps/5")], 80, 4):
            row = conversation(worked, faults, random.Random(number))
            words = count(row["messages"][1]["reasoning_content"], row["language"])
            found.append(words[row["language"]] / words.total())
        return sum(found) / len(found)

    assert share(Faults()) == 1.0
    assert 0.25 < share(Faults(mixed=1.0)) < 0.45
    direct = conversation(draw(WorkedTask("steps/3"), 0, 1), Faults(direct=1.0), random.Random(0))
    assert direct["reasoning_language"] == "none" and "=" not in direct["messages"][1]["reasoning_content"]


# --- rejection ---


def drawn(text: str, *, index: int = 0, language: str = "en", cut: bool = False, tokens: int = 20) -> Drawn:
    """A sample of "1+2+3", whose answer is 6."""
    record = {"prompt": "What is 1+2+3?", "language": language, "task": "sums", "key": "1+2+3",
              "answer": "6", "puzzle": {"task": "chain", "kind": "sum", "args": ["1", "+", "2", "+", "3"],
              "key": "1+2+3", "difficulty": 0, "gold": ["6"], "language": language}}  # fmt: skip
    said = Completion(record, text, tokens, "length" if cut else "stop", True)
    with Rewards(read([{"kind": "puzzle"}, {"kind": "language"}])) as rewards:
        return Drawn(5, index, 100 + index, record, said, rewards.score([said])[0])


GOOD = "I go from left to right.\n1+2=3\nthen 3+3=6\n</think>\n\n**6**"
SAMPLES = {
    "": GOOD,
    "wrong": GOOD.replace("**6**", "**7**"),
    "form": "I go from left to right.\n1+2=3",
    "language": GOOD.replace("then", "puis"),
    "duplicate": GOOD.replace("\n1+2", "\n 1+2"),  # but for spaces
}


@pytest.mark.parametrize("reason", SAMPLES)
def test_a_sample_is_dropped_for_its_reason(reason: str) -> None:
    sieve = Sieve(FilterRecipe())
    if reason == "duplicate":
        assert sieve.reason(drawn(GOOD)) == ""
    assert sieve.reason(drawn(SAMPLES[reason])) == reason


def test_samples_are_dropped_for_length_cuts_and_surplus() -> None:
    assert Sieve(FilterRecipe()).reason(drawn(GOOD, cut=True)) == "cut"
    assert Sieve(FilterRecipe(min_tokens=21)).reason(drawn(GOOD)) == "short"
    assert Sieve(FilterRecipe(max_tokens=19)).reason(drawn(GOOD)) == "long"
    assert Sieve(FilterRecipe(language=0.5)).reason(drawn(SAMPLES["language"])) == ""
    assert Sieve(FilterRecipe(duplicates=True)).reason(drawn(SAMPLES["duplicate"])) == ""
    sieve = Sieve(FilterRecipe(keep=1))
    other = GOOD.replace("then 3+3", "then, 3+3")
    assert [sieve.reason(drawn(text)) for text in (GOOD, other)] == ["", "surplus"]


def test_kept_rows_say_where_they_come_from(tmp_path: Path) -> None:
    samples = [drawn(text, index=i) for i, text in enumerate(SAMPLES.values())]
    recipe = rejection.RejectionRecipe(
        "m",
        load(ROOT / "recipes" / "r1" / "cpu.toml").stage("rejected").recipe.tasks,
        ({"kind": "puzzle"},),
        1,
        5,
    )
    report = rejection.write("set", tmp_path, iter(samples), recipe, "digest-of-the-model")
    assert report["dropped"] == {"form": 1, "wrong": 1, "language": 1, "duplicate": 1}
    assert (report["kept"], report["samples"], report["prompts"]) == (1, 5, 1)
    assert report["tasks"]["sums"] == {"sampled": 5, "kept": 1, "right": 3}
    (kept,) = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    assert kept["messages"][1] == {
        "role": "assistant", "content": "**6**",
        "reasoning_content": "I go from left to right.\n1+2=3\nthen 3+3=6",
    }  # fmt: skip
    origin = kept["provenance"]
    assert origin["model"] == "digest-of-the-model" and origin["seed"] == 100 and origin["sample"] == 0
    assert origin["prompt"] == rejection.prompt_id(samples[0].record) and origin["number"] == 5
    assert origin["accuracy"] == 1.0 and origin["parts"]["language"]["value"] == 1.0
    pool = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["dropped"] for line in pool] == list(SAMPLES)
    assert "| wrong | 1 |" in (tmp_path / "README.md").read_text()


def test_a_rejection_ends_with_its_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked at once fills the seats; after `max_minutes` no more is asked."""
    asked: list[int] = []

    class Engine:
        template = SimpleNamespace(starts_in_reasoning=lambda template, messages: True)

        def encode_chat(self, messages: Any) -> list[int]:
            return [0]

        def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
            asked.append(len(prompts))
            return [SimpleNamespace(text=GOOD, token_ids=[1], finish_reason="stop") for _ in prompts]

    clock = iter([0.0, 1.0, 50.0, 70.0])
    monkeypatch.setattr(rejection, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    prompts = tmp_path / "sums.jsonl"
    write_prompts(prompts, [WorkedTask("steps/3")], 40, 1)
    recipe = rejection.RejectionRecipe(
        "m", (TaskRecipe("jsonl", str(prompts)),), ({"kind": "puzzle"},), 40, 2, max_seqs=4, max_minutes=1
    )
    report = rejection.sampled("set", tmp_path, recipe, Engine(), "digest", lambda done: None)
    assert asked == [16, 16] and report["prompts"] == 16


def test_seeds_tell_prompts_and_draws_apart() -> None:
    seeds = {rejection.sample_seed(1, number, index) for number in range(20) for index in range(20)}
    assert len(seeds) == 400 and rejection.sample_seed(1, 0, 0) != rejection.sample_seed(2, 0, 0)


# --- preference ---


def test_pairs_put_right_before_wrong_before_mixed(tmp_path: Path) -> None:
    samples = [drawn(SAMPLES[reason], index=i) for i, reason in enumerate(("wrong", "language", ""))]
    recipe = rejection.RejectionRecipe(
        "m",
        load(ROOT / "recipes" / "r1" / "cpu.toml").stage("pool").recipe.tasks,
        ({"kind": "puzzle"},),
        1,
        3,
    )
    rejection.write("pool", tmp_path, iter(samples), recipe, "m")
    pool = preference.pool_of(str(tmp_path / "samples.jsonl"))
    (pair,) = preference.pairs_of(pool, 10, 0)
    assert pair.better["text"] == GOOD and "**7**" in pair.worse["text"]
    assert [line["provenance"]["sample"] for line in sorted(pool, key=preference.worth)] == [0, 1, 2]
    assert preference.pairs_of([pool[0], pool[0]], 10, 0) == []


def test_a_head_learns_pairs_that_can_be_told_apart(done: Path, tmp_path: Path) -> None:
    base = done / "run" / "base" / "export"
    pool = []
    for number in range(40):
        for index, text in enumerate(("yes\n</think>\n\n**1**", "no\n</think>\n\n**2**")):
            one = drawn(text, index=index)
            record = {**one.record, "prompt": f"Sum {number}?"}
            one = replace(one, record=record, completion=replace(one.completion, record=record))
            origin = {**rejection.provenance(one, "m"), "accuracy": float(index == 0)}
            pool.append({"record": record, "text": text, "opened": True, "language_share": 1.0,
                         "provenance": origin})  # fmt: skip
    encode = preference.encoder(template_for(base), Tokenizer.load(base))
    torch.manual_seed(0)
    model = RewardModel(load_weights(base, dtype=torch.float32))
    recipe = preference.PreferenceRecipe("m", "p", epochs=6, batch=8, rate=1e-2)
    losses: list[float] = []
    report = preference.train(
        model,
        preference.pairs_of(pool, 100, 0),
        encode,
        recipe,
        lambda step, steps, loss: losses.append(loss),
    )
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.3
    assert report["accuracy"] == 1.0 and report["held_out_pairs"] >= 1 and report["pairs"] >= 30
    tmp_folder = tmp_path / "stage" / "export"
    model.save(tmp_folder, files_from=base)
    (tmp_folder.parent / preference.REPORT).write_text(json.dumps(report), encoding="utf-8")
    score = preference.scorer(tmp_folder, template_for(base), Tokenizer.load(base), "cpu")
    better, worse = (Completion(pool[i]["record"], pool[i]["text"], 1, opened=True) for i in (0, 1))
    scores = score([better] * 40 + [worse] + [better])
    assert len(set(scores)) == 2 and scores[-1] == scores[0] > scores[40]  # equal ones to the last bit
    ids = encode(Completion(pool[0]["record"], pool[0]["text"], 1, opened=True))
    assert (
        ids[-1] == Tokenizer.load(base).eos_ids[0]
        and ids.count(Tokenizer.load(base).control_id("</think>")) == 1
    )


# --- figures ---


def test_figures_count_samples_votes_and_words() -> None:
    worked = draw(WorkedTask("steps/3"), 3, 0)
    made, record = worked.sample, prompt_record(worked)
    gold = made.problem.gold[0]
    others = {"en": "puis", "fr": "then", "pt": "then"}

    def say(work: str, answer: str, cut: bool = False) -> Any:
        text = f"{work}\n</think>\n\n**{answer}**" if answer else work
        return judged(worked, Completion(record, text, 10, "length" if cut else "stop", True))

    good, mixed = say(made.think, gold), say(f"{others[made.language]} {others[made.language]}", gold)
    wrong, cut, bare = say(made.think, "99"), say(made.think, "", cut=True), say("1+2", gold)
    assert (good.right, good.share) == (True, 1.0) and (mixed.right, mixed.share) == (True, 0.0)
    assert not wrong.right and not cut.right and not cut.formed and bare.share is None
    found = summary([[good, mixed, wrong, cut], [wrong, wrong, good, bare]])
    assert found["pass@1"] == 4 / 8 and found["cons"] == 0.75 and found["cut"] == 1 / 8
    assert found["language"] == pytest.approx(6 / 7) and found["no_words"] == pytest.approx(1 / 8)
    assert summary([[wrong, wrong, good]])["cons"] == 0.0 and summary([[cut]])["cons"] == 0.0


def test_all_models_answer_the_same_problems() -> None:
    recipe = MeasureRecipe(tasks=(WorkedTask("steps/3"),), count=12)
    asked = [one.sample.prompt for one in problems(recipe, recipe.tasks[0])]
    assert len(set(asked)) == 12 and asked == [one.sample.prompt for one in problems(recipe, recipe.tasks[0])]


def test_the_page_has_the_figures_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import r1_report

    page = (ROOT / "docs" / "r1.md").read_text(encoding="utf-8")
    assert r1_report.page(page) == page
    assert "| r1 | grpo |" in page


def test_the_table_says_what_is_not_done() -> None:
    assert overview(from_dict(table()), {}).count("not done") == 7
    assert read_config(ON_BOARD).hidden_size == 256  # the board's own model is no part of a run
