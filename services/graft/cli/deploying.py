"""`graft models deploy`, `undeploy` and `deployments`: which models are served beside the stack's first one."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.connect import connect
from graft.cli.output import (
    Interrupted,
    Json,
    as_dict,
    console,
    failures,
    local_time,
    print_json,
    show,
    show_one,
)

if TYPE_CHECKING:
    from graft.api.v1.deployment_pb2 import Deployment
    from graft.client import Graft

POLL_SECONDS = 0.5


def add_to(models: typer.Typer) -> None:
    """Adds these commands to `graft models`."""
    models.command("deploy")(deploy)
    models.command("undeploy")(undeploy)
    models.command("deployments")(deployments)


def deploy(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A base model, or a full model that a job made: base:adapter@version."),
    ],
    name: Annotated[
        str, typer.Option(help="What requests will call a full model; base-adapter-version when not given.")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a model beside the stack's first one, by an engine of its own. Follows it until it is ready."""
    with failures(as_json=as_json), connect() as graft:
        deployment = graft.deploy_model(model, name)
        if not detach:
            deployment = _followed(graft, deployment, as_json=as_json)
        ready = deployment.state == deployment.STATE_READY
        if as_json:
            print_json(as_dict(deployment))
        elif ready:
            print(f"{deployment.model} is ready. Try it: graft chat {deployment.model}")
        elif detach:
            print(f"{deployment.model} is being deployed. `graft models deployments` tells how far it is.")
        else:
            print(f"{deployment.model} is not served: {deployment.error.message}", file=sys.stderr)
        raise typer.Exit(0 if ready or detach else 1)


def undeploy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What requests call it.")],
    as_json: Json = False,
) -> None:
    """Stop serving a model that was deployed, and free what it holds. It stays in the catalogue."""
    from graft.domain.errors import NotFound

    with failures(as_json=as_json), connect() as graft:
        deployment = graft.undeploy_model(name)
        try:
            with _waiting(f"Undeploying {name}", as_json=as_json):
                while True:
                    time.sleep(POLL_SECONDS)
                    deployment = graft.deployment(name)
        except NotFound:
            show_one(deployment, f"{name} is no longer served.", as_json=as_json)
        except KeyboardInterrupt:
            raise Interrupted(f"{name} goes on ending.", reason="INTERRUPTED") from None


def deployments(as_json: Json = False) -> None:
    """List what is served beside the stack's first base model, and how far each is."""
    from graft.api.v1.deployment_pb2 import Deployment

    with failures(as_json=as_json), connect() as graft:
        columns: dict[str, Callable[..., object]] = {
            "MODEL": lambda d: d.model,
            "SOURCE": lambda d: d.source,
            "STATE": lambda d: Deployment.State.Name(d.state).removeprefix("STATE_").lower(),
            "SINCE": lambda d: local_time(d.create_time),
            "ERROR": lambda d: d.error.message,
        }
        none = "Nothing is deployed beside the stack's first base model. `graft models deploy MODEL` does."
        show(graft.deployments(), columns, as_json=as_json, none=none)


def _followed(graft: "Graft", deployment: "Deployment", *, as_json: bool) -> "Deployment":
    """The deployment once it is ready or has failed."""
    name = deployment.model
    try:
        with _waiting(f"Deploying {name}", as_json=as_json):
            while deployment.state == deployment.STATE_STARTING:
                time.sleep(POLL_SECONDS)
                deployment = graft.deployment(name)
    except KeyboardInterrupt:
        raise Interrupted(
            f"The deployment of {name} goes on. `graft models deployments` tells how far it is, and "
            f"`graft models undeploy {name}` ends it.",
            reason="INTERRUPTED",
            metadata={"deployment": name},
        ) from None
    return deployment


def _waiting(text: str, *, as_json: bool) -> AbstractContextManager[object]:
    return nullcontext() if as_json else console.status(text)
