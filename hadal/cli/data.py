"""`hadal data`: from raw text to a tokenizer and token shards. The work is done in `hadal.data`."""

from __future__ import annotations

from hadal.cli.data_prepare import prepare
from hadal.cli.data_report import report
from hadal.cli.data_tokenizer import tokenizer
from hadal.cli.family import Family

DATA = Family(
    about="""Make training data: filter, deduplicate, mix, tokenise, pack.

    `hadal data RECIPE` is `hadal data prepare RECIPE`.

    Examples:
        hadal data prepare recipes/data-example.toml
        hadal data tokenizer corpus/ --vocab-size 32768 --out tokenizers/mine
        hadal data report shards/example
    """,
    kinds={"prepare": prepare, "tokenizer": tokenizer, "report": report},
    default="prepare",
)
