"""The client of a user's own grader.

POST `{"items": [{"row": {…}, "completion": "…"}]}`, answered by `{"rewards": [0.5, …]}`: a finite number an item, in
their order. Connections that fail and answers 429 and 5xx are tried again; anything else that is not this is an error.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from graft.domain.errors import FailedPrecondition, Unavailable
from graft.grading.items import Grade, GradeItem, shorten

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5
"""Doubled each time: 7.5 s in all, enough for a grader that restarts and short beside a step of training."""


class HttpGrader:
    """Asks a URL for rewards, a whole batch in one request."""

    def __init__(
        self,
        url: str,
        timeout_seconds: float = 60.0,
        passing_reward: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url
        self._passing_reward = passing_reward
        self._sleep = sleep
        self._client = httpx.Client(timeout=timeout_seconds, follow_redirects=False)

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """The rewards that the grader gives.

        Raises:
            Unavailable: it cannot be reached, or answered 429 or 5xx, five times.
            FailedPrecondition: it refused the request, or its answer is not one finite number an item.
        """
        if not items:
            return []
        body = {"items": [{"row": dict(item.row), "completion": item.completion} for item in items]}
        rewards = self._rewards(self._post(body), len(items))
        return [Grade(reward, reward >= self._passing_reward, f"the grader gave {reward:g}") for reward in rewards]

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        content = json.dumps(body, default=str).encode()
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                answer = self._client.post(self._url, content=content, headers={"content-type": "application/json"})
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 429 or answer.status_code >= 500:
                trouble = f"it answered {answer.status_code}: {answer.text}"
                continue
            if answer.status_code != 200:
                raise FailedPrecondition(
                    f"The grader at {self._url} answered {answer.status_code}: {shorten(answer.text)}",
                    reason="GRADER_REFUSED",
                )
            return answer
        raise Unavailable(
            f"The grader at {self._url} did not answer {ATTEMPTS} times; at last {shorten(trouble)}",
            reason="GRADER_UNAVAILABLE",
            retry_after_seconds=FIRST_WAIT_SECONDS * 2**ATTEMPTS,
        )

    def _rewards(self, answer: httpx.Response, count: int) -> list[float]:
        try:
            rewards = answer.json()["rewards"]
        except (ValueError, KeyError, TypeError):
            raise self._nonsense('is not JSON of the form {"rewards": [number, …]}', answer) from None
        if not isinstance(rewards, list) or len(rewards) != count:
            raise self._nonsense(f"does not give a list of {count} rewards, one an item", answer)
        for index, reward in enumerate(rewards):
            if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
                raise self._nonsense(f"has a reward that is no finite number, the one of item {index}", answer)
        return [float(reward) for reward in rewards]

    def _nonsense(self, fault: str, answer: httpx.Response) -> FailedPrecondition:
        return FailedPrecondition(
            f"The answer of the grader at {self._url} {fault}: {shorten(answer.text)}", reason="GRADER_ANSWER_INVALID"
        )
