"""Tasks to protobuf, for both edges. The only module that knows both."""

from graft.api.v1 import task_pb2
from graft.data.tasks.definition import TaskDefinition
from graft.domain.names import resource


def task(project: str, found: TaskDefinition) -> task_pb2.Task:
    """A task as the project sees it, in its parts and as the YAML that a job takes."""
    decoding = found.decoding
    return task_pb2.Task(
        name=resource("projects", project, "tasks", found.name),
        task=found.name,
        version=found.version,
        description=found.description,
        fields=[
            task_pb2.TaskField(name=one.name, description=one.description, optional=one.optional)
            for one in found.fields
        ],
        completion=task_pb2.TaskCompletion(field=found.completion.field, template=found.completion.template),
        labels=found.labels,
        labels_from_data=found.labels_from_data,
        system=found.system,
        user=found.user,
        prompt=found.prompt,
        conversations=found.conversations,
        metrics=found.metrics,
        decoding=task_pb2.TaskDecoding(
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            stop=decoding.stop,
            choices=decoding.choices,
            choose_label=decoding.choose_label,
        ),
        digest=found.digest,
        definition=found.to_text(),
    )
