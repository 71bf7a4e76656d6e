"""Measuring: how fast this engine is here, beside what this machine could do.

`offline` times the engine (latency, throughput), `load` a server under open-loop arrivals, `kernels` single
operations; `ceilings` measures the machine, `work` counts what a step of a live model must read.
"""
