"""A reward model: a `Transformer`, and a linear head that makes one number of a sequence.

    r(x, y) = w · RMSNorm(h_last) + b            h_last: hidden state of the last token
    loss    = −log σ(r(x, y⁺) − r(x, y⁻))        Bradley-Terry, for pairs of a better and a worse answer

as in InstructGPT (arXiv 2203.02155, eq. 1). Legend: T tokens of the stream, S sequences, D hidden, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from hadal.model import Context, Transformer
from hadal.post.rewards.protocol import Completion, RewardError
from hadal.weights.folder import load
from hadal.weights.writer import save

HEAD = "reward_head/head.safetensors"  # below the folder: what lies in it is the transformer's
Encode = Callable[[Completion], Sequence[int]]


class RewardModel(nn.Module):
    """`transformer` is used as it is, its own head is not; the scalar head is FP32 and starts at zero, so
    that all begin equal."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        width, device = transformer.config.hidden_size, transformer.device
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, token_T: Tensor, context: Context) -> Tensor:
        """FP32 scores [S], from the last token of each sequence of a packed stream."""
        hidden_TD = self.transformer(token_T, context)
        last_S = torch.tensor(context.cu_seqlens[1:], device=hidden_TD.device) - 1
        normed_SD = self.transformer.norm(hidden_TD[last_S])
        return linear(normed_SD.float(), self.weight, self.bias)[:, 0]

    def measure(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Scores [S] of token sequences. Raises RewardError for an empty one."""
        if not sequences or not all(sequences):
            raise RewardError("a reward model measures sequences of at least one token")
        device = self.transformer.device
        token_T = torch.tensor([token for one in sequences for token in one], device=device)
        scores: Tensor = self(token_T, Context.packed([len(one) for one in sequences], device))
        return scores

    def scorer(self, encode: Encode, batch: int = 32) -> Callable[[Sequence[Completion]], list[float]]:
        """What `Rewards(…, model=…)` takes. encode: the tokens of a completion with its prompt before it,
        in the form that the head was trained on."""

        @torch.no_grad()
        def measure(completions: Sequence[Completion]) -> list[float]:
            found: list[float] = []
            for first in range(0, len(completions), batch):
                block = [encode(completion) for completion in completions[first : first + batch]]
                found += self.measure(block).tolist()
            return found

        return measure

    def save(self, folder: str | Path, *, files_from: str | Path | None = None) -> Path:
        """A published folder of the transformer, with the head beside it in HEAD. Returns its path."""
        path = save(self.transformer, folder, files_from=files_from)
        tensors = {"weight": self.weight.detach().cpu(), "bias": self.bias.detach().cpu()}
        (path / HEAD).parent.mkdir()
        save_file(tensors, path / HEAD, metadata={"format": "pt"})
        return path

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> RewardModel:
        """What `save` wrote. Raises WeightsError, or RewardError if the head is missing or does not fit."""
        model = cls(load(folder, dtype=dtype, device=device))
        path = Path(folder) / HEAD
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RewardError(f"{path} cannot be read ({error}); save a RewardModel there first") from None
        for name, parameter in (("weight", model.weight), ("bias", model.bias)):
            tensor = found.get(name)
            if tensor is None or tensor.shape != parameter.shape or tensor.dtype != torch.float32:
                raise RewardError(f"{path}: {name} is missing, or not FP32 of {list(parameter.shape)}")
            parameter.data.copy_(tensor)
        return model


def bradley_terry(better_B: Tensor, worse_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """Mean of −log σ(better − worse − margin) over pairs, in FP32. margin_B: how much better, if known."""
    if better_B.shape != worse_B.shape or not better_B.numel():
        shapes = f"{list(better_B.shape)} and {list(worse_B.shape)}"
        raise ValueError(f"pairs of scores are wanted, at least one; got {shapes}")
    gap_B = better_B.float() - worse_B.float()
    return -logsigmoid(gap_B if margin_B is None else gap_B - margin_B).mean()
