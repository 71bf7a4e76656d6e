"""What other programs put around a text: BOS where the folder asks for it, and never by our own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

import hadal
from hadal.text import Tokenizer, TokenizerError
from hadal.text.processor import completed, to_text, with_bos
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

ON_BOARD = Path(hadal.__file__).parent / "assets" / "hadal-mini"
TEXTS = ("", "1 + 1", "une ligne\nencore", "<think> as text", "日本語 🙂")
CONFIG = {"add_bos_token": True, "bos_token": "<s>"}
DATA: dict[str, Any] = {"added_tokens": [{"content": "<s>", "id": 7}], "post_processor": None}


def test_transformers_begins_a_text_as_our_server_does() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(ON_BOARD), Tokenizer.load(ON_BOARD)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode_with_controls(text)]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode_with_controls(text)
    asked = [{"role": "user", "content": "1 + 1?"}]
    ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids.count(ours.bos_id) == 1, "the chat template writes its own"


def test_a_folder_is_completed_once(tmp_path: Path) -> None:
    folder = make_tiny_tokenizer(tmp_path)
    before, path = Tokenizer.load(folder), folder / "tokenizer.json"
    text = completed(folder)
    assert text is not None
    path.write_text(text, encoding="utf-8")
    assert completed(folder) is None
    backend, after = Backend.from_file(str(path)), Tokenizer.load(folder)
    assert backend.to_str(pretty=True) == text == to_text(json.loads(text)), "as the library writes it"
    for one in TEXTS:
        assert before.encode(one) == after.encode(one)
        assert backend.encode(one).ids == [0, *after.encode_with_controls(one)]
    assert backend.encode("a", "b").ids == [0, *after.encode("a"), 0, *after.encode("b")]


@pytest.mark.parametrize(
    ("data", "config"),
    [
        ({}, {"add_bos_token": False}),
        ({}, {"bos_token": None}),
        ({"post_processor": {"type": "ByteLevel"}}, {}),
    ],
)
def test_what_is_not_asked_for_stays(data: dict[str, Any], config: dict[str, Any]) -> None:
    assert with_bos(DATA | data, CONFIG | config) == DATA | data


def test_a_bos_that_is_no_control_token_is_refused() -> None:
    assert with_bos(DATA, CONFIG | {"bos_token": {"content": "<s>"}})["post_processor"] is not None
    with pytest.raises(TokenizerError, match="'<x>' is not an added token"):
        with_bos(DATA, CONFIG | {"bos_token": "<x>"})


def test_a_folder_without_a_tokenizer_lacks_nothing(tmp_path: Path) -> None:
    assert completed(tmp_path) is None
