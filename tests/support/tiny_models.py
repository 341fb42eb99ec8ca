"""Tiny models of the other architectures that Graft takes, with random weights that make every parameter count."""

from pathlib import Path

from tests.support.tiny_llama import make_tiny_llama


def make_tiny_model(folder: Path, kind: str, **config: object) -> Path:
    """A `llama`, `mistral`, `qwen2` or `qwen3` in `folder`, beside the tiny llama's tokenizer; returns `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tiny_llama(folder)
    made = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **({"sliding_window": None} if kind == "mistral" else {}),
            **config,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    for parameter in model.parameters():
        # Biases start as zeros and norms as ones, and would hide that they are ignored.
        mean, deviation = (0.5, 0.2) if parameter.dim() == 1 else (0.0, 0.1)
        torch.nn.init.normal_(parameter, mean, deviation)
    model.save_pretrained(folder)
    return folder
