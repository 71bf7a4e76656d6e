"""How much memory a training step takes, by part: arithmetic on the model and the shape of a micro-batch.

    peak   = state + max(forward, update)
    state  = parameters + FP32 masters + two moments + FP32 gradients summed over micro-batches
    forward = activations kept for the backward pass + the largest thing made beside them
    update = the larger of the parameters' own gradients (small ones together, large ones one by one) and the
             FP32 temporaries of an optimizer's slab; on a GPU, where one kernel updates, the largest gradient

It counts what the operations of `hadal/ops` keep, tensor by tensor; with selective recomputation what they
keep instead (hadal/ops/recompute.py). The logits exist a chunk at a time. A moving average of the weights and
the copy of a checkpoint live in host memory and are told apart. What an allocator wastes is not in it.

Bytes everywhere; widths in elements. Legend: T tokens of a micro-batch, D hidden, H heads, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from hadal.config import Gqa, Mla, ModelConfig
from hadal.config.model import _matrices

SLAB = 2**26  # elements that the optimizer updates at a time where no kernel does and nothing else is said
LARGE = 2**18  # elements from which on a parameter's gradient is summed as soon as it is made
SLAB_TEMPORARIES = 5  # FP32 tensors of a slab
CHUNK_BYTES, CHUNK_STEP = 512 * 2**20, 256  # of FP32 logits at a time, and tokens that they are cut to
FP32 = 4
TILE = 128  # of FP8 products


@dataclass(frozen=True)
class TrainingShape:
    """What a step's memory depends on beside the model. `element`: bytes of the model's dtype; `recompute`:
    kinds of hadal/ops/recompute.py; `fused`: the kernels of a GPU, which keep less than the references;
    `masked`: attention stays inside documents; `slab`: elements of the optimizer's slab, on a CPU as many as
    its threads keep in their caches (hadal/train/optimizer.py)."""

    tokens: int
    element: int = 2
    moment: int = 2
    recompute: tuple[str, ...] = ()
    fused: bool = True
    masked: bool = False
    average: bool = False
    snapshot: bool = True
    fp8: bool = False
    slab: int = SLAB
    micro_batches: int = 1  # of a step: where there are several, weights in FP8 are kept all through


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by part; `peak` on the device, `host` beside it in host memory."""

    parameters: int
    masters: int
    moments: int
    gradients: int  # the FP32 sums
    activations: int
    weight_codes: int  # of FP8 products, between the forward and the backward pass
    forward_workspace: int
    update_workspace: int
    host: int

    @property
    def state(self) -> int:
        return self.parameters + self.masters + self.moments + self.gradients

    @property
    def peak(self) -> int:
        passes = self.activations + self.weight_codes + self.forward_workspace
        return self.state + max(passes, self.update_workspace)


def training_memory(config: ModelConfig, shape: TrainingShape) -> TrainingMemory:
    """The memory of one device that trains the whole model."""
    count = _trained(config)
    state = count * (FP32 + 2 * shape.moment)
    return TrainingMemory(
        parameters=count * shape.element,
        masters=count * FP32,
        moments=count * 2 * shape.moment,
        gradients=count * FP32,
        activations=activations(config, shape),
        weight_codes=weight_codes(config, shape),
        forward_workspace=_forward_workspace(config, shape),
        update_workspace=_largest(config) * shape.element
        if shape.fused
        else max(_own_gradients(config) * shape.element, SLAB_TEMPORARIES * FP32 * min(shape.slab, count)),
        host=(count * FP32 if shape.average else 0)
        + (state + (count * FP32 if shape.average else 0) if shape.snapshot else 0),
    )


def _largest(config: ModelConfig) -> int:
    """Elements of the largest parameter: embedding, or the stacked experts of a layer."""
    m, D = config.moe, config.hidden_size
    stack = 0 if m is None else m.n_routed_experts * 2 * m.moe_intermediate_size * D
    return max(config.vocab_size * D, stack, 2 * config.intermediate_size * D)


def _own_gradients(config: ModelConfig) -> int:
    """Elements of gradients in the model's dtype that exist at once: those of small parameters wait for the
    end of the backward pass, of large ones there is one."""
    D, depths = config.hidden_size, config.num_nextn_predict_layers
    sizes = [config.vocab_size * D] * (1 if config.tie_word_embeddings else 2) + [2 * D * D] * depths
    for layer in range(config.num_hidden_layers + depths):
        sizes += [rows * width * copies for rows, width, copies in _matrices(config, layer)]
    large = sum(size for size in sizes if size >= LARGE)
    return min(_trained(config), _trained(config) - large + _largest(config))


