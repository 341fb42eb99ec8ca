"""Base models that are served beside the first: wishes for them, and how far they are.

The wish is a row that the orchestrator carries out. Knows the read model and the engines' residency, never Ray.
"""

import asyncio
from collections.abc import Collection
from datetime import UTC, datetime

from graft.domain.deployments import Deployment, DeploymentState, default_deployment_id, full_model_source
from graft.domain.errors import AlreadyExists, FailedPrecondition, FieldViolation, GraftError, InvalidArgument, NotFound
from graft.domain.jobs import ServedAs
from graft.domain.names import check_id, parse_model
from graft.gateway.checks import check_page_size
from graft.internal.engine_client import EngineClient
from graft.internal.v1 import engine_pb2
from graft.settings import Settings
from graft.store.protocol import Page, Store


class Deployments:
    """Every operation of the public API on them."""

    def __init__(self, store: Store, engine: EngineClient, settings: Settings) -> None:
        self._store = store
        self._engine = engine
        self._first = settings.serving.base_model

    async def deploy(self, project: str, model: str, deployment_id: str = "") -> Deployment:
        """Asks for `model`: a base model of the catalogue, or a full model's version. Returns what there is already.

        Raises NotFound naming what exists, AlreadyExists when the id means another model, InvalidArgument for an id
        that cannot be one, FailedPrecondition for the stack's first base model, which is always served.
        """
        check_id(project, "project")
        name = parse_model(model)
        if name.adapter is None:
            base, source = name.base, name.base
            await self._store.get_base_model(base, project)
            if deployment_id not in ("", base):
                told = f"a base model is served under its own id, {base!r}; leave it out"
                raise InvalidArgument(
                    f"deployment_id: {told}",
                    reason="INVALID_DEPLOYMENT_ID",
                    violations=(FieldViolation("deployment_id", told),),
                )
        else:
            version = await self._store.resolve_version(
                project, name.base, name.adapter, version=name.version, alias=name.alias
            )
            if version.served_as is ServedAs.ADAPTER:
                raise FailedPrecondition(
                    f"{version.model} is an adapter: it is served beside its base, {version.base_model}, and needs no "
                    "deployment of its own.",
                    reason="NO_FULL_MODEL",
                    metadata={"model": version.model},
                )
            base = deployment_id or default_deployment_id(version.base_model, version.adapter, version.version)
            source = version.model
            check_id(base, "deployment_id")
            await self._check_free(base, full_model_source(project, version.model))
        if base == self._first:
            raise FailedPrecondition(
                f"{base!r} is the stack's own base model (GRAFT_SERVING_BASE_MODEL) and always served.",
                reason="BASE_MODEL_SERVED",
                metadata={"base_model": base},
            )
        return await self._store.create_deployment(Deployment(base, project, source, datetime.now(UTC)))

    async def undeploy(self, project: str, base: str) -> Deployment:
        """Asks for its end. Raises NotFound, or FailedPrecondition for the stack's first base model."""
        if base == self._first:
            raise FailedPrecondition(
                f"{base!r} is the stack's own base model. Set GRAFT_SERVING_BASE_MODEL and restart the stack to serve "
                "another one in its place.",
                reason="BASE_MODEL_IS_FIRST",
                metadata={"base_model": base},
            )
        return await self._store.request_undeploy(project, base)

    async def get(self, project: str, base: str) -> Deployment:
        """Raises NotFound naming it and what exists."""
        return await self._store.get_deployment(project, base)

    async def page(self, project: str, page_size: int = 0, page_token: str = "") -> Page[Deployment]:
        """In order of id; 50 when `page_size` is 0, 1000 at most."""
        return await self._store.list_deployments(project, check_page_size(page_size), page_token)

    async def served(self) -> Collection[str]:
        """Ids of the base models that requests are answered for."""
        return {self._first, *await self._ready()}

    async def residency(self, project: str) -> list[engine_pb2.Replica]:
        """Replicas of the deployments that are ready, as far as the project sees their base models.

        One that does not answer is told as not ready, without an id.
        """
        visible = {model.id for model in await self._store.list_base_models(project)}
        bases = [base for base in await self._ready() if base in visible]
        answers = await asyncio.gather(*map(self._residency_of, bases))
        return [replica for replicas in answers for replica in replicas]

    async def _residency_of(self, base: str) -> list[engine_pb2.Replica]:
        try:
            return list((await self._engine.of(base).residency()).replicas)
        except GraftError:
            return [engine_pb2.Replica(base_model=base)]

    async def _ready(self) -> list[str]:
        every = await self._store.every_deployment()
        return [deployment.base_model for deployment in every if deployment.state is DeploymentState.READY]

    async def _check_free(self, base: str, source: str) -> None:
        """A full model must not take the id of another base model. Its own it has from an earlier deployment."""
        try:
            found = await self._store.get_base_model(base)
        except NotFound:
            return
        if found.source != source:
            raise AlreadyExists(
                f"The catalogue has another base model {base!r}. Give this one another name.",
                reason="BASE_MODEL_EXISTS",
                metadata={"name": base},
            )
