"""A base model's tokenizer is loaded once, as long as it is the same one."""

import json
import shutil
from pathlib import Path

from graft.data.tokenizers import load_tokenizer
from tests.support.tiny_llama import make_tiny_llama


def test_a_tokenizer_is_loaded_once_and_again_where_its_folder_was_made_anew(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "tiny")
    first = load_tokenizer(str(folder))
    assert load_tokenizer(str(folder)) is first
    shutil.rmtree(folder)
    make_tiny_llama(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 77}))
    again = load_tokenizer(str(folder))
    assert (first.model_max_length == 77, again.model_max_length) == (False, 77)
    assert load_tokenizer(str(folder)) is again