def _trained(config: ModelConfig) -> int:
    """Parameters that a gradient moves: all but the gates' biases."""
    n, m = config.parameters(), config.moe
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    gates = sum(config.is_moe_layer(layer) for layer in layers)
    biases = m.n_routed_experts if m is not None and m.topk_method == "noaux_tc" else 0
    return n.main + n.mtp_unique - gates * biases


def activations(config: ModelConfig, shape: TrainingShape) -> int:
    """What the graph of one micro-batch keeps for the backward pass."""
    keep, b, D = _keep(shape), shape.element, config.hidden_size
    depths = config.num_nextn_predict_layers
    rope = (
        config.attention.qk_rope_head_dim if isinstance(config.attention, Mla) else config.attention.head_dim
    )
    per_token = 8 * (depths + 1) + FP32 * rope  # ids; rotations
    constant = (depths + 1) * config.vocab_size * D * b  # the head's gradients, made with the losses
    for layer in range(config.num_hidden_layers + depths):
        per_token += keep.attention(config) + keep.mlp(config, layer) + keep.norms(config, layer)
        constant += keep.gate_weight(config, layer) + keep.rows(config, layer)
    per_token += (depths + 1) * (keep.norm(D, output=False) + D * b)  # before each head, and its gradient
    for depth in range(depths):
        per_token += keep.mtp_input(D, config.mtp_after_norm and depth == 0) + 2 * D * b
    return round(shape.tokens * per_token) + constant


@dataclass(frozen=True)
class _Keep:
    """Bytes a token that operations keep."""

    shape: TrainingShape

    @property
    def b(self) -> int:
        return self.shape.element

    def again(self, kind: str) -> bool:
        return kind in self.shape.recompute

    def norm(self, width: int, output: bool = True) -> int:
        """An RMSNorm: its input, what it makes on its way, and its output where the next operation keeps
        that."""
        if self.again("norm"):
            return self.b * width
        inside = self.b * width if self.shape.fused else (FP32 + self.b) * width
        return inside + FP32 + (self.b * width if output else 0)

    def norms(self, config: ModelConfig, layer: int) -> int:
        """Those before attention and before the feed-forward network."""
        return 2 * self.norm(config.hidden_size)

    def rows(self, config: ModelConfig, layer: int) -> int:
        """Bytes of a micro-batch that are not so many a token: rows by expert, with gaps."""
        return 0

    def attention(self, config: ModelConfig) -> int:
        a, H, b = config.attention, config.num_attention_heads, self.b
        if isinstance(a, Gqa):
            G, C = a.num_key_value_heads, a.head_dim
            heads = (H + 2 * G) * C if self.shape.fused else (2 * H + 3 * G) * C  # copies, or views of both
            return b * heads + self._attended(H, C, C)
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        kept = 0 if a.q_lora_rank is None else self.norm(a.q_lora_rank)
        kept += b * latent if self.again("norm") else self._entry(a)
        # a GPU's kernel for whole rows takes values as wide as they are; the one for documents does not
        padded = a.v_head_dim < a.qk_head_dim and (self.shape.masked or not self.shape.fused)
        own_v = a.v_head_dim if self.shape.fused else a.qk_nope_head_dim + a.v_head_dim  # a copy, or a view
        if not self.again("up"):
            kept += b * H * (2 * a.qk_head_dim + (a.qk_head_dim if padded else own_v))
        narrow = a.v_head_dim if self.shape.fused and not padded else a.qk_head_dim
        return kept + self._attended(H, narrow, a.v_head_dim)

    def _entry(self, a: Mla) -> int:
        """MLA's latent entry: the norm's input lies in the projection's output, beside the rope key."""
        latent, entry = a.kv_lora_rank, a.kv_lora_rank + a.qk_rope_head_dim
        if self.shape.fused:
            return 2 * self.b * entry + FP32
        wide = entry if self.b == FP32 else latent
        return FP32 * wide + FP32 + self.b * (latent + entry)

    def _attended(self, heads: int, key: int, value: int) -> int:
        """log-sum-exp and output of attention, and the copy that the output projection reads."""
        copy = value < key or not self.shape.fused
        return FP32 * heads + self.b * heads * (key + (value if copy else 0))

    def swiglu(self, width: int) -> int:
        """Gate and up; the product, which the next one reads; and silu(gate) without the kernel."""
        return self.b * width * (2 if self.again("swiglu") else 3 if self.shape.fused else 4)

    def mlp(self, config: ModelConfig, layer: int) -> int:
        m, D, b = config.moe, config.hidden_size, self.b
        if m is None or not config.is_moe_layer(layer):
            return self.swiglu(config.intermediate_size)
        K = m.num_experts_per_tok
        copied = b != FP32 and not self.shape.fused and not self.again("norm")  # x in FP32
        gate = FP32 * m.n_routed_experts + (FP32 * D if copied else 0)
        gate += (20 if self.shape.fused else 28) * K + (
            FP32 * (K + 1) if m.norm_topk_prob and K > 1 and not self.shape.fused else 0
        )  # ids, places, weights
        shared = self.swiglu(m.n_shared_experts * m.moe_intermediate_size) if m.n_shared_experts else 0
        back = b if self.shape.fused else 0 if self.again("rows") else FP32  # what the weighted sum keeps
        rows = K * D * ((0 if self.again("rows") and self.shape.fused else b) + back)  # sorted, and back
        return gate + shared + K * self.swiglu(m.moe_intermediate_size) + rows

    def gate_weight(self, config: ModelConfig, layer: int) -> int:
        """A gate's weight in FP32, once."""
        if config.moe is None or not config.is_moe_layer(layer) or self.b == FP32 or self.shape.fused:
            return 0
        return FP32 * config.moe.n_routed_experts * config.hidden_size

    def mtp_input(self, D: int, after_norm: bool) -> int:
        """The two norms before an MTP block, whose outputs are read by their concatenation alone, and the
        final norm before them where it applies. The hidden state is kept by the final norm already."""
        shared_input = 0 if not self.shape.fused and self.b != FP32 and not self.again("norm") else self.b * D
        if not after_norm:
            return 2 * self.norm(D, output=False) - shared_input
        chained = self.norm(D) + self.norm(D, output=False) - self.b * D  # one's output is the other's input
        return self.norm(D, output=False) + chained - shared_input


