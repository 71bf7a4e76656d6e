"""`hadal data tokenizer`: trains a byte-level BPE tokenizer with DeepSeek's pre-tokenisation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadal.cli import options as o
from hadal.cli.terminal import bar, fields, print_json, say


def tokenizer(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders or globs of text.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Of the tokenizer; must not exist.")],
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=300, metavar="N", help="Entries, control tokens included.")
    ] = 32768,
    text: Annotated[
        str, typer.Option(metavar="FIELD", help='Of a record, or a template: "{question}\\n{answer}".')
    ] = "text",
    digits: Annotated[
        int, typer.Option(min=1, max=3, metavar="N", help="Longest group of digits; DeepSeek-V3: 3.")
    ] = 3,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Of the documents, drawn by the seed.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    json: o.Json = False,
) -> None:
    """Train a tokenizer on text.

    Byte-level BPE, split as DeepSeek-V3 splits: digits in groups, Chinese and Japanese apart, words with the
    sign before them, line breaks with the signs before them. Control and FIM tokens come first.

    Examples:
        hadal data tokenizer corpus/ --out tokenizers/mine
        hadal data tokenizer "data/*.jsonl.gz" --vocab-size 65536 --share 0.1 --out tokenizers/big
        hadal data tokenizer math.jsonl --text "{question} {answer}" --digits 1 --out tokenizers/math
    """
    from hadal.data.vocabulary import train_tokenizer

    with bar("reading text") as update:
        made = train_tokenizer(
            paths, out, vocabulary=vocab_size, text=text, digits=digits, share=share, seed=seed,
            progress=lambda done, total: update(done, total),
        )  # fmt: skip
    if json:
        print_json({"folder": out, **made})
        return
    fields(
        (key.replace("_", " "), f"{v:,.2f}" if isinstance(v, float) else f"{v:,}") for key, v in made.items()
    )
    say(f'{out}; in a recipe: tokens.tokenizer = "{out}"')
