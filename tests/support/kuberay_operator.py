"""KubeRay's own operator, run against the API server of `make test-k8s`, where pods run nothing.

What it needs and has not there stands in for it: names of Services, the newest form of EndpointSlices, and the
dashboard of each head, which takes Serve's configuration and says that its applications run when the test lets it.
"""

import http.client
import json
import os
import socket
import ssl
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

POD_ADDRESS = "192.168.192.168"
"""Of every pod."""
DASHBOARD_PORT, AGENT_PORT = 8265, 52365
NEW, OLD = b"discovery.k8s.io/v1", b"discovery.k8s.io/v1beta1"
KEPT_HEADERS = ("Content-Type", "Content-Encoding")
OPTIONS = (
    "--enable-leader-election=false",
    "--metrics-addr=127.0.0.1:18080",
    "--health-probe-bind-address=127.0.0.1:18081",
)
VARIABLES = {
    # An API server of before 1.27 takes the question for a list by watch, and never says that the list has ended.
    "KUBE_FEATURE_WatchListClient": "false",
    # Workers wait for their head in a container that comes first, and which never ends here.
    "ENABLE_INIT_CONTAINER_INJECTION": "false",
}
WITH_NAMES = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'


class Api(BaseHTTPRequestHandler):
    """Passes all on to the API server; EndpointSlices, which it knows as a beta, as what became of them."""

    protocol_version = "HTTP/1.1"
    server: "ApiServer"

    def _pass_on(self) -> None:
        path = self.path.partition("?")[0]
        slices = path == "/apis" or path.startswith("/apis/discovery.k8s.io")
        headers = {key: value for key, value in self.headers.items() if key not in ("Host", "Connection")}
        headers["Authorization"] = f"Bearer {self.server.token}"
        if slices:
            headers |= {"Accept": "application/json", "Accept-Encoding": "identity"}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPSConnection(self.server.upstream, context=ssl._create_unverified_context())
        upstream.request(self.command, self.path.replace(f"/{NEW.decode()}", f"/{OLD.decode()}"), body, headers)
        told = upstream.getresponse()
        self.send_response(told.status)
        for key in KEPT_HEADERS:
            if value := told.headers.get(key):
                self.send_header(key, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        # A watch says one event a line; what is not watched is one line.
        pieces = iter(told.readline if slices else lambda: told.read1(65536), b"")
        try:
            for piece in pieces:
                if slices:
                    piece = piece.replace(OLD + b'","version":"v1beta1"', NEW + b'","version":"v1"').replace(OLD, NEW)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (ConnectionError, http.client.HTTPException):
            self.close_connection = True
        finally:
            upstream.close()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, format: str, *arguments: object) -> None:
        """Not a line a request."""


