"""Text to token ids and back: a published `tokenizer.json`, with control tokens that text alone can never
produce.

A `tokenizer.json` lists *added tokens* (`<｜User｜>`, `<think>`, …) that its own `encode` recognises
wherever they are written, flagged `special` or not. A chat server must not do that with what a user types,
so text is encoded by a second backend whose added tokens, and whatever vocabulary entries spell one of
them, are gone. Control tokens enter a prompt only as `Control` parts, which templates make.

Two vocabularies are read: byte-level BPE (GPT-2's byte alphabet; all DeepSeek, Qwen and Llama-3 models) and
BPE with byte fallback (SentencePiece's `▁` and `<0x0A>`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as Backend

# What the parsers of hadal.text.parsers read in a model's output: always part of the decoded text.
MARKUP: Final = frozenset(
    ["<think>", "</think>", "<｜search▁begin｜>", "<｜search▁end｜>", "<｜tool▁sep｜>"]
    + [
        f"<｜tool▁{name}▁{edge}｜>"
        for name in ("calls", "call", "outputs", "output")
        for edge in ("begin", "end")
    ]
)
_CONTROL_SHAPE = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})
# Bytes that occur in no UTF-8 text; several published vocabularies leave them out.
_NEVER_IN_UTF8 = frozenset([0xC0, 0xC1, *range(0xF5, 0x100)])
# Encoded and decoded at load: spaces that vanish, newlines, accents, wide scripts, joined emoji, digits,
# code, oddities.
ROUND_TRIP_TEXTS: Final = (
    "Hello, world!",
    " one  two   three    four ",
    "line\nline\r\n\n\ttab\t\t\n ",
    "café naïve Ångström œuvre São ø þ ÿ",
    "深度求索，你好。こんにちは 한국어 สวัสดี",
    "👩‍👩‍👧‍👦🏳️‍🌈 🙂🚀",
    "1234567890 3.14159 -1e-9 1/2 ²",
    'def f(x: int) -> str:\n    return f"{x!r}"  # <tag attr=\'v\'/> {"a": [1, 2]}\n',
    "\ufeffBOM NUL \x00 \u200b\u2028\U0010ffff",
    "<|x|> <｜y｜> < think > ▁",
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or trusted, or text or ids that it cannot represent."""


@dataclass(frozen=True, slots=True)
class Control:
    """A control token in a prompt, by its content; only templates and this package make them, never a
    request."""

    content: str


