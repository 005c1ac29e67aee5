"""This package's server and `llama-server` under the same closed-loop client, over HTTP.

Each user sends its next prompt when its last answer has ended; all servers see the same prompts as
token ids, greedy, and `max_new_tokens` at most. Servers run one after the other, each in a process
of its own, warmed by one short answer per user.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import say
from benchmarks.llama_cpp import ANSWER_S, Process, free_port, server_command
from benchmarks.peers import LLAMA, OURS, OURS_DRAFT, llama_draft

MODEL = "peer"


@dataclass(frozen=True)
class Heard:
    """One streamed answer: its tokens, and seconds to its first text and to its end."""

    tokens: int
    first_s: float
    end_s: float


def ask(port: int, prompt_ids: Sequence[int], tokens: int) -> Heard:
    """Stream one answer of an OpenAI-compatible server.

    Raises:
        RuntimeError: the server refused, or its stream ended without a count of tokens.
    """
    body = {
        "model": MODEL,
        "prompt": list(prompt_ids),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {reply.read()[:300]!r}")
        first_s, count = None, None
        for line in reply:
            event = read_event(line)
            if event is None:
                continue
            if first_s is None and any(c.get("text") for c in event.get("choices") or ()):
                first_s = time.perf_counter() - started
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
        end_s = time.perf_counter() - started
    finally:
        connection.close()
    if count is None:
        raise RuntimeError("the stream ended without usage")
    return Heard(count, end_s if first_s is None else first_s, end_s)


def read_event(line: bytes) -> dict[str, Any] | None:
    """The JSON of a line of a stream; None for what is none."""
    data = line.strip().removeprefix(b"data:").strip()
    if not line.startswith(b"data:") or data == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    return event


def closed_loop(
    port: int, prompts: Sequence[Sequence[int]], users: int, requests: int, tokens: int
) -> dict[str, float]:
    """So many users with so many requests each; tokens per second of all together.

    Raises:
        RuntimeError: a request failed.
    """
    heard: list[Heard] = []
    faults: list[BaseException] = []

    def user(number: int) -> None:
        try:
            for i in range(requests):
                prompt = prompts[(number * requests + i) % len(prompts)]
                heard.append(ask(port, prompt, tokens))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=user, args=(n,)) for n in range(users)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if faults:
        raise RuntimeError(f"{len(faults)} of {users} users failed: {faults[0]}")
    return {
        "tokens_per_s": sum(h.tokens for h in heard) / seconds,
        "ttft_s": statistics.median(h.first_s for h in heard),
        "answer_s": statistics.median(h.end_s for h in heard),
    }


def compare(
    args: argparse.Namespace, prompts: Sequence[Sequence[int]], draft: str | None
) -> dict[str, dict[str, dict[str, float]]]:
    """By server and number of users."""
    said: dict[str, dict[str, dict[str, float]]] = {}
    slots = max(args.users)
    with tempfile.TemporaryDirectory() as folder:
        for name, command, port in _commands(args, draft, slots):
            say(f"starting {name}")
            with Process(command, port, Path(folder) / f"{port}.log"):
                said[name] = {}
                for users in args.users:
                    closed_loop(port, prompts, users, 1, 4)
                    row = closed_loop(port, prompts, users, args.requests, args.max_new_tokens)
                    said[name][str(users)] = row
                    say(f"{name}, {users} users: {row['tokens_per_s']:.1f} tokens/s")
    return said


def _commands(
    args: argparse.Namespace, draft: str | None, slots: int
) -> list[tuple[str, list[str], int]]:
    found = []
    for name, own in ((OURS, "none"), (OURS_DRAFT, draft)):
        if own is not None:
            port = free_port()
            found.append((name, _ours(args, own, port, slots), port))
    for name, model in args.gguf.items() if args.llama_cpp else ():
        for drafter in ([], *([llama_draft(args)] if args.gguf_draft else [])):
            port = free_port()
            command = server_command(
                args.llama_cpp,
                model,
                port,
                threads=args.threads,
                context=args.max_length,
                slots=slots,
                draft=[*drafter, "--no-cache-prompt"],
            )
            found.append((f"{LLAMA} {name}{' draft' if drafter else ''}", command, port))
    return found


def _ours(args: argparse.Namespace, draft: str, port: int, slots: int) -> list[str]:
    own = {
        "--draft": draft,
        "--port": port,
        "--served-model-name": MODEL,
        "--threads": args.threads,
        "--dtype": args.dtype or "auto",
        "--max-requests": slots,
        "--max-model-len": args.max_length,
        "--log-level": "error",
        "--weights": args.weights,
        "--quantize": args.quantize,
    }
    words = [str(w) for key, value in own.items() if value is not None for w in (key, value)]
    return [sys.executable, "-m", "dspark", "serve", args.model, "--offline", *words]
