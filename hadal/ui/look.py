"""How the pages look: a calm, deep-sea theme on the fonts that the visitor's system has (nothing is
fetched)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

# From the sunlit surface (50) to hadal depth (950).
SEA = "#effafa #d3f0f0 #a8e0e2 #72c8cd #3fa9b1 #238d96 #1a727c #185c66 #164953 #123a44 #0a252d".split()
STONE = "#f7f9fa #eef2f3 #dfe6e8 #c5d0d4 #93a4ab #6a7d85 #4f626a #3c4d54 #22323a #14222a #0b171e".split()


def theme() -> Any:
    """The Gradio theme, light and dark."""
    import gradio as gr

    shades = (50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 950)
    sea = gr.themes.Color(**{f"c{shade}": hue for shade, hue in zip(shades, SEA, strict=True)}, name="sea")
    stone = gr.themes.Color(
        **{f"c{shade}": hue for shade, hue in zip(shades, STONE, strict=True)}, name="stone"
    )
    base = gr.themes.Base(
        primary_hue=sea, secondary_hue=sea, neutral_hue=stone, radius_size="lg", font=SANS, font_mono=MONO
    )
    return base.set(
        body_background_fill="#ffffff",
        body_text_color="*neutral_800",
        body_text_color_dark="*neutral_200",
        body_background_fill_dark="*neutral_950",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary_dark="*neutral_950",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_800",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_title_text_size="*text_sm",
        input_background_fill="#ffffff",
        input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_800",
        input_border_color_focus="*primary_400",
        input_border_color_focus_dark="*primary_600",
        input_border_width="1px",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_200",
        button_secondary_border_color_dark="*neutral_800",
        slider_color="*primary_600",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*neutral_800",
    )
