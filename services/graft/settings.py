"""Every setting of every process: one typed class a process, read from `graft.yaml` and `GRAFT_*` variables.

`graft.yaml` has one section a class (`gateway:`, `serving:` …); a variable is `GRAFT_<SECTION>_<FIELD>` and wins over
the file. Unknown sections, keys and variables are refused. The file is `$GRAFT_CONFIG`, or `$GRAFT_HOME/graft.yaml`.
Does not know what the settings are used for.
"""

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from graft.domain.errors import InvalidArgument
from graft.domain.placement import Demand, Node
from graft.placement_settings import (
    ReplicaPoolSettings,
    ReplicaSettings,
    WorkerGroupSettings,
    WorkerSettings,
    overridden,
)

MIB = 1024 * 1024


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses; a name that might resolve elsewhere is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parsed(value: object) -> object:
    """A variable's text as YAML, for a field that holds more than one value: `GRAFT_TRAINING_WORKER='{gpus: 1}'`."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise ValueError(f"is not YAML: {value}") from None


def _number(value: object) -> object:
    """A variable's text as a number: pydantic reads one for `int` by itself, but not for a Literal of numbers."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


class HomeSettings(_Section):
    """Where state lives. `GRAFT_HOME` and `GRAFT_CACHE` are read without a section."""

    path: Path
    """Database, MLflow, artifacts, data sets, runs, logs."""
    cache: Path
    """Converted base models and pulled adapters; may be shared between homes and deleted while nothing runs."""


class StoreSettings(_Section):
    """The SQL store."""

    url: str = ""
    """SQLAlchemy URL, `sqlite+aiosqlite:///…` or `postgresql+psycopg://…`. Empty: SQLite in the home."""


class StorageSettings(_Section):
    """Where data sets, checkpoints and results lie that several hosts read."""

    url: str = ""
    """`s3://bucket/prefix`, or another fsspec URL. Empty: the home, for processes on one machine."""
    endpoint_url: str = ""
    """Of an S3-compatible server (MinIO, Ceph …); empty: Amazon's, or AWS_ENDPOINT_URL. Keys come by AWS_* variables,
    never from here."""

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and "://" not in value:
            raise ValueError("must be a URL such as s3://bucket/prefix, or empty")
        return value


class GatewaySettings(_Section):
    """The gRPC and HTTP edge."""

    host: str = "127.0.0.1"
    """Any address but loopback is refused until API keys are set."""
    grpc_port: int = 50051
    http_port: int = 8080
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    max_message_bytes: int = 4 * MIB
    """gRPC's own default; larger prompts than the context cannot be answered anyway."""
    max_upload_bytes: int = 512 * MIB
    """OpenAI's limit for a file."""
    shutdown_grace_seconds: float = 10.0
    initial_key_file: Path | None = None
    """Holds an API key of the project `default`, which is added to the store at start: a cluster's first."""


_Nested = BeforeValidator(_parsed)


class ServingSettings(_Section):
    """The inference service: one base model and many adapters, and whatever is deployed beside them."""

    address: str = ""
    """`host:port` of an inference service that runs elsewhere. Empty: the stack's own, on `host` and `grpc_port`."""
    token_file: Path | None = None
    """Holds the token that the internal gRPC asks for, the same on every host that serves, trains, or runs gateway or
    orchestrator. None: the stack's own service has one that `graft up` makes, and any other asks for none."""
    host: str = "127.0.0.1"
    grpc_port: int = 9000
    base_model: str = "smollm2-135m"
    max_loras: int = Field(default=4, ge=1)
    """Adapters in one batch (vLLM's GPU-side slots)."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Adapters in the engine's host memory; beyond it the least recently used leaves."""
    max_lora_rank: Annotated[Literal[8, 16, 32, 64, 128, 256, 320, 512], BeforeValidator(_number)] = 64
    context_tokens: int = 2048
    """Longest prompt plus answer. 2048 keeps 4 sequences in half a GiB of KV cache at 135M parameters."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Of each engine: every base model that is deployed beside the first has one."""
    max_num_seqs: int = 32
    num_replicas: int = Field(default=1, ge=1)
    max_replicas_per_node: int = Field(default=0, ge=0, le=100)
    """1: each replica on a host of its own, so that a host that is lost takes one of them; a replica too many waits for
    a host. 0: as Ray places them, which may be all on one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: float32 on a CPU without AMX, where it is the faster one, else bfloat16."""
    replica: Annotated[ReplicaSettings, _Nested] = ReplicaSettings()
    pools: Annotated[dict[str, ReplicaPoolSettings], _Nested] = Field(default_factory=dict)
    """By base model."""

    def pool(self, base_model: str) -> ReplicaPoolSettings:
        """How the base model is served, with everything that its own pool leaves out."""
        default = ReplicaPoolSettings(num_replicas=self.num_replicas, **self.replica.model_dump())
        return overridden(default, self.pools.get(base_model))


