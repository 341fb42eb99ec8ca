from pathlib import Path

import pytest

from graft.cli.job_options import job_options, what_it_does
from graft.client import requests
from graft.client.requests import JobOptions
from graft.domain.errors import InvalidArgument


def options(*settings: str, method: str = "", tuning: str = "lora", task: str = "", grader: str = "") -> JobOptions:
    return job_options(settings, method=method, tuning=tuning, task=task, grader=grader)


def test_every_section_of_the_job_form_can_be_set_by_name() -> None:
    found = options("lora.use_dora=true", "lora.modules_to_save=lm_head", "eval_steps=5", "preference.beta=0.2")
    assert found["lora"] == {"use_dora": True, "modules_to_save": ["lm_head"]}
    assert found["hyperparameters"] == {"eval_steps": 5}
    assert (found["method"], found["method_options"]) == ("preference", {"beta": 0.2})
    quantized = options("lora.base_quantization=nf4", "supervised.loss_on=all")
    assert quantized["lora"] == {"base_quantization": "BASE_QUANTIZATION_NF4"}
    assert quantized["method_options"] == {"loss_on": "LOSS_ON_ALL"}


def test_a_grader_makes_the_job_one_of_reinforcement_with_its_settings() -> None:
    found = options("grader.field=answer", "grader.tolerance=0.5", "reinforcement.group_size=4", grader="numeric")
    assert found["method"] == "reinforcement"
    assert found["method_options"] == {
        "group_size": 4,
        "grader": {"kind": "numeric", "settings": {"field": "answer", "tolerance": 0.5}},
    }
    job = requests.create_job("projects/default", "base", "ds-1", **found).fine_tuning_job
    assert job.reinforcement.grader.settings["tolerance"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((("lora.use_dora=maybe",), {}), "use true or false"),
        ((("supervised.loss_on=some",), {}), "use one of: completion, all"),
        ((("preference.beta=0.1",), {"method": "supervised"}), "says nothing when the method is supervised"),
        ((("grader.field=x",), {}), "without --grader KIND"),
        (((), {"grader": "numeric", "method": "preference"}), "says nothing when the method is preference"),
        ((("reinforcement.grader=x",), {}), "use NAME=VALUE with one of"),
        (((), {"task": "missing.yaml"}), "missing.yaml cannot be read"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(arguments: tuple[tuple[str, ...], dict[str, str]], told: str) -> None:
    settings, given = arguments
    with pytest.raises(InvalidArgument, match=told):
        options(*settings, **given)


def test_a_task_is_a_name_or_the_text_of_a_file(tmp_path: Path) -> None:
    assert options(task="sentiment")["task"] == "sentiment"
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n")
    assert options(task=str(file))["task_definition"] == "name: mine\n"
    assert options(task=str(file.rename(tmp_path / "mine")))["task_definition"] == "name: mine\n"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "magic"}, "'magic' is none of: supervised"),
        ({"tuning": "some"}, "'some' is none of: lora"),
        ({"served_as": "cake"}, "'cake' is none of: adapter"),
        ({"method_options": {"beta": 1.0}}, "without a method"),
        ({"method": "preference", "method_options": {"bata": 1.0}}, "bata"),
        ({"tuning": "full", "lora": {"rank": 4}}, "when the tuning is 'full'"),
        ({"learning_rate": 1.0}, "is not an option of a job"),
    ],
)
def test_the_sdk_refuses_an_option_that_does_not_exist_before_it_asks(given: JobOptions, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        requests.create_job("projects/default", "base", "ds-1", **given)


def test_what_a_job_does_is_told_in_words() -> None:
    full = requests.create_job("p", "base", "ds-1", tuning="full", served_as="low_rank_delta", method="self_supervised")
    assert what_it_does(full.fine_tuning_job) == "self-supervised, every parameter, served as a low-rank delta"
    dora = requests.create_job("p", "base", "ds-1", lora={"use_dora": True}, served_as="merged_model")
    assert what_it_does(dora.fine_tuning_job) == "DoRA, served as a model of its own"
