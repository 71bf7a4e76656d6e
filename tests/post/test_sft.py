"""`hadal sft`, whole runs: every architecture, all weights and LoRA, from data to what the engine loads."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hadal.engine import Engine, SamplingParams
from hadal.model.context import Context
from hadal.post.base import export_format
from hadal.post.sft import open_run, sft, show
from hadal.post.sft_recipe import RecipeError, from_dict, load
from hadal.text import Tokenizer
from hadal.text.templates import template_for
from hadal.train import state
from hadal.weights import load as load_weights
from hadal.weights.layout import read_config_json
from tests.post.bases import assistant, base, chats, recipe, user, write

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


def run(path: Path, out: Path, *overrides: str, **options):
    return sft(path, out=out, overrides=overrides, device="cpu", console=QUIET, **options)


def records(folder: Path, kind: str):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize("rank", [0, 4], ids=["all", "lora"])
@pytest.mark.parametrize("kind", ["v3", "v2-lite", "qwen2", "llama"])
def test_every_architecture_learns_and_loads_in_the_engine(kind, rank, tmp_path):
    start = base(tmp_path / "base", kind)
    file = write(tmp_path / "talk.jsonl", chats(60, reasoning=kind != "v2-lite"))
    rate = {"peak": 2e-2 if rank else 5e-3}
    path = recipe(
        tmp_path / "r.toml", start, [file], lora={"rank": rank}, learning_rate=rate, train={"epochs": 2},
        export={"adapters": rank > 0},
    )  # fmt: skip
    outcome = run(path, tmp_path / "run")
    assert outcome.finished and outcome.export == tmp_path / "run" / "export"
    losses = [r["loss"] for r in records(tmp_path / "run", "step")]
    assert losses[-1] < losses[0] - (0.3 if rank else 1.0)
    before, after = load_weights(start), load_weights(outcome.export)
    moved = {n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
             if not torch.equal(a, b)}  # fmt: skip
    assert ("embed_tokens.weight" in moved) == (rank == 0)
    assert any("self_attn" in n for n in moved) and (not rank or not any("norm" in n for n in moved))
    engine = Engine.load(outcome.export, device="cpu", max_num_seqs=1, max_model_len=64)
    done = engine.chat([user("What is 1 + 1?")], SamplingParams(temperature=0, max_tokens=6))
    assert done.token_ids
    card = (outcome.export / "README.md").read_text()
    assert "60 in talk.jsonl" in card and ("LoRA of rank 4" in card) == (rank > 0)
    assert (tmp_path / "run" / "export-adapters" / "adapter_model.safetensors").is_file() == (rank > 0)


def test_the_loss_is_that_of_the_assistants_tokens_alone(tmp_path):
    """The first step's, against whole logits of each answer after its own prompt."""
    start = base(tmp_path / "base")
    talk = [user("Say 5"), assistant("5", "say"), user("Say 7 twice"), assistant("7 7", "twice")]
    file = write(tmp_path / "a.jsonl", [talk, *chats(3)])
    path = recipe(tmp_path / "r.toml", start, [file], train={"batch_tokens": 512, "micro_batch_tokens": 0})
    run(path, tmp_path / "run", "mtp.weight=0.0")
    (step,) = records(tmp_path / "run", "step")
    model, tokenizer = load_weights(start), Tokenizer.load(start)
    template, total, count = template_for(start), 0.0, 0
    rows = [talk[:2], talk, *chats(3)]
    with open_run(path, True, ["mtp.weight=0.0"], tmp_path / "run", "cpu", QUIET) as again:
        epochs = 512 // 128 / again.rows.train.rows_per_epoch
    assert epochs.is_integer()  # every document the same number of times
    for chat in rows:
        prompt, answer = (tokenizer.encode_parts(p) for p in template.split(chat))
        ids = torch.tensor([*prompt, *answer])
        with torch.no_grad():
            log_p = model.logits(model(ids, Context.packed([len(ids)]))).log_softmax(-1)
        for t in range(len(prompt) - 1, len(ids) - 1):
            total -= float(log_p[t, ids[t + 1]])
            count += 1
    assert step["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 4], ids=["all", "lora"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(rank, tmp_path):
    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(40))
    path = recipe(tmp_path / "r.toml", start, [file], lora={"rank": rank}, train={"epochs": 2},
                  ema={"rate": 0.9}, checkpoint={"every_steps": 2})  # fmt: skip
    whole = run(path, tmp_path / "whole")
    assert whole.step >= 4
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in state.checkpoints(tmp_path / "cut" / "checkpoints")[1:]:
        shutil.rmtree(later.path)
    again = run(path, tmp_path / "cut", resume=True)
    assert again.step == whole.step
    one, two = (
        state.load(state.latest(f / "checkpoints"))[0] for f in (tmp_path / "whole", tmp_path / "cut")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert any("lora_A" in n for n in one) == (rank > 0)
    for name in ("export", "export-ema"):
        a, b = (load_weights(f / name).state_dict() for f in (tmp_path / "whole", tmp_path / "cut"))
        assert all(torch.equal(a[n], b[n]) for n in a)
    ema = load_weights(tmp_path / "whole" / "export-ema").state_dict()
    last = load_weights(tmp_path / "whole" / "export").state_dict()
    assert any(not torch.equal(ema[n], last[n]) for n in ema)


def test_resuming_another_run_is_refused(tmp_path):
    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(10))
    path = recipe(tmp_path / "r.toml", start, [file], lora={"rank": 2})
    run(path, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"go on with --resume"):
        run(path, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"differs .* in lora\.rank"):
        run(path, tmp_path / "run", "lora.rank=3", resume=True)
    shutil.rmtree(start)
    base(start, "v3", fp8=True)
    with pytest.raises(RecipeError, match=r"the files of model\.start"):
        run(path, tmp_path / "run", resume=True)


