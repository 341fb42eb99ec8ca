"""deploy/serve.yaml is what Ray Serve and the application's builder read, and agrees with the rest of Graft."""

import importlib
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from graft import offline
from graft.internal.engine_client import APPLICATION
from graft.serving.declared import Arguments
from graft.settings import ServingSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    return loaded


def test_ray_serve_accepts_the_file_and_everything_it_names_is_there(document: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(document)
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    for function in config.grpc_options.grpc_servicer_functions:
        module, _, name = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_gateways_find_the_application_and_no_library_in_it_calls_home(document: dict[str, Any]) -> None:
    (application,) = document["applications"]
    assert application["name"] == APPLICATION
    assert application["runtime_env"]["env_vars"] == offline.ENVIRONMENT
    assert document["grpc_options"]["port"] == ServingSettings().grpc_port


def test_the_token_that_it_tells_of_is_an_argument() -> None:
    text = (ROOT / "deploy" / "serve.yaml").read_text()
    (application,) = yaml.safe_load(text.replace("# token_file:", "token_file:"))["applications"]
    assert Arguments.model_validate(application["args"]).serving.token_file == Path("/etc/graft-engine/token")


def test_its_arguments_are_typed_and_a_wrong_one_is_named(document: dict[str, Any]) -> None:
    arguments = document["applications"][0]["args"]
    assert Arguments.model_validate(arguments).serving.base_model == "smollm2-135m"
    with pytest.raises(pydantic.ValidationError, match=r"serving\.num_replica\b"):
        Arguments.model_validate({**arguments, "serving": {"num_replica": 2}})
    with pytest.raises(pydantic.ValidationError, match="tracking_uri"):
        Arguments.model_validate({"home": "/home"})
