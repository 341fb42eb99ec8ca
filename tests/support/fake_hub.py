"""The part of the Hugging Face hub's HTTP that a download of one repository needs, on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`url` goes into HF_ENDPOINT. `asked` has every path, `break_on` names a file whose download fails."""

    url: str
    asked: list[str] = field(default_factory=list)
    break_on: str = ""
    slow_on: str = ""
    """A file that comes a byte at a time until `released`; `slow` is set once it does."""
    slow: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@contextmanager
def fake_hub(repository: str, folder: Path, license: str) -> Iterator[FakeHub]:
    """Serves the files of `folder` as `repository`, at its branch `main` and at COMMIT."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            api = f"/api/models/{repository}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": name} for name in files]
                about = {"id": repository, "sha": COMMIT, "siblings": names, "cardData": {"license": license}}
                self._answer(200, json.dumps(about).encode())
            elif path.startswith(f"{api}/tree/"):
                told = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                    for name, file in files.items()
                ]
                self._answer(200, json.dumps(told).encode())
            elif path.startswith(f"{api}/revision/"):
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(f"/{repository}/resolve/") and (name := path.split("/", 5)[5]) in files:
                if name == hub.break_on:
                    self._answer(400, b"{}")  # the client tries 5xx again for half a minute
                    return
                self._answer(
                    200, files[name].read_bytes(), {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": COMMIT}
                )
            else:
                self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                if hub.slow_on and self.path.endswith(hub.slow_on):
                    hub.slow.set()
                    while body and not hub.released.wait(0.1):
                        self.wfile.write(body[:1])
                        body = body[1:]
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests read their own output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