class Tokenizer:
    """A loaded tokenizer.

    vocab_size: 1 + the largest id of the tokenizer. padded_vocab_size: rows of the model's table
    (config.json's `vocab_size`), which may be more; the ids between decode to nothing.
    bos_id, eos_ids: from tokenizer_config.json, generation_config.json and config.json.
    special: content → id of *all* added tokens.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        bos: str | int | None = None,
        eos: Iterable[str | int] = (),
        padded_vocab_size: int | None = None,
    ) -> None:
        """From the parsed `tokenizer.json`; `bos` and `eos` as contents or ids."""
        self._data = _checked_data(data)
        added = self._data["added_tokens"]
        self.special: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._controls = _backend(_without_templates(self._data))
        self._plain = _backend(_without_controls(self._data, set(self.special)))
        self._normalizer = self._plain.normalizer
        self._byte_level, self._strips_first_space = _decoder_kind(self._data)
        self._texts: dict[int, str] = {index: token for token, index in self._data["model"]["vocab"].items()}
        self._texts.update({index: content for content, index in self.special.items()})
        self.vocab_size = 1 + max(self._texts)
        self.padded_vocab_size = padded_vocab_size or self.vocab_size
        if self.padded_vocab_size < self.vocab_size:
            raise TokenizerError(
                f"config.json says vocab_size {padded_vocab_size}, but the tokenizer has ids up to"
                f" {self.vocab_size - 1}: the folder mixes two models"
            )
        self.hidden_ids = frozenset(token["id"] for token in added if _is_hidden(token))
        self._bytes = _byte_table(self._texts, self.special, self._byte_level, self.padded_vocab_size)
        self._shown = [b"" if index in self.hidden_ids else value for index, value in enumerate(self._bytes)]
        self.bos_id = None if bos is None else self._id_of(bos)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(self._id_of(token) for token in eos))
        self._check_bytes()
        self._check_round_trip()

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read `tokenizer.json` and, where present, tokenizer_config.json, generation_config.json,
        config.json."""
        folder = Path(folder)
        data = _read_json(folder / "tokenizer.json", required=True)
        tokens = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        config = _read_json(folder / "config.json")
        try:
            return cls(
                data,
                bos=_content(tokens.get("bos_token"), config.get("bos_token_id")),
                eos=_eos(tokens, generation, config),
                padded_vocab_size=config.get("vocab_size"),
            )
        except TokenizerError as error:
            raise TokenizerError(f"{folder}: {error}") from error

    # --- text → ids ---

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: never a control token, no BOS. Releases the GIL while it works.

        Raises TokenizerError on text that is not Unicode (a lone surrogate).
        """
        return self._encode_batch(self._plain, [text])[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for each id the characters [begin, end) of `text` that it holds, whole or in part:
        tokens that share a character of several bytes all name it. A space before a word is the word's."""
        _utf8(text)
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_parts(self, parts: Sequence[Control | str]) -> list[int]:
        """Ids of a prompt: a Control is its one id, text is `encode`d; neighbouring texts are joined first,
        so that the ids are those of the rendered text."""
        runs: list[Control | str] = []
        for part in parts:
            if isinstance(part, str) and runs and isinstance(runs[-1], str):
                runs[-1] += part
            else:
                runs.append(part)
        texts = iter(self._encode_batch(self._plain, [run for run in runs if isinstance(run, str)]))
        ids: list[int] = []
        for run in runs:
            ids.extend(next(texts) if isinstance(run, str) else [self.control_id(run.content)])
        return ids

    def encode_with_controls(self, text: str) -> list[int]:
        """Ids of *trusted* text, in which control tokens are recognised, as the published tokenizer does;
        no BOS."""
        return self._encode_batch(self._controls, [text])[0]

    def control_id(self, content: str) -> int:
        """The id of an added token; TokenizerError if the tokenizer has no such token."""
        if content not in self.special:
            raise TokenizerError(
                f"this tokenizer has no control token {content!r}: the chat template belongs to another model"
            )
        return self.special[content]

    def minimum_tokens(self, text: str) -> int:
        """A lower bound of len(encode(text)), at the cost of measuring it: tells a hopelessly long text
        apart at once."""
        return -(-len(_utf8(text)) // self.max_token_bytes)

    @cached_property
    def max_token_bytes(self) -> int:
        """Length in bytes of the longest ordinary token."""
        controls = set(self.special.values())
        return max(len(value) for index, value in enumerate(self._bytes) if index not in controls)

    def _encode_batch(self, backend: Backend, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _utf8(text)
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    # --- ids → text ---

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """Text of the ids. Incomplete or invalid UTF-8 becomes U+FFFD.

        skip_control drops control tokens (BOS, EOS, turn markers, …) but keeps what parsers read
        (`MARKUP`).
        """
        data = b"".join(self.id_to_bytes(index, skip_control) for index in ids)
        text = data.decode("utf-8", "replace")
        return text[1:] if self._strips_first_space and text.startswith(" ") else text

    def id_to_bytes(self, index: int, skip_control: bool = False) -> bytes:
        """The bytes that a token stands for: maybe a part of a character; b"" for an unused id of the
        padded table."""
        table = self._shown if skip_control else self._bytes
        if not 0 <= index < len(table):
            raise TokenizerError(f"token id {index} is outside the vocabulary (0 to {len(table) - 1})")
        return table[index]

    def token_text(self, index: int) -> str:
        """The token alone as text; a part of a character shows as U+FFFD."""
        return self.id_to_bytes(index).decode("utf-8", "replace")

    @property
    def strips_first_space(self) -> bool:
        """Whether the decoder drops one space at the start (SentencePiece's dummy prefix)."""
        return self._strips_first_space

    @property
    def is_byte_level(self) -> bool:
        return self._byte_level

    def backend_json(self, all_special: bool = False) -> str:
        """The tokenizer.json without its post-processor, for libraries that build their own tables from it.

        all_special flags every added token as special, so that none of them passes for text there.
        """
        data = _without_templates(self._data)
        if all_special:
            data["added_tokens"] = [{**token, "special": True} for token in data["added_tokens"]]
        return json.dumps(data, ensure_ascii=False)

    # --- checks at load ---

    def _id_of(self, token: str | int) -> int:
        if isinstance(token, str):
            if token not in self.special:
                raise TokenizerError(f"{token!r} is named as a BOS or EOS token, but is not an added token")
            return self.special[token]
        if not 0 <= token < self.padded_vocab_size:
            raise TokenizerError(
                f"BOS or EOS id {token} is outside the vocabulary (0 to {self.padded_vocab_size - 1})"
            )
        return token

    def _check_bytes(self) -> None:
        controls = set(self.special.values())
        single = {
            value for index, value in enumerate(self._bytes) if len(value) == 1 and index not in controls
        }
        missing = [byte for byte in range(256) if bytes([byte]) not in single and byte not in _NEVER_IN_UTF8]
        if missing:
            raise TokenizerError(
                f"the vocabulary has no token for {len(missing)} bytes, the first 0x{missing[0]:02X}:"
                " text would be lost"
            )

    def _check_round_trip(self) -> None:
        for text, ids in zip(
            ROUND_TRIP_TEXTS, self._encode_batch(self._plain, ROUND_TRIP_TEXTS), strict=True
        ):
            expected = self.normalize(text)
            if self._byte_level and unicodedata.normalize("NFC", expected) != unicodedata.normalize(
                "NFC", text
            ):
                raise TokenizerError(f"its normalizer loses text: {text!r} becomes {expected!r}")
            if (actual := self.decode(ids)) != expected:
                raise TokenizerError(f"round trip fails: {expected!r} comes back as {actual!r}")

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it (Qwen's composes accents, NFC; DeepSeek's changes nothing)."""
        if self._normalizer is None:
            return text
        if self._byte_level:
            return str(self._normalizer.normalize_str(text))
        return text.replace("▁", " ")  # SentencePiece spells a space as ▁ and cannot tell the two apart


# --- reading ---


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a string, not {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise TokenizerError(
            f"text is not valid Unicode: lone surrogate U+{code:04X} at character {error.start};"
            " send a whole character"
        ) from None


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise TokenizerError(f"{path} does not exist: a model folder needs a tokenizer.json")
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def _content(token: Any, fallback: Any = None) -> Any:
    """The content of a token as tokenizer_config.json writes it: a string, an object with `content`, or
    null."""
    if isinstance(token, dict):
        token = token.get("content")
    return fallback if token is None else token


def _eos(
    tokens: Mapping[str, Any], generation: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str | int]:
    """All end-of-sequence tokens that the folder names; the two id fields may be an id or a list."""
    found = [_content(tokens.get("eos_token"))]
    for source in (generation, config):
        value = source.get("eos_token_id")
        found.extend(value if isinstance(value, list) else [value])
    return [token for token in found if token is not None]


def _checked_data(data: Mapping[str, Any]) -> dict[str, Any]:
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        kind = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise TokenizerError(
            f"tokenizer.json has a model of type {kind!r}; Hadal reads BPE, with a vocabulary and merges"
        )
    if not model["vocab"]:
        raise TokenizerError("tokenizer.json has an empty vocabulary")
    checked = dict(data)
    checked["added_tokens"] = list(data.get("added_tokens") or [])
    for token in checked["added_tokens"]:
        if not (
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and isinstance(token.get("id"), int)
        ):
            raise TokenizerError(f"tokenizer.json has an added token without content and id: {token!r}")
    # Merge dropout would make encoding random.
    checked["model"] = {**model, "dropout": None}
    return checked


def _without_templates(data: Mapping[str, Any]) -> dict[str, Any]:
    """No BOS or EOS added, no truncation, no padding."""
    return {**data, "post_processor": None, "truncation": None, "padding": None}


def _without_controls(data: Mapping[str, Any], controls: set[str]) -> dict[str, Any]:
    """The same without added tokens, and without vocabulary entries and merges that spell one."""
    model = data["model"]
    spelled = {content for content in controls if content in model["vocab"]}
    merges = (
        [merge for merge in model["merges"] if not _touches(merge, spelled)] if spelled else model["merges"]
    )
    vocab = {token: index for token, index in model["vocab"].items() if token not in spelled}
    unknown = model.get("unk_token")
    plain = {**model, "vocab": vocab, "merges": merges, "unk_token": None if unknown in spelled else unknown}
    return {**_without_templates(data), "added_tokens": [], "model": plain}


def _touches(merge: Any, spelled: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in spelled or right in spelled or left + right in spelled


def _backend(data: Mapping[str, Any]) -> Backend:
    try:
        return Backend.from_str(json.dumps(data, ensure_ascii=False))
    except Exception as error:  # the Rust library raises plain Exception
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from None


def _is_hidden(token: Mapping[str, Any]) -> bool:
    """Whether an added token is left out of decoded text: flagged or shaped as a control, and not read by
    parsers."""
    content = token["content"]
    return content not in MARKUP and bool(token.get("special") or _CONTROL_SHAPE.fullmatch(content))


def _decoder_kind(data: Mapping[str, Any]) -> tuple[bool, bool]:
    """(byte level?, drops the first space?) of the decoder; TokenizerError on one of another kind."""
    decoder = data.get("decoder") or {}
    steps: list[dict[str, Any]] = (
        (decoder.get("decoders") or []) if decoder.get("type") == "Sequence" else [decoder]
    )
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return True, False
    if (
        not kinds <= _SENTENCEPIECE_DECODERS
        or not kinds & {"Replace", "Metaspace"}
        or "ByteFallback" not in kinds
    ):
        raise TokenizerError(
            f"tokenizer.json has a decoder of {sorted(map(str, kinds))};"
            " Hadal reads ByteLevel, or Replace with ByteFallback"
        )
    strips = any(step.get("type") == "Strip" and step.get("start") for step in steps)
    prepends = any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps
    )
    return False, strips or prepends


# --- bytes of tokens ---


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable Latin-1 characters stand for themselves, the other bytes for U+0100
    onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


def _byte_table(
    texts: Mapping[int, str], special: Mapping[str, int], byte_level: bool, size: int
) -> list[bytes]:
    """Bytes by id. Added tokens stand for their content as written; unused ids for nothing."""
    added = set(special.values())
    alphabet = _byte_alphabet()
    table = [b""] * size
    for index, text in texts.items():
        if index in added:
            table[index] = text.encode("utf-8")
        elif byte_level:
            try:
                table[index] = bytes([alphabet[char] for char in text])
            except KeyError:
                table[index] = text.encode("utf-8")
        elif match := _BYTE_TOKEN.fullmatch(text):
            table[index] = bytes([int(match[1], 16)])
        else:
            table[index] = text.replace("▁", " ").encode("utf-8")
    return table
