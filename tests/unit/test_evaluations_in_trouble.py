"""Evaluations while an engine, a grader or MLflow is away, and with questions that the engine cannot take."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.data.canonical import Preference, Tool, canonical
from graft.data.preference import render_preference
from graft.domain.errors import GraftError, ResourceExhausted, Unavailable
from graft.domain.evaluations import Contestant, EvaluationSpec, EvaluationState
from graft.domain.grading import GraderSpec
from graft.domain.resources import DatasetFormat
from graft.grading import Grade, GradeItem
from graft.internal.v1 import engine_pb2
from graft.orchestrator.asking import Answer, Answers
from graft.storage import Storage
from tests.support.orchestration import BASE, PROJECT, World, world
from tests.unit.test_evaluations import Answering, Bytes, Scoring, evaluated, reviews, stored, until_ended

ONE = EvaluationSpec("ds-h", (Contestant(BASE),))
AWAY = Unavailable("It is starting.", reason="ENGINE_STARTING")


async def with_reviews(it: World, folder: Path, count: int) -> None:
    await stored(it, folder, "ds-h", reviews(count), DatasetFormat.PROMPT_COMPLETION)


async def test_memory_that_the_engine_does_not_tell_costs_no_evaluation(tmp_path: Path) -> None:
    class Silent(Answering):
        async def residency(self) -> engine_pb2.ResidencyResponse:
            raise AWAY

    async with world(tmp_path) as it:
        await with_reviews(it, tmp_path, 4)
        found = await evaluated(it, Silent(), ONE)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert found.results[0].memory_bytes == 0


async def test_a_storage_that_is_away_for_a_moment_costs_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"fetch", "read", "put_file"}

    def away_once(name: str) -> Any:
        method = getattr(Storage, name)

        def call(*given: Any) -> Any:
            if name in away:
                away.discard(name)
                raise Unavailable("The storage does not answer.", reason="STORAGE_UNAVAILABLE")
            return method(*given)

        return call

    (tmp_path / "shared").mkdir()
    for name in tuple(away):
        monkeypatch.setattr(Storage, name, away_once(name))
    async with world(tmp_path, GRAFT_STORAGE_URL=f"file://{tmp_path}/shared") as it:
        await with_reviews(it, tmp_path, 4)
        found = await evaluated(it, Answering(), ONE)
        assert found.state is EvaluationState.SUCCEEDED, found.error
    assert away == set()


async def test_an_evaluation_that_mlflow_does_not_take_succeeds_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        await with_reviews(it, tmp_path, 4)
        monkeypatch.setattr(it.registry, "log_file", it.registry.pull)  # as a server with a full disk: not Unavailable
        found = await evaluated(it, Answering(), ONE)
        assert (found.state, found.mlflow_run_id) == (EvaluationState.SUCCEEDED, None)
        assert "MLflow has no complete run of this evaluation: TypeError" in found.verdicts[-1]

        await it.store.create_evaluation(PROJECT, "ev-2", ONE, None)
        monkeypatch.setattr("graft.orchestrator.evaluations.LOG_SECONDS", 0.3)
        monkeypatch.setattr(it.registry, "start_run", _unavailable)
        async with it.orchestrator():
            found = await until_ended(it, "ev-2")
        assert (found.state, found.mlflow_run_id) == (EvaluationState.SUCCEEDED, None)
        assert "did not answer for" in found.verdicts[-1]
        assert len(found.results[0].figures) == 2


def _unavailable(*_: Any) -> str:
    raise Unavailable("MLflow cannot be reached.", reason="REGISTRY_UNAVAILABLE")


async def test_mlflow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path) as it:
        await with_reviews(it, tmp_path, 4)
        start, tries = it.registry.start_run, []

        def restarting(*arguments: Any) -> str:
            tries.append(1)
            return start(*arguments) if len(tries) > 2 else _unavailable()

        monkeypatch.setattr(it.registry, "start_run", restarting)
        found = await evaluated(it, Answering(), ONE)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert it.registry.runs[str(found.mlflow_run_id)]["status"] == "FINISHED"


class Grading:
    """A grader that passes what ends with an even number, and fails as a test says."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.troubles: list[GraftError] = []
        self.gate = threading.Event()
        self.gate.set()

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        if self.troubles:
            raise self.troubles.pop()
        self.batches.append(len(items))
        self.gate.wait(20)
        return [Grade(1.0, int(item.completion) % 2 == 0, "") for item in items]


