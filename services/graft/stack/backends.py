"""Checks of what the settings place elsewhere: database, storage, MLflow, Ray cluster, inference service.

Each is asked for what Graft will ask of it, and changed by nothing but a small file that is removed again. What is
not named in the settings belongs to the stack itself and is checked in `graft.stack.doctor`.
"""

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from graft.domain.errors import GraftError
from graft.internal import token as engine_token
from graft.settings import Settings
from graft.stack.machine import Check, State

ANSWER_SECONDS = 5.0
"""Another machine on a network that works answers in milliseconds."""
RAY_SECONDS = 90.0
"""Ray Client starts a driver on the head for each session, which takes seconds."""
_RAY_KNOCKS = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "2", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "2"}
"""Ray Client knocks three times. By itself it waits 5, 10 and 15 s: too long for who has mistyped a port or a token."""
_ASK_RAY = """
import json, sys
try:
    from graft.training.link import RayLink
    import ray
    RayLink(sys.argv[1]).connect()
    found = {"cpus": ray.cluster_resources().get("CPU", 0), "nodes": sum(node["Alive"] for node in ray.nodes())}
except BaseException as error:
    lines = [line for line in str(error).splitlines() if line.strip()]
    found = {"error": type(error).__name__, "message": lines[0] if lines else ""}
print("\\n" + json.dumps(found))
"""
"""In a process of its own: Ray takes a second to import and may not come back from a cluster that is half there."""


def check_backends(settings: Settings) -> Iterator[Check]:
    """A check of each that the settings name, asked at once."""
    checks: list[Callable[[Settings], Check]] = []
    if settings.store.url:
        checks.append(check_store)
    if settings.storage.url:
        checks.append(check_storage)
    if settings.registry.tracking_uri:
        checks.append(check_mlflow)
    if settings.orchestrator.ray_address:
        checks.append(check_ray)
    if settings.serving.address:
        checks.append(check_engine)
    if checks:
        with ThreadPoolExecutor(len(checks)) as pool:
            yield from pool.map(lambda check: check(settings), checks)