def _forward_workspace(config: ModelConfig, shape: TrainingShape) -> int:
    """The largest of what exists beside all activations: the last head's loss (a chunk of logits, their
    gradient, the gradient of the head's weight in FP32), or a layer made again and its gradients."""
    b, D, V = shape.element, config.hidden_size, config.vocab_size
    chunk = min(shape.tokens, max(128, CHUNK_BYTES // (FP32 * V) // CHUNK_STEP * CHUNK_STEP))
    if b == FP32:  # the head's gradient is counted among the activations
        head = chunk * V * FP32
    else:
        head = max(chunk * V * (FP32 + b), FP32 * V * D)
    if shape.fp8:
        return max(head, *(_fp8_workspace(config, shape, n) for n in range(config.num_hidden_layers)))
    plain = _Keep(replace(shape, recompute=()))
    layer = max(plain.mlp(config, number) for number in range(config.num_hidden_layers))
    return max(head, shape.tokens * layer)


# --- FP8 products -------------------------------------------------------------------------------------------
def _keep(shape: TrainingShape) -> _Keep:
    return _KeepCodes(shape) if shape.fp8 else _Keep(shape)


def _codes(width: int) -> int:
    """A row in tiles of 1 × 128: a byte an element, an FP32 scale a tile."""
    return width + FP32 * ceil(width / TILE)


class _KeepCodes(_Keep):
    """What operations keep where linear layers multiply in FP8 (hadal/ops/fp8_training.py): each keeps codes
    of its own of what it reads, and no operation keeps a norm's output for it."""

    def norms(self, config: ModelConfig, layer: int) -> int:
        """The gate reads the second's output (as a copy in FP32 for BF16 on a CPU); where the heads are made
        again from the first's output itself, that is kept."""
        D, a = config.hidden_size, config.attention
        again = self.again("up") and isinstance(a, Mla) and a.q_lora_rank is None
        gate = config.is_moe_layer(layer) and (self.b == FP32 or self.shape.fused)
        return self.norm(D, output=again) + self.norm(D, output=gate)

    def attention(self, config: ModelConfig) -> int:
        a, H, D, b = config.attention, config.num_attention_heads, config.hidden_size, self.b
        if isinstance(a, Gqa):
            G, C = a.num_key_value_heads, a.head_dim
            heads = (H + 2 * G) * C if self.shape.fused else (2 * H + 3 * G) * C
            return _codes(D) + b * heads + self._attended(H, C, C)
        up, latent = self.again("up"), a.kv_lora_rank + a.qk_rope_head_dim
        kept = _codes(D) + (0 if up else _codes(a.kv_lora_rank))
        if a.q_lora_rank is not None:
            kept += _codes(D) + self.norm(a.q_lora_rank, output=up) + (0 if up else _codes(a.q_lora_rank))
        elif not up:
            kept += _codes(D)
        kept += b * latent if self.again("norm") else self._entry(a) - (0 if up else b * latent)
        padded = a.v_head_dim < a.qk_head_dim
        own_v = a.v_head_dim if self.shape.fused else a.qk_nope_head_dim + a.v_head_dim
        if not up:
            kept += b * H * (2 * a.qk_head_dim + (a.qk_head_dim if padded else own_v))
        elif self.shape.fused and not padded:
            kept += b * H * own_v
        return kept + self._attended(H, a.qk_head_dim, a.v_head_dim)

    def _attended(self, heads: int, key: int, value: int) -> int:
        return FP32 * heads + self.b * heads * key + _codes(heads * value)

    def swiglu(self, width: int) -> int:
        """Gate and up, in tiles of their own."""
        return 2 * _codes(width)

    def mlp(self, config: ModelConfig, layer: int) -> int:
        m, D = config.moe, config.hidden_size
        if m is None or not config.is_moe_layer(layer):
            return _codes(D) + self.swiglu(config.intermediate_size)
        K = m.num_experts_per_tok
        copied = self.b != FP32 and not self.shape.fused and not self.again("norm")
        gate = FP32 * m.n_routed_experts + (FP32 * D if copied else 0) + 16 * K
        gate += FP32 * (K + 1) if m.norm_topk_prob and K > 1 else 0
        width = m.n_shared_experts * m.moe_intermediate_size
        return gate + _codes(D) + (_codes(D) + self.swiglu(width) if width else 0)

    def rows(self, config: ModelConfig, layer: int) -> int:
        """Gate and up of all rows, their tokens and weights; the expert of each tile; ends."""
        m = config.moe
        if m is None or not config.is_moe_layer(layer):
            return 0
        tiles = _tiles(config, self.shape.tokens)
        row = self.swiglu(m.moe_intermediate_size) + 2 * FP32
        return tiles * (TILE * row + FP32) + FP32 * (m.n_routed_experts + 1)


def _tiles(config: ModelConfig, tokens: int) -> int:
    """Room for tiles of 128 rows, whatever the distribution (hadal.ops.fp8_tiles.tiles_at_most)."""
    assert config.moe is not None
    pairs = tokens * config.moe.num_experts_per_tok
    return max(1, min(pairs, ceil(pairs / TILE) + config.moe.n_routed_experts))


def weight_codes(config: ModelConfig, shape: TrainingShape) -> int:
    """Weights in blocks of 128 × 128; in both forms where several micro-batches share them."""
    if not shape.fp8:
        return 0
    a, H, D, m = config.attention, config.num_attention_heads, config.hidden_size, config.moe
    if isinstance(a, Gqa):
        attention = D * (2 * H + 2 * a.num_key_value_heads) * a.head_dim
    else:
        key, rank = a.qk_head_dim, a.q_lora_rank
        attention = D * H * key if rank is None else rank * (D + H * key)
        attention += D * (a.kv_lora_rank + a.qk_rope_head_dim + H * a.v_head_dim)
        attention += a.kv_lora_rank * H * (a.qk_nope_head_dim + a.v_head_dim)
    elements = 0
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        width = config.intermediate_size
        if m is not None and config.is_moe_layer(layer):
            width = (m.n_routed_experts + m.n_shared_experts) * m.moe_intermediate_size
        elements += attention + 3 * D * width
    return round(elements * (1 + FP32 / TILE**2)) * (2 if shape.micro_batches > 1 else 1)


def _fp8_workspace(config: ModelConfig, shape: TrainingShape, layer: int) -> int:
    """The backward pass of a network at its widest: the gradients of the hidden values and of gate and up,
    these and the hidden values as codes for each product that reads them, the output's gradient as codes."""
    m, D = config.moe, config.hidden_size
    if m is None or not config.is_moe_layer(layer):
        rows, width = shape.tokens, config.intermediate_size
    else:
        rows, width = _tiles(config, shape.tokens) * TILE, m.moe_intermediate_size
    return rows * (D + (5 + shape.element) * width)
