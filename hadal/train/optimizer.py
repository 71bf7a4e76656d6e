"""AdamW with FP32 masters and BF16 moments over a BF16 model (DeepSeek-V3 report §3.3.3, §4.2).

    m ← β₁m + (1−β₁)g          v ← β₂v + (1−β₂)g²
    w ← w·(1 − η·wd)           w ← w − η/(1−β₁ᵗ) · m / (√(v/(1−β₂ᵗ)) + ε)

(Loshchilov & Hutter, arXiv 1711.05101; V3: β 0.9/0.95, weight decay 0.1, global-norm clipping 1.0.)

Masters, moments and gradients live in flat buffers, one of each for the whole model, so that a step is a
dozen kernels however many parameters there are, and so that a slice of a buffer can one day belong to
another rank. On a GPU the model's parameters are views of such a buffer too, and one kernel makes the whole
step. Gradients accumulate in FP32. Weight decay acts on matrices (embedding, head and gate included) and not
on vectors: norm weights and biases.

`alive` is a device scalar, 1.0 or 0.0: at 0.0 a step changes nothing, bit for bit. The trainer lowers it
when a loss or a gradient is not finite, and need not wait for the device to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hadal.ops.dispatch import forced_reference, has_triton
from hadal.ops.fp8_training import summing

SLAB = 2**26
"""Elements updated at a time without the kernel: bounds the FP32 temporaries of a step (256 MiB each)."""
CACHED = 2**17
"""Elements that a thread of a CPU updates at a time: temporaries (512 KiB each) that stay in its cache, and
are not fresh pages. An element's arithmetic does not depend on it."""
LARGE = 2**18
"""Elements from which on a parameter's gradient is taken as soon as it is made (`collecting`)."""
ALIGNED = 64
"""Elements at whose multiples all parameters must start to be views of one buffer: 128 bytes in BF16, which
matrix products want."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives in the flat buffers."""

    name: str
    shape: torch.Size
    start: int
    end: int
    decays: bool


def decays(parameter: Tensor) -> bool:
    """Weight decay is for matrices (and stacks of them); norm weights and biases are vectors."""
    return parameter.ndim >= 2


