"""Text ↔ ids: exact round trips, control tokens out of the reach of text, and honest failures at load."""

from __future__ import annotations

import json
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from hadal.text import Control, Detokenizer, Tokenizer, TokenizerError
from hadal.text.tokenizer import MARKUP, ROUND_TRIP_TEXTS
from tests.helpers.tiny_tokenizer import (
    DEEPSEEK_FIRST,
    DEEPSEEK_LAST,
    LLAMA_DISTILL,
    QWEN_DISTILL,
    STYLES,
    make_tiny_tokenizer,
)

# All control tokens of the published tables, whatever the tokenizer at hand.
PLACEHOLDERS = [f"<｜place▁holder▁no▁{number}｜>" for number in (0, 1, 799)]
ALL_CONTROLS = sorted({*DEEPSEEK_FIRST, *DEEPSEEK_LAST, *QWEN_DISTILL, *LLAMA_DISTILL, *PLACEHOLDERS})


def edit(folder: Path, source: Path, change: Any) -> Path:
    """A copy of a tokenizer folder with its tokenizer.json changed by `change(data)`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder


# --- round trips ---


@pytest.mark.parametrize("text", ROUND_TRIP_TEXTS)
def test_awkward_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalize(text)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_unicode_comes_back(tokenizers_by_style: dict[str, Tokenizer], text: str) -> None:
    assert tokenizers_by_style["deepseek"].decode(tokenizers_by_style["deepseek"].encode(text)) == text
    qwen = tokenizers_by_style["qwen"]
    assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text)


def test_nul_and_bom_come_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\x00a\ufeffb\x00")) == "\x00a\ufeffb\x00"


@pytest.mark.parametrize(("text", "place"), [("ab\ud800c", 2), ("\udfff", 0)])
def test_lone_surrogates_are_refused_with_their_place(tokenizer: Tokenizer, text: str, place: int) -> None:
    with pytest.raises(
        TokenizerError, match=f"lone surrogate U\\+{ord(text[place]):04X} at character {place}"
    ):
        tokenizer.encode(text)
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode_parts([Control("<think>"), "fine", text])


def test_text_must_be_a_string(deepseek: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="not bytes"):
        deepseek.encode(b"abc")  # type: ignore[arg-type]


def test_ids_equal_those_of_the_published_tokenizer(tokenizer_folders: dict[str, Path]) -> None:
    for style, folder in tokenizer_folders.items():
        published = Backend.from_file(str(folder / "tokenizer.json"))
        ours = Tokenizer.load(folder)
        for text in ROUND_TRIP_TEXTS[:-2]:
            expected = published.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == expected, (style, text)
            assert ours.decode(expected) == published.decode(expected, skip_special_tokens=False)


# --- control tokens ---


@pytest.mark.parametrize("content", ALL_CONTROLS)
def test_control_tokens_typed_by_a_user_stay_plain_text(tokenizer: Tokenizer, content: str) -> None:
    controls = set(tokenizer.special.values())
    for text in (
        content,
        f"say {content} now",
        f"{content}{content}",
        f"\n{content}\n",
        f"a{content}b",
        content[:-1],
    ):
        ids = tokenizer.encode(text)
        assert not controls & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_parts([text]) == ids


@given(
    pieces=st.lists(st.sampled_from([*ALL_CONTROLS, "<", "｜", "▁", ">", " ", "\n", "think", "User", "a"]))
)
def test_no_mixture_of_control_text_becomes_a_control_token(
    tokenizers_by_style: dict[str, Tokenizer], pieces: list[str]
) -> None:
    text = "".join(pieces)
    for tokenizer in tokenizers_by_style.values():
        ids = tokenizer.encode(text)
        assert not set(tokenizer.special.values()) & set(ids)
        assert tokenizer.decode(ids) == text


def test_a_control_string_in_the_plain_vocabulary_cannot_be_reached(
    tmp_path: Path, tokenizer_folders: Any
) -> None:
    """As in a vocabulary whose merges spell a control token, or which skips merges for whole entries (Llama
    3)."""

    def spell_think(data: dict[str, Any]) -> None:
        vocab, model = data["model"]["vocab"], data["model"]
        think = next(token["id"] for token in data["added_tokens"] if token["content"] == "<think>")
        model["ignore_merges"] = True
        data["pre_tokenizer"]["pretokenizers"] = data["pre_tokenizer"]["pretokenizers"][-1:]
        spare = len(vocab) + len(data["added_tokens"]) + 10
        for place, (left, right) in enumerate(
            [("<", "t"), ("<t", "h"), ("<th", "i"), ("<thi", "n"), ("<thin", "k")]
        ):
            vocab.setdefault(left + right, spare + place)
            model["merges"].append([left, right])
        vocab["<think>"] = think
        model["merges"].append(["<think", ">"])

    folder = edit(tmp_path / "spelled", tokenizer_folders["deepseek"], spell_think)
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("<think>")
    assert tokenizer.special["<think>"] not in ids
    assert tokenizer.decode(ids) == "<think>"
    assert tokenizer.encode_with_controls("<think>") == [tokenizer.special["<think>"]]


def test_parts_mix_controls_and_text(tokenizer: Tokenizer) -> None:
    parts = [
        Control("<｜User｜>"),
        "What is",
        " 1 + 1?",
        Control("<｜Assistant｜>"),
        Control("<think>"),
        "\n",
    ]
    ids = tokenizer.encode_parts(parts)
    assert ids == tokenizer.encode_with_controls("<｜User｜>What is 1 + 1?<｜Assistant｜><think>\n")
    assert ids[0] == tokenizer.special["<｜User｜>"]


def test_neighbouring_texts_are_encoded_as_one(deepseek: Tokenizer) -> None:
    assert deepseek.encode_parts(["ans", "wer: ", "4", "2"]) == deepseek.encode("answer: 42")


def test_an_unknown_control_is_refused(deepseek: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"no control token '<\|im_start\|>'"):
        deepseek.encode_parts([Control("<|im_start|>")])


def test_decode_hides_controls_but_not_what_parsers_read(tokenizer: Tokenizer) -> None:
    for content, index in tokenizer.special.items():
        shown = tokenizer.decode([index])
        assert shown == (
            content if content in MARKUP or content.startswith(("<tool_call", "</tool_call")) else ""
        )
        assert tokenizer.decode([index], skip_control=False) == content
    assert tokenizer.decode([*tokenizer.encode("a"), *tokenizer.eos_ids]) == "a"


# --- what a folder says ---


def test_bos_and_eos_come_from_the_config_files(tmp_path: Path) -> None:
    folder = make_tiny_tokenizer(tmp_path / "t")
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (folder / "config.json").write_text('{"eos_token_id": 7, "vocab_size": 600}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_ids == (1, 5, 7)
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (512, 600)
    (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<think>"}, "eos_token": null}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.bos_id == tokenizer.special["<think>"]
    assert tokenizer.eos_ids == (1, 5, 7)


def test_padding_ids_are_empty_and_others_refused(tmp_path: Path) -> None:
    folder = make_tiny_tokenizer(tmp_path / "t")
    (folder / "config.json").write_text('{"vocab_size": 600}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode([512, 599]) == ""
    for index in (-1, 600, 2**40):
        with pytest.raises(TokenizerError, match=r"outside the vocabulary \(0 to 599\)"):
            tokenizer.decode([index])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["model"].pop("merges"), "Hadal reads BPE"),
        (lambda data: data.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "'Unigram'"),
        (
            lambda data: data.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
            "WordPiece",
        ),
        (lambda data: data["model"]["vocab"].pop("a"), "cannot be read|no token for 1 bytes, the first 0x61"),
        (
            lambda data: data["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"}),
            "round trip fails",
        ),
        (
            lambda data: data.update(normalizer={"type": "Lowercase"}),
            "normalizer loses text: 'Hello, world!' becomes 'hello",
        ),
        (lambda data: data["added_tokens"].append({"content": "<x>"}), "added token without content and id"),
    ],
    ids=["merges", "unigram", "decoder", "byte", "spaces", "lowercase", "added"],
)
def test_unfit_tokenizers_are_refused_at_load(
    tmp_path: Path, tokenizer_folders: dict[str, Path], change: Any, message: str
) -> None:
    folder = edit(tmp_path / "t", tokenizer_folders["deepseek"], change)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(folder)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    folder = make_tiny_tokenizer(tmp_path / "t")
    (folder / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json is not valid JSON"):
        Tokenizer.load(folder)
    (folder / "config.json").write_text('{"vocab_size": 100}')
    with pytest.raises(TokenizerError, match="vocab_size 100, but the tokenizer has ids up to 511"):
        Tokenizer.load(folder)
    (folder / "config.json").write_text('{"eos_token_id": 9000}')
    with pytest.raises(TokenizerError, match="id 9000 is outside"):
        Tokenizer.load(folder)


def test_a_post_processor_adds_nothing(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    bos = "<｜begin▁of▁sentence｜>"
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    folder = edit(
        tmp_path / "t", tokenizer_folders["deepseek"], lambda data: data.update(post_processor=processor)
    )
    assert Backend.from_file(str(folder / "tokenizer.json")).encode("a").ids[0] == 0
    tokenizer = Tokenizer.load(folder)
    assert 0 not in tokenizer.encode("a") + tokenizer.encode_with_controls("a")


def test_truncation_and_padding_are_off(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    folder = edit(
        tmp_path / "t", tokenizer_folders["deepseek"], lambda data: data.update(truncation=truncation)
    )
    assert len(Tokenizer.load(folder).encode("x y z " * 9)) > 3


def sentencepiece_data() -> dict[str, Any]:
    """A vocabulary of SentencePiece's kind: `▁` for spaces, byte fallback, a dummy space before the
    text."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "é",
        "▁a",
        "ab",
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": words[place], "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for place in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {word: place for place, word in enumerate(words)},
                  "merges": [["▁", "a"], ["a", "b"]]},
    }  # fmt: skip


