"""Small byte-level BPE tokenizers with the control tokens of the published ones, trained in a few
milliseconds.

`make_tiny_tokenizer(folder)` writes `tokenizer.json` and `tokenizer_config.json` as a published folder has
them: the pre-tokenizer of the family, its control tokens at the end of the vocabulary (DeepSeek's first
three at 0, 1, 2), and the same mixture of `special` true and false, since user text must be safe from both
kinds.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Token -> the `special` flag of its published entry. Source: tokenizer.json of DeepSeek-V3.1 and of the R1
# distills.
DEEPSEEK_FIRST = {"<｜begin▁of▁sentence｜>": True, "<｜end▁of▁sentence｜>": True, "<｜▁pad▁｜>": True}
DEEPSEEK_LAST = {
    "<｜search▁begin｜>": False,
    "<｜search▁end｜>": False,
    "<think>": False,
    "</think>": False,
    "<｜fim▁hole｜>": False,
    "<｜fim▁begin｜>": False,
    "<｜fim▁end｜>": False,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<|EOT|>": True,
    "<｜tool▁calls▁begin｜>": False,
    "<｜tool▁calls▁end｜>": False,
    "<｜tool▁call▁begin｜>": False,
    "<｜tool▁call▁end｜>": False,
    "<｜tool▁outputs▁begin｜>": False,
    "<｜tool▁outputs▁end｜>": False,
    "<｜tool▁output▁begin｜>": False,
    "<｜tool▁output▁end｜>": False,
    "<｜tool▁sep｜>": False,
}
_TOOLS = {token: flag for token, flag in DEEPSEEK_LAST.items() if "tool" in token}
QWEN_DISTILL = {
    "<｜end▁of▁sentence｜>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<｜begin▁of▁sentence｜>": True,
    "<|EOT|>": False,
    "<think>": False,
    "</think>": False,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
}
LLAMA_DISTILL = {
    "<｜begin▁of▁sentence｜>": True,
    "<｜end▁of▁sentence｜>": True,
    "<|reserved_special_token_0|>": True,
    "<|finetune_right_pad_id|>": True,
    "<|reserved_special_token_2|>": True,
    "<|start_header_id|>": True,
    "<|end_header_id|>": True,
    "<|eom_id|>": True,
    "<|eot_id|>": True,
    "<|python_tag|>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<think>": False,
    "</think>": False,
    "<｜▁pad▁｜>": True,
}
STYLES: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "deepseek": (DEEPSEEK_FIRST, DEEPSEEK_LAST),
    # The published distills know no tool tokens; here they stay as published.
    "qwen": ({}, QWEN_DISTILL),
    "llama": ({}, LLAMA_DISTILL),
}

# The split patterns of the three published families.
_DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
_QWEN_SPLITS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
_LLAMA_SPLITS = [_QWEN_SPLITS[0].replace(r"\p{N}|", r"\p{N}{1,3}|", 1)]
_SPLITS = {"deepseek": _DEEPSEEK_SPLITS, "qwen": _QWEN_SPLITS, "llama": _LLAMA_SPLITS}

CORPUS = [
    "What is 12 + 30? Let me think step by step. First I add the tens, then the units: the answer is 42.",
    "The sum of the numbers is larger than the product; sort them in increasing order and take the next one.",
    "Combien font 7 fois 8 ? Je réfléchis : sept fois huit font cinquante-six. La réponse est 56.",
    "Quanto é 15 menos 9? Vamos pensar com calma: quinze menos nove são seis. A resposta é 6.",
    "def add(left: int, right: int) -> int:\n    return left + right\n\nprint(add(2, 3))\n",
    '{"name": "add", "value": 5, "list": [1, 2, 3], "ok": true, "none": null}',
    "你好，世界。今天天气很好，我们一起学习数学。答案是四十二。",
    "    for index in range(10):\n        total += index * 2\n\n\n# end of the loop 🙂🚀 café naïve",
    "Because every step follows from the previous step, we should check the final result first.",
]


def make_tiny_tokenizer(folder: Path | str, vocab_size: int = 512, style: str = "deepseek") -> Path:
    """Write a tokenizer of at most `vocab_size` entries, control tokens included, into `folder`; returns
    the folder.

    style: "deepseek" (bos 0, eos 1, thinking, FIM and tool tokens), "qwen" or "llama" (the R1 distills'
    tables). The corpus gives about 640 entries; with a larger `vocab_size` the tokenizer stays smaller than
    the model's table, as the published ones do.
    """
    first, last = STYLES[style]
    merged_size = vocab_size - len(last)
    if merged_size < 256 + len(first):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {style} needs at least {256 + len(first) + len(last)}"
        )
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama"))
    tokenizer.normalizer = normalizers.NFC() if style == "qwen" else normalizers.Sequence([])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[style]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=merged_size,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    for content, special in last.items():
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_flagged(tokenizer, {**first, **last}), encoding="utf-8")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "tokenizer_class": "LlamaTokenizerFast",
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return folder


def _flagged(tokenizer: Tokenizer, flags: dict[str, bool]) -> str:
    """tokenizer.json with the `special` flags of `flags` (the trainer marks all of its own as special)."""
    data = json.loads(tokenizer.to_str())
    for entry in data["added_tokens"]:
        entry["special"] = flags[entry["content"]]
    return json.dumps(data, ensure_ascii=False, indent=1)
