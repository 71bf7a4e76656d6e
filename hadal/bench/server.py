"""A server of our own for the load: in a process apart, on loopback, on a free port, gone with its parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hadal.config import ModelConfig
from hadal.plan.speed import StepWork


class StartError(RuntimeError):
    """The server did not come up; one line with cause and remedy."""


@dataclass(frozen=True)
class Wanted:
    """What to serve: a name or folder; or, with `config`, random weights of that shape. `options`: the
    engine's, device and dtype among them."""

    model: str
    config: ModelConfig | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """A server that answers."""

    pid: int
    url: str
    name: str
    device: str
    dtype: str
    quantize: str | None
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    work: StepWork


@contextlib.contextmanager
def own_server(wanted: Wanted) -> Iterator[Started]:
    """Serve for the length of the context. StartError when the model cannot be loaded."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(wanted, theirs), name="hadal-bench-server", daemon=True
    )
    _start_deaf(process)
    theirs.close()
    try:
        try:
            reply = ours.recv()
        except EOFError:
            process.join(5)
            raise StartError(f"the server's process ended with status {process.exitcode}") from None
        if "fault" in reply:
            raise StartError(reply["fault"])
        work = StepWork(**reply.pop("work"))
        yield Started(work=work, **reply)
    finally:
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _start_deaf(process: Any) -> None:
    """Start with Ctrl-C held back, until the child has left the terminal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(wanted: Wanted, parent: Connection) -> None:
    """The child's life, in a session of its own: Ctrl-C on the terminal is for the parent to understand."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        _run(wanted, parent)
    except Exception as fault:
        parent.send({"fault": " ".join(f"{fault}".split()) or type(fault).__name__})


def _leave_with(parent: Connection) -> None:
    """Nothing is ever sent this way: an end of file means that the parent is gone."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def _run(wanted: Wanted, parent: Connection) -> None:
    from hadal.bench.work import packed_kind, step_work
    from hadal.engine import AsyncEngine, Engine
    from hadal.serve import Settings, create_app
    from hadal.serve.run import base_url, listen, server_for

    if wanted.config is None:
        engine = Engine.load(wanted.model, **wanted.options)
    else:
        from hadal.bench.models import random_engine
        from hadal.text.templates import TEMPLATES
        from hadal.text.tokenizer import Tokenizer
        from hadal.weights import hub

        tokenizer = Tokenizer.load(hub.resolve("hadal-mini"))  # a server writes text; any tokenizer will do
        engine = random_engine(
            wanted.config,
            name=f"{Path(wanted.model).name}-random",
            tokenizer=tokenizer,
            template=TEMPLATES["plain"],
            **wanted.options,
        )
    settings = Settings(port=0, max_queue=100_000, drain_timeout=2.0)
    sock = listen(settings.host, settings.port)
    backend = AsyncEngine(engine, max_queue=settings.max_queue)
    server = server_for(create_app(backend, settings))
    parent.send(
        {
            "pid": os.getpid(),
            "url": base_url(settings, sock),
            "name": engine.name,
            "device": str(engine.device),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "quantize": packed_kind(engine.model),
            "vocab_size": engine.vocab_size,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.max_num_seqs,
            "work": asdict(step_work(engine)),
        }
    )
    try:
        server.run(sockets=[sock])
    finally:
        backend.shutdown(drain=False)