async def with_graded(it: World, folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> Grading:
    rows = [{"prompt": f"film 1 costs {number}", "answer": number} for number in range(count)]
    await stored(it, folder, "ds-h", rows, DatasetFormat.GRADED_PROMPTS)
    grader = Grading()
    monkeypatch.setattr("graft.orchestrator.judging.build_grader", lambda _spec: grader)
    return grader


GRADED = replace(ONE, grader=GraderSpec("http", {"url": "http://localhost/grade"}), samples=2)


async def test_answers_are_graded_in_chunks_by_a_grader_that_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        grader = await with_graded(it, tmp_path, 80, monkeypatch)
        grader.troubles = [Unavailable("It restarts.", reason="GRADER_UNAVAILABLE")] * 3
        found = await evaluated(it, Answering(), GRADED)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert grader.batches == [64, 64, 32]
        assert found.results[0].figures[0].value == 0.5
        assert found.answered_requests == found.total_requests == 80 + 160


async def test_an_evaluation_is_cancelled_while_it_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.TELL_SECONDS", 0.02)
    async with world(tmp_path) as it:
        grader = await with_graded(it, tmp_path, 80, monkeypatch)
        grader.gate.clear()
        it.parts.__dict__["engine"] = Answering()
        await it.store.create_evaluation(PROJECT, "ev-1", GRADED, None)
        async with it.orchestrator():
            while not grader.batches:  # noqa: ASYNC110 - a thread moves it
                await asyncio.sleep(0.01)
            await it.store.cancel_evaluation(PROJECT, "ev-1")
            assert (await until_ended(it)).state is EvaluationState.CANCELLED
            grader.gate.set()
            await asyncio.sleep(0.1)
        assert grader.batches == [64]


class Overloaded(Answering):
    """An engine that is full for as many requests as a test says."""

    def __init__(self, troubles: list[GraftError | int]) -> None:
        super().__init__()
        self.troubles = troubles

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        trouble = self.troubles.pop() if self.troubles else None
        if isinstance(trouble, GraftError):
            raise trouble
        if trouble is not None:
            return engine_pb2.GenerateResponse(http_status=trouble, body=b"{}")
        return await super().generate(request, timeout_seconds)


async def test_an_engine_whose_queue_is_full_is_waited_for(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await with_reviews(it, tmp_path, 4)
        full = ResourceExhausted("Its queue is full.", reason="ENGINE_LIMIT")
        found = await evaluated(it, Overloaded([full, 503, AWAY, 429, full]), ONE)
        assert found.state is EvaluationState.SUCCEEDED, found.error


@pytest.mark.parametrize("trouble", [429, ResourceExhausted("Its queue is full.", reason="ENGINE_LIMIT")])
async def test_an_engine_whose_queue_stays_full_is_given_up_with_the_reason(
    tmp_path: Path, trouble: GraftError | int
) -> None:
    async with world(tmp_path) as it:
        it.parts.__dict__["limits"] = replace(it.parts.limits, unavailable_seconds=0.1)
        await with_reviews(it, tmp_path, 4)
        found = await evaluated(it, Overloaded([trouble] * 10_000), ONE)
        assert found.state is EvaluationState.FAILED
        assert found.error is not None
        assert found.error.reason == "ENGINE_OVERLOADED"
        assert "for 0 s" in found.error.message


def test_an_answer_is_not_glued_to_a_line_that_was_left_half_written(tmp_path: Path) -> None:
    file = tmp_path / "answers-0.jsonl"
    file.write_text('{"row": 0, "texts": ["yes"]}\n{"row": 1, "te')
    Answers(file).keep(Answer(1, ("no",)))
    Answers(file).keep(Answer(2, ("no",)))
    assert {row: answer.texts for row, answer in Answers(file).found.items()} == {0: ("yes",), 1: ("no",), 2: ("no",)}


class Chatting(Bytes):
    """Two line breaks are one token; a chat begins with its tools."""

    PAIR = 300

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        tokens: list[int] = []
        for part in text.split("\n\n"):
            tokens += [*part.encode(), self.PAIR]
        return tokens[:-1]

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        del tokenize
        turns = "".join(f"<{turn['role']}>\n{turn['content']}<end>\n" for turn in conversation)
        return f"{json.dumps(tools) if tools else ''}{turns}{'<assistant>' + chr(10) if add_generation_prompt else ''}"


TOOL: Tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [(), (TOOL,)])
async def test_a_pair_is_scored_by_the_tokens_that_training_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: tuple[Tool, ...]
) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.load_tokenizer", lambda _path: Chatting())
    row: dict[str, Any] = {
        "input": {"messages": [{"role": "user", "content": "q"}], **({"tools": list(tools)} if tools else {})},
        "preferred_output": [{"role": "assistant", "content": "\na"}],
        "non_preferred_output": [{"role": "assistant", "content": "\n\nzz"}],
    }
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", [row], DatasetFormat.OPENAI_PREFERENCE)
        engine = Scoring()
        found = await evaluated(it, engine, ONE)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        learnable = canonical(row, DatasetFormat.OPENAI_PREFERENCE)
        assert isinstance(learnable, Preference)
        trained = render_preference(learnable, Chatting())
        learned = [list(example.token_ids) for example in (trained.chosen, trained.rejected)]
        assert [body["prompt"] for _, body in engine.bodies] == learned
        file = it.parts.settings.evaluation_dir(PROJECT, "ev-1") / "answers-0.jsonl"
        (answer,) = Answers(file).found.values()
        # Scoring gives a token of value t the log-probability 97 - t.
        assert answer.nats == tuple(
            sum(
                token - ord("a")
                for token, counts in zip(example.token_ids, example.loss_mask, strict=True)
                if counts and token
            )
            for example in (trained.chosen, trained.rejected)
        )


