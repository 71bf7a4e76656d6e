"""`python -m hadal.train RECIPE …`: the trainer by itself, without the rest of the command line.

A program: like `hadal.cli` it stands above the rooms that it puts together.
"""

from __future__ import annotations

import argparse
import sys

from hadal.config import ConfigError
from hadal.data.shards import ShardError
from hadal.evals.in_training import examine
from hadal.text.tokenizer import TokenizerError
from hadal.train.fp8_report import fp8_report, lines
from hadal.train.graphs import GraphError
from hadal.train.main import train
from hadal.train.nonfinite import NonFiniteError
from hadal.train.recipe import RecipeError
from hadal.train.state import CheckpointError
from hadal.weights import WeightsError


def main() -> int:
    """0: finished, or stopped on purpose with a checkpoint; 1: an error, told in one line."""
    parser = argparse.ArgumentParser(prog="hadal train", description="Train a model by a recipe.")
    parser.add_argument("recipe", help="a TOML recipe, e.g. recipes/mini.toml")
    parser.add_argument("--out", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if there is one"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--fp8-report",
        action="store_true",
        help="tell what FP8 does to every product of a step; train nothing",
    )
    parser.add_argument("--fp8-report-steps", type=int, default=0, metavar="N", help="after N more steps")
    args = parser.parse_args()
    try:
        if args.fp8_report:
            return _fp8_report(args)
        train(
            args.recipe,
            resume=args.resume,
            overrides=args.overrides,
            out=args.out,
            device=args.device,
            examine=examine,
        )
    except (
        RecipeError,
        CheckpointError,
        GraphError,
        NonFiniteError,
        ConfigError,
        ShardError,
        TokenizerError,
        WeightsError,
    ) as e:
        print(f"hadal train: {e}", file=sys.stderr)
        return 1
    return 0


def _fp8_report(args: argparse.Namespace) -> int:
    report, path = fp8_report(
        args.recipe,
        steps=args.fp8_report_steps,
        resume=args.resume,
        overrides=args.overrides,
        out=args.out,
        device=args.device,
    )
    print("\n".join([*lines(report), "", f"written: {path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
