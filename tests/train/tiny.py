"""A tiny V3 model and a tiny stream of rows for the trainer's tests."""

import numpy as np
import torch

from hadal.config import Mla, ModelConfig, Moe
from hadal.model.transformer import Transformer
from hadal.train.batches import Rows, batches
from hadal.train.losses import Objective
from hadal.train.optimizer import AdamW
from hadal.train.schedules import LearningRate, Schedule
from hadal.train.trainer import Trainer

VOCAB, CONTEXT = 96, 16


def config(mtp=1, **changes):
    moe = Moe(
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=24,
        first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    )  # fmt: skip
    fields = dict(  # noqa: C408
        model_type="deepseek_v3", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, attention=Mla(16, 16, 8, 8, 12), moe=moe, num_nextn_predict_layers=mtp,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=(1,),
    )  # fmt: skip
    return ModelConfig(**(fields | changes))


class RandomRows:
    """Row r is drawn from r: learnable (each token is followed by one of two), with documents, prompts,
    padding."""

    def __init__(self, plain=False):
        self.plain = plain

    def rows(self, start, count):
        token, weight, lengths, padding = [], [], [], []
        for number in range(start, start + count):
            rng = np.random.default_rng(number)
            steps = rng.integers(1, 3, CONTEXT)
            token.append((rng.integers(VOCAB) + np.cumsum(steps)) % VOCAB)
            row_weight = np.ones(CONTEXT, np.float32)
            if self.plain:
                row_lengths, row_padding = [CONTEXT], [False]
            else:
                first, tail = int(rng.integers(3, 9)), int(rng.integers(0, 4))
                row_lengths = [first, CONTEXT - first - tail] + ([tail] if tail else [])
                row_padding = [False, False] + ([True] if tail else [])
                row_weight[: int(rng.integers(0, 3))] = 0
            weight.append(row_weight)
            lengths += row_lengths
            padding += row_padding
        return Rows(np.stack(token), np.stack(weight), lengths, padding)


def model(seed=0, dtype=torch.float32, **changes):
    built = Transformer(config(**changes), dtype=torch.float32).init_weights(seed, 0.06).to(dtype)
    for number, buffer in enumerate(built.buffers()):
        buffer.copy_(torch.linspace(-0.02, 0.02, buffer.numel()).roll(number))
    return built


def trainer(
    network=None,
    *,
    position=0,
    rows=4,
    micro_rows=2,
    alpha=0.01,
    plain=False,
    rate=3e-3,
    speed=0.001,
    **adamw,
):
    network = network or model()
    stream = batches(
        RandomRows(plain), position=position, rows=rows, micro_rows=micro_rows,
        depths=len(network.mtp), mask_documents=True,
    )  # fmt: skip
    schedule = Schedule(LearningRate(rate, 0.1 * rate, 0, 10**9, 10**9), speed, 10**9, 0.3, 0.1, 10**9)
    optimizer = AdamW(network.named_parameters(), **adamw)
    return Trainer(network, optimizer, stream, schedule, Objective(sequence_alpha=alpha))
