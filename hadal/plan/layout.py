"""How a model is spread over devices, and what then lies on the fullest one.

    tp   heads and widths of a layer over devices that see the same tokens
    dp   replicas of attention, each with sequences of its own
    ep   experts over devices; they are reached through an all-to-all
    pp   stretches of layers

tp · dp · pp devices; ep divides tp · dp. MLA's cache is one latent for all heads, so tp does not divide it;
GQA's is divided by as many as there are key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from hadal.config import Gqa, ModelConfig
from hadal.config.model import _matrices
from hadal.plan.figures import PlanError
from hadal.plan.memory import (
    CacheDtype,
    WeightDtype,
    cache_bytes_per_token,
    entry_bytes,
    mtp_layers,
    value_bytes,
    weight_groups,
    workspace,
)


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.dp * self.pp

    def describe(self) -> str:
        """ "TP4 DP8 EP32", or "one device"."""
        parts = [f"{name.upper()}{n}" for name in ("tp", "dp", "pp", "ep") if (n := getattr(self, name)) > 1]
        return " ".join(parts) or "one device"

    def check(self, config: ModelConfig, devices: int) -> None:
        """PlanError names a degree that the model or the machine does not bear."""
        for name in ("tp", "dp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.devices > devices:
            raise PlanError(f"{self.describe()} takes {self.devices} devices; there are {devices}")
        if config.num_attention_heads % self.tp:
            raise PlanError(f"tp {self.tp} does not divide the {config.num_attention_heads} attention heads")
        if self.pp > config.num_hidden_layers:
            raise PlanError(f"pp {self.pp} is more than the model's {config.num_hidden_layers} layers")
        if self.ep > 1 and config.moe is None:
            raise PlanError("ep is for experts; this model is dense: use tp")
        if (self.tp * self.dp) % self.ep:
            raise PlanError(f"ep {self.ep} does not divide tp · dp = {self.tp * self.dp}")

    def cache_split(self, config: ModelConfig) -> int:
        """Devices of a tp group that divide one sequence's cache."""
        a = config.attention
        return min(self.tp, a.num_key_value_heads) if isinstance(a, Gqa) else 1


def layouts(config: ModelConfig, devices: int, per_node: int) -> Iterator[Layout]:
    """The layouts that are tried where none is asked for: tp within a node, experts over all that is left."""
    for pp in (1, 2, 4, 8, 16):
        if devices % pp or pp > config.num_hidden_layers:
            continue
        for tp in (1, 2, 4, 8, 16):
            if devices // pp % tp or tp > max(1, per_node) or config.num_attention_heads % tp:
                continue
            dp = devices // pp // tp
            ep = 1
            if config.moe is not None:
                most = min(tp * dp, config.moe.n_routed_experts)
                ep = next(n for n in range(most, 0, -1) if tp * dp % n == 0)
            yield Layout(tp, dp, pp, ep)


def experts_per_device(config: ModelConfig, layout: Layout) -> int:
    """Routed experts of a layer on the fullest device."""
    return 0 if config.moe is None else ceil(config.moe.n_routed_experts / layout.ep)


@lru_cache(maxsize=256)
def attention_replicated(config: ModelConfig) -> float:
    """Share of attention's matrices that tp does not divide: MLA's projections to the latents."""
    if isinstance(config.attention, Gqa):
        return 0.0
    kept = [0, 2] if config.attention.q_lora_rank is not None else [1]
    sizes = [rows * width for rows, width, _ in _matrices(config, 0)][: 5 if len(kept) == 2 else 4]
    return sum(sizes[i] for i in kept) / sum(sizes)


def _stage_shares(config: ModelConfig, pp: int) -> dict[str, float]:
    """Share of each group on the fullest stage, which has expert layers where there are enough of them: the
    dense ones stand first."""
    layers = ceil(config.num_hidden_layers / pp)
    sparse = sum(config.is_moe_layer(n) for n in range(config.num_hidden_layers))
    dense = config.num_hidden_layers - sparse
    here = min(layers, sparse)
    found = {"layers": layers / config.num_hidden_layers}
    if dense:
        found["dense feed-forward"] = (layers - here) / dense
    if sparse:
        found |= dict.fromkeys(("routed experts", "shared experts", "gates"), here / sparse)
    return found


def weights_on_device(
    config: ModelConfig, dtype: WeightDtype, layout: Layout, *, with_mtp: bool = False
) -> dict[str, float]:
    """Bytes by group on the fullest device."""
    m, kept = config.moe, attention_replicated(config)
    spread = {
        "attention": kept + (1 - kept) / layout.tp,
        "routed experts": 0.0 if m is None else experts_per_device(config, layout) / m.n_routed_experts,
        "gates": 1.0,
        "norms and biases": 1.0,
    }
    stages = _stage_shares(config, layout.pp)
    found: dict[str, float] = {}
    for group in weight_groups(config, dtype, with_mtp=with_mtp):
        share = spread.get(group.name, 1 / layout.tp)
        if group.name == "MTP module":
            assert m is not None
            experts = m.n_routed_experts * 3 * config.hidden_size * m.moe_intermediate_size
            part = experts / group.parameters
            share = part * spread["routed experts"] + (1 - part) / layout.tp
        elif group.name not in ("embedding", "head"):
            share *= stages.get(group.name, stages["layers"])
        elif layout.pp > 1 and group.name == "embedding":
            continue  # the last stage, with the head, is as full as the first
        found[group.name] = group.bytes * share
    return found


def memory_on_device(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: WeightDtype,
    cache: CacheDtype,
    context: int,
    batch: int,
    with_mtp: bool = False,
    gpu: bool = True,
) -> dict[str, float]:
    """Bytes by part on the fullest device: weights by group, cache of `batch` sequences, a step."""
    found = weights_on_device(config, dtype, layout, with_mtp=with_mtp)
    sequences = ceil(batch / layout.dp)
    drafted = sequences * context * entry_bytes(config, cache) * mtp_layers(config) if with_mtp else 0.0
    main = sequences * context * cache_bytes_per_token(config, cache)
    main *= ceil(config.num_hidden_layers / layout.pp) / config.num_hidden_layers
    found["cache"] = main / layout.cache_split(config)
    if drafted:
        found["cache of the MTP layer"] = drafted / layout.cache_split(config)
    found["activations and logits of a step"] = workspace(config, value_bytes(dtype), "cpu")
    if gpu:
        found["the GPU's runtime"] = workspace(config, 0, "gpu") - workspace(config, 0, "cpu")
    return found
