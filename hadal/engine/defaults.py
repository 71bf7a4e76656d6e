"""Sampling that a model asks for in its generation_config.json.

R1 asks for temperature 0.6 and top-p 0.95, hadal-mini for greedy decoding. It holds for every field that a
request leaves unset, in the Python API, the server and the command line alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hadal.engine.request import RequestError, SamplingParams

FIELDS = ("temperature", "top_p", "top_k")


def sampling_defaults(folder: Path | None) -> dict[str, Any]:
    """Keyword arguments of SamplingParams; {} without a folder or file. `do_sample: false` is temperature 0.

    Raises ValueError, naming the file, where it is no JSON object or holds a value out of bounds.
    """
    path = folder / "generation_config.json" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as fault:
        raise ValueError(f"{path} is not JSON ({fault}): download the model again, or delete it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: download the model again, or delete it")
    wanted = {name: found[name] for name in FIELDS if found.get(name) is not None}
    if found.get("do_sample") is False:
        wanted = {"temperature": 0.0}
    try:
        SamplingParams(**wanted)
    except RequestError as fault:
        raise ValueError(f"{path}: {fault}") from None
    return wanted
