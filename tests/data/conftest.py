"""A small tokenizer, and the chat templates of real families, as minimal equivalents."""

import contextlib
import copy
import json
import resource
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from dspark.data.templates import train_tokenizer

TEXTS = [
    "The cat sat on the mat, 12 times. ",
    "def f(x): return x + 1\n\n",
    "Grüße, naïve café! 你好 ",
    "assistant\n\nuser\n\nmodel\n",
]
# How Qwen's and Llama 3's tokenizers part a text: line ends stay together, whatever follows.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|User|>",
    "<|Assistant|>",
    "<|end|>",
)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 400)


@pytest.fixture(scope="session")
def family(tokenizer):
    """A tokenizer with a family's chat template and marks, by the template's name."""
    known = {}

    def of(name):
        if name not in known:
            found = copy.deepcopy(tokenizer)
            found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            found.add_tokens(list(MARKS), special_tokens=False)
            template = Path(__file__).parent / "templates" / f"{name}.jinja"
            found.chat_template = template.read_text(encoding="utf-8").rstrip("\n")
            known[name] = found
        return known[name]

    return of


class FakeServer:
    """An OpenAI-like server in a thread: what it answers is up to `respond`.

    `respond(body, count)` gives a reply's text, a whole JSON object, an int as the status of an
    error, bytes to send as they are, or None to hang up.
    """

    def __init__(self, respond, models=("fake",)):
        self.respond, self.models = respond, models
        self.bodies, self.keys = [], []
        lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_GET(self):
                self.reply({"data": [{"id": name} for name in fake.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.bodies.append(body)
                    fake.keys.append(self.headers["Authorization"])
                    count = len(fake.bodies)
                given = fake.respond(body, count)
                if given is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif isinstance(given, int):
                    self.reply({"error": {"message": f"sorry, {given}"}}, given)
                elif isinstance(given, str):
                    message = {"role": "assistant", "content": given}
                    choice = {"message": message, "finish_reason": "stop"}
                    self.reply({"choices": [choice], "usage": {"completion_tokens": 2}})
                else:
                    self.reply(given)

            def reply(self, content, status=200):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that went away is what some tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake_server(monkeypatch):
    """Start a `FakeServer`."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(respond, **options):
        started.append(FakeServer(respond, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@contextlib.contextmanager
def small_disk(size):
    """Lets files grow to so many bytes and no further, as a full disk would; no longer than needed.

    The limit holds for the whole process, the file that a test run's own output may go to included.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(name="small_disk")
def _small_disk():
    return small_disk
