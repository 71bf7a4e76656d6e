"""The C++ kernels of `csrc/cpu.cpp`: built once by the machine's compiler, cached, called through ctypes.

Those for packed weights (`csrc/packed.cpp`, called from hadal/ops/cpu_packed.py) and for prompts
(`csrc/prompt.cpp`, hadal/ops/cpu_prompt.py) are in the same library.
The build takes seconds, on first use; the library's name carries a hash of source, compiler and processor.
`HADAL_CPU_ISA` = portable or avx2 builds for lesser processors than this one, for tests.
Without a compiler `available()` is False, the torch references run instead, and `hadal doctor` says so.
The references are in the file of each operation (`linear`, `experts`, `rms_norm`, `rope`, `gate`, `paged`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hadal.config import Moe
from hadal.ops.packed import Packed

SOURCE = Path(__file__).parent / "csrc" / "cpu.cpp"
PACKED = SOURCE.with_name("packed.cpp")
PROMPT = SOURCE.with_name("prompt.cpp")
HEADERS = [SOURCE.with_name(name) for name in ("pool.h", "numbers.h", "packed.h")]
# Sums may be reordered. Not -ffast-math: it flushes subnormal numbers to zero, in the whole process.
FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    "-std=c++17",
]

# Products with packed weights reorder nothing: cpu_packed.quantise_activations is held to the bit.
PACKED_FLAGS = [f for f in FLAGS if f not in ("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros")]


def cache_folder() -> Path:
    """Where built kernels are kept: $HADAL_CACHE, else ~/.cache/hadal."""
    return Path(os.environ.get("HADAL_CACHE") or Path.home() / ".cache" / "hadal") / "kernels"


@functools.cache
def status() -> tuple[Any, str]:
    """(library or None, why). Builds it if it is not in the cache."""
    return load_library(SOURCE, FLAGS, {PACKED: PACKED_FLAGS, PROMPT: FLAGS})


def load_library(
    source: Path, flags: list[str], also: Mapping[Path, list[str]] | None = None
) -> tuple[Any, str]:
    """(library or None, why) of source files, each with its flags, built if it is not in the cache."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return None, f"no kernels for {platform.machine()}"
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler (install g++ or clang++ for several times the speed)"
    try:
        path = _build(compiler, {source: flags, **(also or {})})
        library = ctypes.CDLL(str(path))
        library.set_threads(torch.get_num_threads())
        return library, f"{path.name}, built by {Path(compiler).name}"
    except (OSError, subprocess.SubprocessError) as error:
        detail = str(getattr(error, "stderr", None) or error)
        return (
            None,
            f"the kernels could not be built: {detail.strip().splitlines()[-1] if detail.strip() else error}",
        )


def available() -> bool:
    """True when the library is loaded."""
    return status()[0] is not None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def _flags(flags: list[str]) -> list[str]:
    """The flags for this processor, or for the lesser one that HADAL_CPU_ISA names."""
    isa = os.environ.get("HADAL_CPU_ISA", "native")
    instead = {"native": ["-march=native"], "avx2": ["-march=haswell"], "portable": []}
    if isa not in instead:
        raise ValueError(f"HADAL_CPU_ISA is {isa!r}; use {', '.join(instead)}")
    wide = isa == "native" and platform.machine() in ("x86_64", "AMD64")
    flags = [f for f in flags if "prefer-vector" not in f or wide]
    return [out for f in flags for out in (instead[isa] if f == "-march=native" else [f])]


