"""The asyncio client. `graft.client.blocking` is the same list of calls without asyncio."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from graft.api.v1 import (
    adapter_pb2,
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    base_model_pb2,
    base_model_service_pb2,
    base_model_service_pb2_grpc,
    dataset_pb2,
    dataset_report_pb2,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    deployment_pb2,
    evaluation_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    fine_tuning_job_pb2,
    fine_tuning_service_pb2,
    fine_tuning_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)
from graft.client import requests
from graft.client.connection import OPTIONS, Connection
from graft.client.failures import from_rpc_error
from graft.client.uploads import Upload
from graft.domain.errors import Unavailable

RECONNECT_SECONDS = 1.0
RECONNECTS = 30
"""A watch survives a gateway that is away for half a minute."""


class AsyncGraft:
    """One connection to a gateway. Every call raises `graft.domain.errors`."""

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection or Connection()
        credentials = self.connection.credentials
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self.connection.target, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self.connection.target, credentials, options=OPTIONS)
        channel = self._channel
        self._datasets = dataset_service_pb2_grpc.DatasetServiceStub(channel)
        self._jobs = fine_tuning_service_pb2_grpc.FineTuningServiceStub(channel)
        self._evaluations = evaluation_service_pb2_grpc.EvaluationServiceStub(channel)
        self._adapters = adapter_service_pb2_grpc.AdapterServiceStub(channel)
        self._tasks = task_service_pb2_grpc.TaskServiceStub(channel)
        self._models = base_model_service_pb2_grpc.BaseModelServiceStub(channel)
        self._generation = generation_service_pb2_grpc.GenerationServiceStub(channel)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, metadata=self.connection.metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.connection.target) from None

    async def _pages(self, method: Callable[..., Any], request: Any, field: str) -> AsyncIterator[Any]:
        while True:
            page = await self._call(method, request)
            for item in getattr(page, field):
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    # Base models

    async def base_models(self) -> list[base_model_pb2.BaseModel]:
        """The catalogue, by id."""
        request = base_model_service_pb2.ListBaseModelsRequest(parent=self.connection.parent)
        return [item async for item in self._pages(self._models.ListBaseModels, request, "base_models")]

    async def deploy_model(self, model: str, deployment_id: str = "") -> deployment_pb2.Deployment:
        """Asks for a base model, or a full model's version, to be served; `deployment` tells how far it is.

        `deployment_id` is what requests will call a full model; `base-adapter-version` when empty.
        """
        request = base_model_service_pb2.DeployModelRequest(
            parent=self.connection.parent, model=model, deployment_id=deployment_id
        )
        result: deployment_pb2.Deployment = await self._call(self._models.DeployModel, request)
        return result

    async def undeploy_model(self, deployment: str) -> deployment_pb2.Deployment:
        """Asks for its end; `deployment` raises NotFound when it has come."""
        name = requests.deployment(self.connection.parent, deployment)
        request = base_model_service_pb2.UndeployModelRequest(name=name)
        result: deployment_pb2.Deployment = await self._call(self._models.UndeployModel, request)
        return result

    async def deployment(self, deployment: str) -> deployment_pb2.Deployment:
        """One deployment, by id or resource name."""
        name = requests.deployment(self.connection.parent, deployment)
        request = base_model_service_pb2.GetDeploymentRequest(name=name)
        result: deployment_pb2.Deployment = await self._call(self._models.GetDeployment, request)
        return result

    async def deployments(self) -> list[deployment_pb2.Deployment]:
        """What is served beside the stack's first base model, by id."""
        request = base_model_service_pb2.ListDeploymentsRequest(parent=self.connection.parent)
        return [item async for item in self._pages(self._models.ListDeployments, request, "deployments")]

    # Tasks

    async def tasks(self) -> list[task_pb2.Task]:
        """The tasks that Graft brings, by name."""
        request = task_service_pb2.ListTasksRequest(parent=self.connection.parent)
        return [item async for item in self._pages(self._tasks.ListTasks, request, "tasks")]

    async def task(self, task: str) -> task_pb2.Task:
        """One task, by name or resource name; its `definition` is what a job's `task_definition` takes."""
        request = task_service_pb2.GetTaskRequest(name=requests.task(self.connection.parent, task))
        result: task_pb2.Task = await self._call(self._tasks.GetTask, request)
        return result

    # Data sets

    async def upload_dataset(
        self,
        path: str | Path,
        display_name: str = "",
        *,
        format: str = "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> dataset_pb2.Dataset:
        """Streams a JSONL, CSV or Parquet file up, or what an fsspec URL names.

        `format` declares the rows' layout, for example `alpaca`, where it is not to be recognised. `progress` is
        told the bytes sent so far, in another thread. Raises InvalidArgument with the first 20 bad rows as violations,
        or the formats that the file may have.
        """
        upload = await asyncio.to_thread(Upload, self.connection.parent, path, display_name, format, progress)

        async def parts() -> AsyncIterator[dataset_service_pb2.UploadDatasetRequest]:
            while (part := await asyncio.to_thread(next, upload, None)) is not None:
                yield part

        with upload:
            result: dataset_pb2.Dataset = await self._call(self._datasets.UploadDataset, parts())
        return result

    async def dataset(self, dataset: str) -> dataset_pb2.Dataset:
        """One data set, by id or resource name."""
        request = dataset_service_pb2.GetDatasetRequest(name=requests.dataset(self.connection.parent, dataset))
        result: dataset_pb2.Dataset = await self._call(self._datasets.GetDataset, request)
        return result

    async def datasets(self) -> list[dataset_pb2.Dataset]:
        """All data sets, newest first."""
        request = dataset_service_pb2.ListDatasetsRequest(parent=self.connection.parent)
        return [item async for item in self._pages(self._datasets.ListDatasets, request, "datasets")]

    async def validate_dataset(
        self, dataset: str, base_model: str = "", **options: Unpack[requests.CheckOptions]
    ) -> dataset_report_pb2.DatasetReport:
        """Measures a data set for a base model, the served one when empty; the options are
        `graft.client.requests.CheckOptions`. Raises Unavailable (CHECK_RUNNING) when it takes longer than a minute: ask
        again."""
        request = requests.validate_dataset(self.connection.parent, dataset, base_model, **options)
        result: dataset_report_pb2.DatasetReport = await self._call(self._datasets.ValidateDataset, request)
        return result

    async def delete_dataset(self, dataset: str) -> None:
        """Raises FailedPrecondition while a live job or evaluation uses it."""
        request = dataset_service_pb2.DeleteDatasetRequest(name=requests.dataset(self.connection.parent, dataset))
        await self._call(self._datasets.DeleteDataset, request)

    # Jobs

    async def create_job(
        self, base_model: str, training_dataset: str, **options: Unpack[requests.JobOptions]
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Asks for a fine-tune; the options are `graft.client.requests.JobOptions`."""
        request = requests.create_job(self.connection.parent, base_model, training_dataset, **options)
        result: fine_tuning_job_pb2.FineTuningJob = await self._call(self._jobs.CreateFineTuningJob, request)
        return result

    async def job(self, job: str) -> fine_tuning_job_pb2.FineTuningJob:
        """One job, by id or resource name."""
        request = fine_tuning_service_pb2.GetFineTuningJobRequest(name=requests.job(self.connection.parent, job))
        result: fine_tuning_job_pb2.FineTuningJob = await self._call(self._jobs.GetFineTuningJob, request)
        return result

    async def jobs(self) -> list[fine_tuning_job_pb2.FineTuningJob]:
        """All jobs, newest first."""
        request = fine_tuning_service_pb2.ListFineTuningJobsRequest(parent=self.connection.parent)
        return [item async for item in self._pages(self._jobs.ListFineTuningJobs, request, "fine_tuning_jobs")]

    async def cancel_job(self, job: str) -> fine_tuning_job_pb2.FineTuningJob:
        """Asks to cancel; the job ends in STATE_CANCELLED soon after."""
        request = fine_tuning_service_pb2.CancelFineTuningJobRequest(name=requests.job(self.connection.parent, job))
        result: fine_tuning_job_pb2.FineTuningJob = await self._call(self._jobs.CancelFineTuningJob, request)
        return result

    async def watch_job(
        self, job: str, after_sequence: int = 0
    ) -> AsyncIterator[fine_tuning_service_pb2.WatchFineTuningJobResponse]:
        """Events until the job ends. Reconnects from the last event when the gateway goes away for a while."""
        name = requests.job(self.connection.parent, job)
        failures = 0
        while True:
            request = fine_tuning_service_pb2.WatchFineTuningJobRequest(name=name, after_sequence=after_sequence)
            call = self._jobs.WatchFineTuningJob(request, metadata=self.connection.metadata)
            try:
                async for update in call:
                    after_sequence, failures = update.event.sequence, 0
                    yield update
            except grpc.RpcError as error:
                failure = from_rpc_error(error, self.connection.target)
                failures += 1
                if not isinstance(failure, Unavailable) or failures > RECONNECTS:
                    raise failure from None
                await asyncio.sleep(RECONNECT_SECONDS)
            else:
                return
            finally:
                call.cancel()  # the reader may have left

    async def job_events(self, job: str) -> list[fine_tuning_job_pb2.FineTuningJobEvent]:
        """Events of a job so far, in order."""
        parent = requests.job(self.connection.parent, job)
        request = fine_tuning_service_pb2.ListFineTuningJobEventsRequest(parent=parent)
        return [item async for item in self._pages(self._jobs.ListFineTuningJobEvents, request, "events")]

    async def job_checkpoints(self, job: str) -> list[fine_tuning_job_pb2.FineTuningJobCheckpoint]:
        """Checkpoints of a job, in order."""
        parent = requests.job(self.connection.parent, job)
        request = fine_tuning_service_pb2.ListFineTuningJobCheckpointsRequest(parent=parent)
        return [item async for item in self._pages(self._jobs.ListFineTuningJobCheckpoints, request, "checkpoints")]

    # Evaluations

    async def create_evaluation(
        self, dataset: str, contestants: Sequence[str | tuple[str, int]], **options: Unpack[requests.EvaluationOptions]
    ) -> evaluation_pb2.Evaluation:
        """Compares models on held-out data. A contestant is a `model`, or a model and its number of shots."""
        request = requests.create_evaluation(self.connection.parent, dataset, contestants, **options)
        result: evaluation_pb2.Evaluation = await self._call(self._evaluations.CreateEvaluation, request)
        return result

    async def evaluation(self, evaluation: str) -> evaluation_pb2.Evaluation:
        """One evaluation, by id or resource name."""
        name = requests.evaluation(self.connection.parent, evaluation)
        request = evaluation_service_pb2.GetEvaluationRequest(name=name)
        result: evaluation_pb2.Evaluation = await self._call(self._evaluations.GetEvaluation, request)
        return result

    async def evaluations(self) -> list[evaluation_pb2.Evaluation]:
        """All evaluations, newest first."""
        request = evaluation_service_pb2.ListEvaluationsRequest(parent=self.connection.parent)
        return [item async for item in self._pages(self._evaluations.ListEvaluations, request, "evaluations")]

    async def cancel_evaluation(self, evaluation: str) -> evaluation_pb2.Evaluation:
        """Asks to cancel; it ends in STATE_CANCELLED soon after."""
        name = requests.evaluation(self.connection.parent, evaluation)
        request = evaluation_service_pb2.CancelEvaluationRequest(name=name)
        result: evaluation_pb2.Evaluation = await self._call(self._evaluations.CancelEvaluation, request)
        return result

    async def evaluation_report(self, evaluation: str) -> bytes:
        """The report, one HTML page. Raises FailedPrecondition before the evaluation has succeeded."""
        name = requests.evaluation(self.connection.parent, evaluation)
        request = evaluation_service_pb2.GetEvaluationReportRequest(name=name)
        return bytes((await self._call(self._evaluations.GetEvaluationReport, request)).html)

    # Adapters

    async def adapters(self, base_model: str = "-") -> list[adapter_pb2.Adapter]:
        """Adapters of a base model, or of all."""
        parent = f"{self.connection.parent}/baseModels/{base_model}"
        request = adapter_service_pb2.ListAdaptersRequest(parent=parent)
        return [item async for item in self._pages(self._adapters.ListAdapters, request, "adapters")]

    async def adapter(self, model: str) -> adapter_pb2.Adapter:
        """The adapter `base:adapter`, with its aliases."""
        request = adapter_service_pb2.GetAdapterRequest(name=requests.adapter(self.connection.parent, model))
        result: adapter_pb2.Adapter = await self._call(self._adapters.GetAdapter, request)
        return result

    async def adapter_version(self, model: str) -> adapter_pb2.AdapterVersion:
        """One version: `base:adapter@3`, `base:adapter@alias`, or the champion of `base:adapter`."""
        request = adapter_service_pb2.GetAdapterVersionRequest(name=requests.version(self.connection.parent, model))
        result: adapter_pb2.AdapterVersion = await self._call(self._adapters.GetAdapterVersion, request)
        return result

    async def adapter_versions(self, model: str) -> list[adapter_pb2.AdapterVersion]:
        """Versions of `base:adapter`, newest first."""
        parent = requests.adapter(self.connection.parent, model)
        request = adapter_service_pb2.ListAdapterVersionsRequest(parent=parent)
        return [item async for item in self._pages(self._adapters.ListAdapterVersions, request, "adapter_versions")]

    async def set_alias(self, model: str, alias: str, version: int) -> adapter_pb2.Adapter:
        """Points an alias of `base:adapter` at a version, in the registry."""
        request = requests.alias(self.connection.parent, model, alias, version)
        result: adapter_pb2.Adapter = await self._call(self._adapters.SetAdapterAlias, request)
        return result

    async def load_adapter(self, model: str) -> list[adapter_pb2.ReplicaResidency]:
        """Loads `base:adapter@version` into the inference service."""
        name = requests.version(self.connection.parent, model)
        request = adapter_service_pb2.LoadAdapterVersionRequest(name=name)
        return list((await self._call(self._adapters.LoadAdapterVersion, request)).replicas)

    async def unload_adapter(self, model: str) -> list[adapter_pb2.ReplicaResidency]:
        """Takes `base:adapter@version` out of the inference service."""
        name = requests.version(self.connection.parent, model)
        request = adapter_service_pb2.UnloadAdapterVersionRequest(name=name)
        return list((await self._call(self._adapters.UnloadAdapterVersion, request)).replicas)

    async def residency(self) -> list[adapter_pb2.ReplicaResidency]:
        """What every replica holds."""
        request = adapter_service_pb2.GetResidencyRequest(parent=self.connection.parent)
        return list((await self._call(self._adapters.GetResidency, request)).replicas)

    # Generation

    async def generate(
        self,
        model: str,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        inputs: Mapping[str, str] | None = None,
        **sampling: Any,
    ) -> generation_service_pb2.GenerateResponse:
        """Answers a raw prompt, a chat, or the inputs of a task; `sampling` as in `graft.client.requests.generate`."""
        request = requests.generate(
            self.connection.parent, model, prompt=prompt, messages=messages, inputs=inputs, **sampling
        )
        result: generation_service_pb2.GenerateResponse = await self._call(self._generation.Generate, request)
        return result

    async def stream(
        self,
        model: str,
        *,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        inputs: Mapping[str, str] | None = None,
        **sampling: Any,
    ) -> AsyncIterator[generation_service_pb2.StreamGenerateResponse]:
        """The same, token by token."""
        inner = requests.generate(
            self.connection.parent, model, prompt=prompt, messages=messages, inputs=inputs, **sampling
        )
        request = generation_service_pb2.StreamGenerateRequest(request=inner)
        call = self._generation.StreamGenerate(request, metadata=self.connection.metadata)
        try:
            async for piece in call:
                yield piece
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.connection.target) from None
        finally:
            call.cancel()  # the reader may have left: the engine need not go on
