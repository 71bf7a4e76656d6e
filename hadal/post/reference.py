"""The reference policy of a KL penalty: weights kept aside, and in the model for the time of a scoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hadal.model.transformer import Transformer
from hadal.post.lora import Adapters
from hadal.train.optimizer import AdamW

PREFIX = "reference."


class Reference:
    """What the policy was at the start or at the last `refresh`. Of LoRA only A and B are kept, and nothing
    while the reference is the base; else a copy of all weights, on the model's device or on the host."""

    def __init__(
        self, model: Transformer, optimizer: AdamW, adapters: Adapters | None, *, on_host: bool
    ) -> None:
        self.model, self.optimizer, self.adapters, self.on_host = model, optimizer, adapters, on_host
        self.kept: dict[str, Tensor] | None = None
        if adapters is None:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """The reference becomes the policy as it is."""
        if self.adapters is not None:
            self.kept = self.adapters.snapshot()
            return
        device = torch.device("cpu") if self.on_host else self.model.device
        named = dict(self.model.named_parameters())
        if self.kept is None:
            self.kept = {name: torch.empty_like(p, device=device) for name, p in named.items()}
        for name, copy in self.kept.items():
            copy.copy_(named[name].detach())

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model is the reference inside the block, and behind it the policy again, bit for bit."""
        if self.adapters is not None:
            with self.adapters.holding(self.kept):
                yield
            return
        assert self.kept is not None
        try:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self.kept[name])
            yield
        finally:
            self.optimizer.to_model()  # parameters are the masters, rounded

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it."""
        return {f"{PREFIX}{name}": tensor for name, tensor in (self.kept or {}).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave. Raises ValueError for that of another model."""
        found = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
        if self.adapters is not None:
            own = self.adapters.snapshot()
            if found and found.keys() != own.keys():
                raise ValueError("the reference in the checkpoint has other adapters than this run")
            self.kept = {n: t.to(own[n].device) for n, t in found.items()} if found else None
            return
        assert self.kept is not None
        if found.keys() != self.kept.keys():
            raise ValueError("the reference in the checkpoint is that of another model")
        for name, copy in self.kept.items():
            copy.copy_(found[name])
