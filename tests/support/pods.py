"""Pods of a rendered chart, run without Kubernetes: each in a network of its own, its container's process in the image.

Owns what a kubelet does with a pod here: volumes, variables from Secrets, what is mounted where, probes, and the names
of Services in /etc/hosts. Does not know what the pods are for. What it has not: containers beside the first, limits of
resources, seccomp, DNS, and network policies.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.chart import Object, of_kind
from tests.support.hosts import Host
from tests.support.images import Image

NAMESPACE = "ns"
MOST_RESTARTS = 3
CONTAINER = Path(__file__).with_name("container.py")
GET = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3)"


@dataclass
class Cluster:
    """What the pods share: objects that they name, images, volumes, and who answers to a Service's name."""

    objects: list[Object]
    images: Mapping[str, Image]
    """By the name in the pod's spec, without registry and tag."""
    folder: Path
    """Of volumes, on this machine's disk."""
    services: dict[str, Host] = field(default_factory=dict)

    def value(self, kind: str, name: str, key: str) -> str:
        """Of a Secret or a ConfigMap."""
        return self.values(kind, name)[key]

    def values(self, kind: str, name: str) -> dict[str, str]:
        """All of a Secret's or a ConfigMap's. Raises KeyError when the release has none of that name."""
        held = of_kind(self.objects, kind)[name]
        if kind == "ConfigMap":
            return dict(held["data"])
        encoded = {key: base64.b64decode(value).decode() for key, value in held.get("data", {}).items()}
        return {**encoded, **held.get("stringData", {})}

    def hosts_file(self, host: Host) -> str:
        """/etc/hosts of a pod: its own name and every Service."""
        lines = ["127.0.0.1 localhost", f"{host.address} {host.name}"]
        for name, other in self.services.items():
            lines.append(f"{other.address} {name} {name}.{NAMESPACE} {name}.{NAMESPACE}.svc.cluster.local")
        return "\n".join(lines) + "\n"


