"""The web application: routes, guards and errors around one engine service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import dspark
from dspark.engine.model import Model
from dspark.serving.context import Context, Seeds
from dspark.serving.live import routes as live
from dspark.serving.live.engines import PageEngines, offered
from dspark.serving.openai import chat, completions, models, responses, tokenize
from dspark.serving.openai.chat_template import ChatTemplate
from dspark.serving.openai.errors import Reply, add_handlers
from dspark.serving.openai.grammar import Grammars
from dspark.serving.openai.logprobs import TokenTexts
from dspark.serving.ops import health, metrics
from dspark.serving.ops.metrics import Metrics
from dspark.serving.ops.middleware import Middleware
from dspark.serving.service import EngineService
from dspark.serving.settings import Settings

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
        seeds=Seeds(settings.seed),
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
    for routes in (chat, completions, responses, tokenize, models, health, metrics, live):
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
