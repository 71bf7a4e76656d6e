"""docs/models.md equals the presets; `python -m tests.config.test_docs` writes its tables again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hadal.config import PRESETS, Mla, Preset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
GIB = 2**30


def size(count: float) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def figures_row(name: str, p: Preset) -> str:
    """Parameters, cache, sizes; FP8 and BF16 as a published folder holds them, MTP included."""
    c, n = p.config, p.config.parameters()
    kv = c.kv_bytes_per_token(2)
    cells = [
        f"`{name}`",
        f"{n.main:,}",
        f"{n.active / 1e9:.2f}B" if n.active >= 1e9 else f"{n.active / 1e6:.2f}M",
        f"{n.mtp_unique:,}" if n.mtp_unique else "–",
        f"{kv:,.0f}",
        f"{p.context:,}",
        size(kv * p.context),
        size(c.weight_bytes("fp8")),
        size(c.weight_bytes("bf16")),
    ]
    return f"| {' | '.join(cells)} |"


def truth_row(name: str, p: Preset) -> str:
    """What a model truly is, in the words that `hadal show` uses, and the template of its prompts."""
    origin = f"`{p.repo_id}`" if p.repo_id else "in the package"
    return f"| `{name}` | {p.title.split(': ', 1)[-1]} | {origin} | `{p.template}` |"


def shape_row(name: str, p: Preset) -> str:
    """Layers, width, heads, what attention caches a token and layer, experts."""
    c, a, m = p.config, p.config.attention, p.config.moe
    if isinstance(a, Mla):
        kind = f"MLA, latent {a.kv_lora_rank} + rope {a.qk_rope_head_dim}"
    elif a.num_key_value_heads == c.num_attention_heads:
        kind = "MHA"
    else:
        kind = f"GQA, {a.num_key_value_heads} KV heads"
    routed = (
        f"{m.n_routed_experts}, top {m.num_experts_per_tok}, {m.n_shared_experts} shared" if m else "dense"
    )
    cells = [
        f"`{name}`",
        f"`{c.model_type}`",
        str(c.num_hidden_layers),
        f"{c.hidden_size:,}",
        str(c.num_attention_heads),
        kind,
        f"{c.cache_values_per_token:,}",
        routed,
        f"{c.vocab_size:,}",
    ]
    return f"| {' | '.join(cells)} |"


TABLES = {"figures": figures_row, "truth": truth_row, "shapes": shape_row}


def pattern(table: str) -> re.Pattern[str]:
    """The rows of a table, between its markers; its two head lines stay."""
    begin, end = f"<!-- {table}: begin -->\n", f"<!-- {table}: end -->"
    return re.compile(f"({begin}[^\n]*\n[^\n]*\n)(.*?)({end})", re.S)


def rows(table: str) -> str:
    return "".join(TABLES[table](name, p) + "\n" for name, p in PRESETS.items())


@pytest.mark.parametrize("table", TABLES)
def test_the_page_equals_the_presets(table: str) -> None:
    found = pattern(table).search(PAGE.read_text("utf-8"))
    assert found, f"docs/models.md has no table between the markers of {table!r}"
    assert found[2].splitlines() == rows(table).splitlines()


def test_the_model_on_board_is_as_large_as_the_page_says() -> None:
    """What FP8 counts is what lies on the disk, but for the header of the file."""
    from hadal.weights import hub
    from hadal.weights.header import read_header

    file = hub.resolve("hadal-mini") / "model.safetensors"
    stored = sum(entry.nbytes for entry in read_header(file).values())
    assert stored == PRESETS["hadal-mini"].config.weight_bytes("fp8")


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    for name in TABLES:
        text = pattern(name).sub(lambda m, name=name: m[1] + rows(name) + m[3], text)
    PAGE.write_text(text, "utf-8")
