"""Model text that is safe to render as Markdown."""

from __future__ import annotations

import pytest

from hadal.ui.markdown import inert


@pytest.mark.parametrize(
    "text",
    [
        "plain, 3 < 5 and x <- y, a<3",
        "`<b>` and ``a ` <i>`` stay",
        "```html\n<div>\n```",
        "~~~\n<script>\n~~~",
        "````\n```\n<b>\n```\n````",
        "```\n<an unclosed fence is code to the end>",
        "1. item\n   ```\n   <b>\n   ```\n",
        "[link](https://example.org) **bold** \\(a < b\\)",
    ],
)
def test_left_as_it_is(text: str) -> None:
    assert inert(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("<!-- c --><?php", "&lt;!-- c -->&lt;?php"),
        ("![a](http://e/x.png)", "!&#91;a](http://e/x.png)"),
        ("`<b>` <b>", "`<b>` &lt;b>"),
        ("\\`<b>`", "\\`&lt;b>`"),
        ("`unclosed <b>", "`unclosed &lt;b>"),
        ("`two\n\nparagraphs <b>`", "`two\n\nparagraphs &lt;b>`"),
        ("```\n<b>\n```\n<b>", "```\n<b>\n```\n&lt;b>"),
        ("```\n<b>\n~~~\n<i>\n```\n<u>", "```\n<b>\n~~~\n<i>\n```\n&lt;u>"),
        ("``` not a fence ` <b>", "``` not a fence ` &lt;b>"),
        ("\\(a<b\\)", "\\(a&lt;b\\)"),
    ],
)
def test_html_and_images_become_text(text: str, shown: str) -> None:
    assert inert(text) == shown


def test_it_is_quick_on_hostile_input() -> None:
    for text in ("`" * 20_000, "`a" * 10_000, "<" * 50_000, "![" * 30_000, "\\" * 50_000, "` `` " * 6_000):
        inert(text)  # pytest's timeout would tell
