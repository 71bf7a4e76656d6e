"""Tiny models: threads only wait for one another, tenfold so on a busy machine."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
