"""Will it run and how fast: the public questions, and what moves the answers."""

from __future__ import annotations

from typing import Any

import pytest

from hadal.config import preset
from hadal.plan import Ask, PlanError, Running, Work, decode_step, efficiency, parse, prefill, running
from hadal.plan.layout import Layout
from hadal.plan.roofline import LEVELS, communication
from hadal.plan.serving import cards, config_of

V3 = preset("deepseek-v3").config
LITE = preset("deepseek-v2-lite").config


def asked(model: str, on: str, **more: Any) -> Running:
    name, config, stated = config_of(model)
    return running(Ask(config, parse(on), name, stated, **more))


def test_v3_on_colab_pro_is_refused_rightly() -> None:
    answer = asked("deepseek-v3", "A100-40GB, 52GB RAM")
    assert not answer.fits and not answer.speeds
    assert answer.needed.value > 670e9 and answer.usable.value == 36e9
    told = " ".join(answer.notes)
    assert "no FP8 units" in told and "37B active is what one token computes with" in told
    assert "all 671B" in told and "685B of the hub count the MTP module" in told
    would = " ".join(answer.remedies)
    assert "× A100 40 GB" in would and "not the same model" in would and "--offload disk" in would
    assert "--offload cpu" not in would  # 654 GB of experts in 52 GB of RAM


def test_speeds_say_at_what_context_and_formats_what_context_they_leave() -> None:
    answer = asked("deepseek-v2-lite", "A100-40GB")
    for name in ("decode", "decode ceiling"):
        figure = next(f for f in answer.speeds if f.name == name)
        assert "at 4,096 tokens of context" in figure.formula
    would = asked("deepseek-r1-distill-qwen-7b", "t4").remedies[0]  # no FP8 units: integers
    assert would.startswith("weights in INT8") and would.endswith("tokens of context")


def test_v2_lite_on_an_a100_fits() -> None:
    answer = asked("deepseek-v2-lite", "A100-40GB")
    assert answer.fits and answer.context == 32768 and answer.needed.value < answer.usable.value
    assert {f.name for f in answer.speeds} >= {"decode", "prefill", "first token after", "decode ceiling"}
    for figure in answer.speeds[:3]:
        assert figure.low < figure.value < figure.high  # type: ignore[operator]


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_eight_a100_cannot_hold_v3(dtype: Any) -> None:
    answer = asked("deepseek-v3", "8xA100-80", dtype=dtype)
    assert not answer.fits
    least = 9 if dtype == "fp8" else 17
    assert any(f"the weights alone fill {least}" in r for r in answer.remedies)
    assert any("Hadal's own engine runs on one device" in n for n in answer.notes)


def test_v3_on_eight_h800_and_eight_h200() -> None:
    assert not asked("deepseek-v3", "8xh800").fits
    answer = asked("deepseek-v3", "8xh200")
    assert answer.fits and answer.layout.devices == 8
    assert cards(Ask(V3, parse("h800"), "V3")) == 16


def test_v3_on_a_laptop() -> None:
    answer = asked("deepseek-v3", "m1-max-64")
    assert not answer.fits
    assert not any("--offload cpu" in r or "16 ×" in r for r in answer.remedies)  # its memory is one


def test_every_remedy_by_flags_does_fit() -> None:
    for model, on in (
        ("deepseek-v3", "8xA100-80"),
        ("deepseek-v2-lite", "24GB RAM"),
        ("deepseek-v2-lite", "l4, 64GB RAM"),
    ):
        answer = asked(model, on)
        assert not answer.fits and answer.remedies
        for remedy in answer.remedies:
            if remedy.startswith("weights in"):
                assert asked(model, on, dtype=remedy.split("--dtype ")[1].rstrip(")")).fits
            if remedy.startswith("--offload"):
                words = remedy.split(":")[0].split()
                assert asked(model, on, offload=words[1], dtype=words[3]).fits  # type: ignore[arg-type]


def test_a_context_that_was_asked_for_is_not_cut() -> None:
    cut = asked("deepseek-v3", "8xh200", batch=64)
    assert cut.fits and 4096 <= cut.context < 131072
    assert not asked("deepseek-v3", "8xh200", batch=64, context=131072).fits
    assert asked("deepseek-v3", "8xh200", batch=64, context=cut.context).fits


def test_speeds_need_figures_and_say_which() -> None:
    answer = asked("deepseek-v2-lite", "memory=48GB")
    assert answer.fits and answer.why_no_speed is not None and "bandwidth=" in answer.why_no_speed
    assert "bf16=" in (asked("deepseek-v2-lite", "memory=48GB, bandwidth=1TB/s").why_no_speed or "")
    far = asked("deepseek-v3", "16xh200", tp=1, ep=16)
    assert far.fits and "network=" in (far.why_no_speed or "")
    assert asked("deepseek-v3", "16xh200, network=50GB/s", tp=1, ep=16).speeds
    slow = asked("deepseek-v2-lite", "l4, 64GB RAM", offload="disk")
    assert "disk=" in (slow.why_no_speed or "")


