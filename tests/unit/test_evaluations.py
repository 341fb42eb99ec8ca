"""Evaluations in an orchestrator's hands, with an engine that answers as a test says."""

import asyncio
import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import ResourceExhausted
from graft.domain.evaluations import ENDED, Contestant, Evaluation, EvaluationSpec, EvaluationState
from graft.domain.grading import GraderSpec
from graft.domain.resources import Dataset, DatasetFormat
from graft.internal.v1 import engine_pb2
from tests.support.orchestration import BASE, NOW, PROJECT, World, world

LABELS = ("bad", "good")
ADAPTER = f"{BASE}:reviews@1"


class Answering:
    """An engine whose base always says `good`, and whose adapter knows."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.status = 200

    def of(self, base: str) -> "Answering":
        assert base == BASE
        return self

    async def residency(self) -> engine_pb2.ResidencyResponse:
        return engine_pb2.ResidencyResponse(replicas=[engine_pb2.Replica(memory_bytes=1_500_000_000)])

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        del timeout_seconds
        await self.gate.wait()
        body = json.loads(request.body)
        self.bodies.append((request.public_model, body))
        if self.status != 200:
            refusal = {"error": {"message": "too long", "code": self.status}}
            return engine_pb2.GenerateResponse(http_status=self.status, body=json.dumps(refusal).encode())
        said = str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])
        knows = request.HasField("adapter") or "film 1" in said
        text = said.split()[-1] if knows else "good"
        chat = request.endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS
        choice = {"message": {"content": text}} if chat else {"text": f" {text}\n"}
        told = {"choices": [choice] * body.get("n", 1), "usage": {"completion_tokens": 2}}
        return engine_pb2.GenerateResponse(http_status=200, body=json.dumps(told).encode())


class Bytes:
    """A token a byte, and an end of text."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return list(text.encode())


