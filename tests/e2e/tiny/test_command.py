"""`graft up`, `status` and `models` as commands."""

import json
import socket
from dataclasses import replace

import pytest

from tests.support.whole_stack import WholeStack, make_stack, removed

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("setting", ["GRAFT_GATEWAY_GRPC_PORT", "GRAFT_REGISTRY_PORT", "GRAFT_RAY_PORT"])
def test_up_with_a_taken_port_is_one_sentence_that_names_the_setting(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with removed(make_stack(**{setting: str(port)})) as other:
            ended = other.graft("up")
            assert ended.returncode == 2
            assert ended.stderr.count("\n") == 1
            assert f"Port {port} on 127.0.0.1" in ended.stderr
            assert setting in ended.stderr
            assert other.graft("status").returncode == 4


def test_a_second_up_says_that_the_stack_runs(stack: WholeStack) -> None:
    ended = stack.graft("up")
    assert ended.returncode == 2
    assert "running already" in ended.stderr


def test_status_tells_every_process_as_json(stack: WholeStack) -> None:
    ended = stack.graft("status", "--json")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["ready"]
    assert [process["name"] for process in told["processes"]] == [
        "ray", "mlflow", "gateway", "inference", "orchestrator"
    ]  # fmt: skip
    assert all(process["state"] == "ready" and process["pid"] for process in told["processes"])


def test_the_command_reaches_the_gateway_by_its_address(stack: WholeStack) -> None:
    address = f"127.0.0.1:{stack.settings.gateway.grpc_port}"
    ended = replace(stack, environment={**stack.environment, "GRAFT_ADDRESS": address}).graft("models", "--json")
    assert ended.returncode == 0, ended.stderr
    assert [model["model"] for model in json.loads(ended.stdout)] == ["tiny"]