def test_offloading_is_slow_and_said_to_be() -> None:
    answer = asked("deepseek-v3", "h100, 1000GB RAM", offload="cpu")
    assert answer.fits and answer.limits[1] == "streaming experts" and answer.speeds[0].value < 5
    assert any("63 GB/s, the full rate" in note and "ceiling" in note for note in answer.notes)
    assert not asked("deepseek-v3", "h100, 256GB RAM", offload="cpu").fits


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"context": 10**7}, "bears 1 to 163,840"),
        ({"drafts": 1}, "give acceptance"),
        ({"acceptance": 2.0}, "a share from 0 to 1"),
        ({"tp": 16}, "takes 16 devices"),
    ],
)
def test_questions_that_mean_nothing(more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        asked("deepseek-v3", "8xh200", **more)


def test_models_without_a_part() -> None:
    with pytest.raises(PlanError, match="no MTP module"):
        asked("deepseek-v2-lite", "h100", drafts=1, acceptance=0.8)
    with pytest.raises(PlanError, match="this model is dense"):
        asked("deepseek-r1-distill-qwen-7b", "h100", offload="cpu")
    with pytest.raises(PlanError, match=r"unknown model 'deepseek-v9'.*deepseek-v"):
        config_of("deepseek-v9")


# --- what moves a step --------------------------------------------------------------------------------------
def rate(work: Work, on: str, batch: int, context: int, level: Any = "typical") -> float:
    machine = parse(on)
    return decode_step(work, machine, batch, context, efficiency(machine.device.kind, level)).rate


def test_a_step_by_hand() -> None:
    """One sequence of V2-Lite on a device of one terabyte a second without any loss: bytes / bandwidth."""
    from hadal.plan.roofline import IDEAL, ceiling

    work, machine = Work(LITE, "bf16", "bf16"), parse("memory=80GB, bandwidth=1TB/s, bf16=1000TFLOPS")
    n = LITE.parameters()
    assert ceiling(work, machine) == pytest.approx(1e12 / (2 * n.active_with_head), rel=1e-3)
    step = decode_step(work, machine, 1, 1000, IDEAL)
    assert step.seconds == pytest.approx((2 * n.active_with_head + 1000 * 31104) / 1e12, rel=1e-3)


def test_what_helps_and_what_hurts() -> None:
    work = Work(LITE, "bf16", "bf16")
    assert rate(work, "h100", 1, 4096) > rate(work, "h100", 1, 32768)
    assert rate(work, "h200", 1, 4096) > rate(work, "h100", 1, 4096)
    assert rate(work, "h100", 64, 4096) > rate(work, "h100", 8, 4096)
    assert rate(Work(LITE, "int4", "bf16"), "h100", 1, 4096) > rate(work, "h100", 1, 4096)
    levels = [rate(work, "h100", 8, 4096, level) for level in LEVELS]
    assert levels == sorted(levels)


def test_drafts_pay_by_acceptance() -> None:
    plain = rate(Work(V3, "fp8", "bf16"), "memory=1TB, bandwidth=3TB/s, bf16=989TFLOPS", 1, 4096)
    on = "memory=1TB, bandwidth=3TB/s, bf16=989TFLOPS"
    rates = [rate(Work(V3, "fp8", "bf16", drafts=1, acceptance=p), on, 1, 4096) for p in (0.0, 0.5, 0.9)]
    assert rates == sorted(rates) and rates[0] < plain < rates[2]


def test_communication_grows_with_what_crosses() -> None:
    of, machine = efficiency("hopper", "typical"), parse("16xh800, nodes=2")
    tp, ep = (Work(V3, "fp8", "bf16", x) for x in (Layout(tp=8, dp=2, ep=16), Layout(tp=1, dp=16, ep=16)))
    few, many = (communication(ep, machine, n, of, grouped=False) for n in (8, 512))
    assert many > 2 * few
    assert communication(ep, machine, 4096, of, grouped=True) < communication(
        ep, machine, 4096, of, grouped=False
    )
    assert communication(tp, machine, 512, of, grouped=False) > 0
    assert communication(Work(V3, "fp8", "bf16"), machine, 512, of, grouped=False) == 0


def test_prefill_grows_more_than_linearly() -> None:
    work, machine, of = Work(LITE, "bf16", "bf16"), parse("h100"), efficiency("hopper", "typical")
    short, long = (prefill(work, machine, n, of).seconds for n in (4096, 32768))
    assert long > 8 * short
