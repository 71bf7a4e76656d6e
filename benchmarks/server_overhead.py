"""What streaming over HTTP costs: tokens per second of 32 streams through the server and the engine alone.

    python benchmarks/server_overhead.py                          # hadal-mini, this machine
    python benchmarks/server_overhead.py --model qwen-0.5b        # random weights of that shape

Both sides run in one process on the same engine, in turn, `--rounds` times: 32 requests at once, prompt and
output lengths equal, greedy, end of text ignored. The HTTP clients are plain asyncio streams in a process of
their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import threading
import time
from statistics import median
from typing import Any

import torch
from common import machine, save, shapes

from hadal.engine import AsyncEngine, Engine, SamplingParams
from hadal.model import Transformer

PROMPT = "What is 345 + 78?"


def client_process(port: int, jobs: Any, answers: Any) -> None:
    """Runs batches of streamed completions as asked through a pipe; answers the seconds and the tokens."""
    while (job := jobs.recv()) is not None:
        answers.send(asyncio.run(streams(port, *job)))


async def streams(port: int, name: str, clients: int, tokens: int) -> tuple[float, int]:
    body = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "stream": True, "temperature": 0}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    counts = await asyncio.gather(*(one_stream(port, json.dumps(body).encode()) for _ in range(clients)))
    return time.perf_counter() - begin, sum(counts)


async def one_stream(port: int, body: bytes) -> int:
    """Completion tokens that a streamed answer reports at its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    used = 0
    async for line in reader:
        if line.startswith(b"data: {") and b'"usage":{' in line.replace(b" ", b""):
            used = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    return used


def serve(engine: AsyncEngine, port: int) -> None:
    import uvicorn

    from hadal.serve import Settings, create_app

    app = create_app(engine, Settings(port=port))
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", access_log=False)
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"the server did not open port {port}")


async def alone(engine: AsyncEngine, ids: list[int], clients: int, tokens: int) -> tuple[float, int]:
    """The same requests through the engine's own asynchronous interface, not streamed over HTTP."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    begin = time.perf_counter()
    done = await asyncio.gather(*(engine.generate(ids, params) for _ in range(clients)))
    return time.perf_counter() - begin, sum(len(c.token_ids) for c in done)


def build(name: str) -> Engine:
    if name == "hadal-mini":
        return Engine.load("hadal-mini", max_num_seqs=32)
    from hadal.text import TEMPLATES, Tokenizer
    from hadal.weights import hub

    model = Transformer(shapes()[name], dtype=torch.bfloat16).init_weights(0).eval()
    tokenizer = Tokenizer.load(hub.resolve("hadal-mini"))
    return Engine(model, tokenizer, TEMPLATES["plain"], name=name, max_num_seqs=32, max_model_len=512)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="hadal-mini", choices=["hadal-mini", *list(shapes())])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    port = free_port()
    jobs, jobs_end = multiprocessing.Pipe()
    answers_end, answers = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=client_process, args=(port, jobs_end, answers_end), daemon=True
    )
    process.start()
    engine = build(args.model)
    ids = engine.encode(PROMPT)
    runner = AsyncEngine(engine)
    serve(runner, port)
    rates: dict[str, list[float]] = {"engine": [], "server": []}
    for number in range(args.rounds + 1):
        seconds, tokens = asyncio.run(alone(runner, ids, args.clients, args.tokens))
        jobs.send((engine.name, args.clients, args.tokens))
        http_seconds, http_tokens = answers.recv()
        assert tokens == http_tokens == args.clients * args.tokens, (tokens, http_tokens)
        if number:  # the first round warms up
            rates["engine"].append(tokens / seconds)
            rates["server"].append(http_tokens / http_seconds)
    jobs.send(None)
    cost = 1 - median(s / e for s, e in zip(rates["server"], rates["engine"], strict=True))
    direct, streamed = median(rates["engine"]), median(rates["server"])
    print(f"{args.model}: engine {direct:,.0f} tok/s, through the server {streamed:,.0f};")
    print(f"streaming {args.clients} clients costs {cost:.1%}")
    row = [args.model, args.clients, round(direct, 1), round(streamed, 1), f"{cost:.1%}"]
    columns = ["model", "clients", "engine, tok/s", "through the server, tok/s", "cost"]
    result = {"title": f"Server overhead, {args.model}", "columns": columns, "rows": [row], "rates": rates}
    save(f"server_overhead_{args.model}", {"machine": machine("cpu"), **result}, args.out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
