"""VALIDATING in trouble: what is away for a moment, and the data's fault not."""

from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import Unavailable
from graft.domain.jobs import JobState
from tests.support.orchestration import world


async def test_a_storage_that_is_away_for_a_moment_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        prepare, away = it.preparer.prepare, [True]

        def away_once(*given: Any) -> Any:
            if away:
                away.clear()
                raise Unavailable("The storage does not answer.", reason="STORAGE_UNAVAILABLE")
            return prepare(*given)

        monkeypatch.setattr(it.preparer, "prepare", away_once)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        told = [event.message for event in await it.events("job-1", "message") if "storage" in event.message]
        assert [message.partition(":")[0] for message in told] == [
            "The storage is not available yet",
            "The storage is available.",
        ]
