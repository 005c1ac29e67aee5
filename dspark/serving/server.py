"""The web application and its server on uvicorn.

Routes and middleware around one engine service; errors in the API's shape, down to what is no HTTP;
a stop that loses no stream.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import dspark
from dspark.engine.model import Model
from dspark.errors import UsageError
from dspark.serving import metrics
from dspark.serving.context import Context, Settings, seeds
from dspark.serving.live import routes as live
from dspark.serving.live.engines import PageEngines, offered
from dspark.serving.metrics import Metrics
from dspark.serving.middleware import Middleware
from dspark.serving.openai import chat, completions, models, responses
from dspark.serving.openai.chat_template import ChatTemplate
from dspark.serving.openai.errors import Reply, add_handlers, error_body
from dspark.serving.openai.grammar import Grammars
from dspark.serving.openai.output_parser import TokenTexts
from dspark.serving.service import EngineService

SUMMARY = "OpenAI-compatible server with speculative decoding that changes no output."


def create_app(
    service: EngineService, settings: Settings, drafters: Mapping[str, Model] | None = None
) -> FastAPI:
    """The application; it starts the service with itself, and stops it.

    Args:
        service: not yet started.
        settings: how the server behaves.
        drafters: what the live page offers, by name, the server's own first; by default that and
            prompt lookup.
    """
    target = service.engine.target
    engines = PageEngines(service, offered(service.engine) if drafters is None else drafters)
    context = Context(
        service=service,
        settings=settings,
        metrics=Metrics(service, engines, settings.model_name),
        template=ChatTemplate.of(target.tokenizer, target.name),
        tokens=TokenTexts(target.tokenizer),
        grammars=Grammars(target),
        seeds=seeds(settings.seed),
        engines=engines,
        created_s=int(time.time()),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await context.engines.close()
        await service.stop(settings.drain_s)
        context.prompt_thread.shutdown(wait=False)

    app = FastAPI(
        title="dspark",
        version=dspark.__version__,
        summary=SUMMARY,
        lifespan=lifespan,
        default_response_class=Reply,
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    for routes in (chat, completions, responses, models, metrics, live):
        app.include_router(routes.router)
    add_handlers(app)
    app.add_middleware(Middleware, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "warning", "retry-after"],
        )
    return app


MOST_HEADER_BYTES = 32 << 10
_GRACE_S = 5
_SWITCH_S = 5e-4


class JsonProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose refusal of what is no HTTP, or has too large a head, is JSON too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = self._unread_bytes = 0

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._unread_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._in_head = False
        super().on_headers_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MOST_HEADER_BYTES:
            raise ValueError("too large a head")  # the parser makes a refusal of it

    def data_received(self, data: bytes) -> None:
        """Read on; a header that does not end is refused too."""
        began = self._in_head
        super().data_received(data)
        if began and self._in_head and not self.transport.is_closing():
            self._unread_bytes += len(data)
            if self._unread_bytes > MOST_HEADER_BYTES:
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Refuse what came, and close the connection."""
        del msg
        sentence = (
            f"The request is no valid HTTP, or has headers of over {MOST_HEADER_BYTES} bytes."
        )
        body = json.dumps(error_body(400, sentence, code="invalid_http")).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """A server that lets its streams end before it closes their connections.

    Args:
        service: what it serves; the application stops it too, by when it has stopped.
        settings: how the server behaves.
        drafters: what the live page offers, as `create_app`.
    """

    def __init__(
        self,
        service: EngineService,
        settings: Settings,
        drafters: Mapping[str, Model] | None = None,
    ) -> None:
        self.service = service
        self.settings = settings
        self.app: FastAPI = create_app(service, settings, drafters)
        super().__init__(
            uvicorn.Config(
                self.app,
                http=JsonProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_S,
                timeout_keep_alive=30,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal, and at a second one at once; the process then ends by itself."""
        del sig, frame
        self.force_exit = self.should_exit
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes."""
        with _two_busy_threads():
            await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, let answers end or end them, then close the connections."""
        await self.app.state.context.engines.close()
        stopping = asyncio.ensure_future(self.service.stop(self.settings.drain_s))
        while not stopping.done():
            await asyncio.wait((stopping,), timeout=0.1)
            if self.force_exit:
                await self.service.stop(0.0)
        await super().shutdown(sockets)


@contextmanager
def _two_busy_threads() -> Iterator[None]:
    """Suit the interpreter to an engine and an event loop, for as long as this lasts.

    The engine's thread, which lets go of the interpreter's lock in every operator, gets it back
    from the loop after half a millisecond at the latest, in place of five; and what is loaded by
    now is not searched for garbage again.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; it takes connections once a server runs on it.

    Args:
        host: an IPv4 or IPv6 address, or a name.
        port: 0 takes any that is free.

    Raises:
        UsageError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UsageError(
            f"The server cannot listen on {host}, port {port}: {error.strerror or error}; choose "
            "others with --host and --port."
        ) from error
    return found


def read_keys(words: Sequence[str], path: str | None) -> tuple[str, ...]:
    """API keys from the command line and from a file, one a line; # begins a comment.

    Raises:
        UsageError: the file cannot be read, or holds no key.
    """
    keys = list(words)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The key file {path} cannot be read: {error}.") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UsageError(f"The key file {path} holds no key; write one a line.")
        keys += found
    return tuple(keys)
