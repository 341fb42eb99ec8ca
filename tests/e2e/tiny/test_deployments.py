"""A second base model, deployed beside the first on a running stack, and taken away again."""

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.client import Graft
from graft.domain.errors import FailedPrecondition, NotFound
from tests.support.serving_stack import titles
from tests.support.tiny_jobs import BASE, Trained, write_rows
from tests.support.tiny_llama import make_tiny_llama
from tests.support.whole_stack import WholeStack, eventually

pytestmark = pytest.mark.e2e

OTHER = "tiny-other"
WHOLE = "tiny-whole-1"
PROMPT = "Number 5?"
TOKENS = 12


def greedy(folder: Path) -> str:
    """What plain transformers continue PROMPT with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        made = model.generate(inputs, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(made[0, inputs.shape[1] :], skip_special_tokens=True))


def perplexity(folder: Path, texts: list[str]) -> float:
    """Of all tokens, each text's first after the end of another, by plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scored = []
    for text in texts:
        tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        scored.append(logprobs.gather(1, tokens[0, 1:, None]))
    return float(torch.exp(-torch.cat(scored).mean()))


@pytest.fixture(scope="module", autouse=True)
def catalogue(stack: WholeStack, graft: Graft) -> Iterator[Path]:
    """The stack's file of base models, which is again what it was when these tests have ended."""
    file = stack.home / "base_models.yaml"
    text = file.read_text()
    yield file
    file.write_text(text)
    eventually(lambda: [one.model for one in graft.base_models()], lambda ids: ids == [BASE], 30, "it is as it was")


def add(catalogue: Path, graft: Graft, name: str, folder: Path) -> None:
    entries = yaml.safe_load(catalogue.read_text())
    catalogue.write_text(yaml.safe_dump({**entries, name: {"folder": str(folder), "license": "MIT"}}))
    eventually(lambda: {one.model for one in graft.base_models()}, lambda ids: name in ids, 30, "it is listed")


def ask(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0).choices[0].text


def not_served(graft: Graft) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition, match=f"graft models deploy {OTHER}") as refused:
        graft.generate(OTHER, prompt=PROMPT)
    assert refused.value.reason == "BASE_MODEL_NOT_SERVED"
    return refused.value


def test_a_second_base_model_is_deployed_answers_as_itself_and_leaves_nothing_behind(
    stack: WholeStack,
    graft: Graft,
    client: openai.OpenAI,
    trained: Trained,
    base_folder: Path,
    catalogue: Path,
    tmp_path: Path,
) -> None:
    other_folder = make_tiny_llama(tmp_path, seed=7, layers=3, tied=False)
    add(catalogue, graft, OTHER, other_folder)
    not_served(graft)
    before = {process.pid for process in stack.left()}
    expected = greedy(other_folder)
    assert expected != greedy(base_folder)
    of_adapter = ask(client, trained.sums.fine_tuned_model)

    ended = threading.Event()
    wrong: list[str] = []

    def keep_asking() -> None:
        while not ended.is_set():
            if (said := ask(client, trained.sums.fine_tuned_model)) != of_adapter:
                wrong.append(said)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        deployed = stack.graft("models", "deploy", OTHER, "--json")
    finally:
        ended.set()
        asking.join()
    assert deployed.returncode == 0, deployed.stderr
    assert json.loads(deployed.stdout)["state"] == "STATE_READY"
    assert wrong == []

    assert ask(client, OTHER) == expected
    assert graft.generate(OTHER, prompt=PROMPT, max_tokens=TOKENS).text == expected
    assert ask(client, BASE) == greedy(base_folder)
    assert ask(client, trained.sums.fine_tuned_model) == of_adapter
    assert {one.model: one.served for one in graft.base_models()} == {BASE: True, OTHER: True}
    assert sorted(replica.base_model for replica in graft.residency()) == [BASE, OTHER]

    texts: list[dict[str, object]] = [{"text": f"{word} is what {word} does. " * 4} for word in ("red", "two")]
    data = graft.upload_dataset(write_rows(tmp_path / "texts.jsonl", texts))
    made = graft.create_evaluation(data.name, [BASE, OTHER])
    done = eventually(lambda: graft.evaluation(made.name), lambda now: now.HasField("end_time"), 120, "it ends")
    assert done.state == done.STATE_SUCCEEDED, done.error.message
    for result, folder in zip(done.results, (base_folder, other_folder), strict=True):
        (told,) = [figure.value for figure in result.figures if figure.metric == "perplexity"]
        assert told == pytest.approx(perplexity(folder, [str(row["text"]) for row in texts]), rel=1e-3)

    undeployed = stack.graft("models", "undeploy", OTHER)
    assert undeployed.returncode == 0, undeployed.stderr
    with pytest.raises(NotFound):
        graft.deployment(OTHER)
    not_served(graft)
    # Ray keeps idle workers, which hold no model, for the next actor.
    eventually(
        lambda: [
            title for title in titles([p for p in stack.left() if p.pid not in before]) if "ray::IDLE" not in title
        ],
        lambda left: left == [],
        60,
        "what the deployment started has ended",
    )
    assert ask(client, trained.sums.fine_tuned_model) == of_adapter


