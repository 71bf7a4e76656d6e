"""Memory by part: groups that add up to what loading takes, cache entries, layouts."""

from __future__ import annotations

import pytest

from hadal.config import PRESETS, preset
from hadal.config.packing import KINDS, expert_bytes, expert_count, packed_bytes
from hadal.plan.figures import PlanError
from hadal.plan.fit import fit, needed
from hadal.plan.layout import Layout, layouts, memory_on_device, weights_on_device
from hadal.plan.memory import (
    cache_bytes_per_token,
    entry_bytes,
    expert_group_bytes,
    memory_bytes,
    weight_groups,
)

V3 = preset("deepseek-v3").config
LITE = preset("deepseek-v2-lite").config
LLAMA = preset("deepseek-r1-distill-llama-70b").config
GB = 10**9


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("mtp", [False, True])
def test_groups_add_up_to_what_loading_takes(name: str, mtp: bool) -> None:
    config = PRESETS[name].config
    n = config.parameters()
    for kind in KINDS:
        assert memory_bytes(config, kind, with_mtp=mtp) == packed_bytes(config, kind, mtp=mtp)
        assert expert_group_bytes(config, kind, with_mtp=mtp) == (
            expert_count(config, mtp=mtp) * expert_bytes(config, kind)
        )
    groups = weight_groups(config, "bf16", with_mtp=mtp)
    assert sum(g.parameters for g in groups) == n.main + (n.mtp_unique if mtp else 0)
    assert memory_bytes(config, "fp32", with_mtp=mtp) == 4 * sum(g.parameters for g in groups)


def test_scales_of_fp8() -> None:
    """V3's published scales, but for MLA's up-projection, which stays in BF16 in memory."""
    groups = weight_groups(V3, "fp8")
    up = 62 * (32768 // 128) * (512 // 128)
    assert sum(g.scales for g in groups) == 4 * (V3.parameters().fp8_scales - up)


def test_entries() -> None:
    assert entry_bytes(V3) == 1152 and entry_bytes(V3, "fp32") == 2304
    assert entry_bytes(V3, "fp8") == 656  # as FlashMLA's
    with pytest.raises(PlanError, match="FP8 cache is for MLA"):
        entry_bytes(LLAMA, "fp8")
    with pytest.raises(PlanError, match="kv-dtype is 'int4'"):
        entry_bytes(V3, "int4")  # type: ignore[arg-type]


def test_an_mtp_module_that_drafts_has_a_layer_of_cache() -> None:
    assert cache_bytes_per_token(V3, with_mtp=True) == 62 * 1152
    assert cache_bytes_per_token(LITE, with_mtp=True) == cache_bytes_per_token(LITE)  # it has no module
    with_it, without = (needed(V3, "bf16", 1000, with_mtp=m) for m in (True, False))
    assert with_it.cache - without.cache == 1000 * 1152


def test_offloaded_experts_leave_the_device() -> None:
    whole = needed(LITE, "bf16", 4096, device="gpu")
    away = needed(LITE, "bf16", 4096, device="gpu", offload="cpu")
    assert away.elsewhere == expert_group_bytes(LITE, "bf16") == whole.weights - away.weights
    assert needed(LITE, "bf16", 4096, device="cpu", offload="cpu").elsewhere == 0  # they are there anyway
    assert fit(LITE, "bf16", 64 * GB, 8 * GB, 4096).device == "cpu"
    fits = fit(LITE, "bf16", 64 * GB, 8 * GB, 4096, offload="cpu")
    assert fits.ok and fits.device == "gpu" and "of experts in host memory" in fits.message
    short = fit(LITE, "bf16", 24 * GB, 8 * GB, 4096, offload="cpu")
    assert not short.ok and short.device == "gpu"
    assert "its experts take 28.8 GB of host memory and 21.6 GB are usable" in short.message
    on_disk = fit(LITE, "bf16", 8 * GB, 0, 4096, offload="disk")
    assert on_disk.ok and "of experts in the files" in on_disk.message


def test_a_layout_divides_what_it_can() -> None:
    one = weights_on_device(V3, "fp8", Layout())
    assert sum(one.values()) == memory_bytes(V3, "fp8", with_mtp=False)
    eight = weights_on_device(V3, "fp8", Layout(tp=8, ep=8))
    assert eight["routed experts"] == one["routed experts"] / 8
    assert one["attention"] / 8 < eight["attention"] < one["attention"] / 4  # latents' projections are whole
    assert (
        weights_on_device(V3, "fp8", Layout(dp=144, ep=144))["routed experts"]
        == one["routed experts"] * 2 / 256
    )
    piped = weights_on_device(V3, "bf16", Layout(pp=16))
    assert "embedding" not in piped and piped["attention"] == pytest.approx(
        weights_on_device(V3, "bf16", Layout())["attention"] * 4 / 61
    )


def test_the_fullest_stage_has_expert_layers_alone() -> None:
    """V3: 61 layers, of which the first 3 are dense; 8 stages of 8 at most."""
    whole = weights_on_device(V3, "bf16", Layout())
    stage = weights_on_device(V3, "bf16", Layout(pp=8))
    for group in ("routed experts", "shared experts", "gates"):
        assert stage[group] == pytest.approx(whole[group] * 8 / 58)
    assert stage["dense feed-forward"] == 0
    assert stage["attention"] == pytest.approx(whole["attention"] * 8 / 61)
    assert stage["routed experts"] == 8 * 256 * 3 * 7168 * 2048 * 2


def test_tp_divides_the_cache_of_gqa_alone() -> None:
    def cache(config: object, layout: Layout) -> float:
        assert config in (V3, LLAMA)
        shape = V3 if config is V3 else LLAMA
        return memory_on_device(shape, layout, dtype="bf16", cache="bf16", context=1000, batch=8)["cache"]

    assert cache(V3, Layout(tp=8)) == cache(V3, Layout())
    assert cache(LLAMA, Layout(tp=8)) == cache(LLAMA, Layout()) / 8
    assert cache(LLAMA, Layout(tp=16)) == cache(LLAMA, Layout()) / 8  # eight key-value heads
    assert cache(V3, Layout(dp=8)) == cache(V3, Layout()) / 8


def test_layouts_use_all_devices_and_bad_ones_are_refused() -> None:
    for layout in layouts(V3, 16, 8):
        assert layout.devices == 16
        layout.check(V3, 16)
    with pytest.raises(PlanError, match="takes 16 devices; there are 8"):
        Layout(tp=16).check(V3, 8)
    with pytest.raises(PlanError, match="tp 3 does not divide"):
        Layout(tp=3).check(V3, 8)
    with pytest.raises(PlanError, match="this model is dense"):
        Layout(tp=8, ep=8).check(LLAMA, 8)
    with pytest.raises(PlanError, match="ep 3 does not divide"):
        Layout(tp=8, ep=3).check(V3, 8)
