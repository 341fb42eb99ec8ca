"""Group-relative policy optimisation without an engine: what is learned, counted and published."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.data.graded import PromptExample
from graft.domain.errors import Unavailable
from graft.domain.grading import GraderSpec
from graft.domain.jobs import EventLevel, Lora, Method, OverLengthPolicy, Reinforcement
from graft.domain.resources import DatasetFormat
from graft.grading.build import build_grader
from graft.grading.items import Grade, GradeItem
from graft.registry.digest import adapter_digest
from graft.storage import Storage
from graft.training import places
from graft.training.imports import AutoModelForCausalLM, AutoTokenizer, LoraConfig, get_peft_model
from graft.training.loop import LoopSettings, StepReport, train
from graft.training.lora import fuse
from graft.training.objectives.objective import ALONE, Group
from graft.training.objectives.reinforcement import Reinforced, advantages, kl_estimates, policy_losses
from graft.training.packing import PACKED
from graft.training.policies import Policies
from graft.training.rollouts import Patience
from graft.training.spec import RunSpec, StartFrom
from tests.support.sampling import LocalSampler
from tests.support.tiny_llama import make_tiny_llama
from tests.support.workers import together

ASKED = Reinforcement(GraderSpec("regex", {"pattern": "[a-f]"}), 8, 4, 1.0, 0.0, 0.2)
LETTERS = build_grader(GraderSpec("regex", {"pattern": "[a-f]"}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.1)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def model(base: Path) -> Any:
    return make_model(base)


def make_model(base: Path) -> Any:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=PACKED)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    made = get_peft_model(causal, config)
    fuse(made)
    return made


def spec_of(folder: Path) -> RunSpec:
    lora = Lora(8, 16.0, 0.0, ("q_proj",))
    return RunSpec(
        "ft-1", 1, "tiny", "", "", "", DatasetFormat.GRADED_PROMPTS, None, None, str(folder), 1, 8, 1e-2, 0.0, 0.0, 1.0,
        64, 0, 1, 100, OverLengthPolicy.FAIL, lora, Method.REINFORCEMENT,
    )  # fmt: skip


def prompts_of(tokenizer: Any, count: int) -> list[PromptExample]:
    return [PromptExample(tokenizer.encode(f"{'Question ' * (n % 3)}{n}: "), {}) for n in range(count)]


def objective_of(
    model: Any,
    tokenizer: Any,
    folder: Path,
    asked: Reinforcement = ASKED,
    grader: Any = LETTERS,
    group: Group = ALONE,
    count: int = 16,
) -> tuple[Reinforced, LocalSampler]:
    sampler = LocalSampler(model, tokenizer, asked.group_size, asked.max_completion_tokens)
    policies = Policies(spec_of(folder), model, sampler, group, silent)
    patience = Patience(silent)
    return Reinforced(prompts_of(tokenizer, count), asked, 0, sampler, policies, grader, patience), sampler


def run(model: Any, objective: Reinforced, steps: int = 10) -> list[dict[str, float]]:
    told: list[dict[str, float]] = []

    def on_step(report: StepReport) -> None:
        told.append({"loss": report.loss, "tokens": report.trained_tokens, **report.metrics})

    train(model, objective, LoopSettings(steps, 8, 1e-2, 0.0, 0.0, 1.0, 0), on_step)
    return told


def silent(_kind: str, _data: dict[str, Any]) -> None:
    """For those who do not listen."""


class AlwaysOne:
    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [Grade(1.0, True, "") for _ in items]


@pytest.mark.parametrize("beta", [0.01, 0.0])
def test_the_reward_rises_and_the_distance_from_the_base_is_measured(
    model: Any, tokenizer: Any, tmp_path: Path, beta: float
) -> None:
    asked = Reinforcement(ASKED.grader, 8, 4, 1.0, beta, 0.2)
    objective, _ = objective_of(model, tokenizer, tmp_path, asked)
    told = run(model, objective)
    assert told[0]["reward"] < 0.2
    assert told[-1]["reward"] > 0.5
    assert told[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert told[-1]["kl"] > 0.1
    assert [step["sampler_ratio"] for step in told] == pytest.approx([1.0] * len(told), abs=1e-3)
    assert {step["clip_ratio"] for step in told} == {0.0}
    assert 1 <= told[-1]["completion_length"] <= 4


def test_each_update_is_a_policy_of_its_own_and_the_one_before_leaves(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    objective, sampler = objective_of(model, tokenizer, tmp_path)
    run(model, objective, steps=4)
    names = [policy.model if policy else None for policy in sampler.asked]
    assert names == [None, "tiny:ft-1-step-1", "tiny:ft-1-step-2", "tiny:ft-1-step-3"]
    assert len({policy.digest for policy in sampler.loaded}) == len({policy.path for policy in sampler.loaded}) == 3
    assert sampler.unloaded == sampler.loaded[:-1]
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["step-3"]
    objective.close()
    assert sampler.unloaded == sampler.loaded
    assert not (tmp_path / "policy").exists()
    assert sampler.closed


def test_an_engine_that_is_away_keeps_a_policys_files_until_it_has_let_go(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, sampler = objective_of(model, tokenizer, tmp_path)

    def away(_: Any) -> None:
        raise Unavailable("It is restarting.", reason="ENGINE_RESTARTING")

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "unload", away)
        run(model, objective, steps=3)
        assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["step-1", "step-2"]
    objective.close()
    assert [policy.model for policy in sampler.unloaded] == ["tiny:ft-1-step-1", "tiny:ft-1-step-2"]
    assert not (tmp_path / "policy").exists()


def test_answers_that_all_earn_alike_teach_nothing_and_need_no_new_policy(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    objective, sampler = objective_of(model, tokenizer, tmp_path, grader=AlwaysOne())
    told = run(model, objective, steps=3)
    assert [step["frac_zero_std"] for step in told] == [1.0] * 3
    assert [step["loss"] for step in told] == [0.0] * 3
    assert [step["tokens"] for step in told] == [0.0] * 3
    assert [policy.model for policy in sampler.loaded] == ["tiny:ft-1-step-1"]
    assert len(objective.latest) == 8 * 8, "and yet their probes can prove the adapter"


def test_two_workers_sample_and_learn_what_one_does(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    asked = Reinforcement(ASKED.grader, 8, 4, 1.0, 0.01, 0.2)

    def work(group: Group, folder: Path) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
        model = models[group.rank]
        objective, sampler = objective_of(model, tokenizer, folder, asked, group=group)
        model.train()
        batch = objective.gather(2, range(5), group)
        for part in objective.parts(batch.items):
            (objective.loss(model, part)[0] / batch.scale).backward()
        assert [policy.model if policy else None for policy in sampler.asked] == ["tiny:ft-1-step-1"]
        return (
            batch.scale,
            batch.metrics,
            {name: value.grad for name, value in model.named_parameters() if value.grad is not None},
        )

    models = [make_model(base)]
    scale, metrics, gradients = work(ALONE, tmp_path / "one")
    models = [make_model(base), make_model(base)]
    both = together(2, lambda group: work(group, tmp_path / "two"))
    timed = {"rollout_seconds", "rollout_tokens_per_second"}
    for other_scale, other_metrics, _ in both:
        assert other_scale == scale
        assert {name: value for name, value in other_metrics.items() if name not in timed} == pytest.approx(
            {name: value for name, value in metrics.items() if name not in timed}
        )
    for name, gradient in gradients.items():
        torch.testing.assert_close(both[0][2][name] + both[1][2][name], gradient, rtol=1e-4, atol=1e-7)


def test_advantages_are_deviations_within_the_group_and_zero_where_all_are_alike() -> None:
    found = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert found.tolist() == pytest.approx([0.75 / (0.5 + 1e-4)] + [-0.25 / (0.5 + 1e-4)] * 3)
    assert advantages(torch.full((7,), 0.1)).tolist() == [0.0] * 7


def test_clipping_stops_only_what_has_gone_too_far_the_right_way() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5])
    losses, clipped = policy_losses(ratios, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert losses.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]


def test_the_estimate_of_the_divergence_is_zero_at_the_reference_and_never_negative() -> None:
    found = kl_estimates(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5]))
    assert found.tolist() == pytest.approx([0.0, math.exp(-1), math.exp(0.5) - 1.5])


def test_training_that_goes_on_from_a_version_samples_that_version_first(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    start = StartFrom("tiny:reviews@1", "default--tiny--reviews", 1, "sha256:r", "", "")
    sampler = LocalSampler(model, tokenizer, 8, 4)
    policies = Policies(replace(spec_of(tmp_path), start_from=start), model, sampler, ALONE, silent)
    first = policies.publish(0, ALONE)
    assert first is not None
    assert (first.model, first.path) == ("tiny:ft-1-step-0", str(tmp_path / "policy" / "step-0"))
    assert sampler.loaded == [first]
    assert adapter_digest(Path(first.path)) == first.digest


def test_a_policy_waits_for_a_storage_that_is_away(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, away = Storage.put_folder, [True]

    def away_once(self: Storage, folder: Path, uri: str) -> None:
        if away:
            away.clear()
            raise Unavailable("The storage is away.", reason="STORAGE_UNAVAILABLE")
        put(self, folder, uri)

    monkeypatch.setattr(Storage, "put_folder", away_once)
    monkeypatch.setattr(places, "RETRY_SECONDS", 0.0)
    (tmp_path / "shared").mkdir()
    spec = replace(spec_of(tmp_path / "run"), storage=Storage(f"file://{tmp_path}/shared"), output_key="runs/ft-1/1")
    told: list[str] = []
    sampler = LocalSampler(model, tokenizer, 8, 4)
    policies = Policies(spec, model, sampler, ALONE, lambda _, data: told.append(data["level"]))
    policy = policies.publish(1, ALONE)
    assert policy is not None
    assert policy.path == f"file://{tmp_path}/shared/runs/ft-1/1/policy/step-1"
    assert sampler.loaded == [policy]
    assert told == [EventLevel.WARN]
