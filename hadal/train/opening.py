"""A run's folder: kept from other processes, never overwritten unasked, and taken up where it was left.

with opened(folder, resolved, resume, changed, make, console) as run:
    run.go()
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from hadal.train import state
from hadal.train.recipe import RecipeError

Changed = Callable[[Mapping[str, Any], int], list[str]]  # (saved recipe, step) -> keys that have changed


class Resumable(Protocol):
    """What is opened: it can go on from a checkpoint, and holds files and threads until it is closed."""

    def restore(self, checkpoint: state.Checkpoint) -> None: ...
    def close(self) -> None: ...


R = TypeVar("R", bound=Resumable)


def folder_of(out: Path | str | None, name: str) -> Path:
    """Where a run lies: in `out`, or in runs/NAME."""
    return Path(out) if out is not None else Path("runs") / name


@contextmanager
def opened(
    folder: Path,
    resolved: Mapping[str, Any],
    resume: bool,
    changed: Changed,
    make: Callable[[], R],
    console: Console,
) -> Iterator[R]:
    """The run that `make` builds, in its folder, where it is to begin or to go on; closed at the end. See
    `open_folder` for the other arguments. Raises RecipeError, CheckpointError."""
    with held(folder):
        checkpoint = open_folder(folder, resolved, resume, changed)
        if resume and checkpoint is None:
            say(console, f"{folder} holds no checkpoint: the run begins anew")
        run = make()
        try:
            if checkpoint is not None:
                run.restore(checkpoint)
            yield run
        finally:
            run.close()


def say(console: Console, text: str) -> None:
    """A line, as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder, made and kept from other processes. Raises RecipeError if one of them works in it."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; --out takes the folder of the run")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"another process works in {folder}; wait for its end, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def open_folder(
    folder: Path,
    resolved: Mapping[str, Any],
    resume: bool,
    changed: Changed,
) -> state.Checkpoint | None:
    """Check a run's folder, which is held; the checkpoint to go on from, if any. `resolved`: the recipe, to
    be saved; `changed(saved, step)`: keys that a run at `step` depends on and that differ from the saved.
    """
    saved = folder / "recipe.json"
    checkpoint = state.latest(folder / "checkpoints")
    if checkpoint is not None and not resume:
        raise RecipeError(
            f"{folder} holds a run at step {checkpoint.step}; go on with --resume, or choose another --out"
        )
    if resume and checkpoint is not None:
        differ = changed(json.loads(saved.read_text(encoding="utf-8")), checkpoint.step)
        if differ:
            raise RecipeError(
                f"the recipe differs from that of the run in {folder} in {', '.join(differ)}; resume "
                "with the same recipe and --set, or start anew with another --out"
            )
    temporary = folder / ".recipe.json.tmp"
    temporary.write_text(json.dumps(resolved, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, saved)
    return checkpoint
