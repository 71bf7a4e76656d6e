"""Machines as figures: known devices by name, clusters, and unknown hardware by what its owner says of it.

    "A100-40GB, 52GB RAM" · "8xH800" · "32xh100, network=50GB/s" · "m1-max-64" · "cluster.toml"
    "memory=24GB, bandwidth=1008GB/s, bf16=165TFLOPS" · "64GB RAM, bandwidth=80GB/s, fp32=1TFLOPS"

Nothing is guessed: a name that is not known is refused with those near it, and a figure that is not given is
missing where it would be needed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hadal.config import suggest
from hadal.plan.figures import PlanError, data

USABLE = 0.9  # of a memory: what drivers, fragmentation and others take is beyond the arithmetic
PER_NODE = 8
MOST_DEVICES = 1_000_000
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "KI": 2**10, "MI": 2**20, "GI": 2**30,
          "TI": 2**40}  # fmt: skip
_AMOUNT = re.compile(r"([\d.]+)\s*([KMGTP]?I?)(B|B/S|FLOPS|FLOP/S|W)?", re.IGNORECASE)
_FIGURES = ("memory", "ram", "bandwidth", "bf16", "fp16", "fp8", "fp32", "link", "network", "host", "disk",
            "watts", "nodes", "count")  # fmt: skip


@dataclass(frozen=True)
class Device:
    """One device. Bytes, bytes/s, FLOP/s; `link` both directions together, `network` and `host` one. None or
    an absent format: not known, or not there. `memory` 0: a processor, which works in the machine's RAM."""

    name: str
    title: str
    memory: float
    bandwidth: float | None
    flops: Mapping[str, float]
    kind: str  # the class of its efficiencies
    link: float | None = None
    network: float | None = None
    host: float | None = None
    watts: float | None = None
    unified: bool = False
    lacks_fp8: str | None = None
    note: str | None = None
    source: str = "as given"
    date: str = ""

    @property
    def is_cpu(self) -> bool:
        return self.memory == 0

    def peak(self, dtype: str) -> tuple[float, str] | None:
        """FLOP/s of products in the best format that serves weights of `dtype`, and its name. FP8 weights
        without FP8 units are multiplied in BF16; integers are, too."""
        wanted = {"fp8": ("fp8", "bf16", "fp16", "fp32"), "fp32": ("fp32", "bf16", "fp16")}
        for name in wanted.get(dtype, ("bf16", "fp16", "fp32")):
            if name in self.flops:
                return self.flops[name], name
        return None


@dataclass(frozen=True)
class Machine:
    """`count` devices in `nodes` nodes, and the RAM of one node."""

    text: str
    device: Device
    count: int = 1
    nodes: int = 1
    ram: float = 0.0
    disk: float | None = None  # bytes/s of reading
    here: bool = False

    @property
    def per_node(self) -> int:
        return self.count // self.nodes

    @property
    def memory(self) -> float:
        """Of all devices, or the RAM where the processor works."""
        return self.ram if self.device.is_cpu else self.device.memory * self.count

    @property
    def usable(self) -> float:
        """Bytes of one device's memory, or of the RAM where the processor works, that may be counted with."""
        return USABLE * (self.ram if self.device.is_cpu else self.device.memory)

    def describe(self) -> str:
        """ "8 × H800 80 GB SXM in 1 node, 52 GB of RAM"."""
        parts = [self.device.title if self.count == 1 else f"{self.count} × {self.device.title}"]
        if self.nodes > 1:
            parts[0] += f" in {self.nodes} nodes"
        if self.ram and not self.device.unified:
            parts.append(f"{self.ram / 1e9:,.0f} GB of RAM")
        return ", ".join(parts)


# --- known devices ------------------------------------------------------------------------------------------
def devices() -> dict[str, Device]:
    """All known devices by name."""
    return {name: _known(name, row) for name, row in data("hardware")["devices"].items()}


def _known(name: str, row: Mapping[str, Any]) -> Device:
    def of(key: str, unit: float = 1e9) -> float | None:
        return row[key] * unit if key in row else None

    flops = {key.removesuffix("_tflops"): v * 1e12 for key, v in row.items() if key.endswith("_tflops")}
    return Device(
        name=name,
        title=row["title"],
        memory=row.get("memory_gb", 0) * 1e9,
        bandwidth=of("bandwidth_gbs"),
        flops=flops,
        kind=row["class"],
        link=of("link_gbs"),
        network=of("network_gbs"),
        host=of("host_gbs"),
        watts=of("watts", 1.0),
        unified=row.get("unified", False),
        lacks_fp8=row.get("lacks_fp8"),
        note=row.get("note"),
        source=row["source"],
        date=row["date"],
    )


