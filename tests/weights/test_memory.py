"""Peak host memory while loading stays within 1.15 × the weights, mapped file pages included.

Measured in a fresh process by the kernel's high-water mark (VmHWM), which counts anonymous memory and mapped
pages alike, reset after the imports.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hadal.config import Moe
from hadal.model.transformer import Transformer
from hadal.weights import save
from tests.weights import tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux /proc")

CONFIG = replace(
    tiny.V3,
    vocab_size=20_000,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=3,
    moe=Moe(16, 1, 4, 1024, 1, 1, "sigmoid", "noaux_tc", 4, 2, True, 2.5),
    num_nextn_predict_layers=0,
)

MEASURE = """
import sys, torch
from pathlib import Path
from hadal.weights import load, convert

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

folder, what = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(2)
torch.zeros(8).aminmax(), torch.zeros(8, 8).to(torch.float8_e4m3fn).float()  # what torch itself sets up
Path("/proc/self/clear_refs").write_text("5")
base = status("VmRSS")
if what == "convert":
    convert(folder, folder.parent / "converted", dtype=torch.bfloat16)
    print(status("VmHWM") - base, 0)
else:
    model = load(folder, dtype=getattr(torch, what))
    print(status("VmHWM") - base, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    model = Transformer(CONFIG, dtype=torch.bfloat16)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(1, dtype=torch.float32).expand(tensor.shape) * 0.1)
    save(model, folder / "bf16", max_shard_bytes=100_000_000)
    save(model, folder / "fp8", fp8=True, max_shard_bytes=100_000_000)
    return folder


def measure(folder: Path, what: str) -> tuple[int, int]:
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), what], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    peak, weights = out.stdout.split()
    return int(peak), int(weights)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", "bfloat16"), ("bf16", "float32"), ("fp8", "bfloat16")])
def test_loading(folders: Path, kind: str, dtype: str) -> None:
    peak, weights = measure(folders / kind, dtype)
    assert weights > 300e6, "large enough that a second copy would be seen"
    assert weights * 0.98 < peak <= weights * 1.15, f"peak {peak / weights:.3f} × the weights"


PIECES = """
import sys, threading, time, torch
import hadal.weights.mapped as mapped
from hadal.weights import load

def file_pages():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssFile"))

mapped.PIECE_BYTES = 1 << 20  # 256 KiB of FP8: every matrix in several pieces
torch.set_num_threads(2)
load(sys.argv[2])  # loads what the kernels need
base, peak, done = file_pages(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, file_pages() - base)
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
load(sys.argv[1], dtype=torch.bfloat16)
done = True
thread.join()
print(peak)
"""


def test_released_pages_stay_released(folders: Path, tmp_path: Path) -> None:
    """Reading a matrix in several pieces leaves no trail of mapped pages that grows with the model."""
    from tests.weights.helpers import random_model

    save(random_model(tiny.V3), tmp_path / "small", fp8=True)
    command = [sys.executable, "-c", PIECES, str(folders / "fp8"), str(tmp_path / "small")]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert 0 < int(out.stdout) < 16e6, f"{int(out.stdout) / 1e6:.0f} MB of file pages at once"


def test_converting_takes_pieces_not_the_model(folders: Path) -> None:
    size = sum(f.stat().st_size for f in (folders / "fp8").glob("*.safetensors"))
    peak, _ = measure(folders / "fp8", "convert")
    assert peak < 120e6 < size, f"peak {peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
