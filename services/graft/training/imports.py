"""The heavy imports of a worker, in one place and without what training never uses.

A worker's start is mostly imports. transformers loads scikit-learn, and with it scipy, for one curve of assisted
generation: a quarter of the time to import it and peft (2.9 of 12 s on a busy machine).
"""

import transformers.utils
import transformers.utils.import_utils


def _no_sklearn() -> bool:
    return False


# Asked once, when `transformers.generation` is first imported; put back at once, since others may ask as well.
_asked = transformers.utils.import_utils.is_sklearn_available
transformers.utils.is_sklearn_available = _no_sklearn
try:
    import transformers.generation.candidate_generator
finally:
    transformers.utils.is_sklearn_available = _asked

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "LoraConfig",
    "LoraLinear",
    "PeftModel",
    "get_peft_model",
]
