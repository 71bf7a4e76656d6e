"""Ours against Hugging Face `transformers`: same shape and dtype, random weights, greedy, one machine.

    python benchmarks/race_transformers.py --device cpu                 # hadal-mini and Qwen 0.5B
    python benchmarks/race_transformers.py --device cuda                # V2-Lite and Qwen 1.5B
    python benchmarks/race_transformers.py --device cpu --models qwen-0.5b --dtypes bfloat16 --rounds 5

The engines take turns in every round (ours, theirs, ours, theirs, …), so that a drifting machine slows both;
a ratio is the median of the rounds' ratios. `transformers` runs `generate` with its defaults: dynamic cache,
its own choice of attention. Rates: decode = generated tokens over the whole time of a call less its prefill,
measured by a call that generates one token; "whole" keeps the prefill in. On CUDA the models live on the card
one after the other.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import machine, save, shapes, spread

from hadal.config import ModelConfig
from hadal.engine import Engine, SamplingParams
from hadal.model import Transformer

Case = tuple[int, int, int]  # sequences, prompt tokens, generated tokens
CASES: dict[str, list[Case]] = {"cpu": [(1, 128, 48), (16, 32, 48)], "cuda": [(1, 128, 128), (32, 512, 64)]}
PREFILL = {"cpu": 256, "cuda": 4000}
Timer = Callable[[int, int, int], float]  # seconds of one call


def prompts(config: ModelConfig, sequences: int, length: int) -> torch.Tensor:
    """Random token ids, other ones at every call: no cache of prefixes can help."""
    return torch.randint(10, config.vocab_size - 10, (sequences, length))


def ours(config: ModelConfig, dtype: torch.dtype, device: str) -> Timer:
    with torch.inference_mode(False):
        model = Transformer(config, dtype=dtype, device=device, max_positions=8192).init_weights(0).eval()
    engine = Engine(model, max_model_len=min(8192, config.max_position_embeddings), max_num_seqs=32, seed=0,
                    max_num_batched_tokens=16384 if device == "cuda" else None)  # fmt: skip

    def run(sequences: int, length: int, new: int) -> float:
        ids = prompts(config, sequences, length).tolist()
        begin = time.perf_counter()
        done = engine.generate(ids, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
        seconds = time.perf_counter() - begin
        assert all(len(c.token_ids) == new for c in done)
        return seconds

    return run


def theirs(config: ModelConfig, dtype: torch.dtype, device: str) -> Timer:
    import transformers

    kind = config.model_type
    settings = {k: v for k, v in config.to_hf().items() if k not in ("model_type", "quantization_config")}
    hf_config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()

    @torch.inference_mode()
    def run(sequences: int, length: int, new: int) -> float:
        ids = prompts(config, sequences, length).to(device)
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
            pad_token_id=0,
        )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        assert out.shape[1] == length + new
        return seconds

    return run


def measure(run: Timer, device: str) -> dict[str, float]:
    """Rates of one round, tokens per second."""
    rates = {}
    for sequences, length, new in CASES[device]:
        first = run(sequences, length, 1)
        whole = run(sequences, length, new)
        key = f"batch {sequences}, {length}/{new}"
        rates[f"{key}: decode"] = sequences * (new - 1) / max(whole - first, 1e-9)
        rates[f"{key}: whole"] = sequences * new / whole
    rates[f"prefill of {PREFILL[device]}"] = PREFILL[device] / run(1, PREFILL[device], 1)
    return rates


def race(name: str, config: ModelConfig, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    makers = {"hadal": ours, "transformers": theirs}
    rates: dict[str, list[dict[str, float]]] = {who: [] for who in makers}
    if device == "cpu":
        runs = {who: make(config, dtype, device) for who, make in makers.items()}
        for run in runs.values():
            measure(run, device)  # warm-up
        for _ in range(rounds):
            for who, run in runs.items():
                rates[who].append(measure(run, device))
    else:  # two 30 GB models do not fit one card together
        for who, make in makers.items():
            run = make(config, dtype, device)
            measure(run, device)
            rates[who] = [measure(run, device) for _ in range(rounds)]
            del run
            gc.collect()
            torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "rows": {},
    }
    for key in rates["hadal"][0]:
        mine, hf = ([r[key] for r in rates[who]] for who in ("hadal", "transformers"))
        ratio = median(a / b for a, b in zip(mine, hf, strict=True))
        result["rows"][key] = {"hadal": spread(mine), "transformers": spread(hf), "ratio": ratio}
        rate = f"{median(mine):,.1f} against {median(hf):,.1f} tok/s, ×{ratio:.2f}"
        print(f"{name} {result['dtype']} {key}: {rate}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--models", nargs="*", choices=list(shapes()))
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="folder of the JSON result (default: benchmarks/results)")
    args = parser.parse_args()
    models = args.models or (
        ["hadal-mini", "qwen-0.5b"] if args.device == "cpu" else ["v2-lite", "qwen-1.5b"]
    )
    dtypes = args.dtypes or (["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"])
    races = [
        race(name, shapes()[name], getattr(torch, dtype), args.device, args.rounds)
        for name in models
        for dtype in dtypes
    ]
    save(f"race_transformers_{args.device}", {"machine": machine(args.device), "races": races}, args.out)


if __name__ == "__main__":
    main()
