"""llama.cpp's programs as peers: started, asked, and read.

`llama-speculative-simple` decodes one prompt with a drafter and says what it kept;
`llama-server` keeps a model in memory and times every answer itself. Both are given by the folder
of their binaries.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECULATIVE, SERVER = "llama-speculative-simple", "llama-server"
DETAILED = ("-lv", "5")  # the log of every round
START_S, ANSWER_S = 120.0, 600.0
# A thread writes the program's log, whose last lines are lost where it ends before that has run:
# more often than not on a busy machine. Greedy answers are the same each time.
ATTEMPTS = 30


@dataclass(frozen=True)
class SpeculativeRun:
    """What `llama-speculative-simple` says of one answer.

    Attributes:
        prompt_tokens: as it tokenized the prompt.
        encode_s: seconds of the prompt.
        tokens: generated, the drafts that it kept behind an end token included.
        decode_s: seconds of the answer.
        drafted: tokens proposed.
        accepted: of these, kept.
        text: of the answer.
        gains: tokens of each round, where the log tells them (`DETAILED`).
    """

    prompt_tokens: int
    encode_s: float
    tokens: int
    decode_s: float
    drafted: int
    accepted: int
    text: str
    gains: tuple[int, ...] = ()

    @property
    def rounds(self) -> int:
        """Each gains the drafts that it keeps and one token more."""
        return self.tokens - self.accepted

    @property
    def accepted_length(self) -> float:
        """Tokens gained per round."""
        return self.tokens / self.rounds if self.rounds else 0.0


def parse_speculative(out: str, log: str, prompt: str) -> SpeculativeRun:
    """Read what the program prints.

    Args:
        out: its standard output: prompt and answer, between empty lines.
        log: its standard error, with the figures.
        prompt: the text that it was given.

    Raises:
        ValueError: the run did not end with its figures; the message holds the last lines.
    """
    encoded = re.search(r"encoded\s+(\d+) tokens in\s+([\d.]+) seconds", log)
    decoded = re.search(r"decoded\s+(\d+) tokens in\s+([\d.]+) seconds", log)
    drafted = re.search(r"n_drafted = (\d+)", log)
    accepted = re.search(r"n_accept  = (\d+)", log)
    if not (encoded and decoded and drafted and accepted):
        last = " / ".join(log.strip().splitlines()[-3:])
        raise ValueError(f"{SPECULATIVE} ended without its figures: {last}")
    _, found, answer = out.rpartition(prompt)
    if not found:
        raise ValueError(f"{SPECULATIVE} did not repeat its prompt: {out[:200]!r}")
    return SpeculativeRun(
        prompt_tokens=int(encoded[1]),
        encode_s=float(encoded[2]),
        tokens=int(decoded[1]),
        decode_s=float(decoded[2]),
        drafted=int(drafted[1]),
        accepted=int(accepted[1]),
        text=answer.rstrip("\n"),
        gains=tuple(int(kept) + 1 for kept in re.findall(r"accepted (\d+)/\d+ draft tokens", log)),
    )


def run_speculative(
    folder: Path, model: Path, draft: Path | None, prompt: str, tokens: int, options: Sequence[str]
) -> SpeculativeRun:
    """One greedy answer.

    Args:
        folder: of the binaries.
        model: the target's GGUF file.
        draft: the drafter's, if any.
        prompt: text, special tokens included.
        tokens: new ones at most.
        options: the drafter's kind, threads, ...

    Raises:
        ValueError: the program failed.
    """
    command = [
        str(folder / SPECULATIVE), "-m", str(model), "-p", prompt, "-n", str(tokens),
        "--temp", "0", "--top-k", "1", *options,
    ]  # fmt: skip
    if draft is not None:
        command += ["-md", str(draft)]
    for last in [False] * (ATTEMPTS - 1) + [True]:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # the detailed log cuts characters in two
            timeout=ANSWER_S,
            check=False,
        )
        if done.returncode:
            why = " / ".join(done.stderr.strip().splitlines()[-2:])
            raise ValueError(f"{SPECULATIVE} ended with status {done.returncode}: {why}")
        try:
            return parse_speculative(done.stdout, done.stderr, prompt)
        except ValueError:
            if last:
                raise
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class Answer:
    """One answer of `llama-server`'s own `/completion`.

    Attributes:
        token_ids: the answer, without the token that ended it.
        generated: tokens drawn, that one included.
        prefill_s, decode_s: seconds of the prompt and of the answer, as the server measured them.
        prompt_tokens: rows of the prompt that it computed.
        drafted, accepted: tokens proposed, and kept; 0 without a drafter.
    """

    token_ids: tuple[int, ...]
    generated: int
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    drafted: int
    accepted: int


def parse_completion(reply: Mapping[str, Any]) -> Answer:
    """Read the JSON of an answer.

    Raises:
        ValueError: it has no timings, as those of an error.
    """
    timings = reply.get("timings")
    if not isinstance(timings, Mapping):
        raise ValueError(f"{SERVER} gave no timings: {json.dumps(reply)[:200]}")
    return Answer(
        token_ids=tuple(reply.get("tokens") or ()),
        generated=timings["predicted_n"],
        prefill_s=timings["prompt_ms"] / 1e3,
        decode_s=timings["predicted_ms"] / 1e3,
        prompt_tokens=timings["prompt_n"],
        drafted=timings.get("draft_n", 0),
        accepted=timings.get("draft_n_accepted", 0),
    )


class Process:
    """A server of anybody's in a process of its own; a context manager that ends it."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port, self._log = port, log
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            self._wait(command[0])
        except BaseException:
            self._end()
            raise

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if get(self.port, "/health") == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        last = self._log.read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{name} does not serve: {' / '.join(last)}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def server_command(
    folder: Path,
    model: Path,
    port: int,
    *,
    threads: int,
    context: int,
    slots: int = 1,
    draft: Sequence[str] = (),
) -> list[str]:
    """The command line of `llama-server`.

    Args:
        folder: of the binaries.
        model: a GGUF file.
        port: where it listens on 127.0.0.1.
        threads: of prompts and answers alike.
        context: tokens of prompt and answer together, of each slot.
        slots: answers at once.
        draft: the options of a drafter, if any.
    """
    return [
        str(folder / SERVER), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
        "-t", str(threads), "-tb", str(threads), "-c", str(context * slots), "-np", str(slots),
        *draft,
    ]  # fmt: skip


def complete(port: int, prompt_ids: Sequence[int], tokens: int) -> Answer:
    """One greedy answer, its prompt computed anew."""
    body = {
        "prompt": list(prompt_ids),
        "n_predict": tokens,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
    }
    return parse_completion(post(port, "/completion", body))


def post(port: int, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON request and its JSON reply."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        reply: dict[str, Any] = json.loads(connection.getresponse().read())
        return reply
    finally:
        connection.close()


def get(port: int, path: str) -> int:
    """The status of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
