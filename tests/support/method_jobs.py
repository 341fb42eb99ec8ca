"""A job for each method and each choice of what changes, submitted at once through the public doors of a whole stack.

job      method            what changes             asked for by       data
texts    self-supervised   rsLoRA                   SDK                raw text
all      supervised        DoRA                     OpenAI's client    prompt and completion, loss on both
turns    instruction       LoRA and the head        `graft`            ShareGPT
weights  instruction       DoRA, a merged model     SDK                messages with weights
pairs    preference        LoRA                     OpenAI's client    OpenAI's preferences
last     supervised        the last block, the head `graft`            CSV
full     supervised        every parameter          SDK                the same
onward   supervised        LoRA, from a version     SDK                the version's own
stopped  supervised        LoRA, stopped early      OpenAI's client    rows whose held-out part contradicts
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from graft.api.v1 import fine_tuning_job_pb2
from graft.client import Graft
from graft.data.split import Split
from tests.support.tiny_jobs import BASE, write_rows
from tests.support.whole_stack import WholeStack, eventually

QUICK = {"max_steps": 12, "batch_size": 8, "learning_rate": 5e-3, "num_workers": 1}
VALIDATION_FRACTION = 0.3
PATIENCE = 2
STOPPED_STEPS = 60
OF_TEXTS = {**QUICK, "validation_fraction": 0.3}

TEXTS: list[dict[str, Any]] = [
    {"text": f"{word} is what {word} does. " * 6} for word in ("red", "green", "blue", "one", "two", "three", "four")
]


def letters(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows that a tiny model can learn: the letter decides whether 0 or 1 is the answer."""
    return [
        {"prompt": f"{number} {'a' if number % 2 else 'b'}?", "completion": f" {number % 2}"}
        for number in range(first, first + count)
    ]


def preferences(count: int, first: int = 0) -> list[dict[str, Any]]:
    """OpenAI's form. The answers are equally long, and the base finds the preferred one a little less likely."""
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"Shall we, {number}?"}]},
            "preferred_output": [{"role": "assistant", "content": "no, not by a mile"}],
            "non_preferred_output": [{"role": "assistant", "content": "yes, by all means"}],
        }
        for number in range(first, first + count)
    ]


def _conversations() -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                {"from": "system", "value": "Count."},
                {"from": "human", "value": f"After {number}?"},
                {"from": "gpt", "value": f"{number + 1}"},
                {"from": "human", "value": "And then?"},
                {"from": "gpt", "value": f"{number + 2}"},
            ]
        }
        for number in range(24)
    ]


