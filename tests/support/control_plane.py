"""The control plane that `make test-k8s` starts: kubectl, a namespace for the chart, and answers to probes.

Pods there run nothing and all have one address: what stands in for them here answers their probes and completes the
Jobs of hooks, and nothing else.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.support.chart import Object

POD_ADDRESS = "192.168.192.168"
"""Of every pod."""
PROBED_PORTS = (5000, 8080)
KINDS = "all,pvc,cm,secret,sa,role,rolebinding,networkpolicy,ingress,raycluster,rayservice"
"""Whatever the chart, or the operator, makes in a namespace."""

needs_control_plane = pytest.mark.skipif(
    "GRAFT_TEST_CLUSTER" not in os.environ, reason="There is no cluster to test on: run `make test-k8s`."
)


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """What kubectl prints."""
    told = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True)
    assert told.returncode == 0 or not check, told.stderr
    return told.stdout


def items(namespace: str, kind: str, *options: str) -> list[Object]:
    """Objects of the kind in the namespace."""
    found: list[Object] = json.loads(kubectl("-n", namespace, "get", kind, "-o", "json", *options))["items"]
    return found


def names(namespace: str, kinds: str = KINDS) -> set[tuple[str, str]]:
    """Kind and name of everything in the namespace."""
    return {(one["kind"], one["metadata"]["name"]) for one in items(namespace, kinds)}


def await_names(namespace: str, expected: set[tuple[str, str]], seconds: float = 60) -> set[tuple[str, str]]:
    """What is there beside the expected when time runs out, or nothing: pods and endpoints go after their owners."""
    deadline = time.monotonic() + seconds
    while (left := names(namespace) - expected) and time.monotonic() < deadline:
        time.sleep(1)
    return left


def helm_does(helm: Path, namespace: str, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Helm, in the namespace."""
    told = subprocess.run([helm, *arguments, "--namespace", namespace], capture_output=True, text=True)
    assert told.returncode == 0 or not check, told.stdout + told.stderr
    return told


@contextmanager
def a_namespace(name: str) -> Iterator[list[str]]:
    """An empty one with volumes to claim, until the block ends; the names of the Jobs that ran in it."""
    kubectl("wait", "--for=condition=established", "--timeout=60s", "crd", "--all")
    kubectl("create", "namespace", name)
    volumes = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"v{number}"},
            "spec": {
                "capacity": {"storage": "100Gi"},
                "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "hostPath": {"path": f"/volumes/{number}"},
            },
        }
        for number in range(2)
    ]
    kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(volumes))
    stop, completed = threading.Event(), list[str]()
    thread = threading.Thread(target=_complete_jobs, args=(name, stop, completed))
    thread.start()
    try:
        yield completed
    finally:
        stop.set()
        thread.join()
        kubectl("delete", "namespace", name, "--wait")
        kubectl("delete", "pv", "--all")


def _complete_jobs(namespace: str, stop: threading.Event, completed: list[str]) -> None:
    """Says of every Job that it has succeeded, which its pods never will."""
    done = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}
    while not stop.wait(1):
        told = kubectl("-n", namespace, "get", "jobs", "-o", "json", check=False) or '{"items": []}'
        for job in json.loads(told)["items"]:
            name = job["metadata"]["name"]
            if not job.get("status", {}).get("succeeded"):
                patch = json.dumps({"status": done})
                kubectl(
                    *("-n", namespace, "patch", "job", name, "--subresource=status", "--type=merge", "-p", patch),
                    check=False,
                )
                completed.append(name)


class _Well(BaseHTTPRequestHandler):
    """Answers every probe."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Not a line a probe."""


@contextmanager
def probes() -> Iterator[None]:
    """Something answers where the kubelet asks, until the block ends."""
    servers = [ThreadingHTTPServer((POD_ADDRESS, port), _Well) for port in PROBED_PORTS]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
