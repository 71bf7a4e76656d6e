"""What `hadal doctor` says of each operation is what the operation does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

from hadal import ops
from hadal.config import Moe
from hadal.ops import cpu, cpu_packed, cpu_prompt, experts, gate, linear, packed, paged, rms_norm, rope

OPERATIONS = [
    "linear layers",
    "routed experts",
    "gate",
    "norms",
    "rotary embedding",
    "MLA decode",
    "GQA decode",
    "packed weights",
    "attention, prefill",
    "FP8 dequantisation",
    "sampling",
    "with --exact",
]


def test_every_operation_has_a_path_and_a_reason():
    rows = ops.paths()
    assert [operation for operation, _, _ in rows] == OPERATIONS
    assert all(path and reason and "\n" not in path + reason for _, path, reason in rows)


@pytest.mark.parametrize("fast", [True, False])
def test_the_report_of_a_gpu_has_the_same_operations(fast):
    pytest.importorskip("triton")
    from hadal.ops import report

    rows = report._cuda(fast)
    assert [operation for operation, _, _ in rows] == OPERATIONS[: len(rows)]
    assert all(path.startswith("Triton" if fast else "torch") and reason for _, path, reason in rows)


def run(name: str, rows: int) -> None:
    """The operation `name` on `rows` tokens, as inference calls it."""
    x, page = torch.randn(rows, 16), torch.zeros(1, 4, 16)
    table, context = torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    moe = Moe(4, 0, 2, 8, scoring_func="softmax", topk_method="greedy")
    calls = {
        "linear layers": lambda: linear.linear(x, torch.randn(3, 16)),
        "routed experts": lambda: experts.experts(
            x,
            torch.zeros(rows, 1, dtype=torch.int64),
            torch.ones(rows, 1),
            torch.randn(4, 16, 16),
            torch.randn(4, 16, 8),
        ),
        "gate": lambda: gate.gate(x, torch.randn(4, 16), None, moe),
        "norms": lambda: rms_norm.rms_norm(x, torch.ones(16), 1e-6),
        "rotary embedding": lambda: rope.rotate_half(x.unsqueeze(1), torch.ones(rows, 2, 8)),
        "MLA decode": lambda: paged.mla_decode(x.unsqueeze(1), page, table, context, 12, 1.0),
        "GQA decode": lambda: paged.gqa_decode(
            x.unsqueeze(1), torch.zeros(1, 4, 2, 1, 16), table, context, 1.0
        ),
        "packed weights": lambda: linear.linear(x, packed.pack(torch.randn(3, 16), "int8").prepare()),
    }
    calls[name]()


KERNELS = {
    "linear layers": "linear",
    "routed experts": "experts",
    "gate": "gate",
    "norms": "rms_norm",
    "rotary embedding": "rotate",
    "MLA decode": "mla_decode",
    "GQA decode": "gqa_decode",
    "packed weights": "linear",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the report is about CUDA here")
@pytest.mark.parametrize("name", KERNELS)
def test_the_report_is_true_on_cpu(name, monkeypatch):
    """A C++ kernel is called where the report says C++, and nowhere else."""
    path = {operation: path for operation, path, _ in ops.paths()}[name]
    called = []
    modules = [cpu_packed if name == "packed weights" else cpu]
    if name in ("linear layers", "routed experts"):
        modules.append(cpu_prompt)
    for module in modules:
        kernel = getattr(module, KERNELS[name])
        spy = functools.partial(lambda kernel, *args: called.append(1) or kernel(*args), kernel)
        monkeypatch.setattr(module, KERNELS[name], spy)
    with torch.inference_mode():
        run(name, 1)
        assert bool(called) == path.startswith("C++")
        called.clear()
        run(name, 1100)  # above every limit in the report
        assert bool(called) == (path.startswith("C++") and "then torch" not in path)


def test_without_kernels_the_reason_says_so():
    """HADAL_OPS=reference, and a machine without a compiler, in processes of their own."""
    code = "from hadal import ops; print(*ops.paths(), sep='\\n')"
    forced = {**os.environ, "HADAL_OPS": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=forced, capture_output=True, text=True, check=True
    )
    assert "C++" not in done.stdout and "Triton" not in done.stdout
    assert done.stdout.count("HADAL_OPS=reference" if cpu.available() else "forces") >= 1
    if torch.cuda.is_available():
        return
    bare = {**os.environ, "PATH": "/nowhere", "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.count("no C++ compiler") == 9, done.stdout
