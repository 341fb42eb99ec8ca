"""Checks of data sets as protobuf and back, for both edges: over HTTP they are the same messages as JSON."""

from dataclasses import asdict

from graft.api.v1 import dataset_report_pb2, dataset_service_pb2
from graft.domain.reports import DatasetReport
from graft.domain.resources import DatasetFormat
from graft.gateway.convert import FORMATS
from graft.gateway.convert_jobs import dataset_id
from graft.gateway.dataset_checks import CheckSpec


def check_spec(project: str, id: str, asked: dataset_service_pb2.ValidateDatasetRequest, served_base: str) -> CheckSpec:
    """What a client asked of data set `id`; for `served_base` where it names no base. Raises InvalidArgument."""
    held_out = asked.validation_dataset
    return CheckSpec(
        dataset_id=id,
        base=asked.base_model or served_base,
        held_out_id=dataset_id(project, held_out, "validation_dataset") if held_out else None,
        context_tokens=asked.context_tokens or None,
        epochs=asked.epochs or 1.0,
        task=asked.task,
        task_definition=asked.task_definition,
    )


def dataset_report(found: DatasetReport) -> dataset_report_pb2.DatasetReport:
    """What a check found: the same fields."""
    return dataset_report_pb2.DatasetReport(**{**asdict(found), "format": FORMATS[DatasetFormat(found.format)]})
