"""`hadal bench`: speed, with this machine's ceiling beside it. The measuring is done in `hadal.bench`."""

from __future__ import annotations

from hadal.cli.bench_kernels import kernels
from hadal.cli.bench_latency import latency
from hadal.cli.bench_serve import serve
from hadal.cli.bench_throughput import throughput
from hadal.cli.family import Family

BENCH = Family(
    about="""Measure speed, with this machine's ceiling beside it.

    `hadal bench MODEL` is `hadal bench throughput MODEL`.

    Examples:
        hadal bench
        hadal bench latency hadal-mini
        hadal bench throughput deepseek-v2-lite --random --batch 1 --batch 32
        hadal bench serve --rate 2 --rate 8
        hadal bench kernels --only experts
    """,
    kinds={"latency": latency, "throughput": throughput, "serve": serve, "kernels": kernels},
    default="throughput",
)
