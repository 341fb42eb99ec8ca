"""Reads back from MLflow, over its REST API, what Graft registered there: tags, parameters, curves.

Does not use MLflow's client, whose import takes ten seconds, nor Graft's registry: what is shown is what anybody sees.
"""

from dataclasses import dataclass
from typing import Any

import httpx

from graft.domain.errors import FailedPrecondition, Unavailable


@dataclass(frozen=True)
class Lineage:
    """One adapter version as MLflow tells it."""

    registered_model: str
    version: str
    run_id: str
    tags: dict[str, str]
    """Of the version: job, digests, rank, size, code version."""
    params: dict[str, str]
    """Of the run: every hyperparameter as used."""
    metrics: dict[str, float]
    """Of the run: the last value of each."""
    losses: tuple[tuple[int, float], ...]
    """Optimizer step and training loss, in nats per completion token."""
    finished: bool
    """Whether the run has ended, so that its curves are whole."""

    def check(self, expected: dict[str, str]) -> None:
        """Raises FailedPrecondition for a tag that is not as expected, and without parameters, metrics or curve."""
        wrong = [
            f"{tag} is {self.tags.get(tag)!r}, not {value!r}"
            for tag, value in expected.items()
            if self.tags.get(tag) != value
        ]
        missing = [
            name
            for name, there in (
                ("parameters", self.params),
                ("metrics", self.metrics),
                ("a loss curve", self.losses),
                ("graft.code_version", self.tags.get("graft.code_version")),
            )
            if not there
        ]
        if wrong or missing:
            faults = "; ".join([*wrong, *(f"{name} missing" for name in missing)])
            raise FailedPrecondition(
                f"MLflow's lineage of {self.registered_model} version {self.version} is incomplete: {faults}.",
                reason="LINEAGE_INCOMPLETE",
            )


async def read_lineage(tracking_uri: str, registered_model: str, version: int) -> Lineage:
    """Raises Unavailable when MLflow does not answer as its REST API promises."""
    try:
        async with httpx.AsyncClient(base_url=f"{tracking_uri}/api/2.0/mlflow/", timeout=30.0) as mlflow:
            asked = {"name": registered_model, "version": str(version)}
            found = (await _get(mlflow, "model-versions/get", asked))["model_version"]
            run_id = str(found["run_id"])
            run = (await _get(mlflow, "runs/get", {"run_id": run_id}))["run"]
            history = await _get(mlflow, "metrics/get-history", {"run_id": run_id, "metric_key": "loss"})
            return Lineage(
                registered_model=registered_model,
                version=str(version),
                run_id=run_id,
                tags=_pairs(found.get("tags", [])),
                params=_pairs(run["data"].get("params", [])),
                metrics={entry["key"]: float(entry["value"]) for entry in run["data"].get("metrics", [])},
                losses=tuple(
                    sorted((int(point.get("step", 0)), float(point["value"])) for point in history.get("metrics", []))
                ),
                finished=run["info"]["status"] == "FINISHED",
            )
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise Unavailable(
            f"MLflow at {tracking_uri} does not tell of {registered_model} version {version} "
            f"({type(error).__name__}: {error}).",
            reason="REGISTRY_UNAVAILABLE",
        ) from error


async def _get(mlflow: httpx.AsyncClient, path: str, query: dict[str, str]) -> Any:
    response = await mlflow.get(path, params=query)
    response.raise_for_status()
    return response.json()


def _pairs(entries: list[dict[str, str]]) -> dict[str, str]:
    return {entry["key"]: entry["value"] for entry in entries}
