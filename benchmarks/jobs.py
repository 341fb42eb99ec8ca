"""Waiting times of a job: from submission to the first step, and from publication to the first token.

    python -m benchmarks.jobs [--quick]

Every repeat starts the whole stack anew, and does everything twice: the first time is `cold`, the second `warm`. Jobs
train SmolLM2-135M for two steps on film reviews. The first token is asked for in two ways: of a version that somebody
published to the registry and nobody has loaded (`on first request`), and of a job's version at the moment at which the
job's events say that it is loaded (`preloaded`, as every job's version is before its evaluation).
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from tests.support.adapters import make_adapter

from benchmarks.common import CACHE, Report, arguments, base_model, console, temporary_folder
from benchmarks.stacks import Stack, graft_stack, publish
from graft.client import Graft
from graft.data.samples import reviews, write_rows
from graft.domain.errors import NotFound
from graft.domain.resources import BaseModel
from graft.registry.mlflow_registry import Registry

REPEATS = 3
STATES = ("VALIDATING", "QUEUED", "STARTING", "RUNNING", "REGISTERING", "EVALUATING")
STEPS = 2
QUESTION = [{"role": "user", "content": "What is a graft?"}]
ASK_AGAIN_SECONDS = 0.01

Figures = dict[tuple[str, str], list[float]]
"""Seconds by figure and temperature, a value a repeat."""


@dataclass
class Watch:
    """Everything that is done on one stack."""

    stack: Stack
    graft: Graft
    base: BaseModel
    dataset: str
    figures: Figures

    def add(self, figure: str, when: str, seconds: float) -> None:
        """One value."""
        self.figures[figure, when].append(seconds)

    def publish_and_ask(self, when: str, adapter: str, folder: Path) -> None:
        """Publishes past Graft, straight to MLflow, and asks until the name is known."""
        registry = Registry(self.stack.settings.tracking_uri, CACHE)
        created = publish(registry, self.base.id, self.base.digest, adapter, folder)
        known, token = first_token(self.graft, f"{self.base.id}:{adapter}@1")
        self.add("publish to first token, on first request", when, token - created)
        self.add("  of which until the name resolves", when, known - created)
        self.add("  of which request to first token", when, token - known)
        known, token = first_token(self.graft, f"{self.base.id}:{adapter}@1")
        self.add("request to first token, adapter in the engine", when, token - known)

    def run_job(self, when: str, adapter: str) -> None:
        """One job, watched; asks for the first token when its version is loaded."""
        submitted = time.time()
        job = self.graft.create_job(
            self.base.id,
            self.dataset,
            suffix=adapter,
            hyperparameters={"max_steps": STEPS, "batch_size": 8, "checkpoint_steps": 1000},
        )
        entered: dict[str, float] = {}
        for update in self.graft.watch_job(job.name):
            event, seen = update.event, time.time()
            data = MessageToDict(event.data)
            if event.type == "state":
                entered[str(data["state"])] = event.create_time.ToNanoseconds() / 1e9
            elif event.type == "metrics" and "first step" not in entered:
                entered["first step"] = seen
                self.add("submit to first step", when, seen - submitted)
            elif "startup_seconds" in data:
                for name, seconds in data["startup_seconds"].items():
                    self.add(f"  of STARTING and RUNNING: {name}", when, seconds)
            elif data.get("key") == "loaded":
                model = f"{self.base.id}:{adapter}@1"
                created = self.graft.adapter_versions(f"{self.base.id}:{adapter}")[0].create_time.ToNanoseconds() / 1e9
                _, token = first_token(self.graft, model)
                self.add("publish to first token, preloaded", when, token - created)
                self.add("  of which until loaded", when, event.create_time.ToNanoseconds() / 1e9 - created)
        if "SUCCEEDED" not in entered:
            raise RuntimeError(f"The job has not succeeded: {self.graft.job(job.name).error.message}")
        self.add("submit to success", when, entered["SUCCEEDED"] - submitted)
        self.add("  of which until stored", when, entered["VALIDATING"] - submitted)
        ends = dict(zip(STATES, [*STATES[1:], "SUCCEEDED"], strict=True))
        for state, end in ends.items():
            self.add(f"  of which {state}", when, entered[end] - entered[state])
        self.add("  of RUNNING until the first step", when, entered["first step"] - entered["RUNNING"])


def first_token(graft: Graft, model: str) -> tuple[float, float]:
    """When the request was sent that was not refused for an unknown name, and when its first token came; Unix time."""
    while True:
        asked = time.time()
        try:
            stream = graft.stream(model, messages=QUESTION, max_tokens=4)
            next(piece for piece in stream if piece.text)
            token = time.time()
            for _ in stream:
                pass
            return asked, token
        except NotFound:
            time.sleep(ASK_AGAIN_SECONDS)


def main() -> int:
    """Returns 0. Raises RuntimeError when a job does not succeed."""
    asked = arguments(__doc__)
    repeats = 1 if asked.quick else REPEATS
    base = base_model()
    report = Report(
        name="jobs",
        quick=asked.quick,
        settings={"base_model": base.id, "steps": STEPS, "batch_size": 8, "rows": 100, "settings": "defaults"},
        contestants={"cold": "the first of its kind after `graft up`", "warm": "the second"},
    )
    figures: Figures = defaultdict(list)
    for repeat in range(repeats):
        with temporary_folder() as folder, graft_stack({}) as stack, Graft(stack.connection) as graft:
            figures["graft up", "cold"].append(stack.start_seconds)
            rows = write_rows(reviews(100, 0).train, folder / "reviews.jsonl")
            watch = Watch(stack, graft, base, graft.upload_dataset(rows).name, figures)
            for number, when in enumerate(("cold", "warm")):
                seed = 2 * repeat + number
                foreign = make_adapter(Path(base.path), folder / f"foreign-{number}", seed=seed, scale=0.03)
                watch.publish_and_ask(when, f"foreign-{number}", foreign)
                watch.run_job(when, f"job-{number}")
        console.print(
            f"repeat {repeat + 1} of {repeats}: submit to first step "
            + ", ".join(f"{figures['submit to first step', when][-1]:.1f} s {when}" for when in ("cold", "warm"))
        )
    for (figure, when), values in figures.items():
        report.figure(figure, "s", when, values)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
