"""The HTTP application: OpenAI's paths and Graft's own under `/v1`, health, readiness and metrics.

Knows which path is whose; what a path does is its module's.
"""

import asyncio
from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from graft.domain.errors import GraftError
from graft.gateway.auth import Authenticator
from graft.gateway.core import Core
from graft.gateway.http import (
    adapters,
    base_models,
    datasets,
    deployments,
    evaluations,
    files,
    fine_tuning,
    generation,
    models,
    tasks,
)
from graft.gateway.http.edge import Edge
from graft.gateway.http.errors import on_http_exception
from graft.gateway.http.requests import core_of

READY_TIMEOUT_SECONDS = 2.0
"""Probes give up after a second or a few; an engine that is up answers in milliseconds."""


def build_app(core: Core, authenticator: Authenticator) -> Starlette:
    """The ASGI application over `core`."""
    app = Starlette(
        routes=[
            Route("/healthz", _healthz),
            Route("/readyz", _readyz),
            Route("/metrics", _metrics),
            Route("/v1/models", models.list_models),
            Route("/v1/models/{model:path}", models.retrieve_model),
            Route("/v1/chat/completions", generation.chat_completions, methods=["POST"]),
            Route("/v1/completions", generation.completions, methods=["POST"]),
            _route("/v1/files", GET=files.list_files, POST=files.create_file),
            _route("/v1/files/{file_id}", GET=files.retrieve_file, DELETE=files.delete_file),
            Route("/v1/files/{file_id}/content", files.file_content),
            Route("/v1/files/{file_id}/validate", datasets.validate_file, methods=["POST"]),
            _route("/v1/fine_tuning/jobs", GET=fine_tuning.list_jobs, POST=fine_tuning.create_job),
            Route("/v1/fine_tuning/jobs/{job_id}", fine_tuning.retrieve_job),
            Route("/v1/fine_tuning/jobs/{job_id}/cancel", fine_tuning.cancel_job, methods=["POST"]),
            Route("/v1/fine_tuning/jobs/{job_id}/events", fine_tuning.list_events),
            Route("/v1/fine_tuning/jobs/{job_id}/checkpoints", fine_tuning.list_checkpoints),
            _route("/v1/evaluations", GET=evaluations.list_evaluations, POST=evaluations.create_evaluation),
            Route("/v1/evaluations/{evaluation_id}", evaluations.retrieve_evaluation),
            Route("/v1/evaluations/{evaluation_id}/cancel", evaluations.cancel_evaluation, methods=["POST"]),
            Route("/v1/evaluations/{evaluation_id}/report", evaluations.evaluation_report),
            Route("/v1/tasks", tasks.list_tasks),
            Route("/v1/tasks/{task}", tasks.retrieve_task),
            Route("/v1/base_models", base_models.list_base_models),
            Route("/v1/base_models/{base_model}", base_models.retrieve_base_model),
            _route("/v1/deployments", GET=deployments.list_deployments, POST=deployments.create_deployment),
            _route(
                "/v1/deployments/{deployment_id}",
                GET=deployments.retrieve_deployment,
                DELETE=deployments.delete_deployment,
            ),
            Route("/v1/adapters", adapters.list_adapters),
            Route("/v1/adapters/{model}", adapters.retrieve_adapter),
            Route("/v1/adapters/{model}/aliases/{alias}", adapters.set_alias, methods=["PUT"]),
            Route("/v1/adapters/{model}/versions", adapters.list_versions),
            Route("/v1/adapters/{model}/versions/{version}", adapters.retrieve_version),
            Route("/v1/adapters/{model}/versions/{version}/load", adapters.load_version, methods=["POST"]),
            Route("/v1/adapters/{model}/versions/{version}/unload", adapters.unload_version, methods=["POST"]),
            Route("/v1/residency", adapters.residency),
        ],
        middleware=[Middleware(Edge, authenticator=authenticator)],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.state.core = core
    return app


def _route(path: str, **endpoints: Callable[[Request], Awaitable[Response]]) -> Route:
    """One route for several methods, so that a method that is missing is told which there are."""

    async def endpoint(request: Request) -> Response:
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, endpoint, methods=list(endpoints))


async def _healthz(_request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def _readyz(request: Request) -> Response:
    """200 when the store answers and a replica of the engine is ready; else 503 that says which is not."""
    core = core_of(request)
    store, engine = await asyncio.gather(_store(core), _engine(core))
    ready = store == engine == "ready"
    headers = {} if ready else {"retry-after": "2"}
    return JSONResponse({"ready": ready, "store": store, "engine": engine}, 200 if ready else 503, headers)


async def _store(core: Core) -> str:
    try:
        await core.store.ping()
    except GraftError as error:
        return error.message
    return "ready"


async def _engine(core: Core) -> str:
    try:
        residency = await core.engine.residency(timeout_seconds=READY_TIMEOUT_SECONDS)
    except GraftError as error:
        return error.message
    return "ready" if any(replica.ready for replica in residency.replicas) else "No replica is ready yet."


async def _metrics(_request: Request) -> Response:
    """Prometheus metrics of this process."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
