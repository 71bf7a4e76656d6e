"""`hadal train RECIPE --fp8-report`: what FP8 does, or would do, to every product of a step, layer by layer.

A batch goes forward and backward through the model in its own dtype, and every product that FP8 training
takes (hadal/ops/fp8_training.py) shows its operands: the activation, the weight, the gradient of the output.
Each is quantised as training would (hadal/ops/fp8_tiles.py), and of each is told

    underflow    the share of elements that are not zero before and are zero after
    saturated    the share that is cut off at 448 scales, or is not finite
    ratio        the largest scale of a tile over the smallest
    rms          ‖x − fp8(x)‖ / ‖x‖

and of Fprop, Dgrad and Wgrad, on sampled rows, ‖y − y₆₄‖ / ‖y₆₄‖ against FP64: of the FP8 product, and of the
model's own dtype ("plain"). The recipe need not train in FP8, and the batch updates nothing.
Legend: T tokens, I inputs, O outputs, E experts, K experts a token.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear as product

from hadal.model.transformer import Transformer
from hadal.ops import fp8_tiles, fp8_training
from hadal.ops.experts import swiglu_reference
from hadal.ops.fp8 import E4M3_MAX, dequantise_blocks
from hadal.train.batches import Batch
from hadal.train.losses import losses
from hadal.train.main import open_run
from hadal.train.trainer import Trainer

OPERANDS = ("activation", "weight", "gradient", "activation by token", "gradient by token")
PRODUCTS = ("fprop", "dgrad", "wgrad")
SAMPLED_ROWS = 32


@dataclass
class Operand:
    """Sums over the elements of an operand; over all experts of a stack."""

    elements: int = 0
    nonzero: int = 0
    lost: int = 0
    cut: int = 0
    error2: float = 0.0
    norm2: float = 0.0
    scale_low: float = math.inf
    scale_high: float = 0.0

    def add(self, x: Tensor, back: Tensor, q: Tensor, scale: Tensor) -> None:
        """Take in a tensor, what comes back of it, its codes, and the scales of its tiles."""
        x, code = x.float(), q.float()
        self.elements += x.numel()
        self.nonzero += int((x != 0).sum())
        self.lost += int(((x != 0) & (code == 0)).sum())
        beyond = (code.abs() == E4M3_MAX) & (x.abs() > back.abs() * (1 + 1 / 28))  # 464 still rounds to 448
        self.cut += int((beyond | ~x.isfinite()).sum())
        self.error2 += float((x - back).double().square().sum())
        self.norm2 += float(x.double().square().sum())
        used = scale[scale > fp8_tiles.SCALE_MIN]  # a tile of zeros has the smallest
        if used.numel():
            self.scale_low = min(self.scale_low, float(used.min()))
            self.scale_high = max(self.scale_high, float(used.max()))

    def told(self) -> dict[str, float]:
        return {
            "underflow": self.lost / max(1, self.nonzero),
            "saturated": self.cut / max(1, self.elements),
            "ratio": self.scale_high / self.scale_low if self.scale_high else 1.0,
            "rms": math.sqrt(self.error2 / self.norm2) if self.norm2 else 0.0,
        }


@dataclass
class Product:
    """Squared errors of a product on sampled rows, against FP64."""

    error2: float = 0.0
    plain2: float = 0.0
    norm2: float = 0.0

    def add(self, fp8: Tensor, plain: Tensor, exact: Tensor) -> None:
        self.error2 += float((fp8.double() - exact).square().sum())
        self.plain2 += float((plain.double() - exact).square().sum())
        self.norm2 += float(exact.square().sum())

    def told(self) -> dict[str, float]:
        norm2 = self.norm2 or 1.0
        return {"error": math.sqrt(self.error2 / norm2), "plain": math.sqrt(self.plain2 / norm2)}


@dataclass
class Layer:
    """One weight, or one stack of experts."""

    name: str
    operands: dict[str, Operand] = field(default_factory=lambda: {name: Operand() for name in OPERANDS})
    products: dict[str, Product] = field(default_factory=lambda: {name: Product() for name in PRODUCTS})

    @torch.no_grad()
    def add(self, x_TI: Tensor, weight_OI: Tensor, dy_TO: Tensor, power: bool) -> None:
        """Take in the operands of the three products of y = x·Wᵀ."""
        x = fp8_tiles.quantise(x_TI, True)  # codes that are kept: always powers of two
        dy, dy_columns = fp8_tiles.quantise_both(dy_TO, power)
        x_columns, weight = fp8_tiles.columns(x, None), fp8_tiles.quantise_weight(weight_OI, power)
        w_OI = dequantise_blocks(weight.q, weight.scale)
        self.operands["weight"].add(weight_OI, w_OI, weight.q, weight.scale)
        back = {}
        for name, value, codes in (
            ("activation", x_TI, x),
            ("gradient", dy_TO, dy),
            ("activation by token", x_TI.t(), x_columns),
            ("gradient by token", dy_TO.t(), dy_columns),
        ):
            width = value.shape[1]  # without what fills up the last tile
            back[name] = fp8_tiles.dequantise(codes)[:, :width]
            self.operands[name].add(value, back[name], codes.q[:, :width], codes.scale)
        rows_T, rows_O = _sampled(x_TI), _sampled(weight_OI)
        for product_, a, b, fp8_a, fp8_b in (
            ("fprop", x_TI[rows_T], weight_OI.t(), back["activation"][rows_T], w_OI.t()),
            ("dgrad", dy_TO[rows_T], weight_OI, back["gradient"][rows_T], w_OI),
            ("wgrad", dy_TO[:, rows_O].t(), x_TI, back["gradient by token"][rows_O],
             back["activation by token"].t()),
        ):  # fmt: skip
            self.products[product_].add(fp8_a @ fp8_b, a @ b, a.double() @ b.double())

    def told(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "operands": {name: operand.told() for name, operand in self.operands.items()},
            "products": {name: product_.told() for name, product_ in self.products.items()},
        }


def _sampled(x: Tensor) -> Tensor:
    """Row numbers spread evenly."""
    count = min(SAMPLED_ROWS, x.shape[0])
    return torch.arange(count, device=x.device) * x.shape[0] // count


@dataclass(frozen=True)
class Report:
    """`layers`: as `Layer.told` gives them, the worst product first."""

    step: int
    tokens: int  # of the micro-batch that was looked at
    dtype: str
    scales: str
    layers: Sequence[dict[str, Any]]


# --- watching -----------------------------------------------------------------------------------------------
class _Watch:
    """Stands for the functions of `fp8_training`: multiplies in the model's dtype, and keeps what it sees."""

    def __init__(self, model: Transformer, power: bool) -> None:
        self.power = power
        self.layers: dict[str, Layer] = {}
        self._names = [
            (p.data_ptr(), p.data_ptr() + p.nbytes, name.removesuffix(".weight"))
            for name, p in model.named_parameters()
        ]

    def _product(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        y_TO = product(x_TI, weight_OI)
        at = weight_OI.data_ptr()
        name = next((name for first, end, name in self._names if first <= at < end), "?")
        layer = self.layers.setdefault(name, Layer(name))
        x_TI, weight_OI = x_TI.detach(), weight_OI.detach()
        y_TO.register_hook(lambda dy_TO: layer.add(x_TI, weight_OI, dy_TO, self.power))
        return y_TO

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        y_TO = self._product(x_TI.reshape(-1, x_TI.shape[-1]), weight_OI)
        y_TO = y_TO.view(*x_TI.shape[:-1], weight_OI.shape[0])
        return y_TO if bias_O is None else y_TO + bias_O

    def ffn(self, x_TD: Tensor, gate_up_2ID: Tensor, down_DI: Tensor) -> Tensor:
        hidden_TI = swiglu_reference(self._product(x_TD.reshape(-1, x_TD.shape[-1]), gate_up_2ID))
        return self._product(hidden_TI, down_DI).view(x_TD.shape)

    def experts(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor,
        *others_TD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out_TD = torch.zeros_like(x_TD)
        for e in expert_TK.unique().tolist():
            token, slot = torch.where(expert_TK == e)
            hidden = swiglu_reference(self._product(x_TD[token], gate_up_E2ID[e]))
            hidden = hidden * weight_TK[token, slot, None].to(hidden.dtype)
            out_TD = out_TD.index_add(0, token, self._product(hidden, down_EDI[e]))
        return sum((other_TD for other_TD in others_TD if other_TD is not None), out_TD)


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    """FP8's products go through `watch` inside the block."""
    names = ("linear", "ffn", "experts")
    real = {name: getattr(fp8_training, name) for name in names}
    try:
        for name in names:
            setattr(fp8_training, name, getattr(watch, name))
        yield
    finally:
        for name, function in real.items():
            setattr(fp8_training, name, function)


def measure(trainer: Trainer, batch: Batch) -> Report:
    """The report of the first micro-batch of `batch`, with the weights as they are. Leaves weights and
    gradients as they were."""
    model, objective = trainer.model, replace(trainer.objective, fp8=True, recompute=())
    watch = _Watch(model, objective.fp8_scales == "power_of_two")
    micro = batch.micros[0]
    knobs = trainer.schedule.at(trainer.progress.tokens + batch.tokens)
    before = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        with _watching(watch), torch.compiler.set_stance("force_eager"):
            out = losses(model, micro, batch.weight_K, batch.rows, objective)
            out.total(knobs.mtp_weight, objective.sequence_alpha).backward()
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
    layers = sorted((layer.told() for layer in watch.layers.values()), key=_worst, reverse=True)
    dtype = str(model.dtype).removeprefix("torch.")
    return Report(trainer.progress.step, micro.tokens, dtype, objective.fp8_scales, layers)


def _worst(layer: dict[str, Any]) -> float:
    return max(product_["error"] for product_ in layer["products"].values())


# --- the command --------------------------------------------------------------------------------------------
def fp8_report(
    recipe_path: Path | str,
    *,
    steps: int = 0,
    resume: bool = False,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> tuple[Report, Path]:
    """Report on a run after `steps` more steps, of which nothing is kept: from its start, or from its last
    checkpoint (`resume`). Writes fp8-report.json, and fp8-report.png where matplotlib is there, into the
    run's folder; returns the report and the path of the JSON. Raises what `hadal.train.main.train` raises."""
    quiet = (*overrides, "log.accuracy_every_steps=0")
    with open_run(recipe_path, resume, quiet, out, device, console) as run:
        report = measure(run.trainer, run.rehearse(steps))
        path = run.folder / "fp8-report.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return report, path
        _draw(report, Figure(figsize=(15, 8), layout="constrained"), path.with_suffix(".png"))
        return report, path


def lines(report: Report) -> list[str]:
    """The report as a table, the worst product first."""
    plain = f"{report.dtype}'s own"
    title = [
        f"step {report.step}, {report.tokens:,} tokens, {report.dtype}; scales: {report.scales}",
        f"FPROP, DGRAD, WGRAD: relative error of the FP8 product against FP64 ({plain} in brackets)",
        "LOST: share of elements that underflow to zero, of activation, weight and output gradient (in tiles",
        "along channels, and along tokens); CUT: the largest share that saturates; RATIO: the largest scale",
        "over the smallest; RMS: relative error of quantising",
        "",
    ]
    header = ("LAYER", "FPROP", "DGRAD", "WGRAD", "LOST X", "W", "DY", "DY BY TOKEN", "CUT", "RATIO", "RMS X",
              "W", "DY")  # fmt: skip
    rows = [header, *(_row(layer) for layer in report.layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return title + ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in
            enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    o, p = layer["operands"], layer["products"]
    errors = (f"{p[name]['error']:.2%} ({p[name]['plain']:.2%})" for name in PRODUCTS)
    lost = (o[name]["underflow"] for name in ("activation", "weight", "gradient", "gradient by token"))
    cut, ratio = (max(operand[key] for operand in o.values()) for key in ("saturated", "ratio"))
    rms = (f"{o[name]['rms']:.2%}" for name in ("activation", "weight", "gradient"))
    return layer["name"], *errors, *(f"{x:.3%}" for x in lost), f"{cut:.3%}", f"{ratio:.2g}", *rms


def _place(name: str) -> tuple[str, str]:
    """("3", "self_attn.q_proj") of "layers.3.self_attn.q_proj"; an MTP module is a layer of its own."""
    parts = name.split(".")
    if parts[0] == "layers":
        return parts[1], ".".join(parts[2:])
    if parts[0] == "mtp":
        return f"MTP {int(parts[1]) + 1}", ".".join(part for part in parts[2:] if part != "block")
    return "", name


def _draw(report: Report, figure: Any, path: Path) -> None:
    """Heat maps, layers to the right and kinds of weight downwards: errors of products above, shares that
    underflow below."""
    placed = {_place(layer["name"]): layer for layer in report.layers}
    columns = sorted({layer for layer, _ in placed}, key=lambda x: (not x.isdigit(), x.zfill(4)))
    kinds = sorted({kind for _, kind in placed})
    maps = [(f"{name}: relative error", lambda o, n=name: o["products"][n]["error"]) for name in PRODUCTS]
    maps += [(f"{name}: share that underflows", lambda o, n=name: o["operands"][n]["underflow"])
             for name in ("activation", "gradient", "gradient by token")]  # fmt: skip
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for axis, (title, value) in zip(axes.flat, maps, strict=True):
        cells = [[value(placed[c, k]) if (c, k) in placed else math.nan for c in columns] for k in kinds]
        image = axis.imshow(cells, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if len(columns) > 12 else 0)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        figure.colorbar(image, ax=axis, format="{x:.3%}").ax.tick_params(labelsize=7)
    figure.suptitle(f"FP8 at step {report.step}, scales {report.scales}; layers to the right", fontsize=10)
    figure.savefig(path, dpi=110)
