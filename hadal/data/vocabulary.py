"""Tokenizer training: byte-level BPE, pre-tokenised as DeepSeek-V3's `tokenizer.json` does it.

In this order, each rule within what the one before left whole:

1. digits, in groups of up to three from the left;
2. runs of Chinese and Japanese characters, so that no token joins them with anything else;
3. an ASCII sign with the letters after it; a word with the one character before it; signs with the space
   before and the line breaks after them; line breaks with the white space before; other white space.

The tokens of signs and line breaks that rule 3 allows (".\\n\\n") are split at random when documents are
encoded (hadal/data/encoding.py). All 256 bytes are in the vocabulary: any text round-trips.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from hadal.data.bpe import SPECIAL_TOKENS, added_token, save_tokenizer
from hadal.data.cleaning import normalise
from hadal.data.encoding import draws, joined_tokens
from hadal.data.reading import input_files, pieces_of, records
from hadal.data.recipe import Source
from hadal.data.strict import RecipeError
from hadal.text.tokenizer import Tokenizer as Reader

CJK = "[一-龥぀-ゟ゠-ヿ]+"
PIECE = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MOST_CHARACTERS = 100_000  # of one document that the trainer sees: no document outweighs all others


def new_tokenizer(digits: int = 3) -> Tokenizer:
    """An untrained tokenizer with V3's pre-tokenisation, digits in groups of up to `digits`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated"),
            pre_tokenizers.Split(Regex(CJK), "isolated"),
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(
    paths: Sequence[str], out: Path, *, vocabulary: int, text: str = "text", digits: int = 3,
    share: float = 1.0, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Train on the documents of `paths` and write a tokenizer's folder; facts about it.

    The same text, seed and settings give the same file. Raises RecipeError where there is too little text, or
    `out` exists.
    """
    if out.exists():
        raise RecipeError(f"{out} exists; choose another --out, or remove it")
    source = Source("text", paths=tuple(paths), text=text)
    counts = {"documents": 0, "characters": 0}
    faults: list[str] = []
    tokenizer = new_tokenizer(digits)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[added_token(content) for content in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(source, share, seed, counts, faults, progress), trainer)
    if not counts["documents"]:
        why = f"; the first: {faults[0]}" if faults else ""
        raise RecipeError(
            f"no record of {', '.join(paths)} has text in {text!r}{why}; name its field with --text"
        )
    found = tokenizer.get_vocab_size()
    if found != vocabulary:
        raise RecipeError(
            f"{counts['documents']:,} documents yield {found:,} tokens, not {vocabulary:,}; give more text, "
            "or lower --vocab-size"
        )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(tokenizer, partial)
    reader = Reader.load(partial)  # checks that text round-trips
    os.replace(partial, out)
    return {"vocabulary": found, **counts, "sign_and_line_break_tokens": len(joined_tokens(reader))}


def _texts(
    source: Source, share: float, seed: int, counts: dict[str, int], faults: list[str],
    progress: Callable[[int, int], None],
) -> Iterator[str]:  # fmt: skip
    """The chosen documents, normalised and counted. `faults`: why the first record without text has none."""
    files = input_files(source, Path.cwd())
    total, done = sum(f.bytes for f in files), 0

    def tick(amount: int) -> None:
        nonlocal done
        done += amount
        progress(min(done, total), total)

    for piece in (piece for file in files for piece in pieces_of(file)):
        for record in records(piece, source.text, source.id, tick):
            if record.text is None:
                faults[:] = faults or [record.fault]
                continue
            if draws(seed, f"tokenizer|{record.id}", 1)[0] >= share:
                continue
            text = normalise(record.text)[:MOST_CHARACTERS]
            counts["documents"] += 1
            counts["characters"] += len(text)
            yield text
