"""How far a showcase has come: ids and request ids by step, in `showcase/TASK.json` of GRAFT_HOME.

One file, one writer. A showcase that was interrupted, or killed, goes on from what is written here.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any


class Progress:
    """The steps done so far of one plan and data. Of another plan or data nothing is taken over."""

    def __init__(self, path: Path, plan: object) -> None:
        """`plan` is anything whose JSON says all that the results depend on."""
        self._path = path
        self._digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
        self._content: dict[str, Any] = {"plan": self._digest, "seconds": {}}
        try:
            found = json.loads(path.read_text())
            if found["plan"] == self._digest:
                self._content = found
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # nothing yet, or nothing that can be gone on from

    def get(self, name: str) -> str:
        """What `keep` was told; empty before."""
        return str(self._content.get(name, ""))

    def keep(self, name: str, value: str) -> str:
        """Writes it to disk, and returns it."""
        self._content[name] = value
        self._write()
        return value

    def forget(self, *names: str) -> None:
        """These steps are done again."""
        for name in names:
            self._content.pop(name, None)
        self._write()

    def request_id(self, step: str) -> str:
        """Made once, and written before it is used: a repeated create returns the first one's result."""
        return self.get(f"{step}_request") or self.keep(f"{step}_request", str(uuid.uuid4()))

    def spend(self, step: str, seconds: float) -> None:
        """Adds to the time that a step has taken."""
        self._content["seconds"][step] = self._content["seconds"].get(step, 0.0) + seconds
        self._write()

    @property
    def seconds(self) -> dict[str, float]:
        """That each step has taken, over all runs."""
        return dict(self._content["seconds"])

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._content, indent=1) + "\n")
        os.replace(part, self._path)
