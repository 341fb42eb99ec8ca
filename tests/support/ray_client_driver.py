"""A process outside of a Ray cluster, which reaches it by Ray Client through a link that it can cut.

    python -m tests.support.ray_client_driver CLIENT_PORT SPEC

A process of its own, since a process is either a driver or a client for good. SPEC is a pickled run. Prints what
happened as one line of JSON.
"""

import json
import pickle
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.training.link import RayLink
from graft.training.run import RayRuns
from graft.training.spec import ENDS, RunSpec
from graft.training.sweep import SearchSpec, Trial

PATIENCE_SECONDS = 240.0


class Cable:
    """Passes TCP connections on to a port of loopback while it is whole."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._whole = True
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        """No connection comes to be while the others are ended."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends what is connected and lets nobody through."""
        with self._lock:
            self._whole = False
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def mend(self) -> None:
        """Lets connections through again."""
        self._whole = True

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            with self._lock:
                if (far := self._connected()) is None:
                    near.close()
                    continue
                self._open += [near, far]
            for here, there in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(here, there), daemon=True).start()

    def _connected(self) -> socket.socket | None:
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", self._to)) if self._whole else None
        return None

    @staticmethod
    def _pump(here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(65536):
                there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)


def sweep(runs: RayRuns, spec: RunSpec) -> dict[str, Any]:
    """Two trials to their end; what the last report says."""
    search = SearchSpec((Trial(1, 1e-2, 4, 8.0), Trial(2, 1e-9, 4, 8.0)), 3, 2.0, 2)
    mine = replace(spec, job_id="ft-sweep", output_key="runs/ft-sweep/1", search=search, eval_steps=3)
    runs.start(mine)
    reports: list[Any] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reports or reports[-1].kind not in ENDS:
        if time.monotonic() > deadline:
            return {"kind": "late", "reports": len(reports)}
        reports += runs.poll(mine.job_id, 1, len(reports)).reports
        time.sleep(0.2)
    runs.release(mine.job_id, 1)
    return {"kind": reports[-1].kind, **reports[-1].data}


def cuts(runs: RayRuns, spec: RunSpec, cable: Cable) -> dict[str, Any]:
    """What becomes of a run while the link is cut for half a second, and for longer than Ray Client waits."""
    mine = replace(spec, job_id="ft-cut", output_key="runs/ft-cut/1", total_steps=10**6, checkpoint_steps=10**6)
    runs.start(mine)
    runs.start(mine)
    seen = 0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while seen < 2 and time.monotonic() < deadline:
        seen += len(runs.poll(mine.job_id, 1, seen).reports)
        time.sleep(0.1)
    found: dict[str, Any] = {"before": seen}

    cable.cut()
    threading.Timer(0.5, cable.mend).start()
    found["after_short_cut"] = runs.poll(mine.job_id, 1, seen).alive

    cable.cut()
    threading.Timer(10.0, cable.mend).start()
    found["errors"] = []
    while time.monotonic() < deadline:
        try:
            status = runs.poll(mine.job_id, 1, seen)
        except ConnectionError:
            found["errors"].append("ConnectionError")
            time.sleep(0.5)
            continue
        found["after_long_cut"] = status.alive
        found["next_sequence"] = status.reports[0].sequence if status.reports else seen + 1
        break
    runs.cancel(mine.job_id, 1)
    runs.release(mine.job_id, 1)
    found["exists"] = runs.poll(mine.job_id, 1, 0).exists
    found["seen"] = seen
    return found


def main() -> None:
    """Prints a line."""
    cable = Cable(int(sys.argv[1]))
    spec: RunSpec = pickle.loads(Path(sys.argv[2]).read_bytes())
    link = RayLink(f"ray://127.0.0.1:{cable.port}")
    runs = RayRuns(link)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:  # a head that has only just started may not start drivers yet
        try:
            runs.nodes()
            break
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
    found = {
        "cpus": sum(node.resources.get("CPU", 0.0) for node in runs.nodes()),
        "sweep": sweep(runs, spec),
        "cuts": cuts(runs, spec, cable),
    }
    print("\n" + json.dumps(found, default=str), flush=True)


if __name__ == "__main__":
    main()
