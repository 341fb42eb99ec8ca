"""How much memory a worker needs to train, from the base model's shape alone.

An estimate, told before anything is loaded: float32 throughout, as where the hardware multiplies nothing smaller.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from graft.domain.jobs import DEFAULT_BLOCKS, DEFAULT_RANK, JobSpec, LastLayers, Lora, Memory, Sharding, Tuning
from graft.domain.shapes import Shape

MICROBATCH_TOKENS = 1024
"""Tokens in one forward pass. What backward needs kept is some 1.7 MB a token at 135M parameters in float32: 1.7 GB.
Speed has levelled off long before."""

WHOLE_BLOCKS = 2
"""Of a base that is spread over workers: the block that computes and the next one, which is gathered meanwhile; and of
gradients the block's own and their copy on the way to the other workers."""
FLOAT_BYTES = 4
QUANTIZED_BYTES = 0.55
"""A weight in nf4, with its block's scale (Dettmers et al. 2023, arXiv:2305.14314, section 3: 4.127 bits and what stays
in 16)."""


def asked_memory(spec: JobSpec, shape: Shape, target_modules: Sequence[str], start_rank: int = 0) -> Memory:
    """What training by `spec` needs, before its open values are derived.

    `target_modules` are the base's linear layers, which an empty choice means; `start_rank` that of the adapter that
    training starts from, 0 without one. Of a sweep over ranks it is the trial with the highest.
    """
    lora, last_layers = Lora(), LastLayers()
    if spec.tuning is Tuning.LORA:
        asked = spec.lora
        rank = max(spec.sweep.ranks) if spec.sweep and spec.sweep.ranks else asked.rank or start_rank or DEFAULT_RANK
        lora = replace(asked, rank=rank, target_modules=asked.target_modules or tuple(target_modules))
    elif spec.tuning is Tuning.LAST_LAYERS:
        last_layers = replace(spec.last_layers, blocks=spec.last_layers.blocks or DEFAULT_BLOCKS)
    return memory_bytes(shape, spec.tuning, lora, last_layers, sharing_workers(spec))


def sharing_workers(spec: JobSpec) -> int:
    """Over how many workers the job has its base spread; 1 where they find that out themselves."""
    asked = spec.hyperparameters
    return (asked.num_workers or 1) if asked.sharding is Sharding.ALWAYS else 1


def _trained(shape: Shape, tuning: Tuning, lora: Lora, last_layers: LastLayers) -> tuple[int, int]:
    """How many change in the blocks, and how many beside them."""
    head = shape.head_parameters
    if tuning is Tuning.FULL:
        blocks = shape.blocks * shape.block_parameters
        return blocks, shape.parameters - blocks
    if tuning is Tuning.LAST_LAYERS:
        return last_layers.blocks * shape.block_parameters, shape.hidden + (head if last_layers.train_head else 0)
    sides = [sum(sizes) for name, sizes in shape.linear.items() if name in lora.target_modules]
    return shape.blocks * lora.rank * sum(sides), head if lora.modules_to_save else 0


def memory_bytes(shape: Shape, tuning: Tuning, lora: Lora, last_layers: LastLayers, workers: int = 1) -> Memory:
    """What training needs: weights, gradients, AdamW's two moments, and the activations of one microbatch. Of more
    than one worker, what each needs when the blocks are spread over them.

    A block keeps about ten vectors of the hidden width a token and four of the intermediate one for its backward pass;
    the head keeps logits, their softmax and its gradient. Blocks below the first that trains keep nothing. `lora` and
    `last_layers` with every value concrete.
    """
    in_blocks, beside = _trained(shape, tuning, lora, last_layers)
    blocks = last_layers.blocks if tuning is Tuning.LAST_LAYERS else shape.blocks
    trained = beside + _part(in_blocks, workers)
    own = shape.head_parameters if lora.modules_to_save or (last_layers.train_head and shape.tied) else 0
    base_blocks = shape.blocks * shape.block_parameters
    base = shape.parameters - base_blocks + _part(base_blocks, workers)
    gradients = trained
    if workers > 1:
        base += WHOLE_BLOCKS * shape.block_parameters
        gradients += WHOLE_BLOCKS * math.ceil(in_blocks / blocks)
    weights = base * (QUANTIZED_BYTES if lora.base_quantization else FLOAT_BYTES) + own * FLOAT_BYTES
    if tuning is Tuning.LORA:
        weights += (trained - own) * FLOAT_BYTES
    token_floats = blocks * (10 * shape.hidden + 4 * shape.intermediate) + 3 * shape.vocabulary
    return Memory(
        weights_bytes=int(weights),
        gradients_bytes=gradients * FLOAT_BYTES,
        optimizer_bytes=2 * trained * FLOAT_BYTES,
        activations_bytes=MICROBATCH_TOKENS * token_floats * FLOAT_BYTES,
    )


def _part(parameters: int, workers: int) -> int:
    return math.ceil(parameters / workers)
