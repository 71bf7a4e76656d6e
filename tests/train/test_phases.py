"""Phases: borders and schedules as the recipe says, rotary embeddings that change on the way, bit for bit
through a resumption, and runs that start from a finished model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hadal import weights
from hadal.config import ConfigError, Rope
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.train import recipe as recipes
from hadal.train import state
from hadal.train.main import model_config, train
from hadal.train.memory import peak_memory
from hadal.train.phases import begun, config_at, recipe_at, stage_at, stages
from hadal.train.recipe import RecipeError
from hadal.train.runs import read
from hadal.train.sources import open_stages
from hadal.train.trainer import Trainer
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "recipes" / "long-context-smoke.toml"
SHORT = ["train.tokens=1024", "train.batch_tokens=512", "log.heldout_tokens=512", "log.every_steps=1",
         "phases.512.tokens=2048", "phases.512.batch_tokens=1024", "phases.2k.tokens=4096",
         "phases.2k.batch_tokens=2048", "export.fp8=false", "data.workers=1"]  # fmt: skip
BORDERS = [0, 2, 4, 6]  # steps: two of each stage


@pytest.fixture(scope="module")
def needles(tmp_path_factory):
    return tmp_path_factory.mktemp("needles")


@pytest.fixture
def short(needles):
    def run(out, *overrides, recipe=SMOKE, **options):
        every = [*SHORT, f"data.path={needles}", *overrides]
        return train(recipe, out=out, overrides=every, device="cpu", console=Console(quiet=True), **options)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, needles):
    """Six steps in three stages that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    train(
        SMOKE, out=out, overrides=[*SHORT, f"data.path={needles}"], device="cpu", console=Console(quiet=True)
    )
    return out


def _recipe(*overrides):
    return recipes.load(SMOKE, overrides)


def _records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _assert_equal(one, other):
    (got, meta), (want, want_meta) = (state.load(state.latest(f / "checkpoints")) for f in (one, other))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    for key in ("step", "tokens", "position", "recent_losses"):
        assert meta[key] == want_meta[key], key
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in _records(f, "step")] for f in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