def test_gate_biases_stand_still_unless_the_recipe_says(tmp_path):
    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(20))
    path = recipe(tmp_path / "r.toml", start, [file])
    for speed, still in ((0.0, True), (0.01, False)):
        outcome = run(path, tmp_path / f"run{speed}", f"balance.bias_speed={speed}")
        before, after = (dict(load_weights(f).named_buffers()) for f in (start, outcome.export))
        assert all(torch.equal(before[n], after[n]) for n in before) == still and before


def test_held_out_conversations_are_never_trained_on(tmp_path):
    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(60))
    path = recipe(tmp_path / "r.toml", start, [file], data={"heldout_share": 0.25},
                  log={"heldout_every_steps": 2, "heldout_tokens": 1024})  # fmt: skip
    run(path, tmp_path / "run")
    report = json.loads((tmp_path / "run/data/train/report.json").read_text())
    other = json.loads((tmp_path / "run/data/held-out/report.json").read_text())
    assert report["documents"] + other["documents"] == 60 and report["held_out"] == other["documents"] > 5
    held = records(tmp_path / "run", "heldout")
    assert held and set(held[-1]["domains"]) == {"talk"}


def test_exports_come_as_the_model_came(tmp_path):
    start = base(tmp_path / "base", fp8=True)
    file = write(tmp_path / "talk.jsonl", chats(10))
    path = recipe(tmp_path / "r.toml", start, [file], lora={"rank": 2})
    outcome = run(path, tmp_path / "run")
    assert read_config_json(outcome.export)["quantization_config"]["quant_method"] == "fp8"
    assert export_format("auto", base(tmp_path / "plain")) == (False, torch.float32)
    assert export_format("bfloat16", start) == (False, torch.bfloat16)
    assert export_format("fp8", tmp_path / "plain") == (True, torch.bfloat16)


def test_a_base_model_needs_a_template_and_keeps_it(tmp_path):
    start = base(tmp_path / "base", template="")
    file = write(tmp_path / "talk.jsonl", chats(10))
    path = recipe(tmp_path / "r.toml", start, [file])
    with pytest.raises(RecipeError, match=r"has no chat template; name one in model\.template"):
        run(path, tmp_path / "run")
    outcome = run(path, tmp_path / "run", "model.template=deepseek-r1")
    assert template_for(outcome.export).name == "deepseek-r1"


