"""A worker process: builds its rewards, gives up rights where it is to, and judges what comes in.

Lines of JSON. In: first a configuration, then jobs {"id", "reward", "timeout", "completion"}. Out: {"ready"}
or {"error"}, then {"id", "value", "verdict"} for each job. What a reward prints goes nowhere. A job that
takes longer than its time and GRACE ends the process from a thread of faulthandler's, which needs no
interpreter: so nothing stays behind even when the parent was killed. Without a parent, the input ends, and
so does it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

from hadal.data.strict import RecipeError
from hadal.post.rewards.processes import end_children
from hadal.post.rewards.protocol import Completion, Reward, Score, failure

GRACE = 2.0  # seconds that the parent has to end a late worker, before it ends itself


def main() -> None:
    """Work until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reading, writing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1):  # a reward that prints must not write into the talk with the parent
        os.dup2(nowhere, file)
    config = json.loads(reading.readline())
    try:
        rewards = prepare(config)
    except Exception as error:
        kind = "" if isinstance(error, RecipeError) else f"{type(error).__name__}: "
        send(writing, {"error": f"{kind}{error}"})
        return
    send(writing, {"ready": True})
    os.dup2(nowhere, 2)
    for line in reading:
        job = json.loads(line)
        faulthandler.dump_traceback_later(job["timeout"] + GRACE, exit=True, file=nowhere)
        reward, completion = rewards[job["reward"]], Completion(**job["completion"])
        score = judge(reward, completion, not config["locked"], job["check"])
        faulthandler.cancel_dump_traceback_later()
        send(writing, {"id": job["id"], "value": score.value, "verdict": score.verdict})


def prepare(config: dict[str, Any]) -> Sequence[Reward]:
    """Limits, rewards, lock."""
    from hadal.post.rewards.recipe import make
    from hadal.post.rewards.sandbox.lock import adopt_orphans, lock

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = int(config["memory_mib"]) << 20
    if memory and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if not config["locked"]:
        adopt_orphans()
    rewards = [make(kind, options) for kind, options in config["rewards"]]
    for reward in rewards:
        getattr(reward, "prepare", lambda: None)()
    if config["locked"]:
        lock("read")
    return rewards


def judge(reward: Any, completion: Completion, may_have_children: bool, check: bool = False) -> Score:
    """The reward's score; with `check`, why it cannot read the record. Whatever it raises is a failure; so
    are processes that it leaves behind."""
    me = os.getpid()
    try:
        if check:
            score = Score(0.0, {"why": reward.check_gold(completion.record)})
        else:
            score = reward(completion, {})
        json.dumps([score.value, score.verdict])
    except MemoryError:
        score = failure("ran out of memory")
    except BaseException as error:
        score = failure(f"raised {type(error).__name__}: {str(error)[:300]}")
    if os.getpid() != me:
        os._exit(0)  # a child that the reward forked, and that came back here
    left = end_children() if may_have_children else 0
    return failure(f"left processes behind: {left}") if left else score


def send(file: BinaryIO, message: dict[str, Any]) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()
