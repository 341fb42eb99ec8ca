"""What may change: loads the base and makes of it the model that trains. LoRA and its kin, the last blocks, or all.

Does not know what is learned, and saves nothing (`graft.training.results`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import LastLayers, ServedAs, Sharding, Tuning
from graft.domain.memory import memory_bytes
from graft.domain.sharding import unshardable
from graft.training.imports import AutoModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from graft.training.lora import fuse
from graft.training.memory import check_blocks, check_memory, read_shape
from graft.training.objectives.objective import ALONE, Group
from graft.training.packing import PACKED
from graft.training.spec import RunSpec, StartFrom

SMALL_BASE_BYTES = 32 * 1024 * 1024
"""A base below it is bound by overheads and not by products: bfloat16 would only cost it precision."""
TRAINED = "default"
"""PEFT's name of the adapter that trains."""
REFERENCE = "reference"
"""The frozen copy of the adapter that training began from; never saved."""


def compute_dtype(base_model: Path) -> torch.dtype:
    """bfloat16 on a GPU and where the processor has AMX, else float32, which is faster there (ADR 7).

    LoRA's own weights, gradients and optimizer state are float32 in either case.
    """
    if sum(file.stat().st_size for file in base_model.glob("*.safetensors")) < SMALL_BASE_BYTES:
        return torch.float32
    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def wants_sharding(spec: RunSpec, device: torch.device, group: Group) -> bool:
    """Whether the base is to be spread over the workers; the same on each. `auto` spreads it where what a worker needs
    does not fit into the GPU of one of them: on a CPU, where workers may share their memory, it copies.

    Raises FailedPrecondition when it is to be spread over workers with a GPU and others without.
    """
    if spec.sharding is Sharding.NEVER or group.world_size == 1 or any(unshardable(spec.method, spec.lora)):
        return False
    needed = memory_bytes(read_shape(Path(spec.base_model_path)), spec.tuning, spec.lora, spec.last_layers)
    on_gpu = device.type == "cuda"
    votes = torch.tensor([on_gpu, on_gpu and needed.total_bytes > node_memory_bytes(device)], dtype=torch.float64)
    group.reduce(votes)
    with_gpu, lacking = (int(count) for count in votes)
    if spec.sharding is Sharding.AUTO and not lacking:
        return False
    if 0 < with_gpu < group.world_size:
        raise FailedPrecondition(
            f"The base cannot be spread over {group.world_size} workers of which {with_gpu} have a GPU. Train on nodes "
            "that are alike, or with sharding: never.",
            reason="WORKERS_DIFFER",
        )
    return True


def load_base(spec: RunSpec, device: torch.device, group: Group = ALONE) -> Any:
    """The base model on `device`, with packed attention, in the type that it trains in. In a sharded group it is on
    the CPU instead, from where `graft.training.sharding.shard` takes it.

    Where weights of the base itself train (`full`, `last_layers`, `modules_to_save`) it is float32 on all hardware: at
    their learning rates AdamW moves a weight by less than the half of 2^-8 of it that bfloat16 could tell, so most
    steps would round to nothing. Autocast over float32 weights would multiply faster on some hardware, and cast every
    weight in every microbatch; the plain choice is the same everywhere.

    Raises FailedPrecondition when the node's memory does not hold what training needs, or for a quantized base
    without a GPU and bitsandbytes.
    """
    folder = Path(spec.base_model_path)
    shape = read_shape(folder)
    if spec.tuning is Tuning.LAST_LAYERS:
        check_blocks(shape, spec.base_model, spec.last_layers)
    workers = group.world_size if group.sharded else 1
    check_memory(memory_bytes(shape, spec.tuning, spec.lora, spec.last_layers, workers), node_memory_bytes(device))
    options: dict[str, Any] = {}
    if spec.lora.base_quantization:
        options = {"quantization_config": _quantization(), "device_map": {"": device}}
    if spec.start_from is not None and spec.start_from.served_as is ServedAs.MERGED_MODEL:
        folder = _pull(spec.start_from)
    of_base = spec.tuning is not Tuning.LORA or bool(spec.lora.modules_to_save)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if of_base else compute_dtype(folder),
        attn_implementation=PACKED,
        local_files_only=True,
        **options,
    )
    return model if options or group.sharded else model.to(device)