class Bounded(Answering):
    """An engine of 40 tokens, one a byte."""

    CONTEXT = 40

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        body = json.loads(request.body)
        self.status = 200 if len(body["prompt"].encode()) + body["max_tokens"] <= self.CONTEXT else 400
        return await super().generate(request, timeout_seconds)


async def test_a_prompt_that_does_not_fit_is_reported_and_one_that_nearly_fits_gets_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.load_tokenizer", lambda _path: Bytes())
    async with world(tmp_path, GRAFT_SERVING_CONTEXT_TOKENS=str(Bounded.CONTEXT)) as it:
        rows = [
            {"prompt": f"film 1 {'x' * length} is {label}", "completion": label}
            for length, label in [(0, "good"), (16, "good"), (60, "good")]
        ]
        await stored(it, tmp_path, "ds-h", rows, DatasetFormat.PROMPT_COMPLETION)
        engine = Bounded()
        spec = replace(ONE, metrics=("exact_match",), max_tokens=16)
        found = await evaluated(it, engine, spec)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert found.results[0].figures[0].value == pytest.approx(2 / 3)
        told = f"{BASE} has no answer to 1 of 3 questions, which do not fit into its context of 40 tokens"
        assert found.results[0].unanswered_count == 1
        assert any(verdict.startswith(told) for verdict in found.verdicts)
        assert told in (it.parts.settings.evaluation_dir(PROJECT, "ev-1") / "report.html").read_text()
        # The second prompt has 31 bytes.
        assert sorted(body["max_tokens"] for _, body in engine.bodies) == [9, 16, 16, 16]


async def test_a_question_without_an_answer_passes_no_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.load_tokenizer", lambda _path: Bytes())
    async with world(tmp_path, GRAFT_SERVING_CONTEXT_TOKENS=str(Bounded.CONTEXT)) as it:
        rows = [{"prompt": f"film 1 {'x' * length} is 2", "answer": 2} for length in (0, 60)]
        await stored(it, tmp_path, "ds-h", rows, DatasetFormat.GRADED_PROMPTS)
        grader = GraderSpec("regex", {"pattern": "^2?$"})  # nothing at all passes it
        found = await evaluated(it, Bounded(), replace(ONE, grader=grader, samples=2, max_tokens=8))
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert found.results[0].figures[0].value == 0.5
        assert found.answered_requests == found.total_requests == 6


async def test_a_pair_whose_answer_is_longer_than_the_context_is_undecided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.load_tokenizer", lambda _path: Bytes())
    async with world(tmp_path, GRAFT_SERVING_CONTEXT_TOKENS="12") as it:
        pairs = [{"prompt": "p", "chosen": "a", "rejected": "z"}, {"prompt": "p", "chosen": "a" * 20, "rejected": "b"}]
        await stored(it, tmp_path, "ds-h", pairs, DatasetFormat.PREFERENCE)
        found = await evaluated(it, Scoring(), ONE)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert (found.results[0].figures[0].metric, found.results[0].figures[0].value) == ("win_rate", 0.75)
        assert any("1 of 2 questions" in verdict for verdict in found.verdicts)
