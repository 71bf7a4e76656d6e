"""What the kinds of `hadal plan` share: the model, the machine, flags, and figures in words."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hadal.cli.terminal import BOLD, CYAN, CliError, human_count, paint, say

if TYPE_CHECKING:
    from hadal.config import ModelConfig
    from hadal.plan.machines import Device, Machine

MOST = 10_000  # layers, experts of a layer: each is counted one by one
On = Annotated[
    str | None,
    typer.Option("--on", metavar="MACHINE", help="Such as 8xH800, or figures; default: this machine."),
]
WeightDtype = Annotated[
    Literal["int4", "int8", "fp8", "bf16", "fp32"] | None,
    typer.Option("--dtype", help="Of the weights; default: as published."),
]
CacheDtype = Annotated[
    Literal["fp32", "bf16", "fp8", "q8_0"] | None, typer.Option("--kv-dtype", help="Of the cache.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens a sequence; default: the model's, or what fits."),
]
Prompt = Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt that is timed.")]
Batch = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once, on all devices together.")]
MtpDrafts = Annotated[int, typer.Option("--mtp", min=0, metavar="N", help="Drafts a step by the MTP module.")]
Acceptance = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="SHARE", help="Of drafts; DeepSeek: 0.85 to 0.9.")
]
Offload = Annotated[
    Literal["cpu", "disk"] | None, typer.Option(help="Routed experts in host memory, or in the files.")
]
Tp = Annotated[int | None, typer.Option("--tp", min=1, metavar="N", help="Tensor parallel devices.")]
Dp = Annotated[int | None, typer.Option("--dp", min=1, metavar="N", help="Replicas of attention.")]
Pp = Annotated[int | None, typer.Option("--pp", min=1, metavar="N", help="Pipeline stages.")]
Ep = Annotated[int | None, typer.Option("--ep", min=1, metavar="N", help="Devices that share the experts.")]
Hourly = Annotated[
    float | None, typer.Option(min=0, metavar="DOLLARS", help="A device, an hour; default: a dated list.")
]


# --- model and machine --------------------------------------------------------------------------------------
def model_of(name: str) -> tuple[str, ModelConfig, int]:
    """(name, shape, stated context) of a name, folder, repository or config.json."""
    from hadal.config import ModelConfig
    from hadal.plan.figures import PlanError
    from hadal.plan.known import config_of

    if name.endswith(".json"):
        try:
            found = json.loads(Path(name).read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CliError(f"{name} is no JSON: {error}", 2) from None
        if not isinstance(found, dict):
            raise CliError(f"{name} is no config.json: it holds a {type(found).__name__}, not an object", 2)
        config = ModelConfig.from_hf(found)
        if max(config.num_hidden_layers, config.moe.n_routed_experts if config.moe else 0) > MOST:
            raise CliError(f"{name}: at most {MOST:,} layers and experts are planned for", 2)
        return name, config, config.max_position_embeddings
    try:
        return config_of(name)
    except PlanError:
        if "/" not in name and not Path(name).exists():
            raise
    from hadal.weights.info import inspect

    info = inspect(name)
    return info.name, info.config, info.context


def machine_of(on: str | None) -> Machine:
    """The machine that `--on` means; without it, this one."""
    from hadal.plan.machines import parse

    return parse(on) if on is not None else this_machine()


def this_machine() -> Machine:
    """This machine: free memory, the first kind of GPU, else the processor with its measured ceilings."""
    from hadal.cli import machine
    from hadal.plan.machines import Device, Machine

    ram = float(machine.memory().available)
    found = [(gpu.name, float(gpu.free)) for gpu in machine.gpus()] or _smi()
    if found:
        name, free = found[0]
        count = sum(other == name for other, _ in found)
        return Machine("this machine", _gpu(name, free), count, 1, ram, here=True)
    import torch

    cpu = torch.device("cpu")
    flops = {"fp32": machine.matmul_rate(cpu, torch.float32)}
    device = Device(
        "this processor",
        machine.cpu().name,
        0.0,
        machine.bandwidth(cpu),
        flops,
        "cpu",
        source="measured here (`hadal doctor`)",
    )
    return Machine("this machine", device, 1, 1, ram, here=True)


def _gpu(name: str, free: float) -> Device:
    """A GPU of this machine: known by its name, or measured."""
    from dataclasses import replace

    from hadal.cli import machine
    from hadal.plan.figures import PlanError
    from hadal.plan.machines import Device, device

    try:
        return replace(device(name), memory=free)
    except PlanError:
        import torch

        if not torch.cuda.is_available():
            return Device("this GPU", name, free, None, {}, "gpu", source="nvidia-smi")
        cuda = torch.device("cuda")
        flops = {"bf16": machine.matmul_rate(cuda, torch.bfloat16)}
        return Device("this GPU", name, free, machine.bandwidth(cuda), flops, "gpu", source="measured here")


def _smi() -> list[tuple[str, float]]:
    """(name, free bytes) of GPUs that torch cannot use, by nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    return [(name.strip(), float(free) * 2**20) for name, free in rows if free.strip().isdigit()]


# --- numbers and lines --------------------------------------------------------------------------------------
def number(text: str) -> float:
    """ "14.8T", "2e6", "500k" -> a number of tokens."""
    match = re.fullmatch(r"([\d.,]+(?:e\d+)?)\s*([kmbgt]?)", text.strip().lower())
    try:
        value = float(match[1].replace(",", "")) if match else -1.0
    except ValueError:
        value = -1.0
    if match is None or not 0 <= value < 1e30:
        raise typer.BadParameter(f"{text!r} is no number of tokens, such as 2e6, 500k or 14.8T")
    return value * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}[match[2]]


def amount(value: float, unit: str) -> str:
    """A value as people write it."""
    if unit == "B":
        return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.2f} MB"
    if unit == "$":
        return f"${value:,.0f}" if value >= 1000 else f"${value:,.3g}"
    if unit in ("FLOP", "FLOP/s", "tokens", "parameters", "elements"):
        return f"{value:.5g} {unit}" if value >= 1e15 else f"{human_count(value)} {unit}"
    if unit == "s" and value < 1:
        return f"{value * 1e3:,.4g} ms"
    if value >= 1000:
        return f"{value:,.{0 if unit in ('h', 'tokens/s') else 1}f} {unit}".strip()
    return f"{value:,.4g} {unit}".strip()


def heading(text: str) -> None:
    """A line over a block."""
    say()
    say(paint(text, BOLD))


def points(lines: Iterable[str]) -> None:
    """A list."""
    for line in lines:
        say(f"  - {line}")


def figure_lines(figures: Iterable[dict[str, Any]], *, ranges: bool = False) -> None:
    """Name, value, arithmetic; sources below, each once."""
    rows, sources = [], dict[str, None]()
    for f in figures:
        value = amount(f["value"], f["unit"])
        if ranges and "low" in f:
            three = [amount(f[k], f["unit"]) for k in ("low", "value", "high")]
            unit = f["unit"] if all(t.endswith(" " + f["unit"]) for t in three) else ""
            value = " / ".join(t.removesuffix(" " + unit) for t in three) + f" {unit}".rstrip()
        rows.append((f["name"], value, f["formula"]))
        sources[f["source"] + (f" ({f['date']})" if f.get("date") else "")] = None
    names, values = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    for name, value, formula in rows:
        say(f"  {paint(name.ljust(names), CYAN)}  {value.rjust(values)}  {formula}")
    for source in sources:
        longer = any(other != source and other.startswith(source) for other in sources)
        if source != "arithmetic on the model's shapes" and not longer:
            say(f"  source: {source}")