class Ended(Bytes):
    """The same, with the end of text behind each, as after `add_eos_token` in a tokenizer's configuration."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*super().encode(text), *([self.eos_token_id] * add_special_tokens)]


class Scoring(Answering):
    """An engine to which each letter is likelier than the next."""

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        del timeout_seconds
        body = json.loads(request.body)
        self.bodies.append((request.public_model, body))
        scores: list[Any] = [None]
        scores += [{str(token): {"logprob": float(ord("a") - token if token else 0)}} for token in body["prompt"][1:]]
        told = {"choices": [{"text": "x", "prompt_logprobs": scores}]}
        return engine_pb2.GenerateResponse(http_status=200, body=json.dumps(told).encode())


async def stored(it: World, folder: Path, name: str, rows: list[dict[str, Any]], format: DatasetFormat) -> None:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    await it.store.create_dataset(
        Dataset(name, PROJECT, file.name, format, len(rows), 1, f"sha256:{name:0>20}", str(file), NOW), None
    )


def reviews(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"film {number} is {LABELS[number % 2]}", "completion": f" {LABELS[number % 2]}"}
        for number in range(first, first + count)
    ]


async def until_ended(it: World, evaluation_id: str = "ev-1") -> Evaluation:
    deadline = time.monotonic() + 20
    while (found := await it.store.get_evaluation(PROJECT, evaluation_id)).state not in ENDED:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    return found


async def evaluated(it: World, engine: Answering, spec: EvaluationSpec) -> Evaluation:
    it.parts.__dict__["engine"] = engine
    it.registry.add(BASE, "reviews", "ft-1")
    await it.store.replace_registry(it.registry.snapshot())
    await it.store.create_evaluation(PROJECT, "ev-1", spec, None)
    async with it.orchestrator():
        return await until_ended(it)


async def test_contestants_are_measured_compared_reported_and_logged(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(40), DatasetFormat.PROMPT_COMPLETION)
        await stored(it, tmp_path, "ds-s", reviews(4, 200), DatasetFormat.PROMPT_COMPLETION)
        engine = Answering()
        contestants = (Contestant(BASE), Contestant(BASE, 2), Contestant(ADAPTER))
        found = await evaluated(it, engine, EvaluationSpec("ds-h", contestants, shots_dataset="ds-s"))
        assert found.state is EvaluationState.SUCCEEDED, found.error
        base, _few, adapter = found.results
        assert [one.label for one in found.results] == [BASE, f"{BASE}, 2-shot", ADAPTER]
        assert [figure.metric for figure in base.figures] == ["accuracy", "macro_f1"]
        # The base says good to all, but for the five even films whose number begins with 1: 1, 10, 12, 14, 16, 18.
        assert base.figures[0].value == 25 / 40
        assert adapter.figures[0].value == 1.0
        assert (adapter.figures[0].n, adapter.figures[0].low) == (40, 1.0)
        against = {one.baseline: one.figure for one in adapter.differences}
        assert against[BASE].value == 15 / 40
        assert against[BASE].low > 0
        assert base.confusion is not None
        assert (base.confusion.labels, base.confusion.counts) == (LABELS, (5, 15, 0, 0, 20, 0))
        assert found.answered_requests == found.total_requests == 120
        assert adapter.latency_p50_seconds > 0
        assert adapter.tokens_per_second > 0
        assert adapter.memory_bytes == 1_500_000_000
        assert f"{ADAPTER}" in found.verdicts[0]
        assert "beats" in found.verdicts[0]

        bodies = [body for _, body in engine.bodies]
        assert all(
            body["structured_outputs"] == {"choice": [" bad", " good"]} for body in bodies
        )  # as they are learned
        shown = [body["prompt"] for body in bodies if "\n\n" in body["prompt"]]
        assert len(shown) == 40
        assert all(text.startswith("film 200 is bad bad\n\nfilm 201 is good good\n\nfilm ") for text in shown)
        page = (it.parts.settings.evaluation_dir(PROJECT, "ev-1") / "report.html").read_text()
        assert ADAPTER in page
        run = it.registry.runs[str(found.mlflow_run_id)]
        assert run["status"] == "FINISHED"
        assert run["files"] == ["report.html"]
        assert dict(run["metrics"][0][1])["tiny_reviews_1/accuracy"] == 1.0


async def test_a_restarted_orchestrator_asks_only_what_is_missing(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(40), DatasetFormat.PROMPT_COMPLETION)
        engine = Answering()
        it.parts.__dict__["engine"] = engine
        folder = it.parts.settings.evaluation_dir(PROJECT, "ev-1")
        folder.mkdir(parents=True)
        kept = [{"row": row, "texts": ["bad"], "generated_tokens": 2, "seconds": 0.1} for row in range(30)]
        lines = [json.dumps(answer) for answer in kept]
        (folder / "answers-0.jsonl").write_text("\n".join([*lines, '{"row": 31, "te']))
        await it.store.create_evaluation(PROJECT, "ev-1", EvaluationSpec("ds-h", (Contestant(BASE),)), None)
        async with it.orchestrator():
            found = await until_ended(it)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert len(engine.bodies) == 10
        assert found.results[0].figures[0].value == (15 + 5) / 40
        assert found.results[0].tokens_per_second == 0  # of all forty it is not known


async def test_on_another_host_the_answers_of_finished_contestants_are_not_asked_for_again(tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "evaluations" / PROJECT / "ev-1"
    shared.mkdir(parents=True)
    kept = [{"row": row, "texts": ["bad"], "generated_tokens": 2, "seconds": 0.1} for row in range(40)]
    (shared / "answers-0.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in kept))
    async with world(tmp_path, GRAFT_STORAGE_URL=f"file://{tmp_path}/shared") as it:
        await stored(it, tmp_path, "ds-h", reviews(40), DatasetFormat.PROMPT_COMPLETION)
        engine = Answering()
        found = await evaluated(it, engine, EvaluationSpec("ds-h", (Contestant(BASE), Contestant(ADAPTER))))
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert len(engine.bodies) == 40
    assert sorted(path.name for path in shared.iterdir()) == ["answers-0.jsonl", "answers-1.jsonl", "report.html"]
    assert ADAPTER in (shared / "report.html").read_text()


async def test_samples_of_graded_prompts_are_judged_by_the_grader(tmp_path: Path) -> None:
    rows = [{"prompt": f"film 1{number} costs {number}", "answer": number % 4} for number in range(8)]
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", rows, DatasetFormat.GRADED_PROMPTS)
        engine = Answering()
        spec = EvaluationSpec("ds-h", (Contestant(BASE),), grader=GraderSpec("numeric", {"field": "answer"}), samples=3)
        found = await evaluated(it, engine, spec)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        (result,) = found.results
        assert (result.figures[0].metric, result.figures[0].value, result.figures[0].n) == ("pass_at_1", 0.5, 8)
        body = engine.bodies[0][1]
        assert (body["n"], body["temperature"]) == (3, 0.8)


async def test_rows_of_fields_are_asked_by_the_task_and_judged_by_the_grader(tmp_path: Path) -> None:
    task = (
        "name: prices\nversion: 1\nfields: {film: x, cost: x}\ncompletion: price\n"
        "prompt: '{{ film }} costs {{ cost }}'\ndecoding: {max_tokens: 5, stop: ['.']}"
    )
    rows = [{"film": f"film 1{number}", "cost": str(number), "price": str(number % 4)} for number in range(8)]
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", rows, DatasetFormat.FIELDS)
        engine = Answering()
        grader = GraderSpec("numeric", {"field": "price"})
        spec = EvaluationSpec("ds-h", (Contestant(BASE),), grader=grader, task="prices", task_definition=task)
        found = await evaluated(it, engine, spec)
        assert found.state is EvaluationState.SUCCEEDED, found.error
        (result,) = found.results
        assert (result.figures[0].metric, result.figures[0].value, result.figures[0].n) == ("pass_at_1", 0.5, 8)
        assert {body["prompt"] for _, body in engine.bodies} == {f"film 1{n} costs {n}" for n in range(8)}
        assert all((body["max_tokens"], body["stop"]) == (5, ["."]) for _, body in engine.bodies)


@pytest.mark.parametrize("tokenizer", [Bytes(), Ended()], ids=["plain", "with an end"])
async def test_texts_and_pairs_are_scored_token_by_token_over_the_whole_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Bytes
) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.load_tokenizer", lambda _path: tokenizer)
    async with world(tmp_path, GRAFT_SERVING_CONTEXT_TOKENS="12") as it:
        texts = [{"text": "abcdefghijklmnopqrstuvwxyz"}, {"text": "b"}]
        await stored(it, tmp_path, "ds-h", texts, DatasetFormat.TEXT)
        engine = Scoring()
        found = await evaluated(it, engine, EvaluationSpec("ds-h", (Contestant(BASE),)))
        assert found.state is EvaluationState.SUCCEEDED, found.error
        bits, perplexity = found.results[0].figures
        # Each token costs a nat for each step of its letter from `a`, whatever window it lies in.
        nats = sum(range(26)) + 1
        assert perplexity.value == pytest.approx(math.exp(nats / 27))
        assert bits.value == pytest.approx(nats / 27 / math.log(2))
        prompts = [body["prompt"] for _, body in engine.bodies]
        assert sorted(map(len, prompts)) == [2, 7, 11, 11]
        assert all(prompt[0] == Bytes.eos_token_id or chr(prompt[0]) in "jt" for prompt in prompts)

    async with world(tmp_path / "pairs") as it:
        pairs = [{"prompt": "p", "chosen": "a", "rejected": "z"}, {"prompt": "p", "chosen": "zz", "rejected": "b"}]
        await stored(it, tmp_path, "ds-h", pairs, DatasetFormat.PREFERENCE)
        found = await evaluated(it, Scoring(), EvaluationSpec("ds-h", (Contestant(BASE),)))
        assert found.state is EvaluationState.SUCCEEDED, found.error
        assert (found.results[0].figures[0].metric, found.results[0].figures[0].value) == ("win_rate", 0.5)


async def test_a_refused_question_fails_the_evaluation_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.load_tokenizer", lambda _path: Bytes())
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(3), DatasetFormat.PROMPT_COMPLETION)
        engine = Answering()
        engine.status = 400
        found = await evaluated(it, engine, EvaluationSpec("ds-h", (Contestant(BASE),)))
        assert found.state is EvaluationState.FAILED
        assert found.error is not None
        assert (found.error.reason, "too long" in found.error.message) == ("QUESTION_REFUSED", True)


async def test_a_cancelled_evaluation_stops_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.TELL_SECONDS", 0.05)
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(40), DatasetFormat.PROMPT_COMPLETION)
        engine = Answering()
        engine.gate.clear()
        it.parts.__dict__["engine"] = engine
        await it.store.create_evaluation(PROJECT, "ev-1", EvaluationSpec("ds-h", (Contestant(BASE),)), None)
        async with it.orchestrator():
            while (await it.store.get_evaluation(PROJECT, "ev-1")).total_requests == 0:  # noqa: ASYNC110 - another task moves it
                await asyncio.sleep(0.02)
            await it.store.cancel_evaluation(PROJECT, "ev-1")
            assert (await until_ended(it)).state is EvaluationState.CANCELLED
        assert engine.bodies == []


async def test_an_unexpected_error_of_the_store_does_not_end_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(4), DatasetFormat.PROMPT_COMPLETION)
        claim, failed = it.store.claim_evaluation, []

        async def failing_once(*arguments: Any) -> Any:
            if not failed:
                failed.append(True)
                raise ResourceExhausted("The database's disk is full.", reason="DISK_FULL")
            return await claim(*arguments)

        monkeypatch.setattr(it.store, "claim_evaluation", failing_once)
        found = await evaluated(it, Answering(), EvaluationSpec("ds-h", (Contestant(BASE),)))
        assert (failed, found.state) == ([True], EvaluationState.SUCCEEDED)


async def test_a_cancelled_evaluation_ends_before_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.orchestrator.evaluations.TELL_SECONDS", 0.05)
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(4), DatasetFormat.PROMPT_COMPLETION)
        engine = Answering()
        engine.gate.clear()
        it.parts.__dict__["engine"] = engine
        spec = EvaluationSpec("ds-h", (Contestant(BASE),))
        for name in ("ev-1", "ev-2"):
            await it.store.create_evaluation(PROJECT, name, spec, None)
        async with it.orchestrator():
            while (await it.store.get_evaluation(PROJECT, "ev-1")).total_requests == 0:  # noqa: ASYNC110 - another task moves it
                await asyncio.sleep(0.02)
            await it.store.cancel_evaluation(PROJECT, "ev-2")
            ended = await until_ended(it, "ev-2")
            assert (ended.state, ended.start_time) == (EvaluationState.CANCELLED, None)
            assert (await it.store.get_evaluation(PROJECT, "ev-1")).state is EvaluationState.RUNNING


async def test_the_lease_is_free_only_when_nobody_asks_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        await stored(it, tmp_path, "ds-h", reviews(4), DatasetFormat.PROMPT_COMPLETION)
        asking, asked_at_release = [], []

        class Lingering(Answering):
            async def generate(
                self, request: engine_pb2.GenerateRequest, timeout_seconds: float
            ) -> engine_pb2.GenerateResponse:
                del timeout_seconds
                asking.append(request)
                place = len(asking)
                try:
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0.05 * place)  # one after the other
                    asking.remove(request)
                raise AssertionError

        release = it.store.release_evaluation

        async def released(evaluation: Evaluation, owner: str) -> None:
            asked_at_release.append(len(asking))
            await release(evaluation, owner)

        monkeypatch.setattr(it.store, "release_evaluation", released)
        it.parts.__dict__["engine"] = Lingering()
        await it.store.create_evaluation(PROJECT, "ev-1", EvaluationSpec("ds-h", (Contestant(BASE),)), None)
        async with it.orchestrator():
            while len(asking) < 4:  # noqa: ASYNC110 - another task moves it
                await asyncio.sleep(0.01)
        assert asked_at_release == [0]
        assert await it.store.claim_evaluation("next", timedelta(seconds=30)) is not None
