"""A GRPO step of ours against TRL's GRPOTrainer with `transformers` generation: same weights, same settings.

    pip install --target /tmp/trl --no-deps trl accelerate datasets   # apart from Hadal: for this race only
    PYTHONPATH=/tmp/trl python benchmarks/race_trl.py --device cpu                # tiny shapes, a minute
    PYTHONPATH=/tmp/trl python benchmarks/race_trl.py --device cuda               # hadal-mini and Qwen 1.5B
    PYTHONPATH=/tmp/trl python benchmarks/race_trl.py --device cuda --models qwen-1.5b --prompts 16 \\
        --group 8 --prompt-tokens 128 --max-tokens 512 --micro 16 --rounds 3

Random weights, written once and read by both; hadal-mini's shape is a mixture of experts, the others are
dense. Both sample `--group` completions of `--max-tokens` tokens (the end is ignored) at temperature 1 for
each of `--prompts` prompts of about `--prompt-tokens` tokens, judge them by the same function in Python, take
group-relative advantages (dr-grpo, no KL), and make one AdamW update in micro-batches of `--micro`
completions. Ours keeps FP32 masters; TRL runs in the weights' dtype throughout, which is less work. No
gradient checkpointing on either side.

TRL's loop calls ours before each of its own steps, so that a drifting machine slows both: a round is a pair,
the first warms up, a ratio is the median of the rounds' ratios. "sampling" is generation with rewards,
"training" the rest of a step, both by the wall clock; on CUDA the device is waited for at each border.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Timed, clock, machine, save, shapes, spread
from rich.console import Console

from hadal.config import Gqa, ModelConfig, Rope
from hadal.model import Transformer
from hadal.post.grpo import GrpoRun, open_run
from hadal.post.rewards import Completion
from hadal.train.sources import ON_BOARD
from hadal.weights import save as save_weights

TINY = ModelConfig(
    "qwen2", 8192, 256, 768, 4, 4, Gqa(2, 64, True), Rope(1e6), tie_word_embeddings=True,
    max_position_embeddings=1024, bos_token_id=0, eos_token_id=(1,),
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": ["tiny-dense", "hadal-mini"], "prompts": 2, "group": 4, "prompt_tokens": 24,
            "max_tokens": 32, "micro": 4},
    "cuda": {"models": ["hadal-mini", "qwen-1.5b"], "prompts": 16, "group": 8, "prompt_tokens": 128,
             "max_tokens": 512, "micro": 16},
}  # fmt: skip
Times = dict[str, float]  # sampling, training: seconds of a step


def configs() -> dict[str, ModelConfig]:
    """Shapes to race."""
    return {"tiny-dense": TINY} | shapes()


def folder_of(config: ModelConfig, dtype: torch.dtype, device: str, path: Path) -> Path:
    """A published folder of random weights, with hadal-mini's tokenizer, padded to the vocabulary."""
    longest = min(4096, config.max_position_embeddings)
    config = replace(config, max_position_embeddings=longest, bos_token_id=0, eos_token_id=(1,))
    with torch.device(device):
        model = Transformer(config, dtype=dtype, device=device).init_weights(0)
    save_weights(model, path, dtype=dtype)
    tokenizer = json.loads((ON_BOARD / "tokenizer.json").read_text(encoding="utf-8"))
    known = 1 + max(*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"]))
    tokenizer["model"]["vocab"] |= {f"never{i}": i for i in range(known, config.vocab_size)}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(ON_BOARD / "tokenizer_config.json", path / "tokenizer_config.json")
    return path


def prompts(count: int, tokens: int) -> list[str]:
    """Texts of digits, of about so many tokens, all different."""
    return [" ".join(str((7 * i + 3 * j) % 10) for j in range(tokens // 2)) for i in range(count)]


def worth(token_ids: Sequence[int]) -> float:
    """The reward of both sides: the share of even ids."""
    return sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


# --- ours ---


def recipe(asked: argparse.Namespace, folder: Path, beside: Path) -> Path:
    """What ours runs by."""
    lines = [json.dumps({"prompt": text}) for text in prompts(asked.prompts, asked.prompt_tokens)]
    (beside / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dtype = "float32" if asked.device == "cpu" else "bfloat16"
    room = asked.prompt_tokens + 32
    table = {
        "run": {"name": "race", "seed": 1},
        "model": {"start": str(folder), "template": "deepseek-v2"},
        "tasks": [{"source": "jsonl", "path": str(beside / "prompts.jsonl"), "task": "race"}],
        "reward": [{"kind": "model"}],
        "objective": {"variant": "dr-grpo"},
        "sample": {"prompts": asked.prompts, "group": asked.group, "max_tokens": asked.max_tokens,
                   "max_prompt_tokens": room, "max_seqs": asked.prompts * asked.group},
        "train": {"steps": 1000, "dtype": dtype, "exact": False,
                  "max_pack_tokens": asked.micro * (asked.prompt_tokens + asked.max_tokens)},
        "mtp": {"weight": 0.0},
        "learning_rate": {"peak": 1e-6},
    }  # fmt: skip
    path = beside / "race.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def measure(completions: Sequence[Completion]) -> list[float]:
    return [worth(completion.token_ids) for completion in completions]


def ignoring_the_end(run: GrpoRun) -> None:
    """Completions of full length, whatever the model says."""
    sampler = run.policy.sampler
    usual = sampler._params
    sampler._params = lambda most, seed: replace(usual(most, seed), ignore_eos=True)  # type: ignore[method-assign]


# --- theirs ---


def their_trainer(asked: argparse.Namespace, folder: Path, beside: Path, rounds: int) -> Any:
    """TRL's trainer on the same folder; generation ends at the limit alone."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    cuda = asked.device == "cuda"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), padding_side="left",
    )  # fmt: skip
    tokenizer.bos_token, tokenizer.eos_token = (tokenizer.convert_ids_to_tokens(i) for i in (0, 1))
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if cuda else torch.float32)
    batch = asked.prompts * asked.group
    settings = GRPOConfig(
        output_dir=str(beside / "trl"), per_device_train_batch_size=min(asked.micro, batch),
        gradient_accumulation_steps=-(-batch // asked.micro), num_generations=asked.group,
        max_completion_length=asked.max_tokens, temperature=1.0, beta=0.0, loss_type="dr_grpo",
        scale_rewards="none", learning_rate=1e-6, lr_scheduler_type="constant", max_steps=rounds,
        gradient_checkpointing=False, bf16=cuda, use_cpu=not cuda, report_to=[], logging_strategy="no",
        save_strategy="no", disable_tqdm=True, shuffle_dataset=False, seed=1,
        generation_kwargs={"eos_token_id": None},
    )  # fmt: skip

    def reward(completion_ids: list[list[int]], **rest: Any) -> list[float]:
        return [worth(ids) for ids in completion_ids]

    data = Dataset.from_list([{"prompt": text} for text in prompts(asked.prompts, asked.prompt_tokens)])
    return GRPOTrainer(model, reward, args=settings, train_dataset=data, processing_class=tokenizer)


def race(asked: argparse.Namespace, folder: Path, beside: Path) -> dict[str, list[Times]]:
    """Rounds of both, in turn; the first left out."""
    from transformers import TrainerCallback

    now = clock(asked.device, asked.cpu_time)
    found: dict[str, list[Times]] = {"hadal": [], "trl": []}
    path = recipe(asked, folder, beside)
    with open_run(path, False, (), beside / "run", asked.device, Console(quiet=True), None, measure) as run:
        ignoring_the_end(run)
        trainer = their_trainer(asked, folder, beside, asked.rounds + 1)
        drawing = run.policy.sampler.draw = Timed(run.policy.sampler.draw, now)  # type: ignore[method-assign]
        making = trainer._generate_and_score_completions = Timed(trainer._generate_and_score_completions, now)
        begun, ends = 0.0, now() + (asked.seconds or math.inf)

        class Turns(TrainerCallback):  # type: ignore[misc]
            """Ours before each step of theirs."""

            def on_step_begin(self, *args: Any, **rest: Any) -> None:
                nonlocal begun
                begin = now()
                _, stats = run.policy.step()
                whole, sampling = now() - begin, drawing.take()
                assert stats.length == asked.max_tokens and stats.updates == 1, stats
                found["hadal"].append({"sampling": sampling, "training": whole - sampling})
                making.take()
                begun = now()

            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                whole, sampling = now() - begun, making.take()
                found["trl"].append({"sampling": sampling, "training": whole - sampling})
                print(f"  ours {found['hadal'][-1]}\n  TRL  {found['trl'][-1]}", flush=True)
                if len(found["trl"]) > 1 and now() > ends:
                    control.should_training_stop = True

        trainer.add_callback(Turns())
        trainer.train()
    return {who: times[1:] for who, times in found.items()}


def told(asked: argparse.Namespace, found: dict[str, list[Times]]) -> dict[str, Any]:
    """Tokens a second of both and their ratios: whole steps, sampling, training."""
    count = asked.prompts * asked.group
    sampled, trained = count * asked.max_tokens, count * (asked.max_tokens + asked.prompt_tokens)
    parts = {
        "whole step, sampled tokens": (sampled, ("sampling", "training")),
        "sampling": (sampled, ("sampling",)),
        "training, tokens fed": (trained, ("training",)),
    }
    table: dict[str, Any] = {}
    for name, (tokens, keys) in parts.items():
        rates = {who: [tokens / sum(t[k] for k in keys) for t in times] for who, times in found.items()}
        ratio = median(a / b for a, b in zip(rates["hadal"], rates["trl"], strict=True))
        table[name] = {"hadal": spread(rates["hadal"]), "trl": spread(rates["trl"]), "ratio": ratio}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--models", nargs="*", choices=list(configs()))
    for name, what in (
        ("prompts", "of a step"), ("group", "completions of each"), ("prompt-tokens", "about, of each"),
        ("max-tokens", "of each completion"), ("micro", "completions of a forward pass in training"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for one thread, busy machines")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="for each model: no round begins after so long")
    parser.add_argument("--out", help="folder of the JSON result (default: benchmarks/results)")
    parser.add_argument("--name", help="of the result; default race_trl_DEVICE")
    asked = parser.parse_args()
    for key, value in DEFAULTS[asked.device].items():
        setattr(asked, key, getattr(asked, key) or value)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl

    dtype = torch.float32 if asked.device == "cpu" else torch.bfloat16
    races: list[dict[str, Any]] = []
    for name in asked.models:
        with tempfile.TemporaryDirectory() as place:
            beside = Path(place)
            folder = folder_of(configs()[name], dtype, asked.device, beside / "model")
            found = race(asked, folder, beside)
        rows = told(asked, found)
        for key, row in rows.items():
            mine, their = row["hadal"]["median"], row["trl"]["median"]
            print(f"{name} {key}: {mine:,.1f} against {their:,.1f} tok/s, ×{row['ratio']:.2f}", flush=True)
        races.append({"model": name, "dtype": str(dtype).removeprefix("torch."), "against": "trl",
                      "rounds": len(found["trl"]), "rows": rows})  # fmt: skip
        written(asked, trl.__version__, races)  # what is raced stays, whatever comes after it
        gc.collect()
        if asked.device == "cuda":
            torch.cuda.empty_cache()


def written(asked: argparse.Namespace, version: str, races: list[dict[str, Any]]) -> None:
    """The result so far."""
    settings = {
        key: getattr(asked, key) for key in ("prompts", "group", "prompt_tokens", "max_tokens", "micro")
    }
    title = (
        f"GRPO step against TRL {version}: {asked.prompts} prompts × {asked.group}, "
        f"{asked.prompt_tokens} + {asked.max_tokens} tokens" + (", CPU seconds" if asked.cpu_time else "")
    )
    where = {**machine(asked.device), "trl": version}
    result = {"machine": where, "title": title, "settings": settings, "races": races}
    save(asked.name or f"race_trl_{asked.device}", result, asked.out)


if __name__ == "__main__":
    main()
