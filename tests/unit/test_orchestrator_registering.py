"""REGISTERING in trouble: the registry and the training cluster are asked at once, and each may fail alone."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import JobState
from tests.support.orchestration import PATIENCE_SECONDS, world


async def test_a_version_that_is_refused_fails_its_job_without_waiting_for_a_cluster_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise FailedPrecondition("The files have changed.", reason="ADAPTER_DIGEST_MISMATCH")

    async with world(tmp_path) as it:
        it.parts = replace(it.parts, limits=replace(it.parts.limits, unavailable_seconds=10 * PATIENCE_SECONDS))
        it.runs.away = sys.maxsize
        monkeypatch.setattr(it.registry, "publish", refuse)
        await it.create_job("job-1")
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "ADAPTER_DIGEST_MISMATCH"
