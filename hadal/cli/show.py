"""`hadal show`: what a model truly is, what it needs, and whether it fits here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, fields, human_bytes, human_count, note, paint, print_json, say, table

if TYPE_CHECKING:
    from hadal.config import Gqa, ModelConfig
    from hadal.weights.info import ModelInfo


def show(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=o.MODEL_HELP + " Without it: all that Hadal knows."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Say what a model truly is, and whether it fits here.

    Its base, parameters, architecture, context, cache and sizes; without MODEL, the models that Hadal knows.

    A distill is not R1: it is a smaller model of another family, trained on R1's answers. `show` says so.

    Examples:
        hadal show
        hadal show deepseek-r1-distill-qwen-1.5b
        hadal show deepseek-r1 --json
        hadal show ./my-model
    """
    if model is None:
        _show_all(json)
        return
    from hadal.weights.info import inspect

    facts = describe(inspect(model))
    if json:
        print_json(facts)
    else:
        _print(facts)


def describe(info: ModelInfo) -> dict[str, Any]:
    """All that is known of a model, as data. Sizes in bytes."""
    from hadal.cli.loading import judge, name_of, title_of

    config, count, known = info.config, info.config.parameters(), info.preset
    verdict = judge(config)
    return {
        "name": name_of(info),
        "title": title_of(info),
        "is_distill": info.is_distill,
        "base": info.base,
        "repo_id": known.repo_id if known else None,
        "folder": str(info.folder) if info.folder else None,
        "template": known.template if known else None,
        "architecture": architecture(config),
        "model_type": config.model_type,
        "parameters": {
            "total": count.main,
            "active": count.active,
            "active_without_embedding": count.active_with_head,
            "mtp": count.mtp_unique,
        },
        "layers": config.num_hidden_layers,
        "context": info.context,
        "vocabulary": config.vocab_size,
        "kv_bytes_per_token": info.kv_bytes_per_token,
        "kv_bytes_at_full_context": info.kv_bytes_per_token * info.context,
        "stored_as": info.dtype,
        "stored_bytes": info.size_bytes,
        "weight_bytes": {
            "bf16": config.weight_bytes("bf16", mtp=False),
            "fp8": config.weight_bytes("fp8", mtp=False) if config.fp8 else None,
        },
        "runs_here": verdict.runs,
        "why": verdict.reason,
    }


def architecture(config: ModelConfig) -> str:
    """One line: attention and feed-forward, with their sizes."""
    from hadal.config import Mla

    a, m = config.attention, config.moe
    if isinstance(a, Mla):
        query = f"query latent {a.q_lora_rank}" if a.q_lora_rank else "no query latent"
        attention = f"MLA ({query}, latent {a.kv_lora_rank} + {a.qk_rope_head_dim} rope)"
    else:
        attention = _gqa(a, config.num_attention_heads)
    if m is None:
        feed_forward = f"dense feed-forward of {config.intermediate_size}"
    else:
        shared = f"{m.n_shared_experts} shared, " if m.n_shared_experts else ""
        chosen = f"{m.n_routed_experts} experts, {m.num_experts_per_tok} a token"
        feed_forward = f"MoE ({chosen}, {shared}{m.scoring_func} gate)"
    extras = [f"{config.num_nextn_predict_layers} MTP module"] if config.num_nextn_predict_layers else []
    extras += ["sparse attention"] if config.dsa else []
    return ", ".join([attention, feed_forward, *extras])


def _gqa(a: Gqa, heads: int) -> str:
    if a.num_key_value_heads == heads:
        return f"multi-head attention ({heads} heads of {a.head_dim})"
    return f"GQA ({heads} heads of {a.head_dim} on {a.num_key_value_heads} key-value heads)"


def _print(facts: dict[str, Any]) -> None:
    count, sizes = facts["parameters"], facts["weight_bytes"]
    active = f", {human_count(count['active'])} active a token" if count["active"] < count["total"] else ""
    mtp = f", and {human_count(count['mtp'])} of MTP" if count["mtp"] else ""
    sums = [f"{human_bytes(sizes['bf16'])} in BF16"]
    sums += [f"{human_bytes(sizes['fp8'])} in FP8 blocks"] if sizes["fp8"] else []
    full = f"{human_bytes(facts['kv_bytes_at_full_context'])} at full context"
    where = facts["folder"] or "not on this machine"
    say(paint(facts["title"], BOLD))
    fields(
        [
            ("base", facts["base"]),
            ("parameters", f"{count['total']:,} ({human_count(count['total'])}){active}{mtp}"),
            ("architecture", facts["architecture"]),
            ("layers", facts["layers"]),
            ("context", f"{facts['context']:,} tokens"),
            ("weights", f"{', '.join(sums)} (without MTP)" if count["mtp"] else ", ".join(sums)),
            ("cache", f"{facts['kv_bytes_per_token']:,} B a token in BF16, {full}"),
            ("template", facts["template"]),
            ("stored", f"{human_bytes(facts['stored_bytes'])} in {facts['stored_as']}"),
            ("on the hub", facts["repo_id"]),
            ("folder", where),
            ("runs here", ("yes: " if facts["runs_here"] else "no: ") + facts["why"].removeprefix("fits: ")),
        ]
    )
    if facts["is_distill"]:
        note(f"A distill is not R1: this is {facts['base']}, trained further on answers that R1 wrote.")


def _show_all(json: bool) -> None:
    from hadal.cli.loading import installed_names
    from hadal.config import PRESETS
    from hadal.weights.info import inspect

    here = installed_names()
    found = [describe(inspect(name)) for name in PRESETS]
    if json:
        print_json([{**facts, "installed": facts["name"] in here} for facts in found])
        return
    rows = [
        (
            f["name"],
            human_count(f["parameters"]["total"]),
            human_count(f["parameters"]["active"]),
            human_bytes(f["stored_bytes"]),
            f"{f['kv_bytes_per_token']:,}",
            f"{f['context']:,}",
            "yes" if f["name"] in here else "",
            "yes" if f["runs_here"] else "no",
            f["base"] or "",
        )
        for f in found
    ]
    header = ("MODEL", "TOTAL", "ACTIVE", "STORED", "KV B/TOKEN", "CONTEXT", "HERE", "RUNS", "A DISTILL INTO")
    table(header, rows, right=(1, 2, 3, 4, 5))
    note("`hadal show MODEL` says more; `hadal pull MODEL` downloads it; `hadal run MODEL` talks to it.")
