"""One document at a time: its form, its language, its quality. The same text gives the same answer.

Language is told by script, and among Latin scripts by the commonest words. That is enough to keep Chinese out
of an English set; it is no judge of dialects. Text where no language prevails (code, tables) is "und".
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter

from hadal.data.recipe import Quality

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_LINE_END = re.compile(r"[ \t]+(?=\n|$)")
_BLANK_LINES = re.compile(r"\n{4,}")
_LATIN_WORD = re.compile(r"[^\W\d_]+")
_SPACED_WORD = re.compile(r"[^\W_]+")
SAMPLE = 20_000  # characters that tell a language

# First code points of stretches and their script; "" is no script of its own.
_STRETCHES: tuple[tuple[int, str], ...] = (
    (0, ""), (0x41, "latin"), (0x5B, ""), (0x61, "latin"), (0x7B, ""), (0xC0, "latin"), (0x250, ""),
    (0x370, "el"), (0x400, "cyrillic"), (0x530, "hy"), (0x590, "he"), (0x600, "ar"), (0x780, ""),
    (0x900, "hi"), (0x980, "bn"), (0xA00, ""), (0xE00, "th"), (0xE80, ""), (0x10A0, "ka"), (0x1100, "ko"),
    (0x1200, ""), (0x1E00, "latin"), (0x1F00, "el"), (0x2000, ""), (0x3040, "ja"), (0x3100, ""),
    (0x3400, "han"), (0x4DC0, ""), (0x4E00, "han"), (0xA000, ""), (0xAC00, "ko"), (0xD7B0, ""),
    (0xF900, "han"), (0xFB00, ""), (0x20000, "han"), (0x40000, ""),
)  # fmt: skip
_FIRST = [first for first, _ in _STRETCHES]
_COMMON = {
    "en": "the of and to in is that for it was with as be this are on not or by from have which an but",
    "fr": "le la les des et est une dans que qui pour pas sur du au par plus avec il je ce ne sont cette",
    "de": "der die und das ist nicht ein eine zu den mit von auf für sich dem im auch werden als es wird",
    "es": "el los las del que una por con para es como más se su al lo pero está sus este hay son muy",
    "pt": "o os as do da em um uma não que com para por mais ao dos das se como foi são é também isso",
    "it": "il di che la e per non un una è sono con del della si come più gli nel alla anche questo ha",
    "nl": "de het een en van is dat niet op te zijn met voor er aan ook bij maar om naar wordt als ze",
}
_WORD_OF = {language: frozenset(words.split()) for language, words in _COMMON.items()}
_MIN_COMMON, _MIN_LEAD = 0.08, 1.3  # share of common words; ahead of the second language


def normalise(text: str) -> str:
    """NFC, line breaks as \\n, no control characters, no white space at line ends, few blank lines."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = text.replace("\u2028", "\n").replace("\u2029", "\n\n")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _LINE_END.sub("", _CONTROL.sub("", text))
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")


def language_of(text: str) -> str:
    """A code such as "en" or "zh", or "und"."""
    scripts: Counter[str] = Counter()
    for char, count in Counter(text[:SAMPLE]).items():
        scripts[_STRETCHES[bisect_right(_FIRST, ord(char)) - 1][1]] += count
    del scripts[""]
    if not scripts:
        return "und"
    kana = scripts.pop("ja", 0)
    if kana or "han" in scripts:
        scripts["han"] += kana
    script, count = min(scripts.items(), key=lambda pair: (-pair[1], pair[0]))
    if count * 2 < scripts.total():
        return "und"
    if script == "latin":
        return _latin_language(text[:SAMPLE])
    if script == "han":
        return "ja" if kana * 10 > count else "zh"
    return "ru" if script == "cyrillic" else script


def _latin_language(text: str) -> str:
    words = Counter(_LATIN_WORD.findall(text.lower()))
    shares = {
        language: sum(words[word] for word in common) / max(1, words.total())
        for language, common in _WORD_OF.items()
    }
    (best, share), (_, second) = sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))[:2]
    return best if share >= _MIN_COMMON and share >= _MIN_LEAD * second else "und"


def quality_fault(text: str, rules: Quality) -> tuple[str, str] | None:
    """(the rule that a text breaks, with which value), or None."""
    if len(text) < rules.min_characters:
        return "too short", f"{len(text)} characters; at least {rules.min_characters}"
    if len(text) > rules.max_characters:
        return "too long", f"{len(text):,} characters; at most {rules.max_characters:,}"
    broken = text.count("\ufffd") / len(text)
    if broken > rules.max_broken:
        return "broken characters", f"{broken:.1%} are U+FFFD; at most {rules.max_broken:.1%}"
    words = _SPACED_WORD.findall(text)
    letters = sum(map(len, words))
    visible = len("".join(text.split()))
    if letters < rules.min_letters * visible:
        return "few letters", f"{letters / visible:.0%} letters and digits; at least {rules.min_letters:.0%}"
    if text.isascii() and letters > rules.max_word_length * max(1, len(words)):
        mean = letters / max(1, len(words))
        return "long words", f"{mean:.1f} letters a word; at most {rules.max_word_length:g}"
    return _line_fault([line for line in map(str.strip, text.split("\n")) if line], rules)


def _line_fault(lines: list[str], rules: Quality) -> tuple[str, str] | None:
    if len(lines) < 4:
        return None
    for name, share, most in (
        ("repeated lines", 1 - len(set(lines)) / len(lines), rules.max_repeated_lines),
        ("bullet lines", sum(x[0] in "•‣▪*-" for x in lines) / len(lines), rules.max_bullet_lines),
        (
            "ellipsis lines",
            sum(x.endswith(("...", "…")) for x in lines) / len(lines),
            rules.max_ellipsis_lines,
        ),
    ):
        if share > most:
            return name, f"{share:.0%} of {len(lines)} lines; at most {most:.0%}"
    return None