def _weighted() -> list[dict[str, Any]]:
    """Chats of which only the second answer is to be learned."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}"},
                {"role": "assistant", "content": "I would rather not.", "weight": 0},
                {"role": "user", "content": "Please"},
                {"role": "assistant", "content": f"{number} it is", "weight": 1},
            ]
        }
        for number in range(24)
    ]


def _contradicting() -> list[dict[str, Any]]:
    """Rows whose held-out share says the opposite, so that learning the others can only raise its loss."""
    rows: list[dict[str, Any]] = []
    for number in range(400):
        for held_out, completion in ((True, "aaaa"), (False, "bbbb")):
            row = {"prompt": f"{number} ", "completion": completion}
            if Split(VALIDATION_FRACTION, held_out).takes(row):
                rows.append(row)
    return rows[:60]


@dataclass(frozen=True)
class Jobs:
    """Every job, at its success, and the data sets that they have."""

    by_suffix: dict[str, fine_tuning_job_pb2.FineTuningJob]
    data: dict[str, str]
    """Ids, by the suffix of the job that was trained on it."""

    def model(self, suffix: str) -> str:
        """`base:adapter@version`."""
        return self.by_suffix[suffix].fine_tuned_model


def train_all(stack: WholeStack, graft: Graft, client: openai.OpenAI, folder: Path) -> Jobs:
    """Submits all, and returns when all have succeeded."""
    table = folder / "letters.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(letters(32))

    def upload(name: str, rows: list[dict[str, Any]]) -> str:
        return _id(graft.upload_dataset(write_rows(folder / f"{name}.jsonl", rows)).name)

    data = {
        "texts": upload("texts", TEXTS),
        "turns": upload("turns", _conversations()),
        "weights": upload("weights", _weighted()),
        "last": str(_id(_told(stack, "datasets", "upload", str(table))["name"])),
    }
    data |= {"full": data["last"], "onward": data["texts"]}
    for name, rows in (("all", letters(24)), ("pairs", preferences(24)), ("stopped", _contradicting())):
        file = write_rows(folder / f"{name}.jsonl", rows)
        data[name] = client.files.create(file=file, purpose="fine-tune").id

    names = {
        "texts": graft.create_job(
            BASE,
            data["texts"],
            suffix="texts",
            method="self_supervised",
            lora={"use_rslora": True, "rank": 4},
            hyperparameters=OF_TEXTS,
        ).name,
        "weights": graft.create_job(
            BASE,
            data["weights"],
            suffix="weights",
            method="instruction",
            lora={"use_dora": True},
            served_as="merged_model",
            hyperparameters=QUICK,
        ).name,
        "full": graft.create_job(
            BASE,
            data["full"],
            suffix="full",
            tuning="full",
            hyperparameters={**QUICK, "max_steps": 40, "learning_rate": 2e-3},
        ).name,
        "turns": _by_command(
            stack, data["turns"], "turns", "--method=instruction", "--set=lora.modules_to_save=lm_head"
        ),
        "last": _by_command(
            *(stack, data["last"], "last", "--tuning=last_layers", "--set=last_layers.blocks=1", "--max-steps=40"),
            "--set=last_layers.train_head=true",
        ),
    }
    openais: dict[str, dict[str, Any]] = {
        "all": {"graft": {"loss_on": "all", "lora": {"use_dora": True}, "hyperparameters": QUICK}},
        "pairs": {
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
            "graft": {"hyperparameters": {**QUICK, "validation_fraction": 0.3}},
        },
        "stopped": {
            "graft": {
                "hyperparameters": {
                    **QUICK,
                    "max_steps": STOPPED_STEPS,
                    "validation_fraction": VALIDATION_FRACTION,
                    "early_stopping_patience": PATIENCE,
                    "eval_steps": 1,
                }
            }
        },
    }
    for suffix, extra in openais.items():
        names[suffix] = client.fine_tuning.jobs.create(
            model=BASE, training_file=data[suffix], suffix=suffix, extra_body=extra
        ).id

    def texts() -> fine_tuning_job_pb2.FineTuningJob:
        return graft.job(names["texts"])

    # The first job ends while the others wait for their turn, and this one then waits behind them.
    first = eventually(texts, lambda job: job.HasField("end_time"), 240, "the first job ends")
    assert first.state == first.STATE_SUCCEEDED, first.error.message
    names["onward"] = graft.create_job(
        BASE,
        data["onward"],
        suffix="onward",
        from_adapter=first.fine_tuned_model,
        lora={"use_rslora": True},
        hyperparameters=OF_TEXTS,
    ).name

    def ended() -> dict[str, fine_tuning_job_pb2.FineTuningJob]:
        return {suffix: graft.job(name) for suffix, name in names.items()}

    jobs = eventually(ended, lambda told: all(job.HasField("end_time") for job in told.values()), 500, "all jobs end")
    failed = {suffix: job.error.message for suffix, job in jobs.items() if job.state != job.STATE_SUCCEEDED}
    assert not failed, failed
    return Jobs(jobs, data)


def _by_command(stack: WholeStack, data: str, suffix: str, *options: str) -> str:
    """The name of a job that `graft tune create` has made."""
    quick = [f"--set={name}={value}" for name, value in QUICK.items() if name == "num_workers"]
    quick += [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name != "num_workers"]
    made = _told(stack, "tune", "create", BASE, data, f"--suffix={suffix}", "--no-follow", *quick, *options)
    return str(made["name"])


def _told(stack: WholeStack, *arguments: str) -> dict[str, Any]:
    done = stack.graft(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _id(name: str) -> str:
    return name.rsplit("/", 1)[-1]
