"""Ours against llama.cpp on a CPU: same shapes, same weights, same machine, same run, in turns.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python gguf     # builds for minutes
    python benchmarks/race_llama_cpp.py --llama-python /tmp/llama/bin/python
    python benchmarks/race_llama_cpp.py --llama-python … --models ds-410m --pairs Q8_0:int8 --rounds 7

Both sides read one set of random weights: ours as it is, theirs as GGUF, written here (F32) and quantised by
llama.cpp itself with the recipe of `llama-quantize` (under Q4_0, a part of the matrices has more bits). With
`--check`, both continue a prompt greedily in FP32, and the tokens are compared: the work is the same.

llama.cpp is measured as `llama-bench` does it: `llama_decode` and its synchronisation alone, random tokens,
no sampling; so our side pays for scheduling and sampling, theirs does not. Its cache holds FP16, as by
default. Flash attention: on and off are tried in the warm-up, and each case takes the faster. Ours:
`Engine.step()`. Every round measures both, one after the other, in changing order; a ratio is the median of
the rounds' ratios. A measurement that neighbours disturbed is repeated, and how busy they were is kept.
Decode counts the steps after the prompts' own; "whole" counts all generated tokens over all seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine, save, shapes, spread

from hadal.bench.neighbours import Neighbours
from hadal.config import ModelConfig
from hadal.engine import Engine, SamplingParams
from hadal.model import Transformer

Case = tuple[int, int, int]  # sequences, prompt tokens, generated tokens
CASES: list[Case] = [(1, 256, 48), (16, 32, 48)]
CONTEXT = 320  # tokens a sequence may have
SEATS = max(case[0] for case in CASES)
MODELS = ("ds-410m", "qwen-0.5b")
PAIRS = ("F32:float32", "F16:bfloat16", "BF16:bfloat16", "Q8_0:int8", "Q4_0:int4")
REST_S = 0.2  # between two measurements: OpenMP's idle threads spin for a while
Times = dict[str, float]  # prefill_s, decode_s


class Theirs:
    """llama.cpp in its own process (llama_cpp_worker.py): one job at a time."""

    def __init__(self, python: str, threads: int) -> None:
        worker = str(Path(__file__).with_name("llama_cpp_worker.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.threads = threads
        self.about: dict[str, str] = self.ask("about")

    def ask(self, job: str, **details: Any) -> Any:
        """The worker's answer to one job; SystemExit with its fault."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": job, **details}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait(10)
            raise SystemExit(f"llama.cpp's process ended with status {status} in {job!r}: see above")
        reply = json.loads(line)
        if "error" in reply:
            raise SystemExit(f"llama.cpp's process failed in {job!r}: {reply['error']}")
        return reply["ok"]

    def open(self, path: Path) -> None:
        """Load a file for each case, with flash attention off and on."""
        for case in CASES:
            for flash in (False, True):
                name = f"{case[0]} {flash}"
                self.ask("open", name=name, path=str(path), threads=self.threads, sequences=case[0],
                         context=CONTEXT, flash=flash)  # fmt: skip

    def time(self, case: Case, flash: bool) -> Times:
        sequences, prompt, new = case
        name = f"{sequences} {flash}"
        return self.ask("time", name=name, sequences=sequences, prompt=prompt, new=new)

    def faster(self, case: Case) -> bool:
        """Whether flash attention is the faster for this case; three tries each, after a warm-up."""
        for flash in (False, True):
            self.time(case, flash)
        tries = [[sum(self.time(case, flash).values()) for flash in (False, True)] for _ in range(3)]
        off, on = map(min, zip(*tries, strict=True))
        return on < off

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Ours:
    """Hadal's engine on the weights of a folder, in one number format."""

    def __init__(self, folder: Path, kind: str) -> None:
        from hadal.weights import load

        if kind in ("float32", "bfloat16"):
            model = load(folder, dtype=getattr(torch, kind), max_positions=CONTEXT)
        else:
            model = load(folder, dtype=torch.float32, max_positions=CONTEXT, quantize=kind)
        self.engine = Engine(model, max_model_len=CONTEXT, max_num_seqs=SEATS, seed=0)
        self.draw = random.Random(0)

    def time(self, case: Case) -> Times:
        """Seconds until every sequence has a token, and from then to the end."""
        sequences, prompt, new = case
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        vocab = self.engine.vocab_size
        ids = [[self.draw.randrange(10, vocab - 10) for _ in range(prompt)] for _ in range(sequences)]
        begin = time.perf_counter()
        waiting = {self.engine.add(one, params) for one in ids}
        filled = 0.0
        while self.engine.has_work():
            for request, update in self.engine.step():
                assert update.error is None, update.error
                waiting.discard(request)
            if not waiting and not filled:
                filled = time.perf_counter()
        return {"prefill_s": filled - begin, "decode_s": time.perf_counter() - filled}

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        return list(self.engine.generate([prompt], params)[0].token_ids)


def make_files(name: str, config: ModelConfig, kinds: set[str], home: Path, theirs: Theirs) -> Path:
    """The folder of random FP32 weights, and GGUF files of these kinds beside it; what exists stays."""
    from hadal.weights import save as save_weights

    folder = home / name
    if not folder.exists():
        home.mkdir(parents=True, exist_ok=True)
        print(f"writing random weights: {folder}")
        save_weights(Transformer(config).init_weights(0), folder)
    wanted = [("F32", "write"), *((kind, "quantise") for kind in sorted(kinds - {"F32"}))]
    for kind, job in wanted:
        target = gguf(home, name, kind)
        if target.exists():
            continue
        print(f"writing {target}")
        if job == "write":
            theirs.ask(job, folder=str(folder), target=str(target))
        else:
            theirs.ask(job, source=str(gguf(home, name, "F32")), target=str(target), kind=kind)
    return folder


def gguf(home: Path, name: str, kind: str) -> Path:
    return home / f"{name}-{kind}.gguf"


def rates(case: Case, times: Times) -> dict[str, float]:
    """Tokens a second of one measurement, by row of the table."""
    sequences, prompt, new = case
    key = f"batch {sequences}, {prompt}/{new}"
    found = {
        f"{key}: decode": sequences * (new - 1) / times["decode_s"],
        f"{key}: whole": sequences * new / (times["prefill_s"] + times["decode_s"]),
    }
    if sequences == 1:
        found[f"prefill of {prompt}"] = prompt / times["prefill_s"]
    return found


def check(name: str, folder: Path, home: Path, theirs: Theirs) -> int:
    """Tokens of 16 on which both agree, greedily, in FP32: prints, and returns their number."""
    draw = random.Random(1)
    prompt = [draw.randrange(10, shapes()[name].vocab_size - 10) for _ in range(64)]
    mine = Ours(folder, "float32").greedy(prompt, 16)
    theirs.ask("open", name="check", path=str(gguf(home, name, "F32")), threads=theirs.threads,
               sequences=1, context=CONTEXT, flash=False)  # fmt: skip
    other = theirs.ask("greedy", name="check", prompt=prompt, new=16)
    theirs.ask("close")
    same = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), 16)
    print(f"{name}: the first {same} of 16 greedy tokens agree")
    return same


def race(
    name: str, pair: str, folder: Path, home: Path, theirs: Theirs, rounds: int, patience: float
) -> dict[str, Any]:
    kind, mine = pair.split(":")
    ours = Ours(folder, mine)
    theirs.open(gguf(home, name, kind))
    flash = {case: theirs.faster(case) for case in CASES}
    for case in CASES:
        ours.time(case)
    others = Neighbours([os.getpid(), theirs.process.pid])
    disturbed = 0.0
    found: dict[str, list[dict[str, float]]] = {"hadal": [], "llama.cpp": []}
    for number in range(rounds):
        sides: list[tuple[str, Callable[[Case], Times]]] = [
            ("hadal", ours.time),
            ("llama.cpp", lambda case: theirs.time(case, flash[case])),
        ]
        measured: dict[str, dict[str, float]] = {"hadal": {}, "llama.cpp": {}}
        for case in CASES:
            for who, run in sides if number % 2 == 0 else sides[::-1]:
                time.sleep(REST_S)
                times, cores = others.undisturbed(partial(run, case), patience)
                disturbed = max(disturbed, cores)
                measured[who] |= rates(case, times)
        for who in found:
            found[who].append(measured[who])
    theirs.ask("close")
    rows = {}
    for key in found["hadal"][0]:
        a, b = ([r[key] for r in found[who]] for who in ("hadal", "llama.cpp"))
        ratio = median(x / y for x, y in zip(a, b, strict=True))
        rows[key] = {"hadal": spread(a), "llama.cpp": spread(b), "ratio": ratio}
        print(f"{name} {mine} against {kind}, {key}: {median(a):,.1f} : {median(b):,.1f} tok/s, ×{ratio:.2f}")
    return {
        "model": name,
        "dtype": f"{mine} against {kind}",
        "against": "llama.cpp",
        "rounds": rounds,
        "flash_attention": {f"batch {case[0]}": on for case, on in flash.items()},
        "neighbours_cores_at_worst": round(disturbed, 2),
        "rows": rows,
        "every_round": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON",
                        help="a Python that has llama-cpp-python and gguf (default: this one)")  # fmt: skip
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=list(PAIRS), help="theirs:ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--patience", type=float, default=30.0, metavar="SECONDS",
                        help="how long to repeat a measurement while others use the processor")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="compare the greedy tokens of both first")
    parser.add_argument("--files", type=Path, help="folder of weights and GGUF files, kept between runs "
                        "(default: a temporary one; 3 GB a model)")  # fmt: skip
    parser.add_argument("--out", help="folder of the JSON result (default: benchmarks/results)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    theirs = Theirs(args.llama_python, args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        home = args.files or Path(temporary)
        try:
            races = [one for name in args.models for one in run_model(name, args, home, theirs)]
        finally:
            theirs.close()
    where = machine("cpu") | theirs.about | {"load": os.getloadavg()[0]}
    save(f"race_llama_cpp_{args.threads}t", {"machine": where, "races": races}, args.out)


def run_model(name: str, args: argparse.Namespace, home: Path, theirs: Theirs) -> list[dict[str, Any]]:
    kinds = {pair.split(":")[0] for pair in args.pairs}
    folder = make_files(name, shapes()[name], kinds, home, theirs)
    agreed = check(name, folder, home, theirs) if args.check else None
    found = [race(name, pair, folder, home, theirs, args.rounds, args.patience) for pair in args.pairs]
    return found if agreed is None else [{**one, "greedy_tokens_agreed": agreed} for one in found]


if __name__ == "__main__":
    main()
