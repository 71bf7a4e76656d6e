"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.kernels import INTERPRETED


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's cast to E4M3 loses the carry where it rounds to a power of two; torch's does not."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter._convert_float

    def convert(values, source, target, rounding):
        if target != tl.float8e4nv or source != tl.float32:
            return cast(values, source, target, rounding)
        floats = torch.from_numpy(values.view("float32").copy())
        return floats.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
