"""Everybody's benchmarks: tasks of `lm-eval` (extra `eval`) through our engine, or through a running server.

    tasks = load_tasks(["gsm8k"], include=None)
    outcome = run_tasks(tasks, EngineLM(engine), fewshot=5)        # hadal.evals.harness_models has the models

Prompts, few-shot examples, filters and metrics are lm-eval's own. A task's data set comes from the hub, so
from a network; tasks of one's own lie in a folder of YAML files (`include`), with data beside them.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from hadal.evals.samples import EvaluationError

MIN_VERSION = "0.4.13"
BOOTSTRAP = 1000  # resamples, for the errors of metrics that are no means
_GREEDY_SEED = 1234  # lm-eval's own
_UNSAFE = (
    "{} runs what the model wrote in this process; `hadal eval --set` runs HumanEval, and other sets with "
    "`tests`, in a sandbox"
)


def require() -> None:
    """Raises EvaluationError, with the remedy, where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("--tasks needs lm-eval: pip install 'hadal[eval]'")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars are ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_tasks(names: Sequence[str], include: Path | None = None) -> dict[str, Any]:
    """lm-eval's tasks by name; `include` is a folder with task files. Raises EvaluationError."""
    require()
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise EvaluationError(
            f"--include {include} is no folder; one with lm-eval's YAML task files is wanted"
        )
    manager = None
    if include is not None:  # reading lm-eval's own thousands of files takes many seconds
        manager = TaskManager(include_path=str(include), include_defaults=False)
    if manager is None or not all(name in manager.task_index for name in names):
        manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, list(manager.task_index), 1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them"
            raise EvaluationError(f"lm-eval has no task {name!r}; {hint}")
    try:
        found: dict[str, Any] = manager.load(list(names))
    except Exception as error:
        if "code_eval" in str(error):  # their metric, which they fetch before they say what they do
            raise EvaluationError(_UNSAFE.format(", ".join(names))) from error
        raise EvaluationError(
            f"{', '.join(names)} cannot be loaded ({type(error).__name__}: {_first_line(error)}); a data set "
            "of the hub needs a network, or its copy in HF_HOME; a local one a path from where you are"
        ) from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise EvaluationError(_UNSAFE.format(name))
        if getattr(task, "MULTIMODAL", False):
            raise EvaluationError(f"{name} shows pictures; this model reads text alone")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def run_tasks(
    tasks: dict[str, Any],
    model: Any,
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    max_tokens: int | None = None,
    seed: int = _GREEDY_SEED,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results (task, metric, value, error …) and samples. model: an lm_eval LM. fewshot: examples, None what
    each task says; max_tokens: of a generated answer, None what the task says (often 256, too few for a model
    that reasons). Raises EvaluationError."""
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        _configure(task, fewshot, max_tokens, seed)
    try:
        found = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=system,
        )
    except NotImplementedError as error:
        raise EvaluationError(
            f"these tasks cannot be run so: {_first_line(error)} Without --server, or with --plain, they can"
        ) from error
    assert found is not None
    return _results(found), _samples(found)


def _configure(task: Any, fewshot: int | None, max_tokens: int | None, seed: int) -> None:
    """lm-eval's own rules: a task that says 0 examples keeps to it; one that says nothing gets 0."""
    said = task.get_config("num_fewshot")
    if said is None:
        task.set_config(key="num_fewshot", value=fewshot or 0)
    elif fewshot is not None and said != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    task.set_fewshot_seed(seed=seed)
    if max_tokens is not None and task.get_config("output_type") == "generate_until":
        options = {
            key: value
            for key, value in (task.get_config("generation_kwargs") or {}).items()
            if key not in ("max_new_tokens", "max_tokens", "max_completion_tokens")
        }
        task.set_config(key="generation_kwargs", value={**options, "max_gen_toks": max_tokens})


def _results(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a task (or group), metric and filter."""
    rows = []
    for task, entry in found["results"].items():
        for key, value in entry.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = entry.get(f"{metric}_stderr,{chosen}")
            count = found.get("n-samples", {}).get(task, {})
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": chosen,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "problems": count.get("effective"),
                    "fewshot": found.get("n-shot", {}).get(task),
                    "version": found.get("versions", {}).get(task),
                    "higher_is_better": found.get("higher_is_better", {}).get(task, {}).get(metric),
                }
            )
    return rows


def _samples(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's samples as plain JSON."""
    lines = []
    for task, samples in (found.get("samples") or {}).items():
        for one in samples:
            kept = {key: value for key, value in one.items() if not key.endswith("_hash")}
            lines.append(json.loads(json.dumps({"task": task, **kept}, default=str, ensure_ascii=False)))
    return lines


class Answers:
    """What a model answered to lm-eval, by request; with a path each block is kept as soon as it is there, so
    that a run that was interrupted goes on."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises EvaluationError for a file that is damaged before its last line."""
        self.known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        if path.exists():
            data, sound = path.read_bytes(), 0
            for line in data.splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    key, value = entry["key"], entry["value"]
                except (ValueError, KeyError, TypeError):
                    if sound + len(line) < len(data):
                        raise EvaluationError(
                            f"{path} is damaged at byte {sound}; take another folder"
                        ) from None
                    break
                if not line.endswith(b"\n"):
                    break
                sound += len(line)
                self.known[key] = value
            os.truncate(path, sound)
        self._file = path.open("a", encoding="utf-8")

    def keys(self, kind: str, requests: Sequence[Any]) -> list[str]:
        """A key for each request; equal ones (a task that asks several times) are numbered."""
        seen: Counter[str] = Counter()
        found = []
        for request in requests:
            text = json.dumps([kind, *request.args], default=str, ensure_ascii=False, sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()
            found.append(f"{key}/{seen[key]}")
            seen[key] += 1
        return found

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def through(
        self,
        kind: str,
        requests: Sequence[Any],
        ask: Callable[[list[Any]], Sequence[Any]],
        block: int,
        progress: Callable[[int, int], None] | None,
    ) -> list[Any]:
        """The answers to all requests: those that are known, the others asked in blocks."""
        keys = self.keys(kind, requests)
        lacking = [index for index, key in enumerate(keys) if key not in self.known]
        for first in range(0, len(lacking), block):
            part = lacking[first : first + block]
            for index, value in zip(part, ask([requests[index] for index in part]), strict=True):
                self.add(keys[index], value)
            self.flush()
            if progress is not None:
                progress(len(keys) - len(lacking) + first + len(part), len(keys))
        return [self.known[key] for key in keys]
