"""`hadal show`: what a model truly is, what it needs, and whether it fits here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli import options as o
from hadal.cli.terminal import BOLD, fields, human_bytes, human_count, note, paint, print_json, say, table
from hadal.config import PRESETS, Gqa, Mla, ModelConfig

if TYPE_CHECKING:
    from hadal.cli.loading import Identity


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
    from hadal.cli.loading import identify

    identity = identify(model)
    facts = describe(identity)
    if json:
        print_json(facts)
    else:
        _print(identity, facts)


def describe(identity: Identity) -> dict[str, Any]:
    """All that is known of a model, as data. Sizes in bytes."""
    from hadal.cli.loading import fit_here

    config, count = identity.config, identity.config.parameters()
    known = identity.preset
    verdict = fit_here(config)
    return {
        "name": identity.name,
        "title": identity.title,
        "is_distill": known.is_distill if known else None,
        "base": known.base if known else None,
        "repo_id": known.repo_id if known else None,
        "folder": str(identity.folder) if identity.folder else None,
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
        "context": identity.context,
        "vocabulary": config.vocab_size,
        "kv_bytes_per_token": int(config.kv_bytes_per_token()),
        "kv_bytes_at_full_context": int(config.kv_bytes_per_token() * identity.context),
        "weight_bytes": {
            "bf16": config.weight_bytes("bf16", mtp=False),
            "fp8": config.weight_bytes("fp8", mtp=False) if config.fp8 else None,
        },
        "fits": {"here": verdict.fits, "why": verdict.reason},
    }


def architecture(config: ModelConfig) -> str:
    """One line: attention and feed-forward, with their sizes."""
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


def _print(identity: Identity, facts: dict[str, Any]) -> None:
    count, sizes = facts["parameters"], facts["weight_bytes"]
    active = f", {human_count(count['active'])} active a token" if identity.config.moe else ""
    mtp = f", and {human_count(count['mtp'])} of MTP" if count["mtp"] else ""
    stored = [f"{human_bytes(sizes['bf16'])} in BF16"]
    stored += [f"{human_bytes(sizes['fp8'])} in FP8 blocks"] if sizes["fp8"] else []
    cache = (
        f"{facts['kv_bytes_per_token']:,} B a token in BF16, {human_bytes(facts['kv_bytes_at_full_context'])}"
    )
    say(paint(identity.title, BOLD))
    fields(
        [
            ("base", facts["base"]),
            ("parameters", f"{count['total']:,} ({human_count(count['total'])}){active}{mtp}"),
            ("architecture", facts["architecture"]),
            ("layers", facts["layers"]),
            ("context", f"{facts['context']:,} tokens"),
            ("weights", ", ".join(stored)),
            ("cache", f"{cache} at full context"),
            ("template", facts["template"]),
            ("on the hub", facts["repo_id"]),
            ("folder", facts["folder"] or "not downloaded"),
            ("fits here", ("yes: " if facts["fits"]["here"] else "no: ") + facts["fits"]["why"]),
        ]
    )
    if facts["is_distill"]:
        note(f"A distill is not R1: this is {facts['base']}, trained further on answers that R1 wrote.")


def _show_all(json: bool) -> None:
    from hadal.cli.loading import Identity, installed_names

    here = installed_names()
    found = [describe(Identity(p.name, p.config, p.title, p, None)) for p in PRESETS.values()]
    for facts in found:
        facts["installed"] = facts["name"] in here
    if json:
        print_json(found)
        return
    rows = [
        (
            f["name"],
            human_count(f["parameters"]["total"]),
            human_count(f["parameters"]["active"]),
            human_bytes(f["weight_bytes"]["fp8"] or f["weight_bytes"]["bf16"]),
            f"{f['kv_bytes_per_token']:,}",
            f"{f['context']:,}",
            "yes" if f["installed"] else "",
            "yes" if f["fits"]["here"] else "no",
            f["base"] or "",
        )
        for f in found
    ]
    header = (
        "MODEL",
        "TOTAL",
        "ACTIVE",
        "WEIGHTS",
        "KV B/TOKEN",
        "CONTEXT",
        "HERE",
        "FITS",
        "A DISTILL INTO",
    )
    table(header, rows, right=(1, 2, 3, 4, 5))
    note("`hadal show MODEL` says more; `hadal pull MODEL` downloads it; `hadal run MODEL` talks to it.")
