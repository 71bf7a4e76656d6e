"""hadal-mini's tokenizer: any text round-trips, digits stand alone, the same seed gives the same file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

import hadal
from hadal.data import bpe
from hadal.data.puzzles import conversation
from hadal.text import Control, Tokenizer
from hadal.text.templates import TEMPLATES

ON_BOARD = Path(hadal.__file__).parent / "assets" / "hadal-mini"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ON_BOARD)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend.from_file(str(ON_BOARD / "tokenizer.json"))


def test_ids_are_those_the_model_was_trained_with(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == bpe.VOCABULARY and bpe.VOCABULARY % 64 == 0
    assert tokenizer.bos_id == 0 and tokenizer.eos_ids == (1,)
    assert [tokenizer.special[token] for token in bpe.SPECIAL_TOKENS] == list(range(len(bpe.SPECIAL_TOKENS)))


def test_any_text_round_trips(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [
        "",
        " ",
        "\n\n \n",
        "a\r\nb",
        "日本語 한국어",
        "🙂👩‍👩‍👧",
        "x²+½",
        "\x00\x7f",
        "  12  +  7 ",
        "½ 7²",
    ]
    ranges = ((32, 127), (160, 0xD800), (0x1F600, 0x1F650))
    texts += ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(40)) for _ in range(300)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {value for token in range(tokenizer.vocab_size) for value in tokenizer.id_to_bytes(token)} == set(
        range(256)
    )


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    for digit in "0123456789":
        assert len(tokenizer.encode(digit)) == 1
    for text in ("1234567890", "12 + 345=", "a1b22", "3.14", " 7 8\n9"):
        tokens = [tokenizer.token_text(token) for token in tokenizer.encode(text)]
        assert all(not any(c.isdigit() for c in t) or len(t) == 1 for t in tokens), tokens
    arrow = tokenizer.encode("13 → 3")
    assert len(arrow) == 4, "a space before a digit belongs to the sign before it"


def test_text_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    for token in bpe.SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{token}b")
        assert not set(ids) & set(tokenizer.special.values())


def test_documents_are_short(backend: Backend) -> None:
    from hadal.data.documents import render

    rendered = (backend.encode(render(conversation(i, 9)), add_special_tokens=False) for i in range(2500))
    lengths = sorted(len(encoded.ids) for encoded in rendered)
    single = [conversation(i, 9).last for i in range(2500)]
    longest = max(len(backend.encode(turn.prompt + turn.completion).ids) for turn in single)
    assert longest <= 512
    assert sum(lengths) / len(lengths) < 125
    assert sum(length > 200 for length in lengths) / len(lengths) < 0.12


def test_training_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "TRAINING_SAMPLES", 600)
    monkeypatch.setattr(bpe, "CHAT_SAMPLES", 200)
    for name in ("a", "b"):
        bpe.build_mini_tokenizer(tmp_path / name, seed=5, vocabulary=512)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    made = Tokenizer.load(tmp_path / "a")
    assert made.vocab_size == 512
    written = Backend.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert written.encode("1 + 1").ids == [made.bos_id, *made.encode("1 + 1")], "other programs put BOS"
    with pytest.raises(ValueError, match="give more text"):
        bpe.train(iter(["ab ab"]), 512)


def test_config_has_a_template_equal_to_ours(tokenizer: Tokenizer) -> None:
    """The Jinja text, for `transformers`, gives what hadal.text.templates gives."""
    jinja2 = pytest.importorskip("jinja2")
    config = json.loads((ON_BOARD / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == bpe.CHAT_TEMPLATE
    template = jinja2.Environment().from_string(config["chat_template"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "a</think>\n\n1 + 1 = **2**"},
        {"role": "user", "content": "2+2?"},
    ]
    theirs = template.render(
        messages=messages, bos_token=bpe.BOS, eos_token=bpe.EOS, add_generation_prompt=True
    )
    ours = TEMPLATES["hadal-mini"].render(messages)
    assert theirs == "".join(part.content if isinstance(part, Control) else part for part in ours)
