"""Rewards that raise, hang, fork or die score 0, are counted and named; the run goes on; nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hadal.post.rewards import RewardError, Rewards, processes, read
from tests.post.helpers import alive, children, gone_within, said

ROOT = Path(__file__).resolve().parents[2]
BAD = {  # function: what is told of it
    "raises": "raised ValueError: no such luck",
    "leaves": "raised SystemExit: 0",
    "hangs": "took too long",
    "hangs_in_c": "took too long",
    "dies": "ended (status 3)",
    "crashes": "died (SIGSEGV)",
    "eats_memory": "ran out of memory",
    "forks": "left processes behind: 1",
    "gives_nan": "gave what is not in [0, 1]: nan",
    "gives_too_much": "gave what is not in [0, 1]: 2.0",
    "gives_text": "gave what is not in [0, 1]: 'one'",
    "gives_a_flood": "was stopped",
}
FINE = ("length", "asks_a_program")


def table(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "custom", "name": name, "function": f"tests.post.bad_rewards:{name}", "tasks": [name],
            "timeout": 0.7, **more}  # fmt: skip


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    tables = [table(name) for name in (*BAD, *FINE, "forks_away", "tells_the_environment")]
    before = children()
    with Rewards(read(tables), workers=2, memory_mib=2048) as made:
        yield made
    assert set(children()) <= set(before)


def test_bad_rewards_score_0_among_good_ones(rewards: Rewards) -> None:
    tasks = [name for bad in BAD for name in (bad, *FINE)]
    totals = rewards.score([said("x", tokens=5, task=task) for task in tasks])
    for task, total in zip(tasks, totals, strict=True):
        if task in BAD:
            assert (total.value, total.parts[task].failed) == (0.0, BAD[task]), task
        else:
            assert total.value == (0.5 if task == "length" else 1.0), total
    counted = {f"{name}: {cause.partition(':')[0]}": 1 for name, cause in BAD.items()}
    assert dict(rewards.failures) == counted
    assert rewards.restarts == 5  # hangs, hangs_in_c, dies, crashes, gives_a_flood
    assert totals[1].as_json()["parts"]["length"] == {"value": 0.5, "tokens": 5}


def test_a_grandchild_in_another_session_is_killed(rewards: Rewards, tmp_path: Path) -> None:
    total = rewards.score([said("x", task="forks_away", folder=str(tmp_path))])[0]
    assert total.value == 0 and total.parts["forks_away"].failed.startswith("left processes behind")
    assert list(tmp_path.glob("*.pid")) and gone_within(tmp_path, 5)


def test_workers_see_no_secret(rewards: Rewards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAL_API_KEY", "sk-secret")
    told = rewards.score([said("x", task="tells_the_environment")])[0].parts["tells_the_environment"].verdict
    assert "PATH" in told and "secret" not in str(told)
    tables = [table("tells_the_environment", tasks=[])]
    with Rewards(read(tables), workers=1, environment=["HADAL_API_KEY"]) as mine:
        verdict = mine.score([said("x")])[0].parts["tells_the_environment"].verdict
    assert verdict["HADAL_API_KEY"] == "sk-secret"


def test_a_large_batch_keeps_its_order(rewards: Rewards) -> None:
    totals = rewards.score([said("y" * 50_000, tokens=n % 11, task="length") for n in range(200)])
    assert [total.value for total in totals] == [n % 11 / 10 for n in range(200)]


def test_a_worker_that_cannot_start_is_told_at_once() -> None:
    before = children()
    wrong = {"kind": "custom", "function": "tests.post.bad_rewards:nothing_here"}
    with pytest.raises(RewardError, match=r"cannot start: function 'tests\.post\.bad_rewards:nothing_here'"):
        Rewards(read([wrong]), workers=2)
    assert set(children()) <= set(before)


def test_workers_that_stop_starting_do_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before, tables = children(), [table("dies"), table("length")]
    with Rewards(read(tables), workers=1) as mine:
        monkeypatch.setattr(sys, "executable", "/bin/false")  # of those that come after
        totals = mine.score([said("x", tokens=1, task="dies")] + [said("x", tokens=1, task="length")] * 3)
        assert [total.parts["length"].failed for total in totals[1:]] == ["no worker could start: "
                                                                          "ended (status 1)"] * 3  # fmt: skip
        monkeypatch.undo()
        assert mine.score([said("x", tokens=10, task="length")])[0].value == 1.0  # and comes back
    assert set(children()) <= set(before)


def test_a_closed_pool_says_so() -> None:
    before = children()
    rewards = Rewards(read([table("length")]), workers=1)
    rewards.close()
    with pytest.raises(RewardError, match="the pool is closed"):
        rewards.score([said("x", task="length")])
    assert set(children()) <= set(before)


def test_a_process_is_killed_even_if_its_family_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has been stopped before: left so, it would stay for ever."""

    def interrupted(pid: int) -> list[int]:
        raise KeyboardInterrupt

    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    monkeypatch.setattr(processes, "descendants", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.end(process)
    assert process.returncode == -signal.SIGKILL


TRAINER = """
import sys
from hadal.post.rewards import Completion, Rewards, read
table = {"kind": "custom", "function": "tests.post.bad_rewards:hangs", "timeout": float(sys.argv[2])}
with Rewards(read([table]), workers=2) as rewards:
    rewards.score([Completion({"folder": sys.argv[1]}, "x", 1)] * 2)
"""


@pytest.mark.parametrize(("blow", "timeout"), [(signal.SIGINT, 60.0), (signal.SIGKILL, 0.3)])
def test_nothing_stays_behind(blow: signal.Signals, timeout: float, tmp_path: Path) -> None:
    """Ctrl-C ends the workers at once; when the trainer is killed they end themselves, at the job's limit."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path), str(timeout)], cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        limit = time.monotonic() + 60
        while len(alive(tmp_path)) < 2 and trainer.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        workers = [psutil.Process(pid) for pid in alive(tmp_path)]
        assert len(workers) == 2 and all(os.getsid(w.pid) == w.pid for w in workers)
        trainer.send_signal(blow)
        trainer.communicate(timeout=20)
        assert trainer.returncode != 0
        assert gone_within(tmp_path, 15)
    finally:
        trainer.kill()
        trainer.wait()