def device(name: str) -> Device:
    """The device of that name; `m1-max-64` chooses among the memories that it is sold with.

    Raises PlanError with near names, and how to give an unknown one by its figures.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("apple-")
    rows = data("hardware")["devices"]
    names = {alias: known for known, row in rows.items() for alias in (known, *row.get("aliases", ()))}
    if key in names:
        return devices()[names[key]]
    stem, _, size = key.removesuffix("gb").rpartition("-")
    if stem in names and size.isdigit() and (choices := rows[names[stem]].get("memory_choices_gb")):
        if int(size) not in choices:
            raise PlanError(f"{name}: {names[stem]} comes with {' or '.join(map(str, choices))} GB")
        found = devices()[names[stem]]
        return replace(found, memory=int(size) * 1e9, title=f"{found.title} {size} GB")
    near = sorted({names[n] for n in names if n.startswith(key) or key.startswith(n)})[:3]
    hint = f" Did you mean {' or '.join(near)}?" if near else suggest(key, names)
    raise PlanError(
        f"unknown device {name!r}.{hint} `hadal plan devices` lists the known ones; any other is given by "
        "its figures: memory=24GB,bandwidth=1008GB/s,bf16=165TFLOPS"
    )


# --- reading --on -------------------------------------------------------------------------------------------
def amount(text: str, what: str) -> float:
    """ "1008GB/s" -> 1.008e12. PlanError where there is no such number; it must be positive."""
    match = _AMOUNT.fullmatch(text.strip())
    try:
        value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except ValueError:
        value = 0.0
    if value <= 0:
        raise PlanError(f"{what} is {text!r}; give a positive number with its unit, such as 24GB or 1008GB/s")
    return value


def parse(text: str, *, files: bool = True) -> Machine:
    """A machine from words; see the head of this file. A name that ends in `.toml` is read as a file, but not
    where the words come from elsewhere (`files`)."""
    if files and text.strip().endswith(".toml"):
        return from_file(Path(text.strip()))
    found: Device | None = None
    count, given = 1, {}
    for item in (part.strip() for part in text.split(",")):
        if not item:
            raise PlanError(f"--on {text!r} has an empty part between its commas")
        key, equals, value = item.partition("=")
        if equals:
            key = key.strip().lower()
            if key not in _FIGURES:
                raise PlanError(f"--on: unknown figure {key!r}.{suggest(key, _FIGURES)}")
            given[key] = amount(value, key)
        elif match := re.fullmatch(r"(.+?)\s*(?:of\s+)?RAM", item, re.IGNORECASE):
            given["ram"] = amount(match[1], "RAM")
        else:
            if found is not None:
                raise PlanError(f"--on {text!r} names two kinds of device; a plan is for one kind")
            match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(.+)", item, re.IGNORECASE)
            assert match is not None
            count, found = int(match[1] or 1), device(match[2])
    return _machine(text, found, count, given)


def _machine(text: str, found: Device | None, count: int, given: Mapping[str, float]) -> Machine:
    count = int(given.get("count", count))
    if found is None:
        if "memory" not in given and "ram" not in given:
            raise PlanError(f"--on {text!r} names no device and no memory=…GB")
        own = "memory" in given
        found = Device(
            "given", "a device given by its figures" if own else "the processor", 0.0, None, {},
            "gpu" if own else "cpu", source="figures of the question",
        )  # fmt: skip
    flops = {**found.flops, **{k: given[k] for k in ("bf16", "fp16", "fp8", "fp32") if k in given}}
    found = replace(
        found,
        memory=given.get("memory", found.memory),
        bandwidth=given.get("bandwidth", found.bandwidth),
        flops=flops,
        link=given.get("link", found.link),
        network=given.get("network", found.network),
        host=given.get("host", found.host),
        watts=given.get("watts", found.watts),
    )
    if not 1 <= count <= MOST_DEVICES:
        raise PlanError(f"--on {text!r}: {count} devices; at least 1 and at most {MOST_DEVICES:,}")
    nodes = int(given.get("nodes", max(1, count // PER_NODE if count % PER_NODE == 0 else 1)))
    if count % nodes:
        raise PlanError(f"--on {text!r}: {count} devices do not spread over {nodes} nodes")
    ram = given.get("ram", found.memory if found.unified else 0.0)
    if found.is_cpu and not ram:
        raise PlanError(f"--on {text!r}: a processor works in RAM; say how much, such as '64GB RAM'")
    return Machine(text, found, count, nodes, ram, given.get("disk"))


def from_file(path: Path) -> Machine:
    """A cluster file: `device`, `devices_per_node`, `nodes`, `ram` and the figures of `--on`, as TOML.

    device = "h800"          # or none, and memory, bandwidth, bf16 …
    nodes = 256
    devices_per_node = 8
    network = "50GB/s"       # one direction, a device
    """
    try:
        row = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is no TOML: {error}") from None
    allowed = ("device", "devices_per_node", *(f for f in _FIGURES if f != "count"))
    for key in row:
        if key not in allowed:
            raise PlanError(f"{path}: unknown key {key!r}.{suggest(key, allowed)}")
    given: dict[str, float] = {}
    for key, value in row.items():
        if key != "device":
            given[key] = amount(str(value), f"{path}: {key}")
    nodes, each = given.get("nodes", 1.0), given.pop("devices_per_node", 1.0)
    found = device(str(row["device"])) if "device" in row else None
    return _machine(str(path), found, int(nodes * each), {**given, "nodes": nodes})
