"""The application's builder for `serve deploy` and KubeRay's RayService: `graft.serving.declared:application`.

For a Ray cluster that others run (deploy/serve.yaml): Serve keeps what was declared, without a process of Graft's. What
`graft.serving.main` does beside it, to make Serve listen on one address only, is no application's to decide: there the
network has to guard the door.
"""

from pathlib import Path
from typing import Any

import pydantic

from graft.registry.base_models import ensure_base_model
from graft.serving.app import build_app
from graft.settings import HomeSettings, RegistrySettings, ServingSettings, Settings, StorageSettings
from graft.storage import open_storage, share_base_model


class Arguments(pydantic.BaseModel):
    """What `args` of the application may hold; Serve refuses anything else when it is deployed."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    home: Path
    """A folder that all nodes share: the catalogue's own entries, and full models that jobs made."""
    cache: Path | None = None
    """Converted base models and pulled adapters; None: `cache` in the home. Shared as well."""
    tracking_uri: str
    """MLflow's address, from the cluster."""
    storage: StorageSettings = StorageSettings()
    """As `storage:` in graft.yaml; with a URL, home and cache are each node's own."""
    serving: ServingSettings = ServingSettings()
    """As `serving:` in graft.yaml; address and port are Serve's own here."""


def application(arguments: Arguments) -> Any:
    """The application of `serving.base_model`, which is converted first if it is not yet, and shared with other nodes.

    It is running once its engines answer. Raises NotFound for a base model that is not in the catalogue,
    FailedPrecondition when its package is missing, and as `Storage`.
    """
    settings = Settings(
        home=HomeSettings(path=arguments.home, cache=arguments.cache or arguments.home / "cache"),
        storage=arguments.storage,
        serving=arguments.serving,
        registry=RegistrySettings(tracking_uri=arguments.tracking_uri),
    )
    base = ensure_base_model(settings, arguments.serving.base_model)
    share_base_model(open_storage(settings), base.path, base.digest)
    return build_app(settings, base, waits=True)
