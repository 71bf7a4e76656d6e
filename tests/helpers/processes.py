"""Tests in a process of their own, for what counts once in a process: variables read at imports."""

from __future__ import annotations

import os
import subprocess
import sys

# What a single file's tests have no use for takes seconds to import.
WITHOUT = ("cacheprovider", "xdist", "rerunfailures", "anyio")
PATIENT = 900  # seconds; a minute is usual, but for a busy machine


def run_tests(file: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The tests of one file, up to the first that fails, with environment variables of their own."""
    without = [option for plugin in WITHOUT for option in ("-p", f"no:{plugin}")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *without, file]
    environment = {**os.environ, "PYTEST_ADDOPTS": "", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENT)
