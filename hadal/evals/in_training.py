"""Task accuracy while a model trains: an engine on the trainer's own tensors answers held-out puzzles.

Nothing is copied: the engine's model is the trained one. Its cache is freed at the end, random states are
put back, and no gradient is recorded. Steps are run one by one, without CUDA graphs, so that nothing stays
captured of weights that go on changing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hadal.data.puzzles import TASKS, Sample, verify
from hadal.engine import Engine, SamplingParams
from hadal.engine.memory import available_memory, release
from hadal.engine.request import Completion
from hadal.evals.puzzles import problems
from hadal.model.context import Cache
from hadal.model.transformer import Transformer
from hadal.text.templates import template_for
from hadal.train.accuracy import Accuracy
from hadal.train.sources import Sources

_PAGE = 64
_MOST_SEATS = {"cuda": 256, "cpu": 32}
_SHARE = 0.5  # of the memory that is free, at most, for the cache


class ExamError(RuntimeError):
    """The engine could not answer; the message says why."""


def examine(model: Transformer, sources: Sources, each: int, max_tokens: int) -> Accuracy:
    """Let `model` answer `each` held-out problems of every task, the same ones at every call.

    Raises ExamError where the engine fails, TemplateError for a tokenizer without a chat template.
    """
    started = time.perf_counter()
    asked = problems(each)
    on_gpu = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.compiler.set_stance("force_eager"):
        try:
            answers = _answers(model, sources, asked, max_tokens)
        finally:
            release()
    right = dict.fromkeys(TASKS, 0)
    count = dict(right)
    for one, answer in zip(asked, answers, strict=True):
        count[one.task] += 1
        right[one.task] += verify(one, answer.text)
    shares = {name: right[name] / count[name] for name in TASKS}
    return Accuracy(
        accuracy=sum(shares.values()) / len(shares),
        tasks=shares,
        problems=len(asked),
        unfinished=sum(answer.finish_reason == "length" for answer in answers),
        seconds=time.perf_counter() - started,
    )


def _answers(
    model: Transformer, sources: Sources, asked: Sequence[Sample], max_tokens: int
) -> list[Completion]:
    template = template_for(sources.tokenizer_folder)
    prompts = [
        sources.tokenizer.encode_parts(template.render([{"role": "user", "content": one.prompt}]))
        for one in asked
    ]
    longest = min(model.max_positions, max(map(len, prompts)) + max_tokens)
    pages = -(-longest // _PAGE)
    sequence = pages * Cache.bytes_per_page(model.config, _PAGE, model.dtype)
    kind = model.device.type
    seats = min(len(prompts), _MOST_SEATS[kind], max(1, int(_SHARE * _free(model.device)) // sequence))
    engine = Engine(
        model,
        sources.tokenizer,
        template,
        max_model_len=longest,
        max_num_seqs=seats,
        cache_bytes=sequence * seats + 2 * sequence // pages,
        page_size=_PAGE,
        prefix_caching=False,
        cuda_graphs=False,
        speculation="off",
        seed=0,
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    answers: list[Completion] = engine.generate(prompts, params)
    failed = next((a for a in answers if a.finish_reason in ("error", "abort")), None)
    if failed is not None:
        raise ExamError(
            f"accuracy could not be measured: {failed.error}; log.accuracy_every_steps=0 does without"
        )
    return answers


def _free(device: torch.device) -> int:
    """Bytes that a cache may take, those among them that the allocator holds and nobody uses."""
    if device.type == "cpu":
        return available_memory()
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle
