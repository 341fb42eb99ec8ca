"""What `helm test` does: trains a tiny adapter through the gateway and asks it, as any client would.

    GRAFT_ADDRESS=graft-gateway:50051 GRAFT_API_KEY=… python3 train_and_ask.py smollm2-135m

Exit codes: 0 when the adapter has answered, 1 when something failed, told by the last line. Needs Graft's client only.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from graft.client import Graft
from graft.client.connection import Connection
from graft.domain.errors import FailedPrecondition, GraftError, Unavailable

STEPS = 2
"""It is the way that is tested, and not what is learned."""
READY_SECONDS = 900.0
"""An engine of a base model that has to be fetched and converted first takes minutes."""


def wait_for_engine(graft: Graft) -> None:
    """Returns when a replica can answer. Raises Unavailable when none can for READY_SECONDS."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            if any(replica.ready for replica in graft.residency()):
                return
            reason = "no replica is ready"
        except Unavailable as error:
            reason = error.message
        if time.monotonic() > deadline:
            raise Unavailable(
                f"The engine is not ready after {READY_SECONDS:.0f} s: {reason}", reason="ENGINE_STARTING"
            )
        time.sleep(2)


def train_and_ask(graft: Graft, base_model: str, folder: Path) -> str:
    """The name of the version that has answered. Raises GraftError when a step fails."""
    wait_for_engine(graft)
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"What is {number} plus one?", "completion": f" {number + 1}"}) + "\n"
            for number in range(16)
        )
    )
    data = graft.upload_dataset(rows)
    print(f"uploaded {data.name}", flush=True)
    job = graft.create_job(
        base_model, data.name, suffix="helm-test", lora={"rank": 8}, hyperparameters={"max_steps": STEPS}
    )
    print(f"created {job.name}", flush=True)
    for update in graft.watch_job(job.name):
        if update.event.message:
            print(update.event.message, flush=True)
    job = graft.job(job.name)
    if job.state != job.STATE_SUCCEEDED:
        raise FailedPrecondition(f"{job.name} ended without success: {job.error.message}", reason="JOB_FAILED")
    answer = graft.generate(job.fine_tuned_model, prompt="What is 7 plus one?", max_tokens=4, temperature=0.0)
    print(f"{answer.model} answers {answer.text!r} in {answer.usage.completion_tokens} tokens", flush=True)
    graft.delete_dataset(data.name)
    return answer.model


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) != 1:
        print("usage: train_and_ask.py BASE_MODEL", file=sys.stderr)
        return 1
    certificate = os.environ.get("GRAFT_TEST_ROOT_CERTIFICATE")
    connection = Connection(root_certificate=Path(certificate) if certificate else None)
    try:
        with tempfile.TemporaryDirectory() as folder, Graft(connection) as graft:
            train_and_ask(graft, arguments[0], Path(folder))
    except GraftError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