class ApiServer(ThreadingHTTPServer):
    """What kubectl's configuration leads to, without credentials."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Api)
        config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        self.upstream = urllib.parse.urlsplit(config["clusters"][0]["cluster"]["server"]).netloc
        self.token = config["users"][0]["user"]["token"]


class Dashboard(BaseHTTPRequestHandler):
    """Serve's part of a dashboard, and the health of a node."""

    server: "Dashboards"

    def do_GET(self) -> None:
        if self.path == "/api/healthz":
            return self._answer(200, {})
        status = "RUNNING" if self._cluster in self.server.runs else "DEPLOYING"
        names = [one["name"] for one in self.server.told.get(self._cluster, {}).get("applications", [])]
        applications = {name: {"name": name, "status": status, "message": "", "deployments": {}} for name in names}
        return self._answer(200, {"applications": applications})

    def do_PUT(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.told[self._cluster] = told
        self._answer(200, {})

    @property
    def _cluster(self) -> str:
        """All heads have one address, and names of their own."""
        return self.headers["Host"].partition("-head-svc")[0]

    def _answer(self, code: int, body: object) -> None:
        if self.path != "/api/healthz":
            code = code if self.headers.get("x-ray-authorization") == self.server.credentials() else 401
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not a line a request."""


class Dashboards(ThreadingHTTPServer):
    """Of all heads."""

    daemon_threads = True

    def __init__(self, credentials: Callable[[], str]) -> None:
        super().__init__((POD_ADDRESS, DASHBOARD_PORT), Dashboard)
        self.credentials = credentials
        self.told: dict[str, dict[str, object]] = {}
        """Serve's configuration by RayCluster, as the operator has put it."""
        self.runs: set[str] = set()
        """RayClusters whose applications run."""


class Health(BaseHTTPRequestHandler):
    """Every node is well."""

    do_GET = Dashboard.do_GET
    _answer = Dashboard._answer
    log_message = Dashboard.log_message


def resolve(known: Callable[[str], bool], door: socket.socket) -> None:
    """Answers for names of Services that exist, until the socket is closed."""
    while True:
        try:
            question, asker = door.recvfrom(512)
        except OSError:
            return
        labels, at = [], 12
        while size := question[at]:
            labels.append(question[at + 1 : at + 1 + size].decode())
            at += size + 1
        end, kind = at + 5, question[at + 1 : at + 3]
        there = labels[2:] == ["svc", "cluster", "local"] and known(f"{labels[1]}/{labels[0]}")
        found = there and kind == b"\0\1"
        head = question[:2] + (b"\x81\x80" if there else b"\x81\x83") + b"\0\1" + (b"\0\1" if found else b"\0\0")
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(POD_ADDRESS) if found else b""
        door.sendto(head + bytes(4) + question[12:end] + answer, asker)


def _service_exists(name: str) -> bool:
    space, _, service = name.partition("/")
    return subprocess.run(["kubectl", "-n", space, "get", "service", service], capture_output=True).returncode == 0


@contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def node(name: str, port: int, folder: Path) -> Iterator[None]:
    """One more simulated node, until the block ends."""
    ports = (f"--kubelet-port={port}", f"--kubelet-read-only-port={port + 1}")
    command = ["kubemark", "--morph=kubelet", f"--name={name}", f"--kubeconfig={os.environ['KUBECONFIG']}", *ports]
    with (folder / f"{name}.log").open("wb") as log:
        kubelet = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        kubelet.terminate()
        kubelet.wait(60)
        subprocess.run(["kubectl", "delete", "node", name], capture_output=True)


def _leave_statuses_unchecked() -> None:
    """This old API server takes an empty text for none, and the operator's messages may be empty."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    for name in ("rayclusters.ray.io", "rayservices.ray.io"):
        definition = json.loads(subprocess.check_output(["kubectl", "get", "crd", name, "-o", "json"]))
        paths = [
            f"/spec/versions/{number}/schema/openAPIV3Schema/properties/status"
            for number, _ in enumerate(definition["spec"]["versions"])
        ]
        patch = json.dumps([{"op": "replace", "path": path, "value": anything} for path in paths])
        subprocess.run(["kubectl", "patch", "crd", name, "--type=json", "-p", patch], check=True, capture_output=True)


@contextmanager
def running(binary: Path, credentials: Callable[[], str], folder: Path) -> Iterator[Dashboards]:
    """The operator, and what it asks; its log is `operator.log` in the folder. `credentials` is what heads ask for."""
    _leave_statuses_unchecked()
    with ExitStack() as stack:
        api, dashboards = ApiServer(), Dashboards(credentials)
        agent = ThreadingHTTPServer((POD_ADDRESS, AGENT_PORT), Health)
        for server in (api, dashboards, agent):
            stack.enter_context(_serving(server))
        door = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        door.bind(("127.0.0.1", 53))
        threading.Thread(target=resolve, args=(_service_exists, door), daemon=True).start()
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{api.server_address[1]}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": ""}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
        config |= {"clusters": [cluster], "contexts": [context]}
        (folder / "kubeconfig").write_text(json.dumps(config))
        command = ["unshare", "--mount", "sh", "-c", WITH_NAMES, "sh", str(folder / "resolv.conf"), str(binary)]
        log = stack.enter_context((folder / "operator.log").open("wb"))
        environment = {**os.environ, **VARIABLES, "KUBECONFIG": str(folder / "kubeconfig")}
        operator = subprocess.Popen([*command, *OPTIONS], env=environment, stdout=log, stderr=log)
        try:
            yield dashboards
        finally:
            operator.terminate()
            operator.wait(60)
