"""What each way to quantise weights costs in quality, on hadal-mini and worked puzzles that it has not seen.

    python benchmarks/quantisation.py                       # KL, agreement, perplexity and accuracy
    python benchmarks/quantisation.py --samples 0           # without the answers, a minute

Against the same model in FP32, over every token of the worked answers (teacher forcing): the mean KL
divergence of the next token's distribution, KL(p_fp32 ‖ p) in nats, how often both have the same likeliest
token, and the perplexity of the worked answer. Then the accuracy of greedy answers over all tasks (as
`hadal eval` measures it).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import exp
from typing import Any

import torch
from common import machine, save
from torch import Tensor

from hadal.cli.terminal import bar
from hadal.engine import Engine
from hadal.evals.puzzles import evaluate, problems
from hadal.model.context import Context

SCHEMES: dict[str, dict[str, str]] = {
    "FP32": {"dtype": "float32"},
    "BF16": {"dtype": "bfloat16"},
    "FP8 blocks": {"dtype": "float32", "quantize": "fp8"},
    "INT8, groups of 128": {"dtype": "float32", "quantize": "int8"},
    "INT4, groups of 32": {"dtype": "float32", "quantize": "int4"},
}


def documents(engine: Engine, per_task: int) -> list[tuple[list[int], int]]:
    """(tokens, where the answer begins) of worked puzzles."""
    assert engine.tokenizer is not None
    found = []
    for one in problems(per_task, seed=7):
        prompt = engine.encode_chat([{"role": "user", "content": one.prompt}])
        found.append(([*prompt, *engine.tokenizer.encode_with_controls(one.completion)], len(prompt)))
    return found


@torch.no_grad()
def log_probabilities(engine: Engine, texts: list[tuple[list[int], int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(log p [n, V] before each token of an answer, the tokens [n]), 16 texts a pass."""
    for first in range(0, len(texts), 16):
        some = texts[first : first + 16]
        token_T = torch.tensor([t for ids, _ in some for t in ids])
        context = Context.packed([len(ids) for ids, _ in some])
        logits_TV = engine.model.logits(engine.model(token_T, context))
        for index, (ids, begin) in enumerate(some):
            start = context.cu_seqlens[index]
            rows = logits_TV[start + begin - 1 : start + len(ids) - 1]
            yield rows.double().log_softmax(-1), torch.tensor(ids[begin:])


def compare(exact: Engine, engine: Engine, texts: list[tuple[list[int], int]]) -> dict[str, float]:
    """Means over all tokens of the answers."""
    kl = same = loss = count = 0.0
    both = zip(log_probabilities(exact, texts), log_probabilities(engine, texts), strict=True)
    for (p, token), (q, _) in both:
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        loss -= float(q.gather(-1, token[:, None]).sum())
        count += len(token)
    return {"kl": kl / count, "agreement": same / count, "perplexity": exp(loss / count), "tokens": count}


def weight_megabytes(engine: Engine) -> float:
    """What parameters, codes and scales take in memory."""
    return sum(t.nbytes for t in {t.data_ptr(): t for t in engine.model.state_dict().values()}.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="hadal-mini", help="a model that answers puzzles")
    parser.add_argument("--texts", type=int, default=60, help="worked answers a task for KL and perplexity")
    parser.add_argument("--samples", type=int, default=100, help="answers a task for the accuracy; 0: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", help="folder of the result (default: benchmarks/results)")
    args = parser.parse_args()
    exact = Engine.load(args.model, device=args.device, dtype="float32")
    texts = documents(exact, args.texts)
    rows: list[list[Any]] = []
    for name, options in SCHEMES.items():
        engine = Engine.load(args.model, device=args.device, max_num_seqs=64, **options)
        found = compare(exact, engine, texts)
        row = [name, f"{weight_megabytes(engine):.1f}", f"{found['kl']:.2e}"]
        row += [f"{found['agreement']:.3%}", f"{found['perplexity']:.5f}"]
        if args.samples:
            with bar(f"answers in {name}", unit_bytes=False) as update:
                report = evaluate(engine, samples=args.samples, progress=update)
            row.append(f"{report['accuracy']:.2%}")
        print("  ".join(row), flush=True)
        rows.append(row)
    columns = ["weights", "MB", "KL (nats/token)", "same likeliest token", "perplexity"]
    tokens = int(found["tokens"])
    result = {
        "machine": machine(args.device),
        "title": f"{args.model}: what quantised weights cost in quality",
        "columns": columns + (["accuracy"] if args.samples else []),
        "rows": rows,
        "notes": f"{tokens:,} tokens of {len(texts)} worked answers that were not trained on"
        + (f"; accuracy is the mean over all tasks, {args.samples} problems each." if args.samples else "."),
    }
    save(f"quantisation_{args.model.replace('/', '_')}", result, args.results)


if __name__ == "__main__":
    main()
