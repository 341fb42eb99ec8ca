"""The chart's release at work in the images, without Kubernetes: objects as Helm renders them, pods as processes.

What a kubelet does is `tests.support.pods`, what KubeRay's operator does `tests.support.kuberay`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import chart, images, kuberay, policies
from tests.support.chart import Object, of_kind
from tests.support.host_backends import start_postgres
from tests.support.hosts import Host, network
from tests.support.images import Image
from tests.support.pods import Cluster, Pod

HOSTS = ("store", "migrate", "mlflow", "trainhead", "trainer", "enginehead", "engine", "leader", "gateway", "test")
RELEASE = "r-graft"
DATABASE = "given-database"


@dataclass(frozen=True)
class Release:
    """All of it, running."""

    pods: dict[str, Pod]
    """By the names of `HOSTS`. That of `helm test` is not started."""
    store: Host
    """Of the database."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Image]]:
    """Both images, by the repositories of the chart's values. $GRAFT_TEST_IMAGES is `fresh`, or a folder whose images
    are taken as they are, and are left there."""
    asked = os.environ.get("GRAFT_TEST_IMAGES")
    if (
        reason := images.missing()
        or policies.missing()
        or ("" if asked else "The images take half an hour: run `make test-images`.")
    ):
        pytest.skip(reason)
    kept = asked != "fresh"
    folder = Path(asked) if asked and kept else tmp_path_factory.mktemp("images")
    env = images.environment(folder)
    try:
        if not images.known("localhost/graft-base", env):
            images.run(str(images.ROOT / "deploy" / "images" / "local-bases"), env=env)
        found = {}
        for name in images.BASES:
            there = images.known(f"localhost/graft-{name}", env)
            found[f"graft-{name}"] = (images.mounted if there else images.build)(name, folder, env)
        yield found
    finally:
        if not kept:
            images.run("buildah", "rm", "--all", env=env)
            images.run("buildah", "rmi", "--all", "--force", env=env)


def release_objects(store: Host) -> list[Object]:
    """The example for a laptop, on a database that is there already."""
    store_url, mlflow_url = start_postgres(store, "graft", "mlflow")
    secret = {"store-url": store_url, "mlflow-url": mlflow_url}
    given = {"kind": "Secret", "metadata": {"name": DATABASE}, "stringData": secret}
    options = ("--set", f"database.existingSecret={DATABASE}")
    return [*chart.render(chart.helm_path("helm4"), chart.LAPTOP, *options), given]


@pytest.fixture(scope="session")
def release(built: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """The release installed, with its network policies in force: hooks first, then all, until each pod's probe passes
    and Serve's application runs."""
    with network(*HOSTS) as hosts:
        objects = release_objects(hosts["store"])
        cluster = Cluster(objects, built, tmp_path_factory.mktemp("volumes"))
        cluster.folder.chmod(0o755)
        cluster.services = {
            f"{RELEASE}-mlflow": hosts["mlflow"],
            f"{RELEASE}-training-head-svc": hosts["trainhead"],
            f"{RELEASE}-inference-head-svc": hosts["enginehead"],
            f"{RELEASE}-inference": hosts["engine"],
            f"{RELEASE}-gateway": hosts["gateway"],
        }
        deployments = of_kind(objects, "Deployment")
        training = list(kuberay.pods(of_kind(objects, "RayCluster")[f"{RELEASE}-training"]))
        service = of_kind(objects, "RayService")[f"{RELEASE}-inference"]
        inference = list(kuberay.pods(service))
        templates = {
            "migrate": of_kind(objects, "Job")[f"{RELEASE}-migrate"]["spec"]["template"],
            "mlflow": deployments[f"{RELEASE}-mlflow"]["spec"]["template"],
            "trainhead": training[0],
            "enginehead": inference[0],
            "trainer": training[1],
            "engine": inference[1],
            "leader": deployments[f"{RELEASE}-orchestrator"]["spec"]["template"],
            "gateway": deployments[f"{RELEASE}-gateway"]["spec"]["template"],
            "test": of_kind(objects, "Pod")[f"{RELEASE}-test"],
        }
        pods = {name: Pod(cluster, hosts[name], template) for name, template in templates.items()}
        policies.enforce(objects, {name: (pod.host, pod.labels) for name, pod in pods.items()})
        print(pods["migrate"].run(120))
        # Heads before those who join them; a worker that serves is ready once Serve is told what to run.
        for names in (("mlflow",), ("trainhead", "enginehead"), ("trainer", "engine")):
            for name in names:
                pods[name].start()
            for name in names:
                if name != "engine":
                    pods[name].wait_ready(300)
        token = cluster.value("Secret", f"{RELEASE}-ray-token", "auth_token")
        head = hosts["enginehead"]
        kuberay.deploy(service, head, token)
        for name in ("gateway", "leader"):
            pods[name].start()
        running = {"graft-engine": "RUNNING"}
        pods["enginehead"].wait(lambda: kuberay.applications(head, token) == running, 600)
        for name in ("engine", "leader", "gateway"):
            pods[name].wait_ready(300)
        yield Release(pods, hosts["store"])
