"""Ablations: families as recipes, tables by hand from made-up runs, failures shown, a family run whole."""

from __future__ import annotations

import json
import sys
import tomllib
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from hadal.data.strict import RecipeError
from hadal.train import recipe as recipes

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "recipes" / "ablations" / "tiny.toml"
SMALL = [f"--overlay={TINY}", "--device=cpu", "--seeds=1", "--arms=none", "--set=train.tokens=2048",
         "--set=train.context=64", "--set=train.batch_tokens=512", "--set=log.heldout_tokens=512",
         "--set=model.num_hidden_layers=2", "--set=log.every_steps=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def plans() -> ModuleType:
    import ablation_plan

    return ablation_plan


@pytest.fixture
def tables() -> ModuleType:
    import ablation_tables

    return ablation_tables


@pytest.fixture
def runner() -> ModuleType:
    import ablations

    return ablations


# --- recipes ---
@pytest.mark.parametrize("size", ["base", "tiny"])
@pytest.mark.parametrize("name", ["balance", "mtp", "precision", "attention"])
def test_every_arm_is_a_recipe_that_the_trainer_reads_back(
    plans: ModuleType, tmp_path: Path, name: str, size: str
) -> None:
    family = plans.family(name)
    runs = plans.plan(family, [1, 2], {} if size == "base" else plans.overlay(TINY))
    assert len(runs) == 2 * len(family.arm) and len({r.key for r in runs}) == len(runs)
    for run in runs:
        file = tmp_path / f"{run.key}.toml"
        file.write_text(plans.to_toml(run.table))
        assert recipes.load(file) == run.recipe and run.recipe.run.seed == run.seed
        plans.config_of(run.recipe.model)


@pytest.mark.parametrize("size", ["base", "tiny"])
def test_attentions_are_compared_at_equal_parameters(plans: ModuleType, size: str) -> None:
    family = plans.family("attention")
    runs = plans.plan(family, [1], {} if size == "base" else plans.overlay(TINY))
    models = {run.arm: run.recipe.model for run in runs}
    for count in (plans.parameters, plans.active_parameters):
        for arm in ("gqa", "mha"):
            assert count(models[arm]) == pytest.approx(count(models["mla"]), rel=0.01)
    cache = {arm: plans.config_of(model).kv_bytes_per_token() for arm, model in models.items()}
    layers = models["mla"]["num_hidden_layers"]
    wide = {"base": (128 + 16, 2 * 2 * 32, 2 * 8 * 32), "tiny": (64 + 8, 2 * 2 * 16, 2 * 4 * 16)}[size]
    assert [cache[a] for a in ("mla", "gqa", "mha")] == [2 * layers * values for values in wide]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"model.first_k_dense_replace": 0}, "attention/gqa: no layer of the model has the width"),
        ({"model.intermediate_size": 32}, "attention/mha: intermediate_size would have to be -48"),
        ({"model.n_routed_experts": 4, "model.num_attention_heads": 64, "model.num_key_value_heads": 64},
         r"attention/\w+: .*(parameters are [-+][\d.]+% of the reference|would have to be)"),
    ],
)  # fmt: skip
def test_widths_that_cannot_make_parameters_equal_are_refused(
    plans: ModuleType, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        plans.plan(plans.family("attention"), [1], changes)


def test_families_share_the_runs_that_are_the_same(plans: ModuleType) -> None:
    runs = [r for name in plans.FAMILIES for r in plans.plan(plans.family(name), [1], {})]
    shared = {"balance/v3", "mtp/on", "precision/bf16", "attention/mla"}
    assert len({r.key for r in runs if f"{r.family}/{r.arm}" in shared}) == 1
    assert len({r.key for r in runs}) == len(runs) - 3
    elsewhere = plans.plan(plans.family("mtp"), [1], {"data.source": "shards", "data.path": "x"})
    assert {r.key for r in elsewhere} < {r.key for r in runs}  # where the data lies makes no other run


def test_wrong_arms_and_keys_are_refused(plans: ModuleType) -> None:
    with pytest.raises(RecipeError, match="no family 'x'; there are balance"):
        plans.family("x")
    with pytest.raises(RecipeError, match="the reference is 'nobody'"):
        plans.Family("t", "q", "nobody", ("heldout",), (plans.Arm("a", "A"),), name="f")
    with pytest.raises(RecipeError, match=r"unknown key 'train\.token'"):
        plans.plan(plans.family("mtp"), [1], {"train.token": 5})


# --- tables ---
def test_the_interval_is_the_one_by_hand(tables: ModuleType) -> None:
    differences = [0.010, 0.013, 0.019]  # mean 0.014, squares 16 + 1 + 25 = 42e-6, s² = 21e-6
    half = 4.3027 * sqrt(21e-6) / sqrt(3)
    assert tables.interval(differences) == pytest.approx((0.014, 0.014 - half, 0.014 + half))
    assert tables.interval([1.0, 3.0]) == pytest.approx((2.0, 2.0 - 12.7062, 2.0 + 12.7062))
    with pytest.raises(ValueError, match="at least two seeds"):
        tables.interval([1.0])


def test_curves_are_smoothed_and_compared_without_their_first_tenth(tables: ModuleType) -> None:
    assert tables.smooth([1.0, 2.0, 3.0], 0.5) == [1.0, 1.5, 2.25]
    reference, arm = [2.0] * 10, [9.0] + [2.0] * 9
    largest, mean = tables.curve_difference(arm, reference)  # 7/2 · 0.9^k, k = 1 … 9
    assert largest == pytest.approx(3.5 * 0.9)
    assert mean == pytest.approx(sum(3.5 * 0.9**k for k in range(1, 10)) / 9)
    with pytest.raises(ValueError, match="10 and 9 points"):
        tables.curve_difference(reference, reference[:9])


def made_up_run(
    folder: Path, heldout: float, violations: list[float], probe: dict[str, float] | None
) -> None:
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": i + 1, "tokens": 10 * (i + 1), "loss": 5.0 - i, "max_violation": v}
        for i, v in enumerate(violations)
    ]
    last = len(violations)
    lines += [
        {"kind": "heldout", "step": last, "loss": heldout},
        {"kind": "stop", "step": last, "reason": "finished"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if probe is not None:
        (folder / "probe.json").write_text(json.dumps(probe))


def measured(
    plans: ModuleType, tables: ModuleType, folder: Path, held: dict[str, list[float]]
) -> dict[Any, Any]:
    """Runs of the balance family with these held-out losses by arm; the arm "sequence" breaks with seed 2."""
    runs = plans.plan(plans.family("balance"), [1, 2, 3], {})
    out = {}
    for p in runs:
        if p.arm not in held:
            continue
        where = folder / p.key
        broken = (p.arm, p.seed) == ("sequence", 2)
        made_up_run(where, held[p.arm][p.seed - 1], [9, 1, 1, 0.5, 0.25],
                    {"maxvio_heldout": 0.5 * p.seed, "maxvio_sequence": 2.0})  # fmt: skip
        if broken:
            (where / "metrics.jsonl").write_text('{"kind": "step", "step": 7, "tokens": 70, "loss": 4.0}\n')
        out[p.arm, p.seed] = tables.measure(p, where, "train failed with status 1: boom" if broken else "")
    return out


def test_made_up_runs_become_the_table_worked_out_by_hand(
    plans: ModuleType, tables: ModuleType, runner: ModuleType, tmp_path: Path
) -> None:
    held = {"bias": [3.0, 3.1, 3.2], "none": [3.010, 3.113, 3.219], "sequence": [3.0, 9.0, 3.4]}
    family = runner.only(plans.family("balance"), "none,sequence")
    assert [arm.name for arm in family.arm] == ["bias", "sequence", "none"]
    result = tables.collect(family, measured(plans, tables, tmp_path, held), [1, 2, 3])
    bias, sequence, none = result["rows"]
    assert bias[1:] == ["3.1000 ± 0.1000", "0.250", "1.000 ± 0.500", "2.000"]
    assert none[1] == "3.1140 ± 0.1045"
    assert sequence[0].endswith("(**2 of 3 seeds**)") and sequence[1] == "3.2000 ± 0.2828"
    assert result["faults"] == ["sequence, seed 2: train failed with status 1: boom"]
    verdicts = {(c["arm"], c["metric"]): c for c in result["comparisons"]}
    assert verdicts["none", "heldout"]["verdict"] == (
        "held-out loss, nats a token: none − bias = +0.0140 [+0.0026, +0.0254]: none is higher"
    )
    assert verdicts["sequence", "heldout"]["differences"] == pytest.approx([0.0, 0.2])
    assert verdicts["sequence", "heldout"]["verdict"].endswith(tables.NONE_SEEN)
    assert verdicts["none", "maxvio_heldout"]["differences"] == [0.0, 0.0, 0.0]
    assert result["curves"]["bias"]["tokens"] == [10, 20, 30, 40, 50]
    assert result["curves"]["bias"]["loss"] == {"mean": [5, 4, 3, 2, 1], "deviation": [0] * 5}


def test_an_arm_without_a_run_is_called_failed(plans: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    family = plans.family("mtp")
    runs = {(p.arm, p.seed): tables.measure(p, tmp_path / p.key) for p in plans.plan(family, [1, 2], {})}
    result = tables.collect(family, runs, [1, 2])
    assert result["rows"][0][0].endswith(": **no run came to its end**") and set(result["rows"][0][1:]) == {
        "–"
    }
    assert len(result["faults"]) == 4 and result["comparisons"] == [] and result["verdicts"] == []


def test_one_seed_gives_no_verdict_and_fp8_is_held_against_the_bound(
    plans: ModuleType, tables: ModuleType
) -> None:
    family = plans.family("precision")

    def run(loss: float) -> Any:
        return tables.Measured({"heldout": loss}, [1.0, 2.0], {"loss": [loss, loss], "max_violation": [0, 0]})

    runs = {("bf16", 1): run(2.0), ("again", 1): run(2.0), ("fp8", 1): run(2.01)}
    verdicts = tables.collect(family, runs, [1])["verdicts"]
    assert verdicts[1] == (
        "held-out loss, nats a token: fp8 − bf16 = +0.0100 with one seed: no interval, no verdict"
    )
    assert verdicts[2].endswith("at most 0.000%, in the mean 0.000% (1 seeds); V3's bound of 0.25%: kept")
    assert verdicts[3].endswith("at most 0.500%, in the mean 0.500% (1 seeds); V3's bound of 0.25%: not kept")


def test_the_page_shows_tables_verdicts_and_failures(tmp_path: Path) -> None:
    import report

    result = {
        "title": "T", "question": "Q?", "machine": {"gpu": "G", "torch": "2.11", "date": "2026-11-22"},
        "scale": {"steps": 640, "batch_tokens": 16384, "context": 512, "tokens": 10_485_760}, "seeds": [1, 2],
        "data": {"title": "text", "tokens": 11_300_000, "masked": False}, "columns": ["arm", "loss"],
        "rows": [["a", "1.0 ± 0.1"]], "verdicts": ["a − b: lower"], "faults": ["b, seed 2: boom"],
    }  # fmt: skip
    (tmp_path / "ablation_t.json").write_text(json.dumps(result))
    assert report.SMALL not in report.ablation_section(tmp_path)
    result["machine"] = {"cpu": "C", "threads": 1, "cores": 1, "date": "2026-11-22"}
    (tmp_path / "ablation_t.json").write_text(json.dumps(result))
    assert report.ablation_section(tmp_path).count(report.SMALL) == 1
    (tmp_path / "other.json").write_text(json.dumps({"machine": {}, "races": []}))
    text = report.ablation_section(tmp_path)
    assert (
        "| a | 1.0 ± 0.1 |" in text and "- a − b: lower" in text and "- **Failed:** b, seed 2: boom" in text
    )
    assert "640 steps of 16,384 tokens in rows of 512; seeds 1, 2. Data: text; 11,300,000 tokens" in text
    assert [f.name for f in report.files(tmp_path)] == ["other.json"]


def test_plots_are_drawn_from_a_result_alone(tables: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import ablation_plots

    curves = {"tokens": [1e6, 2e6], **{k: {"mean": [3, 2], "deviation": [0.1, 0.1]} for k in tables.CURVES}}
    empty = {"tokens": [], **{k: {"mean": [], "deviation": []} for k in tables.CURVES}}
    result = {"family": "balance", "title": "T", "seeds": [1], "curves": {"a": curves, "failed": empty}}
    assert ablation_plots.draw(result, tmp_path).read_bytes()[:4] == b"\x89PNG"
    assert ablation_plots.draw(result, tmp_path, "b").name == "b.png"
    assert (tmp_path / "ablation-balance.png").is_file()


# --- runs ---
def test_a_family_runs_whole_is_kept_and_refuses_other_data(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two arms, four steps each; then the same line again, which has nothing to run."""
    where = f"--out={tmp_path}"
    assert runner.main(["balance", *SMALL, where, "--jobs=2"]) == 0
    result = json.loads((tmp_path / "ablation_balance.json").read_text())
    assert result["faults"] == [] and result["scale"]["steps"] == 4
    values = result["arms"]["bias"]["values"]
    assert all(len(values[m]) == 1 and values[m][0] > 0 for m in values)
    assert [c["arm"] for c in result["comparisons"]] == ["none"] * 4
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and not any((f / "checkpoints").exists() for f in folders)

    started: list[str] = []
    monkeypatch.setattr(
        runner.Runner, "_start", lambda self, planned, progress: started.append(planned.label)
    )
    assert runner.main(["balance", *SMALL, where]) == 0 and started == []
    assert runner.main(["balance", *SMALL, where, "--collect-only"]) == 0
    again = json.loads((tmp_path / "ablation_balance.json").read_text())
    assert again["rows"] == result["rows"] and again["machine"] == result["machine"]

    about = json.loads((tmp_path / "about.json").read_text())
    about["data"]["sha256"] = "another"
    (tmp_path / "about.json").write_text(json.dumps(about))
    assert runner.main(["balance", *SMALL, where]) == 2


def fake(monkeypatch: pytest.MonkeyPatch, runner: ModuleType, script: Path) -> None:
    """Make the runner start `script` instead of Python."""
    monkeypatch.setattr(runner.sys, "executable", str(script))


def a_runner(runner: ModuleType, tmp_path: Path, deadline: float = float("inf")) -> Any:
    return runner.Runner(tmp_path, "cpu", 2, deadline, False, Console(quiet=True))


def shards_of(tmp_path: Path) -> dict[str, str]:
    return {"data.source": "shards", "data.path": str(tmp_path), "data.heldout_path": str(tmp_path)}


def test_a_run_that_dies_is_reported_and_the_others_go_on(
    plans: ModuleType, runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'first line' >&2; echo \"boom of $2\" >&2; exit 3\n")
    script.chmod(0o755)
    fake(monkeypatch, runner, script)
    planned = plans.plan(plans.family("mtp"), [1], shards_of(tmp_path))
    faults = a_runner(runner, tmp_path).run(planned)
    assert faults == {p.key: "train failed with status 3: boom of hadal.train" for p in planned}


def test_when_the_time_is_over_runs_are_asked_to_save(
    plans: ModuleType, runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path(sys.argv[5], 'saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path(sys.argv[5], 'began').touch()\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    fake(monkeypatch, runner, script)
    planned = plans.plan(plans.family("precision"), [1], shards_of(tmp_path))
    going = a_runner(runner, tmp_path, runner.time.monotonic() + 2.5)
    faults = going.run(planned)
    assert [faults[p.key].split(":")[0] for p in planned] == ["stopped at step 0"] * 2 + ["was not started"]
    assert all((going.folder(p) / "saved").exists() for p in planned[:2])


def test_weights_that_are_gone_are_trained_again_where_drafts_are_asked_of_them(
    plans: ModuleType, runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on, off = plans.plan(plans.family("mtp"), [1], shards_of(tmp_path))
    going = a_runner(runner, tmp_path)
    for p in (on, off):
        made_up_run(going.folder(p), 3.0, [1.0], {"maxvio_heldout": 1.0})
    launched = []
    monkeypatch.setattr(going, "_launch", lambda job, stage: launched.append((job.planned.arm, stage)))
    going.with_drafts = {p.key for p in (on, off) if runner.wants_drafts(p)}
    assert going.with_drafts == {on.key} and going._finished(off) and not going._finished(on)
    progress = runner.Progress(console=Console(quiet=True))
    going._start(on, progress)
    assert launched == [("on", "train")] and not (going.folder(on) / "metrics.jsonl").exists()
    (going.folder(off) / "export").mkdir()
    going._start(off, progress)
    assert launched[-1] == ("off", "probe")


# --- the probe ---
def test_prompts_are_questions_or_the_beginnings_of_texts(tmp_path: Path) -> None:
    import ablation_probe

    from hadal.data.shards import Manifest, write_manifest, write_shard
    from hadal.data.stream import PackedRows

    think = 99
    puzzle = [1, 5, 6, think, 7, *range(20, 40), 2]
    shard = write_shard(tmp_path, "s", [puzzle] * 8 + [list(range(1, 91))] * 8 + [[1, 3, 2]] * 8)
    write_manifest(tmp_path, Manifest((shard,), {}))
    source = PackedRows(tmp_path, 100, think_id=think, pad_id=0, shuffle=False)
    found = ablation_probe.prompts(source, 32)
    assert {len(p) for p in found} == {5, ablation_probe.PROMPT_TOKENS}
    assert all(p == puzzle[:5] or p == list(range(1, 33)) for p in found)
    assert ablation_probe.spaced(source, 2) == [0, source.rows_per_epoch - 1]


def test_agreement_counts_the_places_where_a_draft_would_stand(plans: ModuleType) -> None:
    """Against the definition, place by place, on a model of random weights."""
    import ablation_probe
    import numpy as np
    import torch

    from hadal.data.stream import Rows
    from hadal.model.transformer import Transformer
    from hadal.train.batches import build

    table = tomllib.loads((ROOT / "recipes" / "ablations" / "base.toml").read_text())["model"]
    config = plans.config_of({**table, **{k.split(".")[1]: v for k, v in plans.overlay(TINY).items()
                                          if k.startswith("model.")}}, 64)  # fmt: skip
    model = Transformer(config, dtype=torch.float32).init_weights(3, 0.2)
    token_RC = np.random.default_rng(0).integers(0, 64, (1, 24))
    micro = build(Rows(token_RC, np.ones((1, 24), np.float32), [24], [False]), depths=1, mask_documents=False)
    with torch.no_grad():
        context = micro.context(record_routing=True)
        hidden_TD = model(micro.token_KT[0], context)
        same, overlap, places = ablation_probe.agreement(model, micro, hidden_TD, context).tolist()
        main_TV = model.head(model.norm(hidden_TD)).double().softmax(-1)
        mtp_TD = model.mtp_forward(hidden_TD, micro.token_KT[1], micro.context())
        draft_TV = model.mtp_logits(mtp_TD).double().softmax(-1)
    assert places == 22  # positions 0 to 21 have a token after the next
    assert same == sum(main_TV[i + 1].argmax() == draft_TV[i].argmax() for i in range(22))
    wanted = sum(float(torch.minimum(main_TV[i + 1], draft_TV[i]).sum()) for i in range(22))
    assert overlap == pytest.approx(wanted, abs=1e-4) and 0 < overlap < 22
