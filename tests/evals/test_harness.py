"""lm-eval on the model on board: our engine in this process, a server, and what the engine says directly."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.cli import loading
from hadal.engine import AsyncEngine, Engine, SamplingParams
from hadal.evals import harness
from hadal.evals.puzzles import problems
from hadal.evals.samples import EvaluationError
from hadal.model import Context
from tests.cli.helpers import hadal
from tests.helpers.live_server import LiveServer, live_server

BOLD = r"\*\*(.+?)\*\*"
CHOICES = "mini_choices"
GENERATE = "mini_generate"
ROLLING = "mini_rolling"
LONGEST = 120


def make_engine(of: Engine | None = None) -> Engine:
    if of is None:
        return Engine.load("hadal-mini", device="cpu", dtype="float32", max_num_seqs=12, max_model_len=512)
    return Engine(of.model, of.tokenizer, of.template, name=of.name, folder=of.folder, max_num_seqs=12,
                  max_model_len=512, cache_bytes=16 << 20)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[LiveServer]:
    """The same weights behind HTTP."""
    with live_server(AsyncEngine(make_engine(engine))) as live:
        yield live


@pytest.fixture(scope="module")
def docs() -> list[dict[str, Any]]:
    """A dozen puzzles: some that the model answers rightly, some whose gold answer is made a wrong one."""
    asked = problems(3, 0, ["addition", "subtraction", "comparison", "extreme"])
    return [
        {"question": one.prompt, "gold": one.gold[0] if number % 3 else "0",
         "choices": [one.gold[0], "17", "no"]}
        for number, one in enumerate(asked)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, docs: list[dict[str, Any]]) -> Path:
    """Tasks of one's own, as a user writes them."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
    head = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {place}/docs.jsonl}}
  cache_dir: {place}/cache
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (place / "choices.yaml").write_text(f"""task: {CHOICES}{head}
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    (place / "generate.yaml").write_text(f"""task: {GENERATE}{head}
output_type: generate_until
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["Q:"], max_gen_toks: {LONGEST}}}
filter_list:
  - name: bold
    filter:
      - {{function: regex, regex_pattern: '{BOLD}', group_select: -1}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    (place / "rolling.yaml").write_text(f"""task: {ROLLING}{head}
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
""")
    return place


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str]
) -> Any:
    """`hadal eval --tasks …` as a function that gives its JSON."""
    monkeypatch.setattr(loading, "load_engine", lambda *args, **options: engine)

    def evaluate(tasks: str, *words: str) -> dict[str, Any]:
        shown = hadal(capsys, "eval", "--tasks", tasks, "--include", str(folder), "--json", *words)
        assert shown.status == 0, shown.err
        found: dict[str, Any] = json.loads(shown.out)
        return found

    return evaluate


def values(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["task"], row["metric"]): row["value"] for row in report["results"]}


def direct(engine: Engine, context: str, continuation: str = "") -> tuple[float, bool]:
    """Log-likelihood straight from the network: BOS, text; of the continuation, or of all after BOS. Where
    the two grow together to other tokens, lm-eval takes the context's own, then the rest of the whole."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None and tokenizer.bos_id is not None
    known, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    ids = [tokenizer.bos_id, *known, *whole[len(known) :]]
    start = 1 + len(known) if continuation else 1
    with torch.no_grad():
        hidden = engine.model(torch.tensor(ids), Context.packed([len(ids)], "cpu"))
        logprobs = engine.model.logits(hidden).log_softmax(-1)
    scored = range(start, len(ids))
    total = math.fsum(logprobs[at - 1, ids[at]].item() for at in scored)
    return total, all(logprobs[at - 1].argmax().item() == ids[at] for at in scored)


def test_log_likelihoods_here_through_a_server_and_from_the_network(
    run: Any, server: LiveServer, engine: Engine, docs: list[dict[str, Any]], tmp_path: Path
) -> None:
    both = f"{CHOICES},{ROLLING}"
    here = run(both, "--out", str(tmp_path / "here"))
    there = run(both, "--server", server.url, "--out", str(tmp_path / "there"))
    assert values(here) == pytest.approx(values(there), abs=1e-5)
    expected = [[direct(engine, doc["question"], f" {one}") for one in doc["choices"]] for doc in docs]
    best = [max(range(3), key=lambda index, row=row: row[index][0]) for row in expected]
    assert values(here)[CHOICES, "acc"] == pytest.approx(best.count(0) / len(docs))
    bits = -math.fsum(direct(engine, doc["question"])[0] for doc in docs) / math.log(2)
    size = sum(len(doc["question"].encode()) for doc in docs)
    assert values(here)[ROLLING, "bits_per_byte"] == pytest.approx(bits / size, abs=1e-5)
    for name in ("here", "there"):
        lines = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").open(encoding="utf-8")]
        scored = [line for line in lines if line["task"] == CHOICES]
        assert len(scored) == len(docs)
        for line in scored:
            for (value, greedy), (total, likeliest) in zip(
                line["filtered_resps"], expected[line["doc_id"]], strict=True
            ):
                assert float(value) == pytest.approx(total, abs=1e-4)
                assert str(greedy) == str(likeliest)
    assert here["settings"]["digest"] and there["settings"]["server"] == server.url


def test_answers_here_through_a_server_and_from_the_engine(
    run: Any, server: LiveServer, engine: Engine, docs: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In the chat template, the answer without its reasoning; greedily."""
    docs = docs[:6]
    words = ("--chat", "--limit", str(len(docs)))
    here = run(GENERATE, *words, "--out", str(tmp_path / "here"))
    there = run(GENERATE, *words, "--server", server.url, "--out", str(tmp_path / "there"))
    params = SamplingParams(max_tokens=LONGEST, temperature=0)
    said = [engine.chat([{"role": "user", "content": doc["question"]}], params).content for doc in docs]
    found = [re.findall(BOLD, text) for text in said]
    right = sum(bool(f) and f[-1] == doc["gold"] for f, doc in zip(found, docs, strict=True))
    assert 0 < right < len(docs)
    score = {(GENERATE, "exact_match"): pytest.approx(right / len(docs))}
    assert values(here) == score and values(there) == score
    for name in ("here", "there"):
        lines = (json.loads(line) for line in (tmp_path / name / "samples.jsonl").open(encoding="utf-8"))
        assert [line["resps"] for line in lines] == [[[text]] for text in said]


