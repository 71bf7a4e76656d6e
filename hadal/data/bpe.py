"""The tokenizer of hadal-mini: byte-level BPE, every digit alone, DeepSeek's special tokens.

Pre-tokenisation follows DeepSeek-V3's `tokenizer.json` (digits apart, then words with the sign before them,
then punctuation), with two changes for a model that computes: one digit a token instead of up to three, and
a space before a digit belongs to the word or sign on its left (`5+8=13 → 3` has the token ` → `), so that a
digit looks the same wherever it stands. All 256 bytes are in the vocabulary: any text round-trips.

Training text is a fixed, seeded set of puzzles, so the same seed and generators give the same file, byte for
byte. The file in the package is an input of the recipe: it stays as it is when the generators change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hadal.data.puzzles import conversation, sample
from hadal.text.processor import to_text, with_bos

VOCABULARY = 1024  # 2048 would save 3% of the tokens and cost as many parameters again
TRAINING_SAMPLES = 60_000
CHAT_SAMPLES = 12_000  # questions about everything else, whose words are the most varied

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<think>",
    "</think>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
BOS, EOS, PAD = SPECIAL_TOKENS[:3]
_NOT_SPECIAL = frozenset(
    ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<|EOT|>")
)  # as DeepSeek flags them

_DIGIT = r"\p{N}"
_PIECE = (
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+(?: $)?"  # a word, the space before it, a space before a digit
    r"| ?[\p{P}\p{S}]+(?:[\r\n]+| $)?"  # signs, the space before them, line breaks or a space before a digit
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# R1's template: bos, system text, turns; history without reasoning; the prompt opens the reasoning.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m['role'] == 'system' %}"
    "{{ m['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def training_text(seed: int) -> Iterator[str]:
    """Prompts, reasoning and answers of the puzzles, as pieces of text without special tokens."""
    for i in range(TRAINING_SAMPLES):
        talk = conversation(i, seed)
        if talk.system:
            yield talk.system
        for turn in talk.turns:
            yield turn.prompt
            yield f"\n{turn.think}\n"
            yield f"\n\n{turn.answer}"
    for i in range(CHAT_SAMPLES):
        yield sample(i, seed, name="chat").prompt


def train(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocabulary` entries, special tokens first.

    Raises ValueError if the text is too small for a vocabulary of that size.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_DIGIT), "isolated"),
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[added_token(content) for content in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the training text yields {tokenizer.get_vocab_size()} tokens, not {vocabulary}: give more text"
        )
    return tokenizer


def added_token(content: str) -> AddedToken:
    """A control token, flagged as DeepSeek flags it."""
    return AddedToken(content, normalized=False, special=content not in _NOT_SPECIAL)


def tokenizer_config() -> dict[str, object]:
    """What `tokenizer_config.json` says of a tokenizer with these control tokens."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 2048,
        "hadal_template": "hadal-mini",
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def build_mini_tokenizer(folder: Path | str, seed: int = 0, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train hadal-mini's tokenizer and write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    tokenizer = train(training_text(seed), vocabulary)
    save_tokenizer(tokenizer, Path(folder))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """A trained tokenizer with these control tokens, as a published folder has it: `tokenizer.json`, which
    lets other programs put BOS, and `tokenizer_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tokenizer_config()
    data = with_bos(json.loads(tokenizer.to_str()), config)
    (folder / "tokenizer.json").write_text(to_text(data), encoding="utf-8")
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
