"""From a `model` string to what the engine is asked for. Knows the read model, never MLflow."""

from dataclasses import dataclass

from graft.domain.deployments import DeploymentState
from graft.domain.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from graft.domain.jobs import ServedAs
from graft.domain.names import parse_model, registered_model
from graft.domain.resources import AdapterVersion
from graft.internal.v1 import engine_pb2
from graft.store.protocol import Store

STARTING_RETRY_SECONDS = 5.0
"""An engine takes from ten seconds to a minute to start."""


@dataclass(frozen=True)
class Resolution:
    """What a `model` means now. `adapter` is None for the base model."""

    public_model: str
    """What the answer's `model` says: `base`, or `base:adapter@version`."""
    base: str
    """The base model whose engine answers."""
    adapter: engine_pb2.AdapterRef | None
    task_definition: str = ""
    """Of the task that the version was trained with, for named inputs; empty without one."""


def adapter_ref(version: AdapterVersion) -> engine_pb2.AdapterRef:
    """The engine's name for a version: immutable, so that no cache can serve stale weights."""
    return engine_pb2.AdapterRef(
        model=version.model,
        registered_model=registered_model(version.project, version.base_model, version.adapter),
        version=version.version,
        digest=version.digest,
    )


async def check_served(store: Store, base: str, first: str) -> None:
    """Raises FailedPrecondition unless an engine carries `base`: the stack's `first` one, or a deployment that is
    ready; Unavailable while one starts.

    Without it a request for another base of the catalogue would be answered by the wrong weights.
    """
    if base == first:
        return
    deployment = await store.find_deployment(base)
    if deployment is None or deployment.state is DeploymentState.STOPPING:
        raise FailedPrecondition(
            f"Base model {base!r} is not being served. Run `graft models deploy {base}` to serve it beside {first!r}.",
            reason="BASE_MODEL_NOT_SERVED",
            metadata={"base_model": base, "served": first},
        )
    if deployment.state is DeploymentState.FAILED:
        why = deployment.error.message if deployment.error else "its engine did not start."
        raise FailedPrecondition(
            f"Base model {base!r} is not being served, since its deployment failed: {why} "
            f"`graft models deploy {deployment.source}` tries again.",
            reason="BASE_MODEL_NOT_SERVED",
            metadata={"base_model": base, "served": first},
        )
    if deployment.state is DeploymentState.STARTING:
        raise Unavailable(
            f"Base model {base!r} is being deployed. Try again shortly.",
            reason="BASE_MODEL_STARTING",
            metadata={"base_model": base},
            retry_after_seconds=STARTING_RETRY_SECONDS,
        )


def check_shared(version: AdapterVersion) -> None:
    """Raises FailedPrecondition for a version that the shared engine cannot hold: a model of its own."""
    if version.served_as is ServedAs.MERGED_MODEL:
        raise FailedPrecondition(
            f"{version.model} is a full model and not an adapter: it is served as a deployment of its own. "
            f"Deploy it with `graft models deploy {version.model}`.",
            reason="NOT_DEPLOYED",
            metadata={"model": version.model},
        )


async def resolve(store: Store, project: str, model: str, first: str) -> Resolution:
    """Resolves `base`, `base:adapter`, `base:adapter@3` or `base:adapter@alias`.

    Raises InvalidArgument for a malformed name, NotFound naming what exists, and what `check_served` raises for a base
    model that is not served.
    """
    name = parse_model(model)
    if name.adapter is None or name.base != first:  # else the lookup of the version checks the base model too
        await store.get_base_model(name.base, project)
    await check_served(store, name.base, first)
    if name.adapter is None:
        return Resolution(name.base, name.base, None)
    version = await store.resolve_version(project, name.base, name.adapter, version=name.version, alias=name.alias)
    check_shared(version)
    return Resolution(version.model, name.base, adapter_ref(version), version.task_definition)


async def owns(store: Store, project: str, model: str, digest: str) -> bool:
    """Whether `model` names that content in the project. The engine does not know projects."""
    try:
        name = parse_model(model)
        if name.adapter is None:
            return False
        found = await store.resolve_version(project, name.base, name.adapter, version=name.version, alias=name.alias)
    except (InvalidArgument, NotFound):  # named by another project, or deleted from the registry since
        return False
    return found.digest == digest
