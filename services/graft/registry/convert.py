"""Converts a GGUF file to a Hugging Face folder in safetensors, in a process whose torch and memory end with it.

python -m graft.registry.convert model.gguf folder
"""

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Writes weights in bfloat16, configuration and tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.bfloat16, local_files_only=True)
    # transformers has dequantised the weights, and yet refuses to save while these say otherwise.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name, local_files_only=True).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