def tune(spec: RunSpec, base: Any) -> Any:
    """The model that trains: its parameters with gradients are what may change. `base` is of `load_base`, and changed.

    LoRA (Hu et al. 2021, arXiv:2106.09685), rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732) and DoRA (Liu et
    al. 2024, arXiv:2402.09353) are PEFT's. Started from an adapter, LoRA goes on with that adapter's own rank, alpha
    and modules; otherwise it is merged into the base first. Draws LoRA's A from `spec.seed`: every worker draws alike.
    """
    torch.manual_seed(spec.seed)
    if spec.tuning is Tuning.LORA:
        model = _adapted(spec, base)
        fuse(model)
        return model
    if spec.start_from is not None and spec.start_from.served_as is not ServedAs.MERGED_MODEL:
        base = PeftModel.from_pretrained(base, _pull(spec.start_from)).merge_and_unload()
    if spec.tuning is Tuning.FULL:
        return base.requires_grad_(True)
    return _last_layers(base, spec.last_layers)


@contextmanager
def reference(model: Any) -> Iterator[None]:
    """While it is entered, `model` computes what training began from: the frozen base, or the adapter it started with.

    Without dropout. Raises FailedPrecondition where the base itself changes: its outputs must be kept beforehand.
    """
    if not isinstance(model, PeftModel):
        raise FailedPrecondition(
            "A model whose own weights train has no reference beside it; compute what is needed of it before the "
            "first step.",
            reason="NO_REFERENCE",
        )
    was_training = model.training
    model.eval()
    try:
        if REFERENCE not in model.peft_config:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield
            finally:
                model.set_adapter(TRAINED)
    finally:
        model.train(was_training)


def _adapted(spec: RunSpec, base: Any) -> Any:
    if spec.start_from is not None:
        folder = _pull(spec.start_from)
        config = LoraConfig.from_pretrained(folder)
        config.lora_dropout = spec.lora.dropout  # of the training and not of the weights
        config.inference_mode = False
        model = PeftModel.from_pretrained(base, folder, adapter_name=TRAINED, is_trainable=True, config=config)
        model.load_adapter(folder, adapter_name=REFERENCE, is_trainable=False)
        model.set_adapter(TRAINED)
        return model
    return get_peft_model(
        base,
        LoraConfig(
            r=spec.lora.rank,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=list(spec.lora.target_modules),
            use_rslora=spec.lora.use_rslora,
            use_dora=spec.lora.use_dora,
            modules_to_save=list(spec.lora.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    )


def _last_layers(base: Any, asked: LastLayers) -> Any:
    """Freezes all but the last blocks, the final norm and, if asked, the head, which is its own from then on."""
    base.requires_grad_(False)
    decoder = base.get_decoder()
    for module in (*decoder.layers[-asked.blocks :], decoder.norm):
        module.requires_grad_(True)
    if asked.train_head:
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    return base


def _quantization() -> Any:
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        lacking = "a GPU" if not torch.cuda.is_available() else "the package bitsandbytes"
        raise FailedPrecondition(
            f"A base in nf4 needs a GPU and bitsandbytes, and this node lacks {lacking}. Leave base_quantization out.",
            reason="QUANTIZATION_UNAVAILABLE",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def node_memory_bytes(device: torch.device) -> int:
    """Of the device or the machine, in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _pull(start: StartFrom) -> Path:
    from graft.registry.mlflow_registry import Registry  # whose client takes seconds to import

    registry = Registry(start.tracking_uri, Path(start.cache))
    pull = registry.pull_model if start.served_as is ServedAs.MERGED_MODEL else registry.pull
    return pull(start.registered_model, start.version, start.digest)
