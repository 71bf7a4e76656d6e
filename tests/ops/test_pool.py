"""The thread pool under a widened race: every piece of every job runs exactly once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hadal.ops import cpu

PROGRAM = r"""
#include <algorithm>
#include <cstdio>
#include <thread>
#include <chrono>
#define POOL_PAUSE() std::this_thread::sleep_for(std::chrono::microseconds(20))
#include "pool.h"

int main() {
  Pool::instance().resize(3);
  for (int job = 0; job < 4000; ++job) {
    int64_t count = 1 + (job * 7) % 40;
    std::atomic<int> runs[64];
    for (auto& r : runs) r = 0;
    parallel(count, 1, true, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) runs[i].fetch_add(1);
    });
    for (int64_t i = 0; i < 64; ++i)
      if (runs[i] != (i < count ? 1 : 0)) {
        std::printf("job %d piece %d ran %d times\n", job, int(i), int(runs[i]));
        return 1;
      }
  }
  std::puts("sound");
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_every_piece_runs_once(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(PROGRAM)
    include = f"-I{cpu.SOURCE.parent}"
    command = [
        "c++",
        "-O2",
        "-std=c++17",
        "-pthread",
        include,
        str(tmp_path / "main.cpp"),
        "-o",
        str(tmp_path / "a"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(tmp_path / "a")], capture_output=True, text=True, timeout=60)
    assert done.stdout == "sound\n", done.stdout
