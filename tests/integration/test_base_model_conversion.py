"""A packaged base model that is no model."""

from pathlib import Path

import pytest
import yaml

from graft.domain.errors import FailedPrecondition
from graft.registry.base_models import ensure_base_model
from graft.settings import load

pytestmark = pytest.mark.integration


def test_a_file_that_cannot_be_converted_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    entry = {"package": "iniconfig", "file": "py.typed"}
    (tmp_path / "base_models.yaml").write_text(yaml.safe_dump({"broken": entry}))
    with pytest.raises(FailedPrecondition, match=r"^py\.typed cannot be converted .*make setup"):
        ensure_base_model(load({"GRAFT_HOME": str(tmp_path)}), "broken")
    assert [path.suffix for path in (tmp_path / "cache" / "base_models").iterdir()] == [".lock"]