class AdamW:
    """See the file's head. `named`: (name, parameter) pairs; those without `requires_grad` are left out."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        moment_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        chosen = [(name, p) for name, p in named if p.requires_grad]
        if not chosen:
            raise ValueError("no parameter requires a gradient: there is nothing to optimise")
        chosen.sort(key=lambda pair: not decays(pair[1]))  # stable: matrices first, vectors last
        self.betas, self.eps, self.weight_decay, self.clip = betas, eps, weight_decay, clip
        self.parameters: list[Tensor] = [p for _, p in chosen]
        self.slots = list(_slots(chosen))
        self.decayed = sum(slot.end - slot.start for slot in self.slots if slot.decays)
        device, size = self.parameters[0].device, self.slots[-1].end
        self.master_N = torch.empty(size, dtype=torch.float32, device=device)
        self.grad_N = torch.zeros(size, dtype=torch.float32, device=device)
        self.exp_avg_N = torch.zeros(size, dtype=moment_dtype, device=device)
        self.exp_avg_sq_N = torch.zeros(size, dtype=moment_dtype, device=device)
        self.steps = 0
        self.on_write: Callable[[], None] | None = None  # for whoever makes weights out of the parameters
        self._has_grad = False
        self._taken: set[int] = set()  # parameters whose gradient of this backward pass is summed already
        self._number: dict[int, int] = {}  # of the parameter that lies at an address, during a pass
        self._masters, self._grads = self._views(self.master_N), self._views(self.grad_N)
        self._parameter_N = self._lay_flat()
        self.from_model()

    def _views(self, flat_N: Tensor) -> list[Tensor]:
        return [flat_N[slot.start : slot.end].view(slot.shape) for slot in self.slots]

    @torch.no_grad()
    def _lay_flat(self) -> Tensor | None:
        """On a GPU: the parameters moved, as views, into one buffer laid out like the masters."""
        dtypes = {p.dtype for p in self.parameters}
        if not self.master_N.is_cuda or len(dtypes) > 1 or any(slot.start % ALIGNED for slot in self.slots):
            return None
        parameter_N = torch.empty_like(self.master_N, dtype=dtypes.pop())
        for parameter, view in zip(self.parameters, self._views(parameter_N), strict=True):
            parameter.data = view.copy_(parameter.data)
        return parameter_N

    def _lies_flat(self) -> bool:
        """Whether the parameters are still where `_lay_flat` put them: nobody moved or cast the model."""
        if self._parameter_N is None:
            return False
        first, size = self._parameter_N.data_ptr(), self._parameter_N.element_size()
        pairs = zip(self.parameters, self.slots, strict=True)
        return all(p.data_ptr() == first + slot.start * size for p, slot in pairs)

    @torch.no_grad()
    def from_model(self) -> None:
        """Masters ← parameters: after weights were set from outside."""
        torch._foreach_copy_(self._masters, self.parameters)

    @torch.no_grad()
    def to_model(self) -> None:
        """Parameters ← masters, rounded to the model's dtype."""
        torch._foreach_copy_(self.parameters, self._masters)
        self.wrote()

    def wrote(self) -> None:
        """The parameters have been written: tells `on_write`."""
        if self.on_write is not None:
            self.on_write()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """For a forward and backward pass, or the latter alone: large gradients go into the FP32 buffer one
        by one as they are made, and are freed, so that they never exist all at once. Those of experts in FP8
        are added there by the products that make them. `accumulate` must follow."""
        hooks = [
            p.register_post_accumulate_grad_hook(partial(self._take, number))
            for number, p in enumerate(self.parameters)
            if p.numel() >= LARGE
        ]
        self._number = {p.data_ptr(): number for number, p in enumerate(self.parameters)}
        try:
            with summing(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def place(self, weight: Tensor) -> tuple[Tensor, bool] | None:
        """Where this pass's gradient of a weight is to be brought, and whether it is added to one that is
        there (`hadal.ops.fp8_training.Sums`); None where it is no parameter of this optimizer."""
        number = self._number.get(weight.data_ptr())
        if number is None or self._grads[number].shape != weight.shape:
            return None
        more = self._has_grad or number in self._taken
        self._taken.add(number)
        return self._grads[number], more

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        if parameter.grad is None:  # autograd says so of a weight that had none, too
            return
        if self._has_grad or number in self._taken:
            self._grads[number].add_(parameter.grad)
        else:
            self._grads[number].copy_(parameter.grad)
        self._taken.add(number)
        parameter.grad = None

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the parameters' `.grad` into the FP32 buffer (adding from the second call of a step on)."""
        fresh: list[tuple[Tensor, Tensor]] = []
        more: list[tuple[Tensor, Tensor]] = []
        for number, (g, p) in enumerate(zip(self._grads, self.parameters, strict=True)):
            begun = self._has_grad or number in self._taken
            if p.grad is not None:
                (more if begun else fresh).append((g, p.grad))
            elif not begun:
                g.zero_()
        for function, pairs in ((torch._foreach_copy_, fresh), (torch._foreach_add_, more)):
            if pairs:
                function([g for g, _ in pairs], [grad for _, grad in pairs])
        self._has_grad = True
        self._taken.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def gathered(self, any_yet: bool = True) -> None:
        """Say whether the buffer holds gradients of this step: where a CUDA graph has written them, or a
        pass was broken off."""
        self._has_grad = any_yet
        self._taken.clear()
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Global L2 norm of the accumulated gradient, a device scalar in FP32."""
        return torch.linalg.vector_norm(self.grad_N)

    @torch.no_grad()
    def step(self, rate: float, norm: Tensor, alive: Tensor) -> None:
        """One update at learning rate `rate` from the accumulated gradient of global norm `norm`.

        Clips to `clip` (0: not at all) as `torch.nn.utils.clip_grad_norm_` does, writes the masters back to
        the model and empties the gradient. Raises RuntimeError when nothing was accumulated.
        """
        if not self._has_grad:
            raise RuntimeError("optimizer.step() without a gradient: call accumulate() after backward()")
        self.steps += 1
        self._has_grad = False
        if self.master_N.is_cuda and has_triton() and not forced_reference():
            self._update_whole(rate, norm, alive)
            return
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else torch.ones_like(norm)
        for part, decayed in self._slabs():
            self._update(part, rate, self.weight_decay if decayed else 0.0, scale, alive)
        self.to_model()

    def _update_whole(self, rate: float, norm: Tensor, alive: Tensor) -> None:
        """`_update` for all slabs, and `to_model`, in one kernel."""
        from hadal.ops.triton import train_adamw

        (beta1, beta2), flat = self.betas, self._lies_flat()
        numbers = train_adamw.Numbers(
            beta1, beta2, self.eps, rate / (1.0 - beta1**self.steps), math.sqrt(1.0 - beta2**self.steps),
            rate * self.weight_decay, self.clip,
        )  # fmt: skip
        train_adamw.update(
            self.grad_N, self.master_N, self.exp_avg_N, self.exp_avg_sq_N,
            self._parameter_N if flat else None, norm, alive, self.decayed, numbers,
        )  # fmt: skip
        if flat:
            self.wrote()
        else:
            self.to_model()

    def _slabs(self) -> Iterator[tuple[slice, bool]]:
        slab = min(SLAB, CACHED * torch.get_num_threads()) if self.master_N.is_cpu else SLAB
        for low, high, decayed in ((0, self.decayed, True), (self.decayed, self.master_N.numel(), False)):
            for start in range(low, high, slab):
                yield slice(start, min(start + slab, high)), decayed

    def _update(self, part: slice, rate: float, decay: float, scale: Tensor, alive: Tensor) -> None:
        beta1, beta2 = self.betas
        # A dead step may hold NaN; made finite, it is then multiplied by exact zeros.
        g_N = torch.nan_to_num_(self.grad_N[part] * scale, nan=0.0, posinf=0.0, neginf=0.0)
        m_N = self.exp_avg_N[part].float().lerp_(g_N, (1.0 - beta1) * alive)
        v_N = self.exp_avg_sq_N[part].float().lerp_(g_N.square_(), (1.0 - beta2) * alive)
        self.exp_avg_N[part].copy_(m_N)
        self.exp_avg_sq_N[part].copy_(v_N)
        denominator_N = v_N.sqrt().div_(math.sqrt(1.0 - beta2**self.steps)).add_(self.eps)
        update_N = torch.div(m_N, denominator_N).mul_(alive * (rate / (1.0 - beta1**self.steps)))
        if decay:
            self.master_N[part].mul_(1.0 - alive * (rate * decay))
        self.master_N[part].sub_(update_N)

    # --- state: tensors by parameter name, so that a checkpoint does not know how the buffers are laid out
    # -------
    def state(self) -> dict[str, Tensor]:
        """Views of masters and moments as `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`."""
        return {
            f"{kind}.{slot.name}": view
            for kind, flat_N in self._buffers().items()
            for slot, view in zip(self.slots, self._views(flat_N), strict=True)
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Restore what `state()` gave, and the model's parameters with it. Names, shapes and dtypes must
        match."""
        own = self.state()
        if own.keys() != state.keys():
            missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(
                f"optimizer state does not fit the model: missing {missing[:3]}, unknown {extra[:3]}"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise ValueError(
                    f"optimizer state {name!r} is {state[name].dtype} {tuple(state[name].shape)}; "
                    f"this run wants {tensor.dtype} {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])
        self.steps, self._has_grad = steps, False
        self.to_model()

    def _buffers(self) -> dict[str, Tensor]:
        return {"master": self.master_N, "exp_avg": self.exp_avg_N, "exp_avg_sq": self.exp_avg_sq_N}


def _slots(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Slot]:
    start = 0
    for name, p in named:
        yield Slot(name, p.shape, start, start + p.numel(), decays(p))
        start += p.numel()
