"""What a model asks for in generation_config.json holds where a caller sets nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hadal.engine import EngineError, SamplingParams
from hadal.engine.defaults import sampling_defaults


def write(folder: Path, data: object) -> Path:
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "generation_config.json").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"do_sample": True, "temperature": 0.6, "eos_token_id": 1}, {"temperature": 0.6}),
        ({"temperature": 0.6, "top_k": 20, "top_p": None}, {"temperature": 0.6, "top_k": 20}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.0}),
        ({}, {}),
    ],
)
def test_read(data: dict[str, object], wanted: dict[str, object], tmp_path: Path) -> None:
    assert sampling_defaults(write(tmp_path, data)) == wanted


def test_nothing_to_read(tmp_path: Path) -> None:
    assert sampling_defaults(None) == sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("data", ["{", "[]", {"temperature": -1}, {"top_p": "high"}])
def test_a_bad_file_is_named(data: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        sampling_defaults(write(tmp_path, data))


def test_the_engine_takes_them_where_nothing_is_set(tmp_path: Path) -> None:
    from tests.engine.tiny import tiny_engine

    made = tiny_engine(folder=write(tmp_path, {"temperature": 0.25, "top_p": 0.5}))
    assert made.prepare([1, 2]).params == SamplingParams(temperature=0.25, top_p=0.5)
    assert made.prepare([1, 2], SamplingParams(seed=1)).params == SamplingParams(seed=1)
    write(tmp_path, "{")
    with pytest.raises(EngineError, match=r"generation_config\.json"):
        tiny_engine(folder=tmp_path)


def test_the_model_on_board_is_greedy() -> None:
    from hadal.weights import hub

    assert sampling_defaults(hub.resolve("hadal-mini")) == {"temperature": 0.0}