# --- borders and schedules ---
def test_stages_follow_from_the_recipe_alone():
    recipe = _recipe("train.tokens=5000", "train.batch_tokens_start=1024")
    main, first, second = stages(recipe)
    assert (main.first_step, main.steps, main.tokens) == (0, 3, 5120)  # 1024, then 2048: the ramp is short
    assert (first.name, first.first_step, first.first_token, first.steps) == ("512", 3, 5120, 4)
    assert (second.first_step, second.end_step, second.end_token) == (7, 9, 5120 + 8192 + 8192)
    assert (recipe.steps, recipe.tokens_read) == (9, 21504)
    assert [stage_at(stages(recipe), n).name for n in (0, 2, 3, 6, 7, 8, 9)] == [
        "main", "main", "512", "512", "2k", "2k", "2k"]  # fmt: skip
    assert [begun(stages(recipe), n) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    view = recipe_at(recipe, first)
    assert (view.train.context, view.train.tokens_read, view.phases) == (512, 8192, ())
    assert view.run.seed != recipe.run.seed
    assert recipe_at(_recipe("needles.short=0.5"), first).needles.short == 0.0


def test_the_rate_goes_on_where_pre_training_ended():
    recipe = _recipe("learning_rate.peak=2.2e-4", "phases.2k.learning_rate=1e-5", "phases.2k.warmup=0.5")
    schedule, (main, first, second) = recipe.schedule(), stages(recipe)
    assert schedule.at(main.end_token).learning_rate == pytest.approx(7.3e-6)
    assert schedule.at(main.end_token + 1).learning_rate == pytest.approx(7.3e-6)  # V3 §4.3
    assert schedule.at(first.end_token).learning_rate == pytest.approx(7.3e-6)
    assert schedule.at(second.first_token + 2048).learning_rate == pytest.approx(0.5e-5)
    assert schedule.at(second.end_token).learning_rate == 1e-5
    assert (schedule.at(second.end_token).bias_speed, schedule.at(second.end_token).mtp_weight) == (0.0, 0.1)


@pytest.mark.parametrize(
    ("until", "finals", "last"), [(1.0, [], 1.0), (0.5, [], 0.1), (0.5, [0.1, 0.05], 0.05)]
)
def test_what_the_last_rate_is(until, finals, last):
    marks = [] if not finals else [0.9, 1.0]
    recipe = _recipe(
        "learning_rate.peak=1.0", f"learning_rate.constant_until={until}",
        f"learning_rate.cosine_until={max(until, 0.8)}", f"learning_rate.finals={finals}",
        f"learning_rate.finals_until={marks}",
    )  # fmt: skip
    assert recipe.schedule().phases[0].learning_rate == pytest.approx(last)


def test_balance_and_mtp_of_a_phase():
    knobs = _recipe(
        "phases.512.bias_speed=0.002", "phases.512.mtp_weight=0", "phases.2k.mtp_weight=0.2"
    ).schedule().phases  # fmt: skip
    assert [(k.bias_speed, k.mtp_weight) for k in knobs] == [(0.002, 0.0), (0.002, 0.2)]
    kept = _recipe("balance.bias_until=1", "mtp.switch=1", "balance.bias_speed=0.003").schedule().phases
    assert [(k.bias_speed, k.mtp_weight) for k in kept] == [(0.003, 0.3)] * 2


# --- rotary embeddings ---
def test_the_configuration_of_each_stage(tmp_path):
    recipe = _recipe("train.tokens=2048", "model.max_position_embeddings=128", "data.workers=1",
                     "phases.512.tokens=2048")  # fmt: skip
    sources = open_stages(recipe, tmp_path, lambda text: None)
    config = model_config(recipe, sources[0].tokenizer)
    found = [config_at(config, stages(recipe), i) for i in range(3)]
    assert [c.rope.type for c in found] == ["default", "yarn", "yarn"]
    assert [c.max_position_embeddings for c in found] == [128, 512, 2048]
    assert (found[1].rope.factor, found[1].rope.original_max_position_embeddings) == (16.0, 128)
    assert found[2].softmax_scale == pytest.approx(found[0].softmax_scale * (0.1 * 2.772588722 + 1) ** 2)


def test_a_model_goes_on_under_another_rotary_embedding():
    before = tiny.model()
    rope = Rope(type="yarn", factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
    config = replace(before.config, rope=rope, max_position_embeddings=256)
    fresh = Transformer(config)
    fresh.load_state_dict(before.state_dict())
    token, context = torch.arange(90) % tiny.VOCAB, Context.packed([90])
    assert before.rotation_table().shape[0] == 64  # built, and to be built anew
    before.set_rope(config)
    got, want = before(token, Context.packed([90])), fresh(token, context)
    assert torch.equal(got, want) and before.max_positions == 256
    assert torch.equal(before.mtp_forward(got, token, Context.packed([90])),
                       fresh.mtp_forward(want, token, Context.packed([90])))  # fmt: skip
    with pytest.raises(ConfigError, match="rope and max_position_embeddings"):
        before.set_rope(replace(config, hidden_size=64))


def test_memory_is_that_of_the_largest_stage():
    recipe, config = _recipe("phases.2k.micro_batch_tokens=0"), tiny.config()
    small = _recipe()  # micro-batches of 2048 in every stage
    assert peak_memory(recipe, config, cuda=False).peak > peak_memory(small, config, cuda=False).peak
    assert peak_memory(small, config) == peak_memory(replace(small, phases=()), config)


# --- runs ---
def test_a_run_through_its_phases(whole):
    (first, second) = _records(whole, "phase")
    assert (first["step"], first["name"], first["context"], first["rope"]) == (3, "512", 512, "yarn 16")
    assert (second["step"], second["name"], second["context"]) == (5, "2k", 2048)
    tokens = [r["tokens"] for r in _records(whole, "step")]
    assert tokens == [512, 1024, 2048, 3072, 5120, 7168]
    assert [r["step"] for r in _records(whole, "heldout")] == [2, 4, 6]
    assert [r["step"] for r in _records(whole, "checkpoint")] == [2, 4, 6]
    main, first, last = (_config(whole / name) for name in ("export-main", "export-512", "export"))
    assert main["rope_scaling"] is None and main["max_position_embeddings"] == 2048
    assert first["rope_scaling"]["factor"] == last["rope_scaling"]["factor"] == 16.0
    assert last["rope_scaling"]["type"] == "yarn" and last["rope_scaling"]["mscale_all_dim"] == 1.0
    assert read(whole).summary()["planned_tokens"] == 1024 + 2048 + 4096
    assert "2,048 tokens in training" in (whole / "export" / "README.md").read_text()
    assert "128 tokens in training" in (whole / "export-main" / "README.md").read_text()
    tensors, _ = state.load(state.latest(whole / "checkpoints"))
    model = weights.load(whole / "export", dtype=torch.float32)
    assert torch.equal(model.norm.weight, tensors["master.norm.weight"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_a_run_killed_in_or_between_phases_resumes_bit_for_bit(short, whole, tmp_path, monkeypatch, step):
    real = Trainer.step

    def deadly(self):
        if self.progress.step == step:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", deadly)
        with pytest.raises(Killed):
            short(tmp_path / "run", "checkpoint.every_steps=1")
    assert state.latest(tmp_path / "run" / "checkpoints").step in (step - 1, step)
    assert short(tmp_path / "run", "checkpoint.every_steps=1", resume=True).finished
    _assert_equal(tmp_path / "run", whole)
    assert [r["step"] for r in _records(tmp_path / "run", "phase")] == [3, 5]
    assert (tmp_path / "run" / "export-main" / "config.json").is_file()


def test_phases_can_be_added_to_a_finished_run(short, whole, tmp_path):
    """The main part alone, to its end; then the same with phases: as if they had always been there."""
    alone = tmp_path / "recipe.json"
    text = recipes.load(SMOKE, SHORT).to_dict()
    alone.write_text(json.dumps(text | {"phases": []}))
    short_of = [o for o in SHORT if not o.startswith("phases.")]
    settings = {"out": tmp_path / "run", "device": "cpu", "console": Console(quiet=True)}
    path = json.loads((whole / "recipe.json").read_text())["data"]["path"]
    outcome = train(alone, overrides=[*short_of, f"data.path={path}"], **settings)
    assert (outcome.reason, outcome.step) == ("finished", 2)
    assert short(tmp_path / "run", resume=True).step == 6
    _assert_equal(tmp_path / "run", whole)
    assert _config(tmp_path / "run" / "export-main")["rope_scaling"] is None


def test_phases_that_have_begun_cannot_change(short, tmp_path, monkeypatch):
    real = Trainer.step

    def stopped(self):
        if self.progress.step == 3:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(Killed):
            short(tmp_path / "run", "checkpoint.every_steps=1")
    with pytest.raises(RecipeError, match=r"differs .* in phases\.512\.learning_rate"):
        short(tmp_path / "run", "phases.512.learning_rate=1.0", resume=True)
    assert short(tmp_path / "run", "phases.2k.learning_rate=0.001", resume=True).finished


def test_a_phase_may_read_shards_of_its_own(short, needles, whole, tmp_path):
    other = needles / "2k" / "train"
    outcome = short(tmp_path / "run", f"phases.512.path={other}", f"phases.512.heldout_path={other}")
    assert outcome.finished
    held, want = _records(tmp_path / "run", "heldout"), _records(whole, "heldout")
    assert held[0]["loss"] == want[0]["loss"] and held[1]["loss"] != want[1]["loss"]


# --- starting from a finished model ---
def test_a_finished_model_is_extended(short, whole, tmp_path, needles):
    folder = whole / "export-main"
    table = recipes.load(SMOKE, [*SHORT, f"data.path={needles}"]).to_dict()
    table |= {"model": {}, "init": {"weights": str(folder)}}
    table["train"]["tokens"] = 0
    table["phases"][0]["learning_rate"] = 0.001
    (tmp_path / "extend.json").write_text(json.dumps(table))
    settings = {"out": tmp_path / "run", "device": "cpu", "console": Console(quiet=True)}
    outcome = train(tmp_path / "extend.json", **settings)
    assert (outcome.step, outcome.tokens) == (4, 6144)
    assert _config(outcome.export)["rope_scaling"]["factor"] == 16.0
    own, theirs = (weights.load(f, dtype=torch.float32) for f in (outcome.export, folder))
    change = (own.lm_head.weight - theirs.lm_head.weight).abs().max()
    assert 0 < change < 0.01  # four steps of Adam away from where it started
    assert [r["step"] for r in _records(tmp_path / "run", "phase")] == [1, 3]


def test_the_first_loss_is_that_of_the_weights(whole, tmp_path, needles):
    """The main part as one more stage of a finished model: the loss goes on where it was, not at ln V."""
    table = recipes.load(SMOKE, [*SHORT, f"data.path={needles}", "train.batch_tokens=1024"]).to_dict()
    table |= {"model": {}, "init": {"weights": str(whole / "export-main")}, "phases": []}
    (tmp_path / "r.json").write_text(json.dumps(table))
    train(tmp_path / "r.json", out=tmp_path / "run", device="cpu", console=Console(quiet=True))
    (first,) = _records(tmp_path / "run", "step")
    held = _records(whole, "heldout")[0]
    assert first["loss"] == pytest.approx(held["loss"], abs=0.6)
    assert not (tmp_path / "run" / "export-main").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"init": {"weights": "/nowhere"}}, "init.weights is '/nowhere'.*holds no model"),
        ({"model": {"num_hidden_layers": 3}}, "makes another model than .*tensors differ"),
        ({"model": {"hiden_size": 3}}, "unknown key 'hiden_size'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(whole, tmp_path, needles, change, match):
    table = recipes.load(SMOKE, [*SHORT, f"data.path={needles}"]).to_dict()
    table |= {"model": {}, "init": {"weights": str(whole / "export-main")}, "phases": []} | change
    (tmp_path / "r.json").write_text(json.dumps(table))
    with pytest.raises(RecipeError, match=match):
        train(tmp_path / "r.json", out=tmp_path / "run", device="cpu", console=Console(quiet=True))


# --- recipes ---
@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("phases.512.context=500", r"phases\.512\.batch_tokens is 2048.*multiple of its context 500"),
        ("phases.512.micro_batch_tokens=300", r"phases\.512\.micro_batch_tokens is 300"),
        ("phases.512.tokens=7", r"phases\.512\.tokens is 7.*at least one batch of 2048"),
        ("phases.512.name=main", "phases.name is 'main'.*taken"),
        ("phases.512.name=2k", r"phases is \['2k', '2k'\].*different names"),
        ("phases.512.learning_rate=-2", r"phases\.512\.learning_rate is -2.0.*-1: as before"),
        ("phases.512.warmup=2", r"phases\.512\.warmup is 2.0"),
        ("phases.512.bias_sped=2", r"unknown key 'phases\[0\].bias_sped'.*'bias_speed'"),
        ("phases.512.heldout_path=x", r"phases\.512\.heldout_path is 'x'.*with a path"),
        ("phases.1k.tokens=1", r"phases\.NAME\.key=value; phases here: 512, 2k"),
        ("phases.512=1", r"phases\.NAME\.key=value"),
        ("train.tokens=0", r"train\.tokens is 0.*first has a learning_rate"),
        ("needles.share=2", r"needles\.share is 2.0"),
        ("needles.lists=2", r"needles\.lists is 2.0"),
        ("needles.short=2", r"needles\.short is 2.0"),
    ],
)  # fmt: skip
def test_phases_that_cannot_be_are_refused(override, match):
    with pytest.raises(RecipeError, match=match):
        _recipe(override)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("phases.512.rope_scaling={type='yarm', factor=2.0}", "rope_scaling of a phase: rope type is 'yarm'"),
        ("phases.512.rope_scaling={type='yarn', factr=2.0}", r"unknown rope key 'factr'.*'factor'"),
        ("phases.512.rope_scaling={type='yarn', factor=2.0, original_max_position_embeddings=128}",
         r"phases\.512: YaRN with factor 2 from 128 reaches 256 positions; its context is 512: raise"),
        ("needles.haystack=['/nowhere.txt']", "needles: .*nowhere"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_are_refused(short, tmp_path, override, match):
    fresh = [f"data.path={tmp_path / 'd'}"] if "haystack" in override else []
    with pytest.raises(RecipeError, match=match):
        short(tmp_path / "run", override, *fresh)


def test_a_resolved_recipe_with_phases_reads_back_through_json(tmp_path):
    recipe = _recipe(
        "phases.512.rope_scaling={type='yarn', factor=8.0, original_max_position_embeddings=128}"
    )
    saved = json.loads(json.dumps(recipe.to_dict()))
    assert recipes.from_dict(saved) == recipe
    (tmp_path / "recipe.json").write_text(json.dumps(saved))
    assert recipes.load(tmp_path / "recipe.json", ["run.seed=5"]).run.seed == 5
    (tmp_path / "recipe.json").write_text("[1")
    with pytest.raises(RecipeError, match="not valid JSON"):
        recipes.load(tmp_path / "recipe.json")
