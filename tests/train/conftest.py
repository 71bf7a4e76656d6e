"""Tiny models: threads only wait for one another, tenfold so on a busy machine."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass
