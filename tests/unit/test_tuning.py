"""What changes, and in which form it is left: each choice on the tiny llama, from the base to the loaded result."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.data.prepare import Example
from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.domain.jobs import LastLayers, Lora, ServedAs, Tuning
from graft.domain.memory import FLOAT_BYTES, memory_bytes
from graft.domain.resources import BaseModel
from graft.orchestrator.evaluating import Probe, fits
from graft.registry.base_models import LINEAR
from graft.registry.digest import adapter_digest
from graft.serving.prove import base_shapes, prove
from graft.training import loop
from graft.training.memory import read_shape
from graft.training.objectives.supervised import Supervised, mean_loss
from graft.training.packing import PACKED
from graft.training.results import Yardstick, save_result
from graft.training.saving import PROBE_TOKENS, describe, save_checkpoint
from graft.training.spec import RunSpec, StartFrom
from graft.training.tuning import load_base, reference, tune
from tests.support.run_specs import tiny_run
from tests.support.tiny_llama import make_tiny_llama

CPU = torch.device("cpu")
PLAIN = Lora(4, 8.0, 0.0, LINEAR)
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])
STEPS = loop.LoopSettings(15, 8, 3e-3, 0.1, 0.0, 1.0, 0)
EXACT = 2e-5
"""Largest difference of a logit between the model in memory and what was saved of it. Measured: 4e-6."""

CHOICES = {
    "lora": {"lora": PLAIN},
    "rslora": {"lora": replace(PLAIN, use_rslora=True)},
    "dora": {"lora": replace(PLAIN, use_dora=True), "served_as": ServedAs.LOW_RANK_DELTA},
    "head": {"lora": replace(PLAIN, modules_to_save=("lm_head",)), "served_as": ServedAs.LOW_RANK_DELTA},
    "last": {"tuning": Tuning.LAST_LAYERS, "last_layers": LastLayers(1), "served_as": ServedAs.LOW_RANK_DELTA},
    "last-head": {
        "tuning": Tuning.LAST_LAYERS,
        "last_layers": LastLayers(1, train_head=True),
        "served_as": ServedAs.LOW_RANK_DELTA,
    },
    "full": {"tuning": Tuning.FULL, "served_as": ServedAs.LOW_RANK_DELTA},
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def spec(base_folder: Path, tmp_path: Path) -> RunSpec:
    return tiny_run(
        base_folder,
        "nowhere",
        tmp_path / "run",
        total_steps=15,
        learning_rate=3e-3,
        lora=Lora(),
        delta_rank=8,
    )


def _examples(count: int = 8) -> list[Example]:
    rng = random.Random(0)
    return [Example([rng.randint(3, 250) for _ in range(12)], [False] * 6 + [True] * 6) for _ in range(count)]


def _yardstick(held_out: bool = True) -> Yardstick:
    return Yardstick(_examples(), held_out, lambda model: mean_loss(model, _examples()))


def _logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def _plain(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _packed(model: Any) -> Any:
    model.get_base_model().set_attn_implementation(PACKED)
    return model


def _train(spec: RunSpec) -> Any:
    model = tune(spec, load_base(spec, CPU))
    before = mean_loss(model, _examples())
    loop.train(model, Supervised(_examples()), STEPS, lambda _: None)
    assert mean_loss(model, _examples()) < before - 0.1
    return model


def _silent(_kind: str, _data: dict[str, Any]) -> None:
    return None


def _trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shapes(base_folder: Path) -> Any:
    return base_shapes(BaseModel("tiny", str(base_folder), "sha256:b", 1, 1, 512, "", "", LINEAR, 64))


@pytest.mark.parametrize("choice", CHOICES)
def test_each_choice_learns_and_what_it_leaves_loads_as_it_was_served(
    choice: str, spec: RunSpec, base_folder: Path
) -> None:
    from peft import PeftModel

    mine = replace(spec, **CHOICES[choice])
    told: list[dict[str, Any]] = []
    model = _train(mine)
    logits = _logits(model)
    before = mean_loss(model, _examples())
    result = save_result(mine, model, _yardstick(), lambda _, data: told.append(data))
    root = Path(mine.output_dir)

    adapter = root / "adapter"
    served = PeftModel.from_pretrained(_plain(base_folder), adapter)
    prove(adapter, _shapes(base_folder), model="m", max_lora_rank=64, expected_digest=adapter_digest(adapter))
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == (8 if mine.delta_rank and told else 4)
    about = json.loads((adapter / "graft.json").read_text())
    for probe in about["probes"]:
        example = Example(probe["prompt_token_ids"] + probe["completion_token_ids"], [False] * 6 + [True] * 6)
        served.set_adapter("default")
        scored = served(torch.tensor([example.token_ids])).logits[0].log_softmax(-1).detach()
        expected = [float(scored[5 + n, token]) for n, token in enumerate(probe["completion_token_ids"])]
        assert sum(expected) / len(expected) == pytest.approx(probe["mean_logprob"], abs=1e-4)
    if mine.served_as is ServedAs.ADAPTER:
        assert (_logits(served) - logits).abs().max() < EXACT
        assert set(result) == {"adapter_bytes"}
        assert not (root / "model").exists()
        return
    assert 0 < result["delta_retained_fraction"] < 1
    assert result["validation_loss"] == pytest.approx(before, abs=1e-4)
    assert "the validation data's first 8 examples" in told[0]["message"]
    assert mean_loss(_packed(served), _examples()) == pytest.approx(before + result["delta_loss_change"], abs=1e-4)
    if mine.tuning is Tuning.LORA:
        assert not (root / "model").exists()
        again = PeftModel.from_pretrained(_plain(base_folder), root / "trained_adapter")
        assert (_logits(again) - logits).abs().max() < EXACT
        with pytest.raises(FailedPrecondition, match="use_dora" if mine.lora.use_dora else "modules_to_save"):
            prove(root / "trained_adapter", _shapes(base_folder), model="m", max_lora_rank=64, expected_digest="")
    else:
        assert (_logits(_plain(root / "model")) - logits).abs().max() < EXACT
        from transformers import AutoTokenizer

        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base_folder, root / "model")]
        messages = [{"role": "user", "content": "hello"}]
        first, second = (each.apply_chat_template(messages, tokenize=True) for each in tokenizers)
        assert first == second
        assert json.loads((root / "model" / "graft.json").read_text())["probes"] != about["probes"]


def _long(count: int, mask: Callable[[int], bool]) -> list[Example]:
    rng = random.Random(1)
    length = 400
    return [
        Example([rng.randint(3, 250) for _ in range(length)], [mask(place) for place in range(length)])
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("first_learned", "prompt_tokens"), [(0, 1), (1, 1), (100, 100), (390, PROBE_TOKENS // 2), (399, PROBE_TOKENS // 2)]
)
def test_probes_of_long_examples_are_excerpts_that_the_engine_scores_as_the_trainer_did(
    first_learned: int, prompt_tokens: int, spec: RunSpec, base_folder: Path
) -> None:
    mine = replace(spec, context_tokens=400)
    model = _plain(base_folder)
    examples = _long(5, lambda place: place >= first_learned)
    # The base's own positions are scored by plain transformers, the trainer's by its packed attention.
    about = describe(mine, load_base(mine, CPU), examples)
    assert len(about["probes"]) == 4
    for probe, example in zip(about["probes"], examples, strict=False):
        prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
        assert fits(Probe(prompt, completion, 0.0), PROBE_TOKENS + 1)
        assert len(prompt) == prompt_tokens
        place = max(first_learned, 1)
        assert completion[0] == example.token_ids[place], "the completion starts at the first learned token"
        assert prompt + completion == example.token_ids[place - len(prompt) : place + len(completion)]
        with torch.no_grad():
            scored = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = [float(scored[len(prompt) - 1 + n, token]) for n, token in enumerate(completion)]
        assert probe["mean_logprob"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_a_probe_leaves_room_for_an_answer_in_the_context_that_it_was_trained_in(
    spec: RunSpec, base_folder: Path
) -> None:
    del base_folder
    about = describe(spec, load_base(spec, CPU), _long(1, bool))
    (probe,) = about["probes"]
    assert fits(Probe(probe["prompt_token_ids"], probe["completion_token_ids"], 0.0), spec.context_tokens)


def test_what_may_change_is_exactly_what_was_chosen(spec: RunSpec) -> None:
    def trained(choice: str) -> set[str]:
        return _trained_names(tune(replace(spec, **CHOICES[choice]), load_base(replace(spec, **CHOICES[choice]), CPU)))

    every = {name for name, _ in load_base(replace(spec, lora=PLAIN), CPU).named_parameters()}
    assert trained("full") == every
    last = {name for name in every if name.startswith("model.layers.1.")} | {"model.norm.weight"}
    assert trained("last") == last
    assert trained("last-head") == last | {"lm_head.weight"}
    sides = {name.rpartition(".default")[0].rpartition(".")[2] for name in trained("dora")}
    assert sides == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert len(trained("lora")) == 2 * 2 * 7
    assert trained("head") - trained("lora") == {"base_model.model.lm_head.modules_to_save.default.weight"}


@pytest.mark.parametrize("choice", ["full", "last", "last-head", "head"])
def test_weights_of_the_base_train_in_float32_also_where_the_rest_computes_in_bfloat16(
    choice: str, spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.training.tuning.compute_dtype", lambda _: torch.bfloat16)
    model = tune(replace(spec, **CHOICES[choice]), load_base(replace(spec, **CHOICES[choice]), CPU))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert load_base(replace(spec, lora=PLAIN), CPU).dtype == torch.bfloat16


def test_the_embeddings_stay_tied_in_full_tuning_and_the_last_layers_head_is_untied(spec: RunSpec) -> None:
    full = tune(replace(spec, **CHOICES["full"]), load_base(replace(spec, **CHOICES["full"]), CPU))
    assert full.get_output_embeddings().weight is full.get_input_embeddings().weight
    mine = replace(spec, **CHOICES["last-head"])
    last = _train(mine)
    assert not torch.equal(last.get_output_embeddings().weight, last.get_input_embeddings().weight)
    assert torch.equal(last.get_input_embeddings().weight, load_base(mine, CPU).get_input_embeddings().weight)
    for model, tied in ((full, True), (last, False)):
        folder = Path(spec.output_dir) / "checkpoints" / "step-1"
        save_checkpoint(model, Path(spec.base_model_path), folder)
        # Not every engine looks whether the file has a head; all read the configuration.
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


@pytest.mark.parametrize("choice", ["dora", "head"])
def test_an_adapter_that_the_engine_does_not_load_is_merged_into_a_model(choice: str, spec: RunSpec) -> None:
    mine = replace(spec, **{**CHOICES[choice], "served_as": ServedAs.MERGED_MODEL})
    model = _train(mine)
    logits = _logits(model)
    result = save_result(mine, model, _yardstick(), _silent)
    root = Path(mine.output_dir)
    assert sorted(path.name for path in root.iterdir()) == ["model", "trained_adapter"]
    assert (_logits(_plain(root / "model")) - logits).abs().max() < EXACT
    assert json.loads((root / "model" / "config.json").read_text())["tie_word_embeddings"] is (choice != "head")
    assert set(result) == {"model_bytes"}


def test_of_whole_models_the_last_two_checkpoints_stay(spec: RunSpec, base_folder: Path) -> None:
    mine = replace(spec, **CHOICES["full"])
    model = tune(mine, load_base(mine, CPU))
    folder = Path(spec.output_dir) / "checkpoints"
    for step in (2, 9, 10, 100):
        save_checkpoint(model, base_folder, folder / f"step-{step}")
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-100"]
    assert torch.equal(_logits(_plain(folder / "step-100")), _logits(_plain(base_folder)))


def test_more_blocks_than_there_are_are_refused_with_both_numbers(spec: RunSpec) -> None:
    mine = replace(spec, tuning=Tuning.LAST_LAYERS, last_layers=LastLayers(3))
    with pytest.raises(InvalidArgument, match="last 3 blocks, and tiny has 2"):
        load_base(mine, CPU)


def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.training.tuning.node_memory_bytes", lambda _: 20_000_000)
    with pytest.raises(FailedPrecondition, match=r"this node has 0\.02 GB") as caught:
        load_base(replace(spec, **CHOICES["full"]), CPU)
    assert caught.value.reason == "DOES_NOT_FIT"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_quantized_base_without_a_gpu_is_refused(spec: RunSpec) -> None:
    with pytest.raises(FailedPrecondition, match="lacks a GPU"):
        load_base(replace(spec, lora=replace(PLAIN, base_quantization="nf4")), CPU)


def test_the_estimate_counts_the_parameters_that_there_are(base_folder: Path, spec: RunSpec) -> None:
    shape = read_shape(base_folder)
    for choice in CHOICES.values():
        mine = replace(spec, **choice)
        model = tune(mine, load_base(mine, CPU))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        counted = memory_bytes(shape, mine.tuning, mine.lora, mine.last_layers).gradients_bytes // FLOAT_BYTES
        # DoRA's magnitudes, one number an output, are not worth counting.
        assert counted == trained or (mine.lora.use_dora and counted > 0.8 * trained)
    assert shape.parameters == sum(parameter.numel() for parameter in _plain(base_folder).parameters())
    full = memory_bytes(shape, Tuning.FULL, Lora(), LastLayers())
    assert full.weights_bytes + full.gradients_bytes + full.optimizer_bytes == 16 * shape.parameters


@pytest.mark.parametrize("choice", ["lora", "dora", "head"])
def test_the_reference_of_lora_is_the_base_while_gradients_wait(choice: str, spec: RunSpec, base_folder: Path) -> None:
    model = _train(replace(spec, **CHOICES[choice]))
    trained = _trained_names(model)
    loss = model(TOKENS, labels=TOKENS).loss
    with reference(model), torch.no_grad():
        assert (model(TOKENS).logits - _plain(base_folder)(TOKENS).logits).abs().max() < EXACT
    assert _trained_names(model) == trained
    assert model.training
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_whole_model_has_no_reference(spec: RunSpec) -> None:
    mine = replace(spec, **CHOICES["full"])
    with pytest.raises(FailedPrecondition, match="before the first step"), reference(tune(mine, load_base(mine, CPU))):
        pass


@pytest.fixture
def start(spec: RunSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, RunSpec]:
    """The model of a first run, and the specification of one that goes on from its adapter."""
    first = replace(spec, output_dir=str(tmp_path / "first"), lora=replace(PLAIN, rank=3, use_rslora=True))
    model = _train(first)
    save_result(first, model, _yardstick(), _silent)
    monkeypatch.setattr("graft.training.tuning._pull", lambda _: tmp_path / "first" / "adapter")
    return model, replace(
        spec, start_from=StartFrom("tiny:a@1", "default--tiny--a", 1, "sha256:a", "nowhere", "nowhere")
    )


def test_lora_goes_on_from_an_adapter_whose_frozen_copy_is_the_reference(start: tuple[Any, RunSpec]) -> None:
    from peft import PeftModel

    first, mine = start
    mine = replace(mine, lora=replace(PLAIN, rank=3))
    model = tune(mine, load_base(mine, CPU))
    expected = _logits(first)
    assert (_logits(model) - expected).abs().max() < EXACT
    loop.train(model, Supervised(_examples()), STEPS, lambda _: None)
    assert (_logits(model) - expected).abs().max() > 0.1
    trained = _trained_names(model)
    assert all(".default." in name for name in trained)
    model.train()
    loss = model(TOKENS, labels=TOKENS).loss
    with reference(model), torch.no_grad():
        assert (model(TOKENS).logits - expected).abs().max() < EXACT
    assert _trained_names(model) == trained
    loss.backward()
    logits = _logits(model)
    save_result(mine, model, _yardstick(), _silent)
    adapter = Path(mine.output_dir) / "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]
    assert (_logits(PeftModel.from_pretrained(_plain(mine.base_model_path), adapter)) - logits).abs().max() < EXACT
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (3, True)


@pytest.mark.parametrize("choice", ["full", "last"])
def test_weights_of_the_base_go_on_from_the_adapter_merged_into_them(choice: str, start: tuple[Any, RunSpec]) -> None:
    first, mine = start
    mine = replace(mine, **CHOICES[choice])
    model = tune(mine, load_base(mine, CPU))
    assert (_logits(model) - _logits(first)).abs().max() < EXACT
    assert _trained_names(model) == _trained_names(
        tune(replace(mine, start_from=None), load_base(replace(mine, start_from=None), CPU))
    )


def test_full_tuning_goes_on_from_a_model_of_its_own(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(spec, **{**CHOICES["full"], "served_as": ServedAs.MERGED_MODEL})
    model = _train(mine)
    logits = _logits(model)
    save_result(mine, model, _yardstick(), _silent)
    monkeypatch.setattr("graft.training.tuning._pull", lambda _: Path(mine.output_dir) / "model")
    start = StartFrom("tiny:a@1", "default--tiny--a", 1, "sha256:a", "nowhere", "nowhere", ServedAs.MERGED_MODEL)
    again = replace(mine, start_from=start)
    assert (_logits(tune(again, load_base(again, CPU))) - logits).abs().max() < EXACT