def test_rows_are_shown_with_what_is_trained_marked(tmp_path):
    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(10))
    path = recipe(tmp_path / "r.toml", start, [file])
    console = Console(file=io.StringIO(), record=True, width=400)
    report = show(path, 1, console=console)
    told = console.export_text()
    assert report.documents == 10 and "— row 0:" in told
    assert "<｜Assistant｜><think>\n⟦I add.\n</think>\n\nIt is" in told and "<｜end▁of▁sentence｜>⟧" in told
    assert "⟦" not in told.split("<｜Assistant｜>")[0]


def test_the_verb(tmp_path):
    from hadal.cli.app import build

    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(10))
    path = recipe(tmp_path / "r.toml", start, [file])
    app, runner = build(), CliRunner()
    shown = runner.invoke(app, ["sft", str(path), "--show", "1"])
    assert shown.exit_code == 0 and "⟦" in shown.stdout and not (tmp_path / "runs").exists()
    done = runner.invoke(app, ["sft", str(path), "--out", str(tmp_path / "run"), "--device", "cpu", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["finished"] is True
    wrong = runner.invoke(app, ["sft", str(path), "--set", "lora.rnak=3"])
    assert wrong.exit_code == 2 and "Did you mean 'rank'?" in wrong.output


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"data": {"files": []}}, r"data\.files"),
        ({"data": {"files": ["a"], "turns": "each"}}, r'"all" or "last"'),
        (
            {"data": {"files": ["a"], "heldout_files": ["b"], "heldout_share": 0.1}},
            r"0 with data\.heldout_files",
        ),
        ({"model": {"start": ""}}, r"model\.start"),
        ({"model": {"start": "x", "template": "r1"}}, r"model\.template is 'r1'"),
        ({"train": {"epochs": 0}}, r"train\.epochs"),
        ({"lora": {"rank": -1}}, r"lora\.rank"),
        ({"export": {"adapters": True}}, r"false without lora\.rank"),
        ({"export": {"format": "int4"}}, r"export\.format"),
        ({"trian": {}}, r"Did you mean 'train'\?"),
    ],
)
def test_recipes_are_strict(change, complaint):
    table = {
        "run": {"name": "a"},
        "model": {"start": "x"},
        "data": {"files": ["a"]},
        "learning_rate": {"peak": 1},
    }
    with pytest.raises(RecipeError, match=complaint):
        from_dict(table | change)


def test_the_published_schedule():
    """Warm-up, then a cosine to a tenth of the peak at the last step."""
    for name in ("sft-example", "sft-smoke"):
        recipe_read = load(ROOT / "recipes" / f"{name}.toml")
        whole = recipe_read.to_train(100, Path("base"), Path("rows"))
        schedule, peak = whole.schedule(), recipe_read.learning_rate.peak
        assert schedule.at(whole.train.tokens).learning_rate == pytest.approx(0.1 * peak)
        assert max(schedule.at(t).learning_rate for t in range(1, whole.train.tokens, 999)) <= peak
        assert schedule.at(whole.train.tokens // 2).mtp_weight == 0.1
        assert from_dict(recipe_read.to_dict()) == recipe_read


def test_paths_that_lead_nowhere_and_rows_that_do_not_fit_are_refused(tmp_path):
    start = base(tmp_path / "base")
    file = write(tmp_path / "talk.jsonl", chats(10))
    with pytest.raises(RecipeError, match="neither here nor beside the recipe"):
        run(recipe(tmp_path / "a.toml", start, [tmp_path / "none.jsonl"]), tmp_path / "run")
    with pytest.raises(RecipeError, match="has 256 positions"):
        run(recipe(tmp_path / "b.toml", start, [file], train={"context": 512, "batch_tokens": 512,
                   "micro_batch_tokens": 0}), tmp_path / "run2")  # fmt: skip
    with pytest.raises(RecipeError, match=r"lora\.modules: 'q_proj'"):
        run(
            recipe(tmp_path / "c.toml", start, [file], lora={"rank": 2, "modules": ["q_proj"]}),
            tmp_path / "run3",
        )
