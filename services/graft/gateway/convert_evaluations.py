"""Evaluations as protobuf and back, for both edges: over HTTP they are the same messages as JSON."""

from google.protobuf.json_format import MessageToDict

from graft.api.v1 import evaluation_pb2
from graft.domain.evaluations import Contestant, ContestantResult, Evaluation, EvaluationSpec, Figure
from graft.domain.grading import GraderSpec
from graft.domain.names import dataset_name, resource
from graft.gateway.convert import status, timestamp
from graft.gateway.convert_jobs import dataset_id


def evaluation_spec(project: str, asked: evaluation_pb2.Evaluation) -> EvaluationSpec:
    """What a client asked for; output-only fields are ignored (AIP-203). Raises InvalidArgument naming a bad field."""
    return EvaluationSpec(
        dataset=dataset_id(project, asked.dataset, "dataset"),
        contestants=tuple(Contestant(one.model, one.shots) for one in asked.contestants),
        metrics=tuple(asked.metrics),
        task=asked.task,
        task_definition=asked.task_definition,
        grader=GraderSpec(asked.grader.kind, MessageToDict(asked.grader.settings))
        if asked.HasField("grader")
        else None,
        shots_dataset=dataset_id(project, asked.shots_dataset, "shots_dataset") if asked.shots_dataset else None,
        max_rows=asked.max_rows,
        samples=asked.samples,
        max_tokens=asked.max_tokens,
        display_name=asked.display_name,
    )


def evaluation(found: Evaluation) -> evaluation_pb2.Evaluation:
    """A stored evaluation."""
    spec = found.spec
    made = evaluation_pb2.Evaluation(
        name=resource("projects", found.project, "evaluations", found.id),
        dataset=dataset_name(found.project, spec.dataset),
        contestants=[evaluation_pb2.Contestant(model=one.model, shots=one.shots) for one in spec.contestants],
        metrics=spec.metrics,
        task=spec.task,
        task_definition=spec.task_definition,
        shots_dataset=dataset_name(found.project, spec.shots_dataset) if spec.shots_dataset else "",
        max_rows=spec.max_rows,
        samples=spec.samples,
        max_tokens=spec.max_tokens,
        display_name=spec.display_name,
        state=evaluation_pb2.Evaluation.State.Value(f"STATE_{found.state.value}"),
        error=status(found.error) if found.error else None,
        create_time=timestamp(found.create_time),
        start_time=timestamp(found.start_time),
        end_time=timestamp(found.end_time),
        answered_requests=found.answered_requests,
        total_requests=found.total_requests,
        results=[_result(one) for one in found.results],
        verdicts=found.verdicts,
        mlflow_run_id=found.mlflow_run_id or "",
        cancel_requested=found.cancel_requested,
    )
    if spec.grader is not None:
        made.grader.kind = spec.grader.kind
        made.grader.settings.update(spec.grader.settings)
    return made


def _result(found: ContestantResult) -> evaluation_pb2.ContestantResult:
    return evaluation_pb2.ContestantResult(
        label=found.label,
        model=found.model,
        shots=found.shots,
        figures=[_figure(one) for one in found.figures],
        differences=[
            evaluation_pb2.FigureDifference(baseline=one.baseline, figure=_figure(one.figure))
            for one in found.differences
        ],
        latency_p50_seconds=found.latency_p50_seconds,
        latency_p95_seconds=found.latency_p95_seconds,
        tokens_per_second=found.tokens_per_second,
        parameter_count=found.parameter_count,
        size_bytes=found.size_bytes,
        memory_bytes=found.memory_bytes,
        unanswered_count=found.unanswered_count,
        confusion=evaluation_pb2.ConfusionMatrix(labels=found.confusion.labels, counts=found.confusion.counts)
        if found.confusion
        else None,
    )


def _figure(found: Figure) -> evaluation_pb2.Figure:
    return evaluation_pb2.Figure(metric=found.metric, value=found.value, low=found.low, high=found.high, n=found.n)
