"""The memory that is predicted against what the operations keep, byte for byte, and against a step's peak."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hadal.config import Gqa, ModelConfig, preset
from hadal.ops import cross_entropy, fp8_tiles
from hadal.ops.fp8_training import constant_weights, fp8_training
from hadal.ops.recompute import KINDS
from hadal.plan import training as plan
from hadal.plan.training import TrainingShape, activations, training_memory, weight_codes
from hadal.train import optimizer
from hadal.train import recipe as recipes
from hadal.train.batches import build
from hadal.train.losses import cross_entropies
from hadal.train.memory import peak_memory
from tests.train import tiny
from tests.train.test_recompute import V3, kept_bytes

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
MLA = tiny.config().attention
MODELS = {
    "v3": {},
    "no MTP": {"mtp": 0},
    "two MTP depths": {"mtp": 2},
    "MTP before the norm": {"mtp_after_norm": False},
    "no query latent": {"attention": replace(MLA, q_lora_rank=None)},
    "values as wide as keys": {"attention": replace(MLA, v_head_dim=16)},
    "dense": {"moe": None, "mtp": 0},
    "qwen": {"attention": Gqa(2, 8, qkv_bias=True), "model_type": "qwen2", "moe": None, "mtp": 0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_activations_are_predicted_to_the_byte(changes, fp8, dtype):
    network = tiny.model(dtype=dtype, **changes)
    micro = build(tiny.RandomRows().rows(0, 4), depths=len(network.mtp), mask_documents=True)
    for kinds in ((), *((kind,) for kind in KINDS), V3, KINDS):
        shape = TrainingShape(micro.tokens, dtype.itemsize, 2, kinds, fused=False, fp8=fp8)
        with fp8_training(fp8):
            assert activations(network.config, shape) == kept_bytes(network, micro, kinds), kinds


class Live(TorchDispatchMode):
    """The most bytes of tensor storage that were alive at once."""

    def __init__(self, *tensors):
        super().__init__()
        self.live, self.peak = {}, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        for key in [key for key, (reference, _) in self.live.items() if reference.expired()]:
            del self.live[key]
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [(), V3, KINDS], ids=["nothing", "v3", "all"])
@pytest.mark.parametrize("rows", [4, 64])
def test_the_peak_of_a_whole_step_is_predicted_within_ten_percent(rows, kinds, dtype):
    """With 4 rows the update is the peak, with 64 the activations."""
    trainer = tiny.trainer(tiny.model(dtype=dtype), rows=rows, micro_rows=rows, plain=True)
    trainer.objective = replace(trainer.objective, recompute=kinds)
    peak = peak_of_a_step(trainer)
    shape = TrainingShape(rows * tiny.CONTEXT, dtype.itemsize, 2, kinds, fused=False)
    assert training_memory(trainer.model.config, shape).peak == pytest.approx(peak, rel=0.1)


def peak_of_a_step(trainer):
    """Bytes that are alive at most during a step that is not the first."""
    trainer.step()
    flat = trainer.optimizer
    live = Live(*trainer.model.parameters(), flat.master_N, flat.grad_N, flat.exp_avg_N, flat.exp_avg_sq_N)
    with live:
        trainer.step()
    return live.peak


def test_an_update_on_a_cpu_takes_a_slab_of_its_caches(monkeypatch):
    """Which is smaller than the model, and here larger than what the passes take."""
    slab, trainer = 2**15, tiny.trainer(rows=1, micro_rows=1, plain=True)
    monkeypatch.setattr(optimizer, "CACHED", slab // torch.get_num_threads())
    shape = TrainingShape(tiny.CONTEXT, 4, fused=False, slab=slab)
    memory = training_memory(trainer.model.config, shape)
    assert memory.update_workspace == 5 * 4 * slab > memory.activations + memory.forward_workspace
    assert memory.peak == pytest.approx(peak_of_a_step(trainer), rel=0.03)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_gradients_that_exist_at_once_are_counted(changes, monkeypatch):
    monkeypatch.setattr(plan, "LARGE", 512)
    network = tiny.model(**changes)
    sizes = [p.numel() for p in network.parameters() if p.requires_grad]
    shape = TrainingShape(64, 4, fused=False, slab=1)
    expected = 4 * (sum(n for n in sizes if n < 512) + max(sizes))
    assert training_memory(network.config, shape).update_workspace == expected


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "changes", [{}, MODELS["no query latent"], MODELS["qwen"]], ids=["v3", "lite", "qwen"]
)
def test_the_codes_of_weights_are_counted(changes, micro_batches, monkeypatch):
    """All of them, in both forms where they are shared; partial blocks of tiny matrices have more scales."""
    network, made = tiny.model(dtype=torch.bfloat16, **changes), []
    for name in ("quantise_weight", "transposed"):
        make = getattr(fp8_tiles, name)
        monkeypatch.setattr(fp8_tiles, name, lambda *a, make=make: made.append(make(*a)) or made[-1])
    micro = build(tiny.RandomRows().rows(0, 4), depths=len(network.mtp), mask_documents=True)
    with fp8_training(), constant_weights():
        sum(nll_T.sum() for nll_T in cross_entropies(network, micro, micro.context())).backward()
    forms = made if micro_batches > 1 else made[: len(made) // 2]
    shape = TrainingShape(micro.tokens, 2, fp8=True, micro_batches=micro_batches)
    assert weight_codes(network.config, shape) == pytest.approx(sum(w.q.nbytes for w in forms), rel=1e-3)
    assert weight_codes(network.config, replace(shape, fp8=False)) == 0


def test_the_state_is_that_of_the_optimizer():
    trainer = tiny.trainer()
    flat, memory = trainer.optimizer, training_memory(trainer.model.config, TrainingShape(64, 4))
    assert memory.masters == flat.master_N.nbytes
    assert memory.gradients == flat.grad_N.nbytes
    assert memory.moments == flat.exp_avg_N.nbytes + flat.exp_avg_sq_N.nbytes
    assert memory.parameters == sum(p.nbytes for p in trainer.model.parameters())


def test_the_arithmetic_uses_the_trainers_own_sizes():
    assert (plan.SLAB, plan.LARGE) == (optimizer.SLAB, optimizer.LARGE)
    assert plan.CHUNK_BYTES == cross_entropy.CHUNK_BYTES
    assert plan.CHUNK_STEP == cross_entropy.CHUNK_STEP


def test_recipes_have_a_peak():
    plainly = ["train.fp8=false", "ema.rate=0", "train.batch_tokens_start=0", "ema.rate=0"]
    recipe = recipes.load(SHIPPED / "mini.toml", plainly)
    config = preset("hadal-mini").config
    plain = peak_memory(recipe, config)
    lean = peak_memory(replace(recipe, train=replace(recipe.train, recompute=V3)), config)
    biases = 8 * 16  # seven layers and the MTP module
    assert plain.state == (config.parameters().main + config.parameters().mtp_unique - biases) * 14
    assert lean.activations < 0.7 * plain.activations
    assert lean.state == plain.state
    halves = replace(recipe, train=replace(recipe.train, micro_batch_tokens=32_768))
    assert peak_memory(halves, config).activations == pytest.approx(plain.activations / 2, rel=0.01)
    codes = peak_memory(replace(recipe, train=replace(recipe.train, fp8=True)), config)
    assert codes.state == plain.state and codes.activations < 0.7 * plain.activations
    kept = replace(recipe, ema=recipes.EmaRecipe(rate=0.99))
    assert peak_memory(kept, config).host > plain.host > 0


def test_v3_itself_in_its_published_numbers():
    """671B with its MTP module: 14 bytes a parameter of state on one device of imagination."""
    config: ModelConfig = preset("deepseek-v3").config
    memory = training_memory(config, TrainingShape(4096, recompute=V3))
    assert memory.state == 14 * (671_026_419_200 + 11_610_068_224 - 59 * 256)
    plain = training_memory(config, TrainingShape(4096))
    assert memory.activations < 0.7 * plain.activations
