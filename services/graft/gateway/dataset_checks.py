"""Checks of data sets: asked for here, made by the orchestrator, and waited for. Knows neither files nor tokenizers."""

import asyncio
import hashlib
import json
from dataclasses import dataclass

from graft.domain.errors import KINDS, FieldViolation, Internal, InvalidArgument, Unavailable
from graft.domain.reports import REPORT_VERSION, DatasetReport
from graft.gateway.checks_tasks import definition_of
from graft.store.protocol import DatasetCheck, Store

CHECK_TIMEOUT_SECONDS = 60.0
"""Some 20 MB of text are tokenized in it on one core."""
CHECK_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class CheckSpec:
    """What a client asks to have measured."""

    dataset_id: str
    base: str
    held_out_id: str | None = None
    context_tokens: int | None = None
    """None: the base model's context."""
    epochs: float = 1.0
    task: str = ""
    """Name of a built-in task, for rows of named fields."""
    task_definition: str = ""
    """Or the whole definition of one."""


async def made(store: Store, project: str, asked: CheckSpec) -> DatasetReport:
    """The report; a question is answered once for all.

    Raises InvalidArgument, NotFound, whatever ended the check, or Unavailable after 60 s: the check goes on, and asking
    again waits for the same one.
    """
    if asked.context_tokens is not None and asked.context_tokens < 1:
        raise _invalid("context_tokens", "must be above 0")
    if not 0 < asked.epochs <= 1000:
        raise _invalid("epochs", "must be above 0 and at most 1000")
    definition = ""
    if asked.task or asked.task_definition:
        definition = definition_of(asked.task, asked.task_definition).to_text()
    model = await store.get_base_model(asked.base, project)
    for one in filter(None, (asked.dataset_id, asked.held_out_id)):
        await store.get_dataset(project, one)
    parts = (asked.base, asked.held_out_id, asked.context_tokens, asked.epochs, definition)
    told = json.dumps([REPORT_VERSION, project, asked.dataset_id, model.digest, *parts])
    name = f"dc-{hashlib.sha256(told.encode()).hexdigest()[:40]}"
    check = await store.request_dataset_check(DatasetCheck(name, project, asked.dataset_id, *parts))
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            while not check.done:
                await asyncio.sleep(CHECK_POLL_SECONDS)
                check = await store.get_dataset_check(check.id)
    except TimeoutError:
        raise Unavailable(
            f"The check of {asked.dataset_id!r} has not ended within {CHECK_TIMEOUT_SECONDS:.0f} s. It goes on: ask "
            "again for its report.",
            reason="CHECK_RUNNING",
            retry_after_seconds=10.0,
        ) from None
    if check.error is not None:
        raise KINDS.get(check.error.code, Internal)(check.error.message, reason=check.error.reason)
    assert check.report is not None
    return check.report


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {description}", reason="INVALID_CHECK", violations=(FieldViolation(field, description),)
    )