class RegistrySettings(_Section):
    """MLflow."""

    tracking_uri: str = ""
    """Empty: the stack's own server on `host` and `port`."""
    host: str = "127.0.0.1"
    port: int = 5000
    backend_store_uri: str = ""
    """Of the stack's own server: its database, such as `postgresql://…`. Empty: SQLite in the home."""
    artifacts_destination: str = ""
    """Of the stack's own server: a folder or a URL such as `s3://bucket/mlflow`. Empty: a folder in the home."""


class OrchestratorSettings(_Section):
    """The job loop."""

    ray_address: str = ""
    """`ray://host:10001`, which needs nothing of Ray on this machine, or `host:port` of the head of a cluster that this
    machine is a node of. Empty: the stack's own cluster."""
    poll_seconds: float = 0.25
    lease_seconds: float = 15.0
    max_concurrent_jobs: int = 0
    """0: as many as the cluster has room for."""
    registry_poll_seconds: float = 1.0
    """An alias moved in MLflow is honoured within five seconds."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    """Where Prometheus reads what the orchestrator measures, by HTTP and without a key. 0: nowhere."""


class TrainingSettings(_Section):
    """Where jobs train, and with what."""

    quantized_base: bool = False
    """Every training node has a GPU and bitsandbytes: QLoRA is accepted."""
    worker: Annotated[WorkerSettings, _Nested] = WorkerSettings()
    pools: Annotated[dict[str, WorkerSettings], _Nested] = Field(default_factory=dict)
    """By base model; what is left out is as in `worker`."""
    share: Annotated[dict[str, Annotated[float, Field(ge=0)]], _Nested] = Field(default_factory=dict)
    """The most that all jobs hold together, by Ray's names: `{CPU: 6, GPU: 1}`. The rest is for inference on the same
    cluster. What is not named has no bound but the nodes."""
    worker_groups: Annotated[dict[str, WorkerGroupSettings], _Nested] = Field(default_factory=dict)
    """What the cluster can grow to, where Ray's autoscaler runs: a job that fits there is started, and waits for its
    nodes. Empty: what is there is all."""
    nodes_wait_seconds: float = Field(default=900.0, gt=0)
    """How long a started job may wait for its nodes: one with a GPU that pulls an image of 10 GB takes ten minutes."""

    def demand(self, base_model: str) -> Demand:
        """What a worker of the base model asks of its node."""
        return overridden(self.worker, self.pools.get(base_model)).demand

    @property
    def largest(self) -> list[Node]:
        """Every node that there can be; none where that is not declared."""
        return [node for group in self.worker_groups.values() for node in group.nodes]


class RaySettings(_Section):
    """The local Ray head."""

    host: str = "127.0.0.1"
    port: int = 6379
    dashboard_port: int = 8265
    num_cpus: int = 0
    """0: the machine's cores."""
    object_store_mib: int = 256
    """Graft moves weights through files, not through Ray objects."""


