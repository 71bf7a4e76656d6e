"""What a model writes, made safe to render: its HTML becomes text, its images become their source.

Gradio renders Markdown with raw HTML and sanitises what comes out, but its sanitiser parses in the live
document, where an `onerror=` would already run and an image already load. The page's policy stops both
(site.py); here the cause goes away: outside code, `<` before a tag becomes `&lt;` and `![` loses its
meaning. In LaTeX `&lt;` still reads as <.

Code is recognised as in CommonMark (https://spec.commonmark.org/0.31.2/, 4.5 fenced code blocks, 6.1 code
spans).
"""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*(?:(`{3,})[^`\n]*|(~{3,}).*)$")
_SPAN = re.compile(r"\\.|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=ticks)(?!`)", re.DOTALL)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def inert(text: str) -> str:
    """Markdown that contains no HTML and no image; code blocks and code spans stay as they are.

    >>> inert("<img src=x> and `<b>`")
    '&lt;img src=x> and `<b>`'
    """
    done: list[str] = []
    prose: list[str] = []
    fence = ""
    for line in text.split("\n"):
        if fence:
            done.append(line)
            stripped = line.strip()
            if len(stripped) >= len(fence) and not stripped.strip(fence[0]):
                fence = ""
            continue
        opening = _FENCE.match(line)
        if opening is None:
            prose.append(line)
            continue
        fence = opening.group(1) or opening.group(2)
        done += _prose(prose)
        prose = []
        done.append(line)
    return "\n".join(done + _prose(prose))


def _prose(lines: list[str]) -> list[str]:
    if not lines:
        return []
    text = "\n".join(lines)
    done, last = [], 0
    for span in _SPAN.finditer(text):
        if span.group("ticks"):
            done += [_plain(text[last : span.start()]), span.group()]
            last = span.end()
    return ["".join([*done, _plain(text[last:])])]


def _plain(text: str) -> str:
    return _TAG.sub("&lt;", text).replace("![", "!&#91;")
