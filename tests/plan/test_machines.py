"""Machines in words: known names, near names, figures, clusters; and nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hadal.plan.figures import PlanError
from hadal.plan.machines import amount, device, devices, parse


def test_the_ways_to_name_a_machine() -> None:
    colab = parse("A100-40GB, 52GB RAM")
    assert (colab.device.name, colab.count, colab.ram) == ("a100-40", 1, 52e9)
    assert parse("8xH800").memory == 640e9 and parse("8 × h800").count == 8
    apple = parse("m1-max-64")
    assert apple.device.memory == apple.ram == 64e9 and apple.device.unified
    own = parse("memory=24GB, bandwidth=1008GB/s, bf16=165TFLOPS")
    assert own.device.bandwidth == 1008e9 and own.device.flops == {"bf16": 165e12}
    host = parse("64GB RAM, bandwidth=80GB/s, fp32=1TFLOPS")
    assert host.device.is_cpu and host.memory == 64e9 and host.device.kind == "cpu"
    known = parse("16xh100, nodes=2, network=50GB/s")
    assert (known.nodes, known.per_node, known.device.network) == (2, 8, 50e9)
    assert parse("2048xH800").nodes == 256


def test_a_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'device = "h800"\nnodes = 4\ndevices_per_node = 8\nram = "2TB"\nnetwork = "50GB/s"\n', "utf-8"
    )
    machine = parse(str(file))
    assert (machine.count, machine.nodes, machine.ram) == (32, 4, 2e12)
    with pytest.raises(PlanError, match="unknown device"):
        parse(str(file), files=False)
    file.write_text('devise = "h800"\n', "utf-8")
    with pytest.raises(PlanError, match=r"unknown key 'devise'.*device"):
        parse(str(file))
    file.write_text("device = ", "utf-8")
    with pytest.raises(PlanError, match="is no TOML"):
        parse(str(file))
    with pytest.raises(PlanError, match="No such file"):
        parse(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("h1000", "unknown device 'h1000'. Did you mean h100"),
        ("A100", "a100-40 or a100-80"),
        ("RTX 4080", "Did you mean 'rtx-4090'"),
        ("dgx", "given by its figures"),
        ("m1-max-48", "32 or 64 GB"),
        ("h100, h200", "two kinds of device"),
        ("bandwidth=1GB/s", "names no device"),
        ("h100, memori=24GB", "unknown figure 'memori'.*memory"),
        ("h100, memory=many", "memory is 'many'"),
        ("h100, memory=0GB", "positive number"),
        ("h100,,8GB RAM", "empty part"),
        ("ddr5-2ch", "how much"),
        ("0xh100", "at least 1"),
        ("10xh100, nodes=4", "do not spread"),
    ],
)
def test_refusals(words: str, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        parse(words)


def test_amounts() -> None:
    assert amount("24GB", "x") == 24e9 and amount("80GiB", "x") == 80 * 2**30
    assert (
        amount("165TFLOPS", "x") == 165e12 and amount("50 GB/s", "x") == 50e9 and amount("400W", "x") == 400
    )


def test_every_known_device_says_where_its_figures_are_from() -> None:
    for name, known in devices().items():
        assert known.source and known.date and known.bandwidth, name
        assert known.is_cpu or known.flops, name
        assert ("fp8" in known.flops) == (known.lacks_fp8 is None) or known.is_cpu, name


def test_arithmetic_of_weights() -> None:
    """FP8 without FP8 units is multiplied in BF16; integers too; a T4 has FP16 alone."""
    assert device("h100").peak("fp8") == (1979e12, "fp8") and device("a100-80").peak("fp8") == (
        312e12,
        "bf16",
    )
    assert device("h100").peak("int4") == (989e12, "bf16") and device("t4").peak("bf16") == (65e12, "fp16")


def test_the_h800_has_the_memory_of_an_h100() -> None:
    """What was cut is NVLink, not memory bandwidth."""
    cut, whole = device("h800"), device("h100")
    assert cut.bandwidth == whole.bandwidth == 3350e9 and (cut.link, whole.link) == (400e9, 900e9)
