"""LoRA: W = W₀ + s·B·A with s = α/r (Hu et al., arXiv 2106.09685 §4.1), without anything knowing of it.

The matrix that the network multiplies with *is* the sum: it lies in the model's own parameter, in place, and
is made again after each update of A and B. So trainer, engine, exact mode, CUDA graphs and fused kernels see
one plain weight, and the engine samples from the tensors that are trained. The backward pass makes dW as
ever, and a hook projects it and lets it go as soon as it is there:

    dA = s·Bᵀ·dW          dB = s·dW·Aᵀ

What that costs against adapters in the product: a copy of W₀ beside W (so that rounding never adds up), the
gradient of one matrix at a time, and the products for dW. What it saves against training everything: masters,
moments and FP32 gradients, 12 of 16 bytes a parameter and more; A and B are FP32 and have all four.

Routed experts have an A and a B each, stacked: A [E, r, in], B [E, out, r]. Matrices that are stacked here
(q, k, v; gate, up) share one A; PEFT's files get a copy for each. No dropout.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hadal.data.strict import RecipeError, require
from hadal.model.transformer import Transformer
from hadal.ops.packed import Packed
from hadal.train.optimizer import AdamW
from hadal.weights.names import slots

PIECE = 2**25
"""Elements of a matrix that are widened to FP32 at a time."""
GROUPS = {
    "attention": ("self_attn.*",),
    "ffn": ("mlp.gate_up_proj", "mlp.down_proj", "shared_experts.*"),
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "all": ("self_attn.*", "mlp.*", "shared_experts.*", "experts.*"),
}
_PUBLISHED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
              "up_proj": "gate_up_proj"}  # fmt: skip


@dataclass(frozen=True)
class LoraRecipe:
    """The `[lora]` of a recipe. `modules`: groups (attention, ffn, experts, all), names ("o_proj"), or
    patterns of them ("layers.1?.self_attn.*")."""

    rank: int = 0  # 0: no LoRA, all weights are trained
    alpha: float = 0.0  # 0: twice the rank
    modules: tuple[str, ...] = ("attention", "ffn", "experts")
    rank_stabilised: bool = False  # s = α/√r (arXiv 2312.03732)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 (train all weights) or more")
        require(self.alpha >= 0, "lora.alpha", self.alpha, "above 0, or 0 for twice the rank")
        require(
            bool(self.modules) or not self.rank, "lora.modules", self.modules, "at least one group or name"
        )

    @property
    def scale(self) -> float:
        """s."""
        return (self.alpha or 2.0 * self.rank) / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def choose(model: Transformer, patterns: tuple[str, ...]) -> list[str]:
    """Names of the parameters that the patterns mean, in the model's order. Raises RecipeError for a pattern
    that means none."""
    known = {
        name: name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name != "embed_tokens.weight" and not name.endswith("mlp.gate.weight")
    }
    chosen: set[str] = set()
    for pattern in patterns:
        globs = GROUPS.get(pattern, (pattern,))
        found = {n for n, short in known.items() if any(_means(glob, short) for glob in globs)}
        if not found and not (pattern in GROUPS and model.config.moe is None and pattern == "experts"):
            raise RecipeError(_unknown(pattern, list(known.values())))
        chosen |= found
    return [name for name in known if name in chosen]


def _means(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def _unknown(pattern: str, names: list[str]) -> str:
    shorts = sorted({".".join(n.split(".")[-2:]) if ".experts." in n else n.split(".")[-1] for n in names})
    last = pattern.split(".")[-1]
    if _PUBLISHED.get(last) in shorts:
        hint = f"{last} is a part of {_PUBLISHED[last]} here: name that"
    elif last in ("gate", "embed_tokens"):
        hint = "gates and the embedding have no adapters"
    elif near := difflib.get_close_matches(pattern, [*GROUPS, *shorts], 1):
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = f"groups are {', '.join(GROUPS)}; names {', '.join(shorts)}"
    return f"lora.modules: {pattern!r} means no matrix of this model; {hint}"


@dataclass
class _Adapted:
    """One matrix, or stack of them: W in the model, W₀, A [.., r, in] and B [.., out, r]."""

    name: str
    weight: nn.Parameter
    base: Tensor
    a: nn.Parameter
    b: nn.Parameter

    def pieces(self) -> Iterator[slice]:
        """Stretches of W's first dimension of at most PIECE elements, or one each."""
        per = max(1, PIECE // self.weight[0].numel())
        for start in range(0, self.weight.shape[0], per):
            yield slice(start, min(start + per, self.weight.shape[0]))


class Adapters:
    """The adapters of a model, which is changed: its chosen parameters hold merged weights and get gradients,
    all others are frozen. Give `named_parameters()` to the optimizer, and `attach` it."""

    def __init__(self, model: Transformer, recipe: LoraRecipe, *, seed: int = 0) -> None:
        """A is uniform in ±1/√in (as PEFT draws it), B is 0: nothing is changed yet. Raises RecipeError for
        patterns that mean nothing, for packed weights, and for a rank that is none."""
        require(recipe.rank > 0, "lora.rank", recipe.rank, "above 0")
        if any(isinstance(getattr(m, "weight", None), Packed) for m in model.modules()):
            raise RecipeError("LoRA on packed (quantised) weights is not there; load float32 or bfloat16")
        self.model, self.recipe, self.scale = model, recipe, recipe.scale
        names, generator = choose(model, recipe.modules), torch.Generator().manual_seed(seed)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self.items = [self._adapt(name, parameters[name], generator) for name in names]
        self._hooks = [
            item.weight.register_post_accumulate_grad_hook(partial(self._project, item))
            for item in self.items
        ]

    def _adapt(self, name: str, weight: nn.Parameter, generator: torch.Generator) -> _Adapted:
        *stack, outs, ins = weight.shape
        bound, rank = 1.0 / math.sqrt(ins), self.recipe.rank
        a = torch.empty(*stack, rank, ins).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(*stack, outs, rank, device=weight.device)
        weight.requires_grad_(True)
        return _Adapted(
            name, weight, weight.detach().clone(), nn.Parameter(a.to(weight.device)), nn.Parameter(b)
        )

    @property
    def parameters_trained(self) -> int:
        """Numbers in all A and B."""
        return sum(item.a.numel() + item.b.numel() for item in self.items)

    def __str__(self) -> str:
        trained, count = self.parameters_trained, len(self.items)
        return f"LoRA of rank {self.recipe.rank} on {count} matrices: {trained:,} parameters trained"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, as NAME.lora_A and NAME.lora_B after the model's parameters."""
        for item in self.items:
            name = item.name.removesuffix(".weight")
            yield f"{name}.lora_A", item.a
            yield f"{name}.lora_B", item.b

    def attach(self, optimizer: AdamW) -> None:
        """Merge whenever the optimizer has written A and B: after a step, a resumption, an average."""
        optimizer.on_write = self.merge

    @torch.no_grad()
    def _project(self, item: _Adapted, weight: Tensor) -> None:
        """dW becomes dA and dB, and goes."""
        assert weight.grad is not None
        grad_a, grad_b = torch.zeros_like(item.a), torch.empty_like(item.b)
        for part in item.pieces():
            wide = weight.grad[part].float()
            stacked = wide.ndim == 3
            grad_b[part] = wide @ (item.a[part] if stacked else item.a).mT
            product = item.b[part].mT @ wide
            if stacked:
                grad_a[part] = product
            else:
                grad_a += product
        for parameter, grad in ((item.a, grad_a), (item.b, grad_b)):
            grad.mul_(self.scale)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        weight.grad = None

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W₀ + s·B·A, computed in FP32 and rounded once."""
        for item in self.items:
            for part in item.pieces():
                a = item.a[part] if item.a.ndim == 3 else item.a
                item.weight[part] = torch.add(item.base[part].float(), item.b[part] @ a, alpha=self.scale)

    # --- other weights for a while ---
    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """Copies of A and B, for `holding`: a reference policy costs no more than this."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    @contextmanager
    def holding(self, adapters: Mapping[str, Tensor] | None) -> Iterator[None]:
        """The model has other adapters inside the block (None: none, it is the base), and its own again
        behind it, bit for bit."""
        mine = self.snapshot()
        try:
            self._set(adapters)
            yield
        finally:
            self._set(mine)

    @torch.no_grad()
    def _set(self, adapters: Mapping[str, Tensor] | None) -> None:
        for name, parameter in self.named_parameters():
            if adapters is not None:
                parameter.copy_(adapters[name])
            elif name.endswith("lora_B"):
                parameter.zero_()
        self.merge()

    def release(self) -> None:
        """Leave the model as an ordinary one: merged weights stay, everything may be trained."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    # --- files ---
    def save(self, folder: Path, base: str) -> Path:
        """Write A and B as PEFT does: adapter_config.json and adapter_model.safetensors, under the published
        names of the matrices. `base`: the model that they belong to."""
        by_parameter: dict[str, list[tuple[str, int | None, slice]]] = {}
        for name, slot in slots(self.model.config).items():
            rows = slice(slot.row, slot.row + slot.shape[0])
            if not slot.copy:
                by_parameter.setdefault(slot.parameter, []).append((name, slot.index, rows))
        tensors: dict[str, Tensor] = {}
        for item in self.items:
            for name, index, rows in by_parameter[item.name]:
                a, b = (item.a, item.b) if index is None else (item.a[index], item.b[index])
                key = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = a.detach().cpu().clone()
                tensors[f"{key}.lora_B.weight"] = b.detach()[rows].cpu().clone()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        targets = sorted({key.split(".")[-3] for key in tensors})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
            "r": self.recipe.rank, "lora_alpha": self.scale * self.recipe.rank, "lora_dropout": 0.0,
            "use_rslora": False, "target_modules": targets, "inference_mode": True,
        }  # fmt: skip
        text = json.dumps(config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        return folder