def test_byte_fallback_vocabularies_work_too() -> None:
    data = sentencepiece_data()
    tokenizer = Tokenizer(data, bos="<s>", eos=["</s>"])
    published = Backend.from_str(json.dumps(data))
    for text in ["ab", " ab", "  a", "héé 🙂 a</s>", "你好", "a\nb"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if "</s>" not in text:
            assert ids == published.encode(text).ids
            assert published.decode(ids) == text
        streamed = Detokenizer(tokenizer)
        assert "".join(streamed.push([index]) for index in ids) + streamed.finish() == text
    assert tokenizer.id_to_bytes(3 + 0xE4) == b"\xe4"


# --- speed and threads ---


def test_a_lower_bound_of_the_length_is_cheap(deepseek: Tokenizer) -> None:
    text = "What is 12 + 30? 你好 🙂 " * 50
    assert 0 < deepseek.minimum_tokens(text) <= len(deepseek.encode(text))
    started = time.thread_time()
    assert deepseek.minimum_tokens("a" * 10_000_000) >= 10_000_000 // deepseek.max_token_bytes
    assert time.thread_time() - started < 0.5


def test_encoding_lets_other_threads_run(deepseek: Tokenizer) -> None:
    text = "What is 12 + 30? Let me think step by step. " * 30_000
    worst = 0.0
    done = threading.Event()

    def work() -> None:
        deepseek.encode(text)
        done.set()

    started = time.thread_time()
    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        before = time.thread_time()
        time.sleep(0.001)
        worst = max(worst, time.thread_time() - before)
    thread.join()
    total = time.thread_time() - started
    assert worst < max(0.5 * total, 0.2), f"other threads stood still for {worst:.2f} of {total:.2f} s"


def test_helper_gives_the_published_tables(tokenizers_by_style: dict[str, Tokenizer]) -> None:
    for style, (first, last) in STYLES.items():
        assert set(tokenizers_by_style[style].special) == {*first, *last}
    assert tokenizers_by_style["deepseek"].special["<｜begin▁of▁sentence｜>"] == 0
