"""`hadal convert`: a model folder into another, in another number format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from hadal.cli import options as o
from hadal.cli.terminal import CliError, bar, human_bytes, human_seconds, print_json, say

DtypeName = Literal["bfloat16", "float16", "float32"]


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A model's name, or its folder.")],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The folder to write; it must not hold a model.")
    ],
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Matrices in FP8 blocks of 128 × 128, as V3 is published.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Matrices in 8-bit integers, groups of 128 channels.")
    ] = False,
    int4: Annotated[
        bool, typer.Option("--int4", help="Matrices in 4-bit integers, groups of 32 channels.")
    ] = False,
    dtype: Annotated[DtypeName, typer.Option(help="Of what is not quantised.")] = "bfloat16",
    max_shard: Annotated[int, typer.Option("--max-shard-gb", min=1, help="Largest file, in GB.")] = 5,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is in TARGET.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the source with its SHA-256 first.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Write a model in another number format.

    FP8 blocks to BF16, BF16 to FP8 blocks or to integers (as compressed-tensors packs them, which other
    engines read too), or any of them to FP32. Works tensor by tensor: memory stays small however large the
    model is. Tokenizer and templates come along.

    Examples:
        hadal convert deepseek-v3 ./v3-bf16 --dtype bfloat16
        hadal convert ./my-model ./my-model-fp8 --fp8
        hadal convert deepseek-v2-lite ./v2-lite-int4 --int4
    """
    import torch

    from hadal import weights

    if fp8 + int8 + int4 > 1:
        raise CliError("choose one of --fp8, --int8 and --int4", 2)
    started = time.monotonic()
    folder = weights.hub.resolve(source)
    with bar(f"converting {source}", quiet=json) as update:
        made = weights.convert(
            folder,
            target,
            fp8=fp8,
            ints="int8" if int8 else "int4" if int4 else None,
            dtype=getattr(torch, dtype),
            max_shard_bytes=max_shard * 1_000_000_000,
            overwrite=overwrite,
            verify=verify,
            progress=update,
        )
    size = sum(path.stat().st_size for path in Path(made).glob("*.safetensors"))
    took = time.monotonic() - started
    if json:
        print_json({"path": str(made), "size_bytes": size, "seconds": took, "bytes_per_s": size / took})
        return
    rate = f"{human_bytes(size / took)}/s"
    say(f"{made}: {human_bytes(size)} in {human_seconds(took)} ({rate})")