def test_a_full_model_that_a_job_made_is_served_as_a_base_model_and_trained_on(
    stack: WholeStack, graft: Graft, client: openai.OpenAI, trained: Trained
) -> None:
    quick = {"max_steps": 5, "batch_size": 4, "learning_rate": 0.005}
    job = graft.create_job(
        BASE, trained.data.name, suffix="whole", tuning="full", served_as="merged_model", hyperparameters=quick
    )
    *_, last = graft.watch_job(job.name)
    assert last.fine_tuning_job.fine_tuned_model == "tiny:whole@1", last.fine_tuning_job.error.message
    with pytest.raises(FailedPrecondition, match="graft models deploy tiny:whole@1"):
        graft.generate("tiny:whole", prompt=PROMPT)

    deployed = stack.graft("models", "deploy", "tiny:whole", "--json")
    assert deployed.returncode == 0, deployed.stderr
    assert json.loads(deployed.stdout)["model"] == WHOLE
    assert WHOLE in {model.id for model in client.models.list()}
    assert ask(client, WHOLE) == greedy(stack.home / "base_models" / WHOLE)

    job = graft.create_job(WHOLE, trained.data.name, suffix="more", hyperparameters={**quick, "learning_rate": 0.05})
    *_, last = graft.watch_job(job.name)
    assert last.fine_tuning_job.fine_tuned_model == f"{WHOLE}:more@1", last.fine_tuning_job.error.message
    assert ask(client, f"{WHOLE}:more")
    (held,) = [replica for replica in graft.residency() if replica.base_model == WHOLE]
    assert [adapter.model for adapter in held.adapters] == [f"{WHOLE}:more@1"]
    assert stack.graft("models", "undeploy", WHOLE).returncode == 0
    assert {one.model: one.served for one in graft.base_models()}[WHOLE] is False  # but still in the catalogue


def test_a_base_model_whose_weights_cannot_be_loaded_fails_with_its_reason_and_is_not_tried_again(
    stack: WholeStack, graft: Graft, catalogue: Path, tmp_path: Path
) -> None:
    broken = make_tiny_llama(tmp_path, layers=2)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))  # weights of two are missing
    add(catalogue, graft, "broken", broken)
    ended: subprocess.CompletedProcess[str] = stack.graft("models", "deploy", "broken")
    assert ended.returncode == 1
    assert "The engine of broken does not start" in ended.stderr
    (told,) = [one for one in graft.deployments() if one.model == "broken"]
    assert told.state == told.STATE_FAILED
    with pytest.raises(FailedPrecondition, match="its deployment failed"):
        graft.generate("broken", prompt=PROMPT)
    assert [replica.base_model for replica in graft.residency()] == [BASE]
    assert stack.graft("models", "undeploy", "broken").returncode == 0