def _build(compiler: str, sources: Mapping[Path, list[str]]) -> Path:
    """Compile into the cache under a name that no other source, flags, compiler or processor shares."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    flags = {source: _flags(own) for source, own in sources.items()}
    text = "".join(file.read_text() for file in [*sources, *HEADERS])
    key = "\0".join([text, str(list(flags.values())), version, _processor()])
    stem = next(iter(sources)).stem
    path = cache_folder() / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        commands = [
            [compiler, *own, "-w", "-fPIC", "-pthread", "-c", str(source), "-o", out]
            for (source, own), out in zip(flags.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as together:
            list(together.map(_compile, commands))
        library = f"{folder}/{stem}.so"
        _compile([compiler, "-shared", "-pthread", *objects, "-o", library])
        os.replace(library, path)
    return path


def _compile(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(status()[0], f"{name}_{'f32' if dtype == torch.float32 else 'bf16'}")
    p, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    function.restype = None
    function.argtypes = {
        "linear": [p] * 4 + [i] * 4,
        "experts": [p] * 6 + [i] * 5,
        "swiglu": [p] * 2 + [i] * 2,
        "rms_norm": [p] * 5 + [i] * 3 + [f],
        "rotate": [p] * 3 + [i] * 5 + [ctypes.c_int],
        "gate": [p] * 5 + [i] * 6 + [ctypes.c_int] * 3 + [f],
        "moe_block": [p, f],
        "block": [p, p],
        "per_head": [p] * 3 + [i] * 7,
        "write_latent": [p] * 6 + [i] * 4 + [f],
        "absorbed_query": [p] * 5 + [i] * 10,
        "decode": [p] * 5 + [i] * 9 + [f],
    }[name]
    return function


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x·Wᵀ + b for few rows."""
    if x.dim() != 2:
        return linear(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)
    stride, along = x.stride()
    if along != 1:
        x = x.contiguous()
        stride = x.stride(0)
    (rows, width), outs = x.shape, weight_OI.shape[0]
    out = torch.empty((rows, outs), dtype=x.dtype)
    bias = None if bias_O is None else bias_O.data_ptr()
    _function("linear", x.dtype)(
        x.data_ptr(), weight_OI.data_ptr(), bias, out.data_ptr(), rows, outs, width, stride
    )
    return out


def experts(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor
) -> Tensor:
    """The routed experts; only the chosen ones are read."""
    x_TD, expert_TK, weight_TK = x_TD.contiguous(), expert_TK.contiguous(), weight_TK.contiguous()
    out = torch.empty_like(x_TD)
    (T, K), (E, D, width) = expert_TK.shape, down_EDI.shape
    _function("experts", x_TD.dtype)(
        x_TD.data_ptr(),
        expert_TK.data_ptr(),
        weight_TK.data_ptr(),
        gate_up_E2ID.data_ptr(),
        down_EDI.data_ptr(),
        out.data_ptr(),
        T,
        K,
        E,
        D,
        width,
    )
    return out