def check_store(settings: Settings) -> Check:
    """The database answers, and its schema is this Graft's."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from graft.store.sql import schema_revision

    name = "database"
    try:
        where = make_url(settings.store.url).render_as_string(hide_password=True)
        found, wanted = schema_revision(settings.store.url)
    except GraftError as error:
        return Check(name, State.FAIL, error.message, "Correct GRAFT_STORE_URL.")
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()
        fix = "Check host, port, user, password and database in GRAFT_STORE_URL, and that the server is up."
        return Check(name, State.FAIL, f"{where} does not answer: {cause[-1] if cause else error}.", fix)
    migrate = "Run `python -m graft.store.main migrate`."
    if not found:
        return Check(name, State.WARN, f"{where} answers and has no schema yet.", f"Start the gateway. Or: {migrate}")
    if found < wanted:
        return Check(name, State.WARN, f"{where} has schema {found}; this Graft needs {wanted}.", migrate)
    if found > wanted:
        fix = "Run that Graft, or name another database."
        return Check(name, State.FAIL, f"{where} has schema {found}, of a newer Graft than this ({wanted}).", fix)
    return Check(name, State.OK, f"{where} answers, with schema {found}.")


def check_storage(settings: Settings) -> Check:
    """A file can be written, listed, read and removed."""
    from graft.storage import open_storage

    storage = open_storage(settings)
    name, word = "storage", secrets.token_hex(8)
    folder = storage.uri("doctor", word)
    doing = "written"
    try:
        storage.write(f"{folder}/file", word.encode())
        doing = "listed"
        if "file" not in storage.names(folder):
            raise FileNotFoundError
        doing = "read"
        if storage.read(f"{folder}/file") != word.encode():
            raise FileNotFoundError
        doing = "removed"
        storage.delete(folder)
    except GraftError as error:
        fix = "Check storage.url, storage.endpoint_url and the AWS_* variables."
        return Check(name, State.FAIL, f"A file could not be {doing}: {error.message}", fix)
    except FileNotFoundError:
        fix = "Use a storage that shows at once what was written to it."
        return Check(name, State.FAIL, f"A file that was just written to {folder} could not be {doing}.", fix)
    return Check(name, State.OK, f"{storage.root} can be written, listed, read and removed from.")


def check_mlflow(settings: Settings) -> Check:
    """MLflow answers at its health address, and says which version it is."""
    url, name = settings.registry.tracking_uri.rstrip("/"), "mlflow"
    fix = "Check GRAFT_REGISTRY_TRACKING_URI, and that the server is up."
    if not url.startswith(("http://", "https://")):
        return Check(name, State.FAIL, f"{url} is no address of an MLflow server.", fix)
    try:
        with urllib.request.urlopen(f"{url}/version", timeout=ANSWER_SECONDS) as answer:
            found = answer.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            fix = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        return Check(name, State.FAIL, f"MLflow at {url} refuses with HTTP status {error.code}.", fix)
    except (urllib.error.URLError, OSError) as error:
        return Check(name, State.FAIL, f"MLflow at {url} does not answer: {getattr(error, 'reason', error)}.", fix)
    from importlib.metadata import PackageNotFoundError, version

    try:
        mine = version("mlflow")
    except PackageNotFoundError:
        mine = found
    if found.split(".")[0] != mine.split(".")[0]:
        return Check(name, State.FAIL, f"MLflow at {url} is {found}, and this Graft speaks with {mine}.", "Match them.")
    return Check(name, State.OK, f"MLflow {found} answers at {url}.")


def check_ray(settings: Settings) -> Check:
    """A session can be made: the cluster answers, takes the token, and has the same Ray and Python."""
    address, name = settings.orchestrator.ray_address, "ray"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_RAY, address],
            env={**_RAY_KNOCKS, **os.environ},
            capture_output=True,
            text=True,
            timeout=RAY_SECONDS,
        )
        found = json.loads(asked.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"error": "Timeout", "message": f"no session within {RAY_SECONDS:.0f} s"}
    except (IndexError, ValueError):
        found = {"error": "Ended", "message": f"exit code {asked.returncode}"}
    if "error" not in found:
        where = f"{found['nodes']} nodes, {found['cpus']:g} CPUs"
        return Check(name, State.OK, f"The Ray cluster at {address} takes this process: {where}.")
    text = f"{found['error']}: {found['message']}"
    if "version" in text.lower() or "mismatch" in text.lower():
        fix = "Install the cluster's own version of Ray and Python here."
    elif "auth" in text.lower() or "token" in text.lower():
        fix = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token."
    else:
        fix = "Check orchestrator.ray_address (Ray Client listens on 10001), and RAY_AUTH_MODE and RAY_AUTH_TOKEN."
    return Check(name, State.FAIL, f"The Ray cluster at {address} cannot be used: {text}.", fix)


def check_engine(settings: Settings) -> Check:
    """The inference service answers its gRPC, and takes this host's token."""
    from graft.internal.v1 import engine_pb2, engine_pb2_grpc

    address, name = settings.serving.address, "inference"
    token_fix = f"Set serving.token_file ({engine_token.VARIABLE}) to a file with the token of that service."
    try:
        token = engine_token.engine_token(settings)
    except GraftError as error:
        return Check(name, State.FAIL, error.message, token_fix)
    with grpc.insecure_channel(address) as channel:
        try:
            answer = engine_pb2_grpc.EngineStub(channel).Residency(
                engine_pb2.ResidencyRequest(),
                timeout=ANSWER_SECONDS,
                metadata=(("application", "graft-engine"), *engine_token.metadata(token)),
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                told = "takes another token than this host's" if token else "asks for a token, and this host has none"
                return Check(name, State.FAIL, f"The inference service at {address} {told}.", token_fix)
            fix = "Check GRAFT_SERVING_ADDRESS (Ray Serve's gRPC port), and that the service runs."
            return Check(name, State.FAIL, f"No inference service answers at {address} ({error.code().name}).", fix)
    if not answer.replicas or not all(replica.ready for replica in answer.replicas):
        return Check(name, State.WARN, f"The inference service at {address} is not ready yet.", "Wait, or see its log.")
    serves = ", ".join(sorted({replica.base_model for replica in answer.replicas}))
    return Check(name, State.OK, f"The inference service at {address} serves {serves}.")
