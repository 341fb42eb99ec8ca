"""Files that MLflow, or a proxy before it, refuses: a fault of the installation that can be mended while jobs wait."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from graft.domain.errors import Unavailable
from graft.registry.mlflow_registry import Registry

SOURCE = "mlflow-artifacts:/0/run/artifacts"
VERSION = {"name": "m", "version": "1", "run_id": "run", "source": f"{SOURCE}/adapter"}
RUN = {"info": {"run_id": "run", "artifact_uri": SOURCE}, "data": {}}


class _NoFiles(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.dumps({"model_version": VERSION} if "model-versions" in self.path else {"run": RUN}).encode()
        self.send_response(413 if "mlflow-artifacts" in self.path else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = _answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _NoFiles)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Registry(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "call",
    [
        lambda registry, _: registry.pull("m", 1, "sha256:a"),
        lambda registry, file: registry.log_file("run", file),
    ],
    ids=["download", "upload"],
)
def test_a_refusal_of_files_is_waited_out_and_says_what_to_mend(
    registry: Registry, tmp_path: Path, call: Callable[[Registry, Path], object]
) -> None:
    (tmp_path / "file").write_text("content")
    with pytest.raises(Unavailable, match=r"refuses files \(413 .*\): whoever runs it has to allow them"):
        call(registry, tmp_path / "file")
