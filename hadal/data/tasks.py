"""Tasks of a stage: plain functions of plain values, done once, by any number of processes.

A task writes files into a folder of its own. The folder gets its name when all is in it, with `result.json`
last; a task whose folder stands there is not done again. So a stage can be stopped anywhere and goes on, and
nothing half-made is ever read.

Workers are processes that take tasks from a pipe, a JSON line each. They do not hear Ctrl-C: the parent ends
them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

Tick = Callable[[int], None]


class TaskError(RuntimeError):
    """A task that failed in a worker, with what it said."""


@dataclass(frozen=True)
class Task:
    """function: "hadal.data.module:name", called as name(folder, spec, tick); folder: where its files go;
    spec: JSON; size: how much work, in the stage's unit."""

    function: str
    folder: str
    spec: dict[str, Any]
    size: int = 1

    @property
    def done(self) -> bool:
        return (Path(self.folder) / "result.json").is_file()


class Executor(Protocol):
    """Does all tasks that are not done, and returns when they are."""

    def __call__(self, tasks: Sequence[Task], tick: Tick) -> None: ...


def run_task(task: Task, tick: Tick = lambda amount: None) -> None:
    """Do one task in this process, unless it is done."""
    if task.done:
        return
    folder = Path(task.folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    module, _, name = task.function.partition(":")
    result = getattr(importlib.import_module(module), name)(partial, task.spec, tick)
    (partial / "result.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def results(tasks: Sequence[Task]) -> list[Any]:
    """What the tasks returned, in their order."""
    return [json.loads((Path(t.folder) / "result.json").read_text(encoding="utf-8")) for t in tasks]


@dataclass(frozen=True)
class Local:
    """Processes of this machine; one worker: this process itself."""

    workers: int = 1

    def __call__(self, tasks: Sequence[Task], tick: Tick) -> None:
        waiting = [task for task in tasks if not task.done]
        tick(sum(task.size for task in tasks) - sum(task.size for task in waiting))
        workers = min(self.workers, len(waiting))
        if workers <= 1:
            for task in waiting:
                run_task(task, tick)
            return
        _Crew(waiting, tick).run(workers)


class _Crew:
    """Threads that each feed one worker process."""

    def __init__(self, tasks: Sequence[Task], tick: Tick) -> None:
        self.tasks: queue.Queue[Task] = queue.Queue()
        for task in tasks:
            self.tasks.put(task)
        self.events: queue.Queue[int | str | None] = queue.Queue()
        self.tick = tick

    def run(self, workers: int) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from hadal.data.tasks import work; work()"]
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment,
            )
            for _ in range(workers)
        ]  # fmt: skip
        threads = [threading.Thread(target=self._feed, args=(p,), daemon=True) for p in processes]
        try:
            for thread in threads:
                thread.start()
            ended = 0
            while ended < workers:
                event = self.events.get()
                if isinstance(event, str):
                    raise TaskError(event)
                if event is None:
                    ended += 1
                else:
                    self.tick(event)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for thread in threads:
                thread.join()
            for process in processes:
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()

    def _feed(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            while True:
                task = self.tasks.get_nowait()
                process.stdin.write(json.dumps(asdict(task)) + "\n")
                process.stdin.flush()
                while (line := process.stdout.readline()) and line.strip() != "done":
                    self.events.put(int(line))
                if not line:
                    said = process.stderr.read().strip().splitlines() or [f"status {process.wait()}"]
                    self.events.put(f"a worker failed at {Path(task.folder).name}: {said[-1]}")
                    return
        except queue.Empty:
            self.events.put(None)
        except (OSError, ValueError) as error:
            self.events.put(f"a worker was lost: {error}")


def work() -> None:
    """A worker: tasks from stdin, amounts of work and "done" to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        run_task(Task(**json.loads(line)), lambda amount: print(amount, flush=True))
        print("done", flush=True)
