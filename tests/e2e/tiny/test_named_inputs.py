"""A task from the job that names it to a request with named inputs: what is asked is what was trained on."""

import json
from pathlib import Path

import openai
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from graft.client import Graft
from graft.data.tasks import catalog
from graft.data.tasks.definition import load
from graft.domain.errors import InvalidArgument
from tests.support.tiny_jobs import BASE, write_rows
from tests.support.whole_stack import WholeStack, eventually

pytestmark = pytest.mark.e2e

RAW = """
name: films
version: 3
fields:
  film: What it is called.
  year: {description: When it was made., optional: true}
completion: {field: verdict, template: " {{ verdict }}"}
prompt: "Film: {{ film }}{% if year %} ({{ year }}){% endif +%}\\nVerdict:"
decoding: {max_tokens: 6}
"""
REVIEW = 'Film 3, and "more" of it.'


def rows(count: int) -> list[dict[str, object]]:
    moods = ("positive", "negative")
    return [
        {"review": f"Film {n}", "sentiment": moods[n % 2], "film": f"F{n}", "year": 1950 + n, "verdict": n % 2 == 0}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def models(client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A version that was trained with a built-in task, and one with raw text of its own, both on one data set."""
    file = write_rows(tmp_path_factory.mktemp("rows") / "films.jsonl", rows(24))
    data = client.files.create(file=file, purpose="fine-tune", extra_body={"format": "fields"})
    hyperparameters = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01}
    jobs = {
        suffix: client.fine_tuning.jobs.create(
            model=BASE,
            training_file=data.id,
            suffix=suffix,
            extra_body={"graft": {"hyperparameters": hyperparameters, **task}},
        )
        for suffix, task in (("moods", {"task": "sentiment"}), ("films", {"task_definition": RAW}))
    }
    ended = {
        suffix: eventually(
            lambda job=job: client.fine_tuning.jobs.retrieve(job.id),
            lambda told: told.finished_at is not None,
            240,
            f"{suffix} ends",
        )
        for suffix, job in jobs.items()
    }
    assert all(job.status == "succeeded" for job in ended.values()), [job.error for job in ended.values()]
    return {suffix: str(job.fine_tuned_model) for suffix, job in ended.items()}


def test_named_inputs_are_answered_as_the_prompt_rendered_by_hand(graft: Graft, models: dict[str, str]) -> None:
    by_hand = f"Is this review positive or negative?\n\n{REVIEW}"
    labels = ["positive", "negative"]
    named = graft.generate(models["moods"], inputs={"review": f" {REVIEW}\n"})
    asked = graft.generate(
        models["moods"], messages=[{"role": "user", "content": by_hand}], choices=labels, max_tokens=8
    )
    assert named.text in labels
    assert (named.text, named.usage.prompt_tokens) == (asked.text, asked.usage.prompt_tokens)
    # One token a byte, and six that the chat template adds: nothing else stands in the prompt.
    assert named.usage.prompt_tokens == len(by_hand) + len("user\n\nassistant\n") + 3
    assert named.model == models["moods"]


def test_inputs_of_a_raw_prompt_are_answered_and_streamed_alike(
    graft: Graft, client: openai.OpenAI, models: dict[str, str]
) -> None:
    inputs = {"film": "F1", "year": "1951"}
    named = graft.generate(models["films"], inputs=inputs)
    asked = graft.generate(models["films"], prompt="Film: F1 (1951)\nVerdict:", max_tokens=6)
    assert (named.text, named.usage.prompt_tokens) == (asked.text, asked.usage.prompt_tokens)
    assert named.usage.completion_tokens <= 6
    pieces = list(graft.stream(models["films"], inputs=inputs))
    assert "".join(piece.text for piece in pieces) == named.text
    answer = client.completions.create(model=models["films"], prompt="", extra_body={"inputs": inputs})
    assert answer.choices[0].text == named.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == named.usage.prompt_tokens


def test_inputs_that_do_not_fit_name_the_fields(graft: Graft, client: openai.OpenAI, models: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        graft.generate(models["films"], inputs={"movie": "F1"})
    assert [one.field for one in caught.value.violations] == ["inputs.movie", "inputs.film"]
    with pytest.raises(openai.BadRequestError, match="trained without a task"):
        client.chat.completions.create(model=BASE, messages=[], extra_body={"inputs": {"review": "x"}})


def test_the_definition_is_kept_with_the_version_and_its_files(
    stack: WholeStack, graft: Graft, models: dict[str, str], tmp_path: Path
) -> None:
    version = graft.adapter_version(models["moods"])
    assert version.task == "sentiment"
    assert load(version.task_definition) == catalog.builtin("sentiment")
    own = graft.adapter_version(models["films"])
    assert (own.task, load(own.task_definition)) == ("films", load(RAW))
    registry = MlflowClient(stack.settings.tracking_uri, stack.settings.tracking_uri)
    kept = registry.get_model_version("default--tiny--moods", str(version.version))
    assert kept.tags["graft.task"] == version.task_definition
    files = Path(download_artifacts(kept.source, dst_path=str(tmp_path), tracking_uri=stack.settings.tracking_uri))
    assert (files / "task.yaml").read_text() == version.task_definition


def test_the_command_shows_and_asks_for_the_tasks_inputs(stack: WholeStack, models: dict[str, str]) -> None:
    shown = stack.graft("adapters", "get", models["films"])
    assert "films" in shown.stdout
    asked = stack.graft("generate", models["moods"], "--input", f"review={REVIEW}", "--json")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["text"] in ("positive", "negative")