def swiglu(x_T2I: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    x_T2I = x_T2I.contiguous()
    out = x_T2I.new_empty((x_T2I.shape[0], x_T2I.shape[1] // 2))
    _function("swiglu", x_T2I.dtype)(x_T2I.data_ptr(), out.data_ptr(), out.shape[0], out.shape[1])
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension; rows of a matrix may be strided."""
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width).contiguous()
    out = x.new_empty(x.shape)
    _function("rms_norm", x.dtype)(
        rows.data_ptr(),
        None,
        weight.data_ptr(),
        None,
        out.data_ptr(),
        rows.shape[0],
        width,
        rows.stride(0),
        eps,
    )
    return out


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm)."""
    x_TD, delta_TD = x_TD.contiguous(), delta_TD.contiguous()
    total, out = torch.empty_like(x_TD), torch.empty_like(x_TD)
    _function("rms_norm", x_TD.dtype)(
        x_TD.data_ptr(),
        delta_TD.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        x_TD.shape[0],
        x_TD.shape[1],
        x_TD.shape[1],
        eps,
    )
    return total, out


def rotate(x: Tensor, rotation_T2r: Tensor, interleaved: bool) -> Tensor:
    """Rotated copy of x [T, H, R] or [T, R]."""
    x_THR = x if x.dim() == 3 else x.unsqueeze(1)
    if x_THR.stride(2) != 1:
        x_THR = x_THR.contiguous()
    (T, H, R), rotation = x_THR.shape, rotation_T2r.contiguous()
    out = x.new_empty(x.shape)
    _function("rotate", x.dtype)(
        x_THR.data_ptr(),
        rotation.data_ptr(),
        out.data_ptr(),
        T,
        H,
        R // 2,
        x_THR.stride(0),
        x_THR.stride(1),
        int(interleaved),
    )
    return out


@functools.cache
def _gate_settings(moe: Moe) -> tuple[int, int, int, int, int, float]:
    """(groups, kept groups, sigmoid, sum of two, normalise, scale) as the kernels take them."""
    grouped = moe.topk_method != "greedy"
    normalise = moe.norm_topk_prob and moe.num_experts_per_tok > 1
    v3 = moe.topk_method == "noaux_tc"
    scale = moe.routed_scaling_factor if v3 or not normalise else 1.0
    groups = (moe.n_group, moe.topk_group) if grouped else (1, 1)
    return (*groups, int(moe.scoring_func == "sigmoid"), int(v3), int(normalise), scale)


def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, moe: Moe) -> tuple[Tensor, Tensor]:
    """(experts int64 [T, K], weights FP32 [T, K])."""
    x_TD, (T, D), (E, K) = x_TD.contiguous(), x_TD.shape, (moe.n_routed_experts, moe.num_experts_per_tok)
    expert = torch.empty((T, K), dtype=torch.int64)
    weight = torch.empty((T, K), dtype=torch.float32)
    _function("gate", x_TD.dtype)(
        x_TD.data_ptr(),
        weight_ED.data_ptr(),
        None if bias_E is None else bias_E.data_ptr(),
        expert.data_ptr(),
        weight.data_ptr(),
        T,
        D,
        E,
        K,
        *_gate_settings(moe),
    )
    return expert, weight


KIND = {"int8": 1, "int4": 2, "fp8": 3}  # of packed weights, as csrc/packed.h numbers them; 0 is a plain one
NONE = (0, 0)  # in place of a matrix that a network does not have


def matrix(weight: Tensor | Packed) -> tuple[int, int]:
    """A weight as the fused kernels take it: its address and its kind."""
    if isinstance(weight, Tensor):
        return weight.data_ptr(), 0
    return weight.codes.data_ptr(), KIND[weight.kind]


def moe_arguments(
    moe: Moe, gate: Tensor, bias: Tensor | None, weights: Sequence[int], wide: int
) -> tuple[list[int], float]:
    """(arguments, scale) of routed and shared experts for the fused kernels.

    `weights`: address and kind of gate_up and down, and of the shared expert's (NONE without one), whose
    width is `wide`.
    """
    *settings, scale = _gate_settings(moe)
    sizes = (moe.n_routed_experts, moe.num_experts_per_tok, moe.moe_intermediate_size, wide)
    router = (gate.data_ptr(), 0 if bias is None else bias.data_ptr())
    return [*sizes, *settings, *router, *weights], scale


def moe_block(x_TD: Tensor, residual_TD: Tensor, experts: tuple[list[int], float]) -> Tensor:
    """residual + routed and shared experts of normed x, in one call; `experts` from `moe_arguments`."""
    x_TD, residual_TD, out = x_TD.contiguous(), residual_TD.contiguous(), torch.empty_like(x_TD)
    arguments, scale = experts
    numbers = [x_TD.data_ptr(), residual_TD.data_ptr(), out.data_ptr(), *x_TD.shape, *arguments]
    _function("moe_block", x_TD.dtype)((ctypes.c_int64 * len(numbers))(*numbers), scale)
    return out


def block(
    x_SD: Tensor, step: Sequence[int], cache: int, layer: Sequence[int],
    eps: float, scale: float, expert_scale: float,
) -> Tensor:  # fmt: skip
    """A whole block for one token a sequence: norm, attention on the paged cache, norm, FFN or experts.

    The lists hold addresses and numbers in the order in which `block` of csrc/cpu.cpp reads them
    (hadal/model/fused.py puts them together): `step` what all layers share, `cache` the address of this
    layer's pages, `layer` its weights and sizes.
    """
    x_SD = x_SD.contiguous()
    out = torch.empty_like(x_SD)
    numbers = (x_SD.data_ptr(), out.data_ptr(), *x_SD.shape, *step, cache, *layer)
    _function("block", x_SD.dtype)(
        (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_float * 3)(eps, scale, expert_scale)
    )
    return out


def per_head(x_SHI: Tensor, weight_HOI: Tensor) -> Tensor:
    """Each head's rows times its own matrix [H, O, I]; [S, H, O]."""
    if x_SHI.stride(2) != 1:
        x_SHI = x_SHI.contiguous()
    (S, H, width), outs = x_SHI.shape, weight_HOI.shape[1]
    out = x_SHI.new_empty((S, H, outs))
    _function("per_head", x_SHI.dtype)(
        x_SHI.data_ptr(),
        weight_HOI.data_ptr(),
        out.data_ptr(),
        S,
        H,
        width,
        outs,
        x_SHI.stride(0),
        x_SHI.stride(1),
        weight_HOI.stride(0),
    )
    return out


def write_latent(
    kv_TC: Tensor, norm_L: Tensor, eps: float, rotation_T2r: Tensor, cache_PBC: Tensor, slot_T: Tensor
) -> Tensor:
    """Latent cache entries [T, C], also written to their slots."""
    kv_TC = kv_TC if kv_TC.stride(1) == 1 else kv_TC.contiguous()
    rotation, slot_T, (T, C), rank = (
        rotation_T2r.contiguous(),
        slot_T.contiguous(),
        kv_TC.shape,
        norm_L.shape[0],
    )
    entry = kv_TC.new_empty((T, C))
    _function("write_latent", kv_TC.dtype)(
        kv_TC.data_ptr(),
        norm_L.data_ptr(),
        rotation.data_ptr(),
        cache_PBC.data_ptr(),
        slot_T.data_ptr(),
        entry.data_ptr(),
        T,
        rank,
        (C - rank) // 2,
        kv_TC.stride(0),
        eps,
    )
    return entry


def absorbed_query(q_nope_SHn: Tensor, q_rope_SHR: Tensor, rotation_S2r: Tensor, up_HnL: Tensor) -> Tensor:
    """Queries over latent cache entries, [S, H, L + R]."""
    rotation, (S, H, n), L, R = (
        rotation_S2r.contiguous(),
        q_nope_SHn.shape,
        up_HnL.shape[2],
        q_rope_SHR.shape[2],
    )
    out = q_nope_SHn.new_empty((S, H, L + R))
    _function("absorbed_query", q_nope_SHn.dtype)(
        q_nope_SHn.data_ptr(),
        q_rope_SHR.data_ptr(),
        rotation.data_ptr(),
        up_HnL.data_ptr(),
        out.data_ptr(),
        S,
        H,
        n,
        L,
        R // 2,
        q_nope_SHn.stride(0),
        q_nope_SHn.stride(1),
        q_rope_SHR.stride(0),
        q_rope_SHR.stride(1),
        up_HnL.stride(0),
    )
    return out


def mla_decode(
    q_SHC: Tensor, cache_PBC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, rank: int, scale: float
) -> Tensor:
    """z [S, H, L]: every head shares the cached entries, whose first L values are the values."""
    q_SHC, (S, H, C) = q_SHC.contiguous(), q_SHC.shape
    out = q_SHC.new_empty((S, H, rank))
    _decode(q_SHC, cache_PBC, block_table_SP, context_len_S, out, 1, C, rank, C, 0, scale)
    return out


def gqa_decode(
    q_SHC: Tensor, cache_PB2GC: Tensor, block_table_SP: Tensor, context_len_S: Tensor, scale: float
) -> Tensor:
    """Output [S, H, C]; an entry holds G keys, then G values."""
    q_SHC, G, C = q_SHC.contiguous(), cache_PB2GC.shape[3], q_SHC.shape[2]
    out = torch.empty_like(q_SHC)
    _decode(q_SHC, cache_PB2GC, block_table_SP, context_len_S, out, G, C, C, 2 * G * C, G * C, scale)
    return out


def _decode(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    context: Tensor,
    out: Tensor,
    groups: int,
    width: int,
    v_width: int,
    entry: int,
    v_offset: int,
    scale: float,
) -> None:
    table, context = table.to(torch.int32), context.to(torch.int32).contiguous()
    if table.stride(1) != 1:
        table = table.contiguous()
    _function("decode", q.dtype)(
        q.data_ptr(),
        cache.data_ptr(),
        table.data_ptr(),
        context.data_ptr(),
        out.data_ptr(),
        q.shape[0],
        q.shape[1],
        groups,
        width,
        v_width,
        entry,
        v_offset,
        cache.shape[1],
        table.stride(0),
        scale,
    )
