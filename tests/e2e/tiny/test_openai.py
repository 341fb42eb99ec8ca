"""OpenAI's published client, unmodified, against Graft: files, jobs, models, answers."""

import openai
import pytest

from tests.support.tiny_jobs import CHECKPOINT_STEPS, STEPS, Trained

pytestmark = pytest.mark.e2e

MODEL = "tiny:echo@1"


def test_a_job_succeeds_and_names_its_model(client: openai.OpenAI, trained: Trained) -> None:
    job = client.fine_tuning.jobs.retrieve(trained.echo.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == MODEL
    assert job.error is None
    assert job.seed == 3
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0
    file = client.files.retrieve(job.training_file)
    assert (file.filename, file.purpose, file.status) == ("echo.jsonl", "fine-tune", "processed")
    assert client.files.content(job.training_file).text.count("\n") == 41


def test_its_events_are_listed_newest_first_over_pages(client: openai.OpenAI, trained: Trained) -> None:
    events = list(client.fine_tuning.jobs.list_events(trained.echo.id, limit=7))
    assert len({event.id for event in events}) == len(events) > 7
    assert events[0].message == f"{MODEL} is trained, proven and loaded."
    metrics = [event for event in events if event.type == "metrics"]
    assert metrics
    assert isinstance(metrics[0].data, dict)
    assert metrics[0].data["step"] == STEPS


def test_its_checkpoints_are_listed_newest_first(client: openai.OpenAI, trained: Trained) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.echo.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [2 * CHECKPOINT_STEPS, CHECKPOINT_STEPS]
    assert all(checkpoint.fine_tuning_job_id == trained.echo.id for checkpoint in checkpoints)
    assert all(checkpoint.metrics.train_loss for checkpoint in checkpoints)


def test_models_are_listed_and_retrieved(client: openai.OpenAI, trained: Trained) -> None:
    listed = {model.id for model in client.models.list()}
    assert {"tiny", "tiny:echo", MODEL, "tiny:sums", trained.sums.fine_tuned_model} <= listed
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve("tiny:echo@champion").id == "tiny:echo@champion"


@pytest.mark.usefixtures("trained")
def test_a_chat_is_answered_by_the_fine_tuned_model_at_once_and_streamed_alike(client: openai.OpenAI) -> None:
    asked = {"messages": [{"role": "user", "content": "Say 7"}], "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(model=MODEL, **asked)
    base = client.chat.completions.create(model="tiny", **asked)
    assert answer.model == MODEL
    assert answer.choices[0].message.content
    assert answer.choices[0].message.content != base.choices[0].message.content
    chunks = list(client.chat.completions.create(model="tiny:echo", stream=True, **asked))
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_a_prompt_is_completed_by_the_fine_tuned_model(client: openai.OpenAI, trained: Trained) -> None:
    answer = client.completions.create(model=trained.sums.fine_tuned_model, prompt="Number 5?", max_tokens=4)
    assert answer.model == "tiny:sums@1"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4
