"""The Ray Serve application: replicas that stream, and the directory that they share.

`self-forcing serve` runs it; `serve deploy` and a RayService name `orchestrator.serving.app:build` and give
the fields of a `ServeConfig`.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import FastAPI
from jsonargparse import ArgumentError, ArgumentParser
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.serving import connection, job_worker, problems, streams, videos
from orchestrator.serving.config import ServeConfig
from orchestrator.serving.directory import Directory
from orchestrator.serving.prompt_encoder import prompt_encoder
from orchestrator.serving.service import Service


@serve.deployment
@serve.ingress()
class StreamServer:
    """One replica."""

    def __init__(self, config: ServeConfig, directory: DeploymentHandle, encoder: DeploymentHandle):
        replica = serve.get_replica_context().replica_id.unique_id
        # Not on the event loop: a model's first chunk asks the encoder, and waits.
        with ThreadPoolExecutor(1) as thread:
            self.service = thread.submit(Service, config, directory, encoder, replica).result()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return api(self.service)

    def check_health(self) -> None:
        """Healthy means that a chunk can be made."""
        self.service.models.check()

    async def census(self) -> dict[str, int]:
        """What viewers hold, for whoever asks by a deployment handle; all but the slots is none when nobody
        is there."""
        return self.service.census()


@dataclass
class WithoutEmptyQueries:
    """Parameters that a typed client leaves empty are as good as not sent."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if query := scope.get("query_string"):
            scope = {**scope, "query_string": urlencode(parse_qsl(query.decode("latin-1"))).encode()}
        await self.app(scope, receive, send)


def api(service: Service) -> FastAPI:
    """The HTTP and WebSocket interface of one replica."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.models.start()
        tasks = [asyncio.create_task(service.report()), asyncio.create_task(job_worker.work(service))]
        if service.config.registered:
            tasks.append(asyncio.create_task(service.models.follow()))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.models.stop()

    app = FastAPI(
        title="self-forcing", summary="Real-time autoregressive video, streamed.", lifespan=lifespan
    )
    problems.install(app)
    if origins := service.config.access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After", "openai-poll-after-ms"],
        )
    app.add_middleware(WithoutEmptyQueries)
    app.include_router(streams.routes(service))
    app.include_router(connection.routes(service))
    app.include_router(videos.routes(service))
    return app


def build(settings: dict[str, Any]) -> serve.Application:
    """The application, from the fields of a `ServeConfig` by name; ValueError for fields that cannot work."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ServeConfig, None)
    try:
        config = parser.instantiate_classes(parser.parse_object(settings))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    return application(ServeConfig(**vars(config)))


def application(config: ServeConfig) -> serve.Application:
    most = config.most_replicas or config.replicas
    return StreamServer.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # A stream is one ongoing request. Whom there is no slot for is told so in words, not queued by Serve.
        max_ongoing_requests=4 * (config.slots + config.queue) + 16,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.replicas,
            initial_replicas=config.replicas,
            max_replicas=most,
            target_ongoing_requests=max(1.0, 0.8 * config.slots),
        ),
        graceful_shutdown_timeout_s=config.drain_s,
    ).bind(
        config,
        Directory.bind(config.videos),  # type: ignore[attr-defined]
        prompt_encoder(config.encoder),
    )
