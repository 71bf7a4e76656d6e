"""Tasks on many machines, through datatrove's executors: Slurm job arrays, or a Ray cluster.

The tasks, and so the shards, are those of one machine (hadal/data/tasks.py): datatrove starts one rank a task
and keeps its log. All machines must see the working folder and the input under the same paths.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hadal.data.tasks import Task, TaskError, Tick, run_task

POLL_S = 5.0
GRACE_S = 60.0  # how long a shared file system may hide what an ended job wrote


def run_rank(data: Any, rank: int, world_size: int, tasks: list[dict[str, Any]]) -> None:
    """What datatrove calls, as a pipeline of one step."""
    run_task(Task(**tasks[rank]))


def _absolute(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The tasks that are not done; another machine starts in another folder."""
    return [{**asdict(t), "folder": str(Path(t.folder).resolve())} for t in tasks if not t.done]


def _logs(tasks: Sequence[Task]) -> str:
    """A fresh folder for datatrove's logs: its own record of what is done must not outlive our results."""
    return str(Path(tasks[0].folder).resolve().parent.parent / "logs" / f"{time.time_ns()}")


def _import(module: str) -> Any:
    try:
        from loguru import logger

        if module == "ray":
            import ray
            from datatrove.executor.ray import RayPipelineExecutor as executor

            del ray
        else:
            from datatrove.executor.slurm import SlurmPipelineExecutor as executor
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "'hadal[data]'"
        raise TaskError(f"--executor {module} needs {error.name}; `pip install {extra}` gives it") from None
    logger.disable("datatrove")  # in this process: our own bar tells how far it is
    return executor


@dataclass(frozen=True)
class Slurm:
    """A job array for each stage; this process waits for it, and tells how far it is."""

    partition: str
    time: str = "24:00:00"
    workers: int = 0  # jobs at a time; 0: no limit
    memory_gb: int = 4

    def __call__(self, tasks: Sequence[Task], tick: Tick) -> None:
        waiting = _absolute(tasks)
        tick(sum(t.size for t in tasks if t.done))
        if not waiting:
            return
        executor = _import("slurm")(
            pipeline=[partial(run_rank, tasks=waiting)], tasks=len(waiting), time=self.time,
            partition=self.partition, workers=self.workers or -1, mem_per_cpu_gb=self.memory_gb, qos=None,
            job_name="hadal-data", logging_dir=_logs(tasks),
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        )  # fmt: skip
        executor.run()
        try:
            self._wait([Task(**t) for t in waiting], tick, executor.job_id, executor.slurm_logs_folder)
        except BaseException:
            with contextlib.suppress(OSError):
                subprocess.run(["scancel", str(executor.job_id)], check=False, capture_output=True)
            raise

    def _wait(self, waiting: list[Task], tick: Tick, job: str, logs: str) -> None:
        """Until all are done; TaskError where the job has ended without."""
        ended_at = 0.0
        while waiting:
            left = [task for task in waiting if not task.done]
            if len(left) < len(waiting):
                tick(sum(task.size for task in waiting) - sum(task.size for task in left))
            waiting = left
            if waiting and not self._runs(job):
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > GRACE_S:
                    raise TaskError(f"Slurm job {job} ended with {len(waiting)} tasks undone; see {logs}")
            if waiting:
                time.sleep(POLL_S)

    @staticmethod
    def _runs(job: str) -> bool:
        """Whether Slurm knows the job as pending or running."""
        said = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True, check=False)
        return said.returncode == 0 and bool(said.stdout.strip())


@dataclass(frozen=True)
class Ray:
    """The cluster that `ray.init()` finds: that of RAY_ADDRESS, else processes of this machine."""

    workers: int = 0  # tasks at a time; 0: no limit
    memory_gb: float = 2

    def __call__(self, tasks: Sequence[Task], tick: Tick) -> None:
        waiting = _absolute(tasks)
        tick(sum(t.size for t in tasks if t.done))
        if not waiting:
            return
        executor = _import("ray")
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": _environment()})
        executor(
            pipeline=[partial(run_rank, tasks=waiting)], tasks=len(waiting), workers=self.workers or -1,
            mem_per_cpu_gb=self.memory_gb, logging_dir=_logs(tasks),
        ).run()  # fmt: skip
        failed = [t["folder"] for t in waiting if not Task(**t).done]
        if failed:
            raise TaskError(
                f"{len(failed)} tasks failed on Ray, the first {failed[0]}; see the logs beside it"
            )
        tick(sum(t["size"] for t in waiting))


def _environment() -> dict[str, str]:
    """A worker finds this package where it is."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": ":".join(p for p in paths if p), "TOKENIZERS_PARALLELISM": "false"}
