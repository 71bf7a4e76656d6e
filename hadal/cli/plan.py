"""`hadal plan`: will it run, how fast, at what cost, and what training takes (arithmetic: `hadal.plan`)."""

from __future__ import annotations

from hadal.cli.family import Family
from hadal.cli.plan_cost import cost
from hadal.cli.plan_run import run
from hadal.cli.plan_tables import accuracy, devices
from hadal.cli.plan_training import pipeline, training

PLAN = Family(
    about="""Say whether it runs, how fast, at what cost.

    `hadal plan MODEL` is `hadal plan run MODEL`, on this machine unless --on names another:
    "A100-40GB, 52GB RAM" · 8xH800 · m1-max-64 · cluster.toml ·
    "memory=24GB, bandwidth=1008GB/s, bf16=165TFLOPS".
    MODEL is a name of `hadal show`, llama-3.1-405b or qwen2.5-72b, ORG/REPO, a folder, or a config.json.

    Every figure comes with its arithmetic. Speeds are three: pessimistic, typical, best.

    Examples:
        hadal plan deepseek-v2-lite
        hadal plan deepseek-v3 --on "A100-40GB, 52GB RAM"
        hadal plan deepseek-v3 --on 8xh200 --batch 64 --plot sweep.png
        hadal plan cost deepseek-v2-lite --on a100-80 --in 2e6 --out 5e5 --api deepseek-chat
        hadal plan training deepseek-v3 --on 2048xh800 --tokens 14.8e12 --mfu 0.3894
        hadal plan pipeline --stages 16
        hadal plan accuracy
    """,
    kinds={
        "run": run,
        "cost": cost,
        "training": training,
        "pipeline": pipeline,
        "devices": devices,
        "accuracy": accuracy,
    },
    default="run",
)