def test_text_is_continued_the_same_here_and_there(
    run: Any, server: LiveServer, engine: Engine, docs: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ("--limit", "4", "--max-tokens", "12")
    here = run(GENERATE, *words, "--out", str(tmp_path / "here"))
    there = run(GENERATE, *words, "--server", server.url, "--out", str(tmp_path / "there"))
    assert values(here) == values(there)
    params = SamplingParams(max_tokens=12, temperature=0, stop=("Q:",))
    said = [[[engine.generate(doc["question"], params).text]] for doc in docs[:4]]
    for name in ("here", "there"):
        lines = (json.loads(line) for line in (tmp_path / name / "samples.jsonl").open(encoding="utf-8"))
        assert [line["resps"] for line in lines] == said


def test_a_run_that_was_cut_asks_only_what_is_left(tmp_path: Path) -> None:
    class Request:
        def __init__(self, text: str) -> None:
            self.args = (text, {"until": ["x"]})

    requests = [Request(text) for text in ("a", "b", "a", "c", "d")]
    asked: list[str] = []

    def ask(part: list[Any], fail_at: str = "") -> list[str]:
        asked.extend(one.args[0] for one in part)
        if fail_at in [one.args[0] for one in part]:
            raise KeyboardInterrupt
        return [f"{one.args[0]}{len(asked)}" for one in part]

    path = tmp_path / "answers.jsonl"
    answers = harness.Answers(path)
    with pytest.raises(KeyboardInterrupt):
        answers.through("generate_until", requests, lambda part: ask(part, "c"), 2, None)
    answers.close()
    with path.open("a") as file:
        file.write('{"key": "to')
    assert asked == ["a", "b", "a", "c"]
    asked.clear()
    seen: list[tuple[int, int]] = []
    answers = harness.Answers(path)
    got = answers.through("generate_until", requests, ask, 2, lambda *at: seen.append(at))
    answers.close()
    assert got[:2] == ["a2", "b2"] and asked == ["a", "c", "d"], "the second `a` is a question of its own"
    assert seen == [(4, 5), (5, 5)]
    assert harness.Answers(path).through("generate_until", requests, ask, 2, None) == got
    assert len(path.read_text().splitlines()) == 5


def test_what_cannot_be_run_is_named(
    monkeypatch: pytest.MonkeyPatch, run: Any, folder: Path, server: LiveServer, engine: Engine,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from hadal.evals.harness_models import sampling

    with pytest.raises(EvaluationError, match="is no folder"):
        harness.load_tasks([CHOICES], folder / "none")
    with pytest.raises(EvaluationError, match="num_beams, which the engine does not have"):
        sampling({"num_beams": 4}, chat=False)
    assert sampling({"do_sample": True, "temperature": 0.7, "max_new_tokens": 9}, chat=True)[1] == (
        SamplingParams(max_tokens=9, temperature=0.7, seed=1234)
    )
    words = ("eval", "--tasks", CHOICES, "--include", str(folder), "--chat", "--server", server.url)
    shown = hadal(capsys, *words)
    assert shown.status == 1 and "Without --server, or with --plain, they can" in shown.err
    named = hadal(capsys, "eval", "other-model", *words[1:])
    assert named.status == 2 and "serves hadal-mini, not 'other-model'" in named.err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    shown = hadal(capsys, "eval", "--tasks", CHOICES)
    assert shown.status == 1 and "pip install 'hadal[eval]'" in shown.err


def test_a_task_that_is_not_there_or_has_no_data(folder: Path, tmp_path: Path) -> None:
    text = (folder / "choices.yaml").read_text().replace("docs.jsonl", "nothing.jsonl")
    (tmp_path / "choices.yaml").write_text(text)
    with pytest.raises(EvaluationError, match=r"cannot be loaded .*needs a network"):
        harness.load_tasks([CHOICES], tmp_path)


def test_a_task_that_runs_code_is_refused_before_its_metric_is_fetched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "choices.yaml").write_text(
        (folder / "choices.yaml").read_text() + "process_docs: !function u.f\n"
    )
    (tmp_path / "u.py").write_text('raise FileNotFoundError("Couldn\'t find code_eval/code_eval.py")\n')
    with pytest.raises(EvaluationError, match="runs what the model wrote in this process"):
        harness.load_tasks([CHOICES], tmp_path)
