"""What *other* programs put around a text: the post-processor of `tokenizer.json`.

Hadal's tokenizer adds nothing to a text; templates and trainers write BOS themselves. Other programs do not
read `add_bos_token` of `tokenizer_config.json` where a `tokenizer.json` lies beside it (`transformers` 5, and
with it TRL and the `hf` model of lm-eval; earlier ones read it in a few classes only): there the
post-processor decides. A folder that wants BOS and has no post-processor is read without BOS, and its model
answers badly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hadal.text.tokenizer import TokenizerError


def with_bos(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed tokenizer.json, with a post-processor that puts BOS before each text (of a pair: both).

    As it is where tokenizer_config.json (`config`) does not say `add_bos_token` or names no `bos_token`, or
    where a post-processor is there already: published files keep theirs. Raises TokenizerError when
    `bos_token` is not an added token.
    """
    named = config.get("bos_token")
    bos = named.get("content") if isinstance(named, dict) else named
    if config.get("add_bos_token") is not True or bos is None or data.get("post_processor") is not None:
        return dict(data)
    ids = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    if bos not in ids:
        raise TokenizerError(
            f"tokenizer_config.json says add_bos_token, but its bos_token {bos!r} is not an added token of"
            " tokenizer.json; name one that is, or set add_bos_token to false"
        )
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": text, "type_id": n}}]
        for n, text in enumerate("AB")
    )
    table = {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}}
    processor = {
        "type": "TemplateProcessing", "single": first, "pair": [*first, *second], "special_tokens": table,
    }  # fmt: skip
    return {**data, "post_processor": processor}


def to_text(data: Mapping[str, Any]) -> str:
    """A tokenizer.json as the `tokenizers` library writes it, byte for byte."""
    return json.dumps(data, ensure_ascii=False, indent=2)


def completed(folder: Path) -> str | None:
    """The text of a folder's tokenizer.json `with_bos`; None where the file is whole as it is, or missing."""
    path, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file() or not beside.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    made = with_bos(data, json.loads(beside.read_text(encoding="utf-8")))
    return None if made == data else to_text(made)
