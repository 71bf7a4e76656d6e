"""`hadal data prepare` on one core: tokens a minute, through all stages, with a tokenizer that fits the text.

    python benchmarks/data_rate.py corpus/*.jsonl.gz --evaluations tests.jsonl --save

The goal is 1M tokens a minute and core. --save keeps the result: on a quiet machine only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from common import machine, save

from hadal.data.prepare import prepare
from hadal.data.recipe import DataRecipe
from hadal.data.strict import build
from hadal.data.vocabulary import train_tokenizer

GOAL = 1e6


def recipe(files: list[str], evaluations: list[str], tokenizer: Path) -> DataRecipe:
    """Every stage at work."""
    made = build(DataRecipe, {
        "name": "rate", "source": [{"name": "text", "paths": files}],
        "decontaminate": {"paths": evaluations}, "fim": {"rate": 0.1}, "heldout": {"share": 0.01},
        "tokens": {"tokenizer": str(tokenizer), "split_rate": 0.1},
    })  # fmt: skip
    assert isinstance(made, DataRecipe)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--evaluations", nargs="*", default=[])
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    files, evaluations = (
        [str(Path(f).resolve()) for f in group] for group in (asked.files, asked.evaluations)
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rates, report = [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train_tokenizer(files, folder / "tokenizer", vocabulary=asked.vocab_size)
        for number in range(asked.rounds):
            made = prepare(recipe(files, evaluations, folder / "tokenizer"), folder / f"set{number}")
            report = made.report
            rates.append(made.report["tokens_per_minute_per_core"])
            print(f"round {number + 1}: {rates[-1] / 1e6:.2f}M tokens a minute", report["seconds"])
    kept = sum(s["kept_bytes"] for s in report["sources"].values())
    best = max(rates)
    print(f"best {best / 1e6:.2f}M tokens a minute, {best / GOAL:.1f} × the goal; {kept / 1e6:.1f} MB")
    if asked.save:
        rows = [
            ["tokens a minute and core", best / 1e6],
            ["of the goal", best / GOAL],
            ["MB kept", kept / 1e6],
        ]
        columns = ["hadal data prepare, vocabulary of " + f"{asked.vocab_size:,}", "millions, or times"]
        save("data_rate", {"machine": machine("cpu"), "title": "Data", "columns": columns, "rows": rows,
                           "rounds": rates, "seconds": report["seconds"]})  # fmt: skip


if __name__ == "__main__":
    main()