class Pod:
    """One pod, whose one container runs from `start` on until `stop`."""

    def __init__(self, cluster: Cluster, host: Host, template: Object) -> None:
        self.host = host
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self._cluster = cluster
        self._spec = template["spec"]
        (self._container,) = self._spec["containers"]
        self.image = cluster.images[self._container["image"].rpartition("/")[2].partition(":")[0]]
        self.process: subprocess.Popen[bytes] | None = None
        self.log = host.disk / f"{host.name}.log"

    @property
    def environment(self) -> dict[str, str]:
        """The image's variables and the container's."""
        found = dict(variable.split("=", 1) for variable in self.image.config["Env"])
        for variable in self._container.get("env", []):
            found[variable["name"]] = self._variable(variable)
        return found

    def _variable(self, variable: Object) -> str:
        if "value" in variable:
            return str(variable["value"])
        if field := variable["valueFrom"].get("fieldRef"):
            return self._field(field["fieldPath"])
        asked = variable["valueFrom"]["secretKeyRef"]
        return self._cluster.value("Secret", asked["name"], asked["key"])

    def _field(self, path: str) -> str:
        """Of the pod, as a variable may have it."""
        if path.startswith("metadata.labels["):
            return self.labels[path.split("'")[1]]
        return {"metadata.name": self.host.name, "metadata.namespace": NAMESPACE}[path]

    @property
    def command(self) -> list[str]:
        return [*self._container.get("command", []), *self._container.get("args", [])] or self.image.config["Cmd"]

    def start(self) -> None:
        """Runs the container; its output is added to the log."""
        security = self._spec["securityContext"]
        (self.host.disk / "etc-hosts").write_text(self._cluster.hosts_file(self.host))
        asked = {
            "image": str(self.image.root),
            "mounts": self._mounts(security["fsGroup"]),
            "environment": self.environment,
            "user": security["runAsUser"],
            "group": security["runAsGroup"],
            "groups": [security["fsGroup"]],
            "command": self.command,
            "folder": self.image.config["WorkingDir"],
            "scratch": str(self.host.here / "layers"),
        }
        (self.host.disk / "layers").mkdir(exist_ok=True)
        unshared = ("unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child")
        self.process = self.host.popen([*unshared, sys.executable, str(CONTAINER), json.dumps(asked)], self.log.name)

    def _mounts(self, group: int) -> list[tuple[str, str, bool]]:
        volumes = {volume["name"]: self._volume(volume, group) for volume in self._spec.get("volumes", [])}
        files = [(str(self.host.here / "etc-hosts"), "/etc/hosts", True), (os.devnull, "/etc/resolv.conf", True)]
        return files + [
            (str(volumes[mount["name"]] / mount.get("subPath", "")), mount["mountPath"], mount.get("readOnly", False))
            for mount in self._container["volumeMounts"]
        ]

    def _volume(self, volume: Object, group: int) -> Path:
        """A folder with the volume's files, of the group that a kubelet gives it."""
        if claim := volume.get("persistentVolumeClaim"):
            folder = self._cluster.folder / "claims" / str(claim["claimName"])
            if not folder.exists():
                (folder / "lost+found").mkdir(parents=True, mode=0o700)  # as a new disk has it
                os.chown(folder, 0, group)
                folder.chmod(0o2775)
            return folder
        folder = self._cluster.folder / "pods" / self.host.name / str(volume["name"])
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, 0, group)
        folder.chmod(0o2777)
        for kind, name in (("Secret", "secret"), ("ConfigMap", "configMap")):
            if source := volume.get(name):
                values = self._cluster.values(kind, source.get("secretName") or source["name"])
                keys = source.get("items") or [{"key": key, "path": key} for key in values]
                for item in keys:
                    (folder / item["path"]).write_text(values[item["key"]])
        return folder

    @property
    def pid(self) -> int:
        """Of the container's first process."""
        assert self.process is not None
        # `ip`, `unshare` and `sh` become one another; what they start is the container.
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(listed) == 1, self.host.last_lines()
        return int(listed[0])

    def execute(self, command: list[str], seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        """As `kubectl exec`: in the container, with its user and variables."""
        security = self._spec["securityContext"]
        entered = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--pid", "--ipc", "--root", "--wd"]
        user = [f"--setuid={security['runAsUser']}", f"--setgid={security['runAsGroup']}"]
        return subprocess.run(
            [shutil.which("nsenter") or "nsenter", *entered[1:], *user, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def ready(self) -> bool:
        """Whether its readiness probe passes."""
        probe = self._container["readinessProbe"]
        if "exec" in probe:
            return self.execute(probe["exec"]["command"]).returncode == 0
        asked = probe["httpGet"]
        named = {port["name"]: port["containerPort"] for port in self._container.get("ports", [])}
        port = named.get(asked["port"], asked["port"])
        url = f"http://{self.host.address}:{port}{asked['path']}"
        return subprocess.run(self.host.command([sys.executable, "-c", GET, url]), capture_output=True).returncode == 0

    def wait_ready(self, seconds: float) -> None:
        """Returns once the probe passes, as `wait` does."""
        self.wait(self.ready, seconds)

    def wait(self, passed: Callable[[], bool], seconds: float) -> None:
        """Returns once `passed()`; fails when time runs out. A container that ends is started again, as a kubelet does,
        MOST_RESTARTS times."""
        deadline = time.monotonic() + seconds
        for restarts in itertools.count():
            while self.process is not None and self.process.poll() is None:
                if passed():
                    return
                assert time.monotonic() < deadline, f"{self.host.name} is not ready\n{self.host.last_lines(40)}"
                time.sleep(1)
            assert restarts < MOST_RESTARTS, f"{self.host.name} ends again and again\n{self.host.last_lines(40)}"
            self.start()

    def run(self, seconds: float) -> str:
        """Runs the container to its end, as that of a Job; returns its log. Fails unless it succeeds."""
        self.start()
        assert self.process is not None
        code = self.process.wait(seconds)
        assert code == 0, f"{self.host.name} ended with {code}\n{self.host.last_lines(60)}"
        return self.log.read_text()

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        os.kill(self.pid, 15)
        return self.process.wait(seconds)
