"""The memory arithmetic against published figures, and its verdicts at the edges."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hadal.config import PRESETS, preset
from hadal.plan.fit import USABLE, alternatives, fit, memory_bytes, needed

GB = 10**9
V3 = preset("DeepSeek-V3").config
LITE = preset("DeepSeek-V2-Lite").config
QWEN_1B = preset("DeepSeek-R1-Distill-Qwen-1.5B").config


def test_published_sizes() -> None:
    """V3: 1,342 GB in BF16 and 671 GB in FP8 without MTP; V2-Lite 29.25 GiB; caches of ISCA'25's table 1."""
    assert round(memory_bytes(V3, "bf16", with_mtp=False) / GB) == 1342
    assert 671 <= memory_bytes(V3, "fp8", with_mtp=False) / GB < 675
    assert memory_bytes(LITE, "bf16") / 2**30 == pytest.approx(29.25, abs=0.01)
    for name, per_token in [
        ("DeepSeek-V3", 70_272),
        ("DeepSeek-V2", 69_120),
        ("DeepSeek-V2-Lite", 31_104),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 28_672),
        ("DeepSeek-R1-Distill-Qwen-7B", 57_344),
        ("DeepSeek-R1-Distill-Llama-8B", 131_072),
        ("DeepSeek-R1-Distill-Qwen-32B", 262_144),
    ]:
        assert needed(preset(name).config, "bf16", 1000, with_mtp=False).cache == 1000 * per_token


def test_mtp_shares_embedding_and_head() -> None:
    with_mtp, without = memory_bytes(V3, "bf16"), memory_bytes(V3, "bf16", with_mtp=False)
    assert with_mtp - without == 2 * 11_610_068_224 + 2 * 256  # its parameters in BF16, its gate bias in FP32


def test_v3_does_not_fit_where_notes_say_it_does() -> None:
    """Eight A100-80 together hold 640 GB: neither 671 GB of FP8 nor 1,342 GB of BF16, and one device far
    less.
    """
    for dtype in ("fp8", "bf16"):
        verdict = fit(V3, dtype, 640 * GB, 80 * GB)
        assert not verdict.ok
        assert verdict.needed.total > 640 * GB
        for part in (
            "does not fit",
            "of weights in",
            "of cache for 163,840 tokens",
            "usable",
            "would hold it",
        ):
            assert part in verdict.message
        assert "\n" not in verdict.message
    assert fit(V3, "bf16", 2000 * GB, 0, 4096).ok


def test_gpu_first_then_ram() -> None:
    assert fit(LITE, "bf16", 256 * GB, 80 * GB, 4096).device == "gpu"
    on_cpu = fit(LITE, "bf16", 256 * GB, 24 * GB, 4096)
    assert on_cpu.ok and on_cpu.device == "cpu" and "of RAM are usable" in on_cpu.message
    nowhere = fit(LITE, "bf16", 16 * GB, 24 * GB, 4096)
    assert not nowhere.ok


def test_a_shorter_context_where_the_whole_one_does_not_fit() -> None:
    verdict = fit(QWEN_1B, "bf16", 6 * GB)
    assert verdict.ok and 4096 <= verdict.context < 131_072 and verdict.context % 64 == 0
    assert f"{verdict.context:,} of 131,072 tokens" in verdict.message
    assert verdict.needed.total <= verdict.available
    one_more = needed(QWEN_1B, "bf16", verdict.context + 64)
    assert one_more.total > verdict.available


def test_the_edge_is_exact() -> None:
    need = needed(QWEN_1B, "bf16", 8192)
    enough = -(-need.total * 10 // 9) + 2
    assert fit(QWEN_1B, "bf16", enough, 0, 8192).context == 8192
    assert fit(QWEN_1B, "bf16", int(need.total / USABLE) - 10**6, 0, 8192).context < 8192
    weights = needed(QWEN_1B, "bf16", 4096)
    assert not fit(QWEN_1B, "bf16", int(weights.total / USABLE) - 10**6, 0, 4096).ok


def test_more_sequences_need_more_cache() -> None:
    one, eight = (needed(LITE, "bf16", 4096, sequences=n) for n in (1, 8))
    assert eight.cache == 8 * one.cache and eight.weights == one.weights
    assert needed(LITE, "fp32", 4096).cache == 2 * one.cache


def test_alternatives_are_smaller_and_fit() -> None:
    verdict = fit(V3, "bf16", 24 * GB)
    assert verdict.alternatives[0] == "deepseek-r1-distill-llama-8b"
    assert "deepseek-r1-distill-qwen-7b" in verdict.alternatives
    assert all(name in verdict.message for name in verdict.alternatives)
    for ram in (1 * GB, 5 * GB, 24 * GB, 100 * GB, 900 * GB):
        for name in alternatives(V3, "bf16", ram):
            assert fit(preset(name).config, "bf16", ram, 0, 4096).ok, (ram, name)
    assert alternatives(V3, "bf16", 1 * GB) == ("hadal-mini", "hadal-mini-dense")
    assert fit(preset("hadal-mini").config, "fp32", 2 * GB).ok


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_somewhere_and_not_nowhere(name: str) -> None:
    config = preset(name).config
    assert fit(config, "bf16", 3000 * GB).ok
    verdict = fit(config, "bf16", 0)
    assert not verdict.ok and verdict.alternatives == ()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="ram_bytes is -1"):
        fit(LITE, "bf16", -1)
    with pytest.raises(ValueError, match="sequences is 0"):
        fit(LITE, "bf16", 1, sequences=0)


def test_no_torch() -> None:
    code = "import sys, hadal.plan.fit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
