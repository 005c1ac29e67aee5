"""The bundled pair behind a real server in a thread, and what its tests ask of it."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import dspark
from dspark.engine.model import Model
from dspark.request import Request, SamplingParams
from dspark.serving.context import Settings
from dspark.serving.server import Server, bind
from dspark.serving.service import EngineService

PROMPTS = (
    "What does the command `tar` do?",
    "Hi, I want to book a table for two.",
    "Tom has 3 apples and buys 4 more. How many has he?",
)


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].endswith(".")
        return error


@dataclass
class Live:
    """A server that runs."""

    server: Server
    thread: threading.Thread
    port: int

    @property
    def service(self) -> EngineService:
        return self.server.service

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own; a dict goes as JSON."""
        given = {"content-type": "application/json", **(headers or {})}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, data, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", path, body, named)

    def chat(self, **fields: Any) -> Reply:
        return self.post("/v1/chat/completions", {"messages": user(PROMPTS[0]), **fields})

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0
        )

    def figures(self) -> dict[tuple[str, ...], float]:
        """What `/metrics` says, by name and labels (in the order of theirs, less the model)."""
        text = self.ask("GET", "/metrics").body.decode()
        return {
            (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "model_name")): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def wait_until(self, holds: Any, seconds: float = 20.0) -> None:
        """Wait for something to become true of the engine's snapshot."""
        until = time.monotonic() + seconds
        while not holds(self.service.snapshot()):
            assert time.monotonic() < until, self.service.snapshot()
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def start(engine: Any, settings: Settings, drafters: dict[str, Model] | None, port: int) -> Live:
    server = Server(EngineService(engine), settings, drafters)
    address = bind("127.0.0.1", port)
    port = address.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([address],), daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    return Live(server, thread, port)


@contextlib.contextmanager
def running(
    model: Model,
    settings: Settings | None = None,
    drafters: dict[str, Model] | None = None,
    port: int = 0,
    **options: Any,
) -> Iterator[Live]:
    """A server of its own; what its rounds do hangs on no clock."""
    options = {
        "max_requests": 4,
        "max_length": 256,
        "max_queue": 16,
        "schedule": "fixed",
        **options,
    }
    settings = settings or Settings("bundled", drain_s=5.0)
    live = start(model.open_engine(**options), settings, drafters, port)
    try:
        yield live
    finally:
        live.stop()


@pytest.fixture(scope="session")
def model() -> Model:
    return dspark.load("bundled", dtype="float32")


@pytest.fixture(scope="session")
def live(model: Model) -> Iterator[Live]:
    """A server that tests share; each leaves it idle."""
    with running(model) as started:
        yield started


@pytest.fixture
def offline(model: Model) -> Any:
    """The output of a prompt without any server."""

    def decode(text: str, *, raw: bool = False, **params: Any) -> Any:
        given = SamplingParams(**params)
        request = Request(model.encode(text, raw=raw), given, reproducible="seed" in params)
        return model.engine([request], schedule="fixed").run([request])

    return decode


@pytest.fixture(scope="session")
def kit() -> Any:
    """What tests build servers of their own from."""

    class Kit:
        prompts = PROMPTS
        messages = staticmethod(user)
        serve = staticmethod(running)

        @staticmethod
        def run(work: Any, seconds: float = 60.0) -> Any:
            """A coroutine on a loop of its own, within a time."""
            return asyncio.run(asyncio.wait_for(work, seconds))

    return Kit
