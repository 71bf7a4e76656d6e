"""Tokenizer training with DeepSeek's pre-tokenisation; documents as tokens: FIM, splitting, controls."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hadal.data.bpe import SPECIAL_TOKENS
from hadal.data.encoding import DocumentEncoder, draws, joined_tokens
from hadal.data.strict import RecipeError
from hadal.data.vocabulary import new_tokenizer, train_tokenizer
from hadal.text import Tokenizer
from tests.data.conftest import poem, prose


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 700 entries, trained on prose, poems, numbers and paragraphs."""
    place = tmp_path_factory.mktemp("vocabulary")
    rng = random.Random(1)
    texts = [prose(rng, 8).replace("\n", "\n\n") + f"\n\n{rng.randrange(10**9)}" for _ in range(60)]
    texts += [poem(rng) for _ in range(60)]
    (place / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    facts = train_tokenizer([str(place / "t.jsonl")], place / "made", vocabulary=700)
    assert facts["vocabulary"] == 700 and facts["documents"] == 120
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "made")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567 8", ["123", "456", "7", " ", "8"]),
        ("深度learning、seek", ["深度", "learning", "、", "seek"]),
        ("你好，world。", ["你好", "，", "world", "。"]),
        ("カタカナとひらがな12", ["カタカナとひらがな", "12"]),
        ("Hello world!\n\nNext", ["Hello", "Ġworld", "!ĊĊ", "Next"]),
        ("x.append(y)", ["x", ".append", "(y", ")"]),
        ("a  b\n  c", ["a", "Ġ", "Ġb", "Ċ", "Ġ", "Ġc"]),
        ("été naïve", ["été", "Ġnaïve"]),
    ],
)
def test_pre_tokenisation_is_deepseeks(text: str, pieces: list[str]) -> None:
    """Worked out by hand from the rules of V3's tokenizer.json."""
    tokenizer = new_tokenizer(3)
    assert tokenizer.pre_tokenizer is not None
    found = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces]


def test_digits_stand_alone_where_asked() -> None:
    tokenizer = new_tokenizer(1)
    assert tokenizer.pre_tokenizer is not None
    assert [p for p, _ in tokenizer.pre_tokenizer.pre_tokenize_str("123")] == ["1", "2", "3"]


def test_the_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    assert [tokenizer.special[token] for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.bos_id == 0 and tokenizer.eos_ids == (1,) and tokenizer.vocab_size == 700
    for index in range(len(SPECIAL_TOKENS), 700):
        text = tokenizer.token_text(index)
        digits = [c for c in text if c.isdigit()]
        assert not digits or (len(digits) == len(text.strip()) <= 3), text
    rng = random.Random(9)
    for text in (prose(rng, 5), poem(rng), "🙂 \x00 é\u0301 <think> \r\n\t", "1234567890"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_text_gives_the_same_tokenizer_and_too_little_is_refused(folder: Path) -> None:
    train_tokenizer([str(folder / "t.jsonl")], folder / "again", vocabulary=700)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "again" / name).read_bytes() == (folder / "made" / name).read_bytes()
    half = train_tokenizer([str(folder / "t.jsonl")], folder / "half", vocabulary=500, share=0.5, seed=3)
    assert 30 < half["documents"] < 90
    with pytest.raises(RecipeError, match="give more text"):
        train_tokenizer([str(folder / "t.jsonl")], folder / "big", vocabulary=60_000)
    with pytest.raises(RecipeError, match="exists; choose another"):
        train_tokenizer([str(folder / "t.jsonl")], folder / "made", vocabulary=700)
    with pytest.raises(
        RecipeError, match=r"has text in 'body'; the first: .*fields: text; name its field with"
    ):
        train_tokenizer([str(folder / "t.jsonl")], folder / "big", vocabulary=700, text="body")
    assert not (folder / "big").exists()


def test_joined_tokens_are_signs_and_line_breaks(tokenizer: Tokenizer) -> None:
    joined = joined_tokens(tokenizer)
    assert ".\n\n" in {tokenizer.token_text(index) for index in joined}
    for index, parts in joined.items():
        sign, breaks = tokenizer.decode(parts[:1]), tokenizer.decode(parts[-1:])
        assert tokenizer.decode(parts) == tokenizer.token_text(index)
        assert not sign.isspace() and not breaks.strip()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_joined_tokens_are_split_at_the_rate(tokenizer: Tokenizer, rate: float) -> None:
    text = prose(random.Random(4), 600).replace("\n", "\n\n")
    plain = DocumentEncoder(tokenizer).encode(text, "d")[0]
    encoder = DocumentEncoder(tokenizer, seed=7, split_rate=rate)
    ids = encoder.encode(text, "d")[0]
    joined = list(joined_tokens(tokenizer))
    left = np.isin(ids, joined).sum() / np.isin(plain, joined).sum()
    assert left == pytest.approx(1 - rate, abs=0.06)
    assert tokenizer.decode(ids.tolist()) == text
    assert (ids == DocumentEncoder(tokenizer, seed=7, split_rate=rate).encode(text, "d")[0]).all()


def test_psm_order_and_rate(tokenizer: Tokenizer) -> None:
    encoder = DocumentEncoder(tokenizer, seed=1, fim_rate=0.1)
    rng, rearranged = random.Random(6), 0
    begin, hole, end = (tokenizer.special[f"<｜fim▁{x}｜>"] for x in ("begin", "hole", "end"))
    for i in range(600):
        text = prose(rng, 1)
        ids, fim = encoder.encode(text, f"d{i}")
        ids = ids.tolist()
        assert ids[0] == 0 and ids[-1] == 1 and ids.count(1) == 1
        if not fim:
            assert tokenizer.decode(ids) == text and begin not in ids
            continue
        rearranged += 1
        assert ids[1] == begin and ids.count(hole) == ids.count(end) == 1
        a, b = ids.index(hole), ids.index(end)
        prefix, suffix, middle = ids[2:a], ids[a + 1 : b], ids[b + 1 : -1]
        assert tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix) == text
    assert 35 < rearranged < 90
    assert not DocumentEncoder(tokenizer, fim_rate=1.0).encode("too short", "d")[1]


def test_text_cannot_spell_a_control_token(tokenizer: Tokenizer) -> None:
    text = "before <｜end▁of▁sentence｜><｜fim▁hole｜></think> after"
    ids, _ = DocumentEncoder(tokenizer, bos=False).encode(text, "d")
    controls = set(tokenizer.special.values())
    assert [i for i in ids.tolist() if i in controls] == [1] and tokenizer.decode(ids.tolist()) == text


def test_what_the_tokenizer_lacks_is_refused(folder: Path) -> None:
    data = json.loads((folder / "made" / "tokenizer.json").read_text("utf-8"))
    data["added_tokens"] = [t for t in data["added_tokens"] if "fim" not in t["content"]]
    without = Tokenizer(data, bos=0, eos=[1])
    with pytest.raises(RecipeError, match="has no <｜fim▁begin｜>"):
        DocumentEncoder(without, fim_rate=0.1)
    with pytest.raises(RecipeError, match="no BOS token"):
        DocumentEncoder(Tokenizer(data, eos=[1]))
    with pytest.raises(RecipeError, match="no EOS token"):
        DocumentEncoder(Tokenizer(data, bos=0))


def test_draws_are_uniform_and_their_own() -> None:
    values = np.array([draws(3, f"n{i}", 2) for i in range(4000)])
    assert ((values >= 0) & (values < 1)).all() and abs(values.mean() - 0.5) < 0.02
    assert draws(3, "n0", 2) == values[0].tolist() and draws(4, "n0", 2) != values[0].tolist()
