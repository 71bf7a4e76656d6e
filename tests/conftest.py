"""What all tests share: few threads, patient hypothesis, caches of their own, markers by hardware."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: tests that run side by side (pytest -n) take one core each.
_SIDE_BY_SIDE = "PYTEST_XDIST_WORKER_COUNT" in os.environ
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
os.environ.setdefault("OMP_NUM_THREADS", "1" if _SIDE_BY_SIDE else str(min(4, _CORES)))
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test talks to the world: telemetry is off, and a test that wants a hub points HF_ENDPOINT at 127.0.0.1.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # lm-eval imports libraries that look for their hosts
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")

# Nor does one read or write the user's own caches. Set here, since huggingface_hub reads these at its import;
# child processes inherit them.
_HOME = tempfile.mkdtemp(prefix="hadal-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _HOME
os.environ["HF_HOME"] = os.path.join(_HOME, "huggingface")
for _name in ("HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HADAL_API_KEY", "HADAL_DEBUG"):
    os.environ.pop(_name, None)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "hadal",
    deadline=None,  # a busy neighbour on the machine is not a bug
    derandomize=not os.environ.get("HADAL_TEST_RANDOM"),  # else the same examples on every run
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("hadal")

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Path of a Chromium-like browser: $HADAL_CHROMIUM, or the first of the usual names on PATH."""
    named = os.environ.get("HADAL_CHROMIUM")
    if named:
        return named
    return next((path for path in map(shutil.which, CHROMIUM_NAMES) if path), None)


# Files of more than some 20 seconds. They are begun first, so that no worker of `pytest -n` ends alone with
# one of them.
LONG = (
    "ops/test_triton_compiles.py", "ui/test_browser.py", "train/test_main.py", "ops/test_triton_packed.py",
    "ops/test_triton.py", "ops/test_triton_exact.py", "ops/test_triton_fp8_train.py",
    "ops/test_triton_train.py", "ops/test_triton_prefill.py", "ops/test_triton_latent.py",
    "engine/test_speculation.py", "model/test_exact.py", "cli/test_programs.py",
    "evals/test_in_training.py", "cli/test_probe.py", "ui/test_real_server.py",
    "ui/test_planner_and_probe.py", "data/test_clusters.py", "data/test_prepare.py", "post/test_grpo.py",
    "post/test_grpo_ways.py", "post/test_sft.py", "post/test_r1_zero.py", "train/test_fp8.py",
    "train/test_fp8_report.py", "train/test_graphs.py", "train/test_memory.py", "probe/test_stats_power.py",
    "ops/test_cpu_packed.py", "ops/test_cpu_prompt.py", "probe/test_server.py", "probe/test_hypotheses.py",
)  # fmt: skip


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` and `chromium` tests are skipped, with the reason, where the machine has none; long files come
    first."""
    long = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    assert all(path.exists() for path in long), [str(path) for path in long if not path.exists()]
    items.sort(key=lambda item: long.get(item.path, len(long)))
    wants_gpu = [item for item in items if item.get_closest_marker("gpu")]
    wants_browser = [item for item in items if item.get_closest_marker("chromium")]
    if wants_gpu and not _has_cuda():
        for item in wants_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if wants_browser and find_chromium() is None:
        for item in wants_browser:
            item.add_marker(pytest.mark.skip(reason="needs Chromium (or HADAL_CHROMIUM)"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch has one thread: small products are quicker so, and the order of every sum is the same."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a kernel is given to write begins as NaN, so that a forgotten element shows."""
    import torch

    torch.manual_seed(0)
    empty = torch.empty

    def nan(*shape, **options):
        tensor = empty(*shape, **options)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", nan)


@pytest.fixture
def cache_home() -> Path:
    """The XDG cache folder that this test session uses instead of ~/.cache."""
    return Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture
def chromium_path() -> str:
    """The browser for tests marked `chromium`."""
    path = find_chromium()
    if path is None:
        pytest.skip("needs Chromium")
    return path
