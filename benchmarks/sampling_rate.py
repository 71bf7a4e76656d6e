"""Sampling inside `hadal grpo` against the engine alone, at the same shapes: the roll-out's overhead.

    python benchmarks/sampling_rate.py                                     # hadal-mini, this CPU
    python benchmarks/sampling_rate.py --device cuda --prompts 32 --group 16 --max-tokens 512
    python benchmarks/sampling_rate.py --exact

A round is a pair: a roll-out as a step draws it (prompts of recipes/grpo-smoke.toml through the chat
template, completions with the sampler's log-probabilities, text, rewards), and `Engine.generate` of an engine
of its own on the same prompts, without log-probabilities and rewards. Completions have all `--max-tokens`
tokens on both sides. The ratio is the median of the rounds' ratios; the first round warms up.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from common import Timed, clock, machine, save, spread
from rich.console import Console

from hadal.engine import Engine, SamplingParams
from hadal.ops import exact_cpu
from hadal.post.grpo import GrpoRun, open_run
from hadal.post.rollout import PAGE

ROOT = Path(__file__).resolve().parent.parent


def alone(run: GrpoRun, asked: argparse.Namespace) -> Engine:
    """An engine with the options of a user, on the same tensors and with as many seats."""
    inside = run.policy.sampler.engine
    return Engine(
        run.model, run.base.tokenizer, run.base.template, max_model_len=run.recipe.sample.longest,
        max_num_seqs=asked.prompts * asked.group, page_size=PAGE, exact=asked.exact,
        cache_bytes=run.policy.sampler._cache_bytes(run.model, inside.scheduler.max_num_seqs),
    )  # fmt: skip


def rounds(run: GrpoRun, asked: argparse.Namespace) -> list[dict[str, float]]:
    """Tokens a second of both, for each round."""
    sampler, engine = run.policy.sampler, alone(run, asked)
    usual = sampler._params
    sampler._params = lambda most, seed: replace(usual(most, seed), ignore_eos=True)  # type: ignore[method-assign]
    now = clock(asked.device, asked.cpu_time)
    judge = sampler._judge = Timed(sampler._judge, now)  # type: ignore[method-assign]
    found: list[dict[str, float]] = []
    ends = math.inf
    for number in range(asked.rounds + 1):
        if number == 1:  # the first compiles
            ends = now() + (asked.seconds or math.inf)
        if number > 1 and now() > ends:
            break
        begin = now()
        drawn = sampler.draw(number * asked.prompts, 0.0, lambda group: True)
        inside = now() - begin
        sampler.weights_changed()
        prompts = [group.prompt for group in drawn.groups for _ in range(asked.group)]
        params = SamplingParams(
            temperature=run.recipe.sample.temperature, max_tokens=asked.max_tokens, ignore_eos=True
        )
        begin = now()
        done = engine.generate(prompts, params)
        outside = now() - begin
        engine.scheduler.pages.forget_prefixes()
        tokens = sum(len(one.token_ids) for one in done)
        assert tokens == drawn.tokens == asked.prompts * asked.group * asked.max_tokens
        found.append({"inside": tokens / inside, "alone": tokens / outside,
                      "rewards": judge.take() / inside})  # fmt: skip
        print(f"  {found[-1]}", flush=True)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "grpo-smoke.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="after the first round no other begins after so long")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread, busy machines")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="folder of the JSON result (default: benchmarks/results)")
    parser.add_argument("--name", help="of the result; default sampling_rate_DEVICE")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.device == "cpu":
        exact_cpu.set_threads(asked.threads)
    seats = asked.prompts * asked.group
    changes = [
        f"sample.prompts={asked.prompts}", f"sample.group={asked.group}",
        f"sample.max_tokens={asked.max_tokens}", f"sample.max_seqs={seats}",
        f"train.exact={str(asked.exact).lower()}", *asked.set,
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(
            asked.recipe, False, changes, Path(folder) / "run", asked.device, Console(quiet=True)
        ) as run,
    ):
        found = rounds(run, asked)
        name = run.base.name
    ratio = median(one["inside"] / one["alone"] for one in found)
    inside, outside = (spread([one[key] for one in found]) for key in ("inside", "alone"))
    share = median(one["rewards"] for one in found)
    rates = f"inside {inside['median']:,.0f}, alone {outside['median']:,.0f} tok/s"
    print(f"{rates}, ×{ratio:.2f}; rewards {share:.1%}")
    how = f"{name}{', exact' if asked.exact else ''}, {asked.prompts} prompts × {asked.group}"
    row = [f"{seats} sequences", inside["median"], outside["median"], f"**{ratio:.2f}×**", f"{share:.1%}"]
    result = {
        "machine": {**machine(asked.device), "threads": asked.threads},
        "title": f"Sampling inside `hadal grpo` and by the engine alone: {how}, {asked.max_tokens} tokens",
        "columns": ["tokens a second", "in a roll-out", "engine alone", "ratio", "share of rewards"],
        "rows": [row],
        "notes": "Roll-outs have the sampler's log-probabilities, seeds, text and rewards. "
        + ("CPU seconds, not the wall clock." if asked.cpu_time else ""),
        "rounds": found,
    }  # fmt: skip
    save(asked.name or f"sampling_rate_{asked.device}", result, asked.out)


if __name__ == "__main__":
    main()