class Settings(_Section):
    """All sections. A process takes the ones that it needs."""

    home: HomeSettings
    store: StoreSettings = StoreSettings()
    storage: StorageSettings = StorageSettings()
    gateway: GatewaySettings = GatewaySettings()
    serving: ServingSettings = ServingSettings()
    registry: RegistrySettings = RegistrySettings()
    orchestrator: OrchestratorSettings = OrchestratorSettings()
    training: TrainingSettings = TrainingSettings()
    ray: RaySettings = RaySettings()

    @property
    def store_url(self) -> str:
        """The store's URL, filled in for the embedded database."""
        return self.store.url or f"sqlite+aiosqlite:///{self.home.path / 'graft.db'}"

    @property
    def tracking_uri(self) -> str:
        """MLflow's URI, filled in for the stack's own server."""
        return self.registry.tracking_uri or f"http://{self.registry.host}:{self.registry.port}"

    @property
    def gateway_address(self) -> str:
        """`host:port` of the gateway's gRPC, from this machine."""
        return f"{self._gateway_host}:{self.gateway.grpc_port}"

    @property
    def gateway_url(self) -> str:
        """Of the gateway's HTTP, from this machine."""
        scheme = "http" if self.gateway.tls_certificate is None else "https"
        return f"{scheme}://{self._gateway_host}:{self.gateway.http_port}"

    @property
    def _gateway_host(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.gateway.host, self.gateway.host)
        return f"[{host}]" if ":" in host and not host.startswith("[") else host

    @property
    def orchestrator_pid_file(self) -> Path:
        """Holds the orchestrator's pid while it works on jobs."""
        return self.home.path / "run" / "orchestrator.pid"

    def evaluation_dir(self, project: str, evaluation_id: str) -> Path:
        """Where an evaluation keeps its answers and its report."""
        return self.home.path / "evaluations" / project / evaluation_id

    @property
    def engine_address(self) -> str:
        """`host:port` of the internal gRPC."""
        return self.serving.address or f"{self.serving.host}:{self.serving.grpc_port}"

    @property
    def ray_address(self) -> str:
        """Where Ray is: `host:port` of its head, or `ray://host:port`."""
        return self.orchestrator.ray_address or f"{self.ray.host}:{self.ray.port}"


_PLAIN = {"GRAFT_HOME", "GRAFT_CACHE", "GRAFT_CONFIG", "GRAFT_ADDRESS", "GRAFT_API_KEY", "GRAFT_PROJECT"}
"""Variables without a section; the last three are the client's."""


def _from_environment(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    known = {
        f"GRAFT_{section}_{name}".upper(): (section, name)
        for section, info in Settings.model_fields.items()
        if section != "home" and isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for name in info.annotation.model_fields
    }
    found: dict[str, dict[str, str]] = {}
    for variable, value in environment.items():
        if not variable.startswith("GRAFT_") or variable in _PLAIN or variable.startswith("GRAFT_TEST_"):
            continue
        if variable not in known:
            close = difflib.get_close_matches(variable, [*known, *_PLAIN], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InvalidArgument(f"{variable} is not a setting.{hint}", reason="UNKNOWN_SETTING")
        section, name = known[variable]
        found.setdefault(section, {})[name] = value
    return found


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """This host's cache, by `GRAFT_CACHE` or `GRAFT_HOME` alone: Ray's nodes have no settings file."""
    env = os.environ if environment is None else environment
    home = Path(env.get("GRAFT_HOME") or "~/.graft").expanduser().absolute()
    return Path(env.get("GRAFT_CACHE") or home / "cache").expanduser().absolute()


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Reads the file and the environment (`os.environ` when None). Raises InvalidArgument listing every fault."""
    env = os.environ if environment is None else environment
    home = Path(env.get("GRAFT_HOME") or "~/.graft").expanduser().absolute()
    cache = cache_folder(env)
    file = Path(env.get("GRAFT_CONFIG") or home / "graft.yaml")
    sections: dict[str, Any] = {}
    if file.is_file():
        try:
            sections = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise InvalidArgument(f"{file} is not YAML: {error}", reason="INVALID_SETTINGS") from None
        if not isinstance(sections, dict):
            raise InvalidArgument(f"{file}: expected sections such as `gateway:`", reason="INVALID_SETTINGS")
    elif env.get("GRAFT_CONFIG"):
        raise InvalidArgument(f"GRAFT_CONFIG names {file}, which does not exist.", reason="INVALID_SETTINGS")
    for section, values in _from_environment(env).items():
        sections[section] = {**(sections.get(section) or {}), **values}
    sections["home"] = {"path": home, "cache": cache}
    try:
        return Settings.model_validate(sections)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise InvalidArgument(f"Settings ({file} and GRAFT_*): {faults}", reason="INVALID_SETTINGS") from None
