"""Files through the unmodified `openai` client: streamed to disk, validated whole, refused with reasons."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import FileObject

from graft.domain.resources import Dataset
from graft.gateway.uploads import Upload
from graft.store.protocol import Page
from tests.support.gateways import ROWS, eventually
from tests.support.http_gateways import HttpGateway, http_gateway

CHAT_ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def kept(it: HttpGateway) -> list[Path]:
    return [path for path in it.settings.home.path.glob("datasets/**/*") if path.is_file()]


async def uploaded(it: HttpGateway, content: bytes = ROWS, name: str = "rows.jsonl", **options: Any) -> FileObject:
    return await it.client.files.create(file=(name, content), purpose="fine-tune", **options)


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> dict[str, Any]:
    """A hand-made multipart request: `(disposition, content)` of each part."""
    body = b"".join(
        b"--b\r\ncontent-disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"
        for disposition, content in parts
    )
    return {"content": body + end, "headers": {"content-type": "multipart/form-data; boundary=b"}}


async def test_a_file_is_uploaded_found_listed_read_and_deleted(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await uploaded(it)
        assert FileObject.model_validate(made.to_dict()) == made
        assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(ROWS), "rows.jsonl", "fine-tune")
        assert made.status == "processed"
        assert await it.client.files.retrieve(made.id) == made
        assert (await it.client.files.wait_for_processing(made.id)).id == made.id
        assert [one async for one in it.client.files.list()] == [made]
        assert (await it.client.files.content(made.id)).content == ROWS
        deleted = await it.client.files.delete(made.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
        assert kept(it) == []
        with pytest.raises(openai.NotFoundError, match=made.id) as caught:
            await it.client.files.retrieve(made.id)
        assert caught.value.type == "invalid_request_error"


async def test_rows_of_messages_are_taken_too_and_the_layout_is_told(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await uploaded(it, json.dumps(CHAT_ROW).encode() + b"\n")
        assert made.to_dict()["graft"]["format"] == "messages"


async def test_a_file_larger_than_every_buffer_arrives_unchanged(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        # Line ends and dashes are what a multipart parser has to look twice at.
        row = json.dumps({"prompt": "\r\n--b\r\n" * 50, "completion": "--" * 500}).encode() + b"\r\n"
        content = row * 2000
        made = await uploaded(it, content)
        assert made.bytes == len(content) > 3_000_000
        assert kept(it)[0].read_bytes() == content


async def test_bad_lines_are_counted_and_the_first_twenty_told_and_nothing_is_stored(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        with pytest.raises(openai.BadRequestError) as caught:
            await uploaded(it, ROWS + b"not json\n" * 30)
        message = caught.value.message
        assert "30" in message
        assert all(f"line {number}" in message for number in range(3, 23))
        assert "line 23" not in message
        assert caught.value.code == "bad_dataset"
        assert str(caught.value.param).startswith("line 3")
        assert kept(it) == []
        assert [one async for one in it.client.files.list()] == []


async def test_lists_are_paged_newest_first_by_the_last_files_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http_gateway(tmp_path) as it:
        asked: list[int] = []
        list_datasets = it.store.list_datasets

        async def counted(project: str, size: int, token: str) -> Page[Dataset]:
            asked.append(size)
            return await list_datasets(project, size, token)

        monkeypatch.setattr(it.store, "list_datasets", counted)
        made = [(await uploaded(it, name=f"{number}.jsonl")).id for number in range(5)]
        page = await it.client.files.list(limit=2)
        assert page.has_more
        assert [one.id async for one in page] == made[::-1]
        assert asked == [2, 2, 2]  # a page reads itself, however far behind the first it is
        rest = await it.client.files.list(after=made[1])
        assert [one.id for one in rest.data] == made[:1]
        assert rest.has_more is False
        assert [one async for one in it.client.files.list(purpose="batch")] == []
        for wrong in ({"order": "asc"}, {"after": "nothing"}, {"limit": 0}, {"limit": 10_001}):
            with pytest.raises(openai.BadRequestError) as caught:
                await it.client.files.list(**wrong)
            assert caught.value.param == next(iter(wrong))


async def test_a_purpose_or_field_that_cannot_be_honoured_is_refused(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        with pytest.raises(openai.BadRequestError) as caught:
            await it.client.files.create(file=("rows.jsonl", ROWS), purpose="batch")
        assert caught.value.param == "purpose"
        expiry: Any = {"anchor": "created_at", "seconds": 3600}
        with pytest.raises(openai.BadRequestError) as caught:
            await uploaded(it, expires_after=expiry)
        assert str(caught.value.param).startswith("expires_after")
        assert kept(it) == []


async def test_a_form_is_taken_in_any_order_and_refused_when_it_is_none(tmp_path: Path) -> None:
    file, purpose = ('name="file"; filename="../a b.jsonl"', ROWS), ('name="purpose"', b"fine-tune")
    async with http_gateway(tmp_path) as it:
        made = await it.raw.post("/v1/files", **form(file, purpose))
        assert made.status_code == 200, made.text
        assert made.json()["filename"] == "a b.jsonl"
        refused = {
            "no file": form(purpose),
            "no purpose": form(file),
            "two files": form(purpose, file, file),
            "cut short": form(purpose, file, end=b""),
            "wrong name": form(purpose, ('name="data"; filename="a"', ROWS)),
            "long field": form(('name="purpose"', b"x" * 10_000)),
            "malformed": {**form(purpose), "content": b"nonsense"},
            "no form": {"json": {"purpose": "fine-tune"}},
        }
        for why, request in refused.items():
            answered = await it.raw.post("/v1/files", **request)
            assert answered.status_code == 400, why
            assert answered.json()["error"]["type"] == "invalid_request_error"
        assert len(kept(it)) == 1


async def test_a_file_over_the_limit_is_413_and_leaves_nothing(tmp_path: Path) -> None:
    async with http_gateway(tmp_path, GRAFT_GATEWAY_MAX_UPLOAD_BYTES="100000") as it:
        for content in (ROWS * 2000, ROWS * 100_000):
            with pytest.raises(openai.APIStatusError) as caught:
                await uploaded(it, content)
            assert caught.value.status_code == 413
            assert caught.value.code == "upload_too_large"
        assert kept(it) == []


async def test_an_upload_reaches_the_disk_while_it_is_sent_and_an_abandoned_one_leaves_nothing(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        gate = asyncio.Event()

        async def half() -> AsyncIterator[bytes]:
            yield form(('name="file"; filename="a.jsonl"', ROWS * 50_000))["content"]
            await gate.wait()

        headers = {"content-type": "multipart/form-data; boundary=b"}
        sending = asyncio.create_task(it.raw.post("/v1/files", content=half(), headers=headers))
        await eventually(lambda: sum(path.stat().st_size for path in kept(it)) > 1_000_000)
        sending.cancel()
        await eventually(lambda: kept(it) == [])


async def test_no_write_of_an_upload_is_larger_than_what_the_socket_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    write = Upload.write

    async def noted(self: Upload, chunk: bytes) -> None:
        sizes.append(len(chunk))
        await write(self, chunk)

    monkeypatch.setattr(Upload, "write", noted)
    async with http_gateway(tmp_path) as it:
        await uploaded(it, ROWS * 100_000)
        assert sum(sizes) == len(ROWS) * 100_000
        assert max(sizes) < 1_000_000


async def test_a_repeated_upload_with_the_same_idempotency_key_returns_the_first(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        key = {"Idempotency-Key": "one"}
        first = await uploaded(it, extra_headers=key)
        assert await uploaded(it, extra_headers=key) == first
        assert len(kept(it)) == 1


async def test_a_file_that_a_live_job_uses_cannot_be_deleted(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await uploaded(it)
        await it.client.fine_tuning.jobs.create(model="smollm2-135m", training_file=made.id)
        with pytest.raises(openai.ConflictError) as caught:
            await it.client.files.delete(made.id)
        # Without this the client would try again for nothing.
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert len(kept(it)) == 1


async def test_a_format_is_declared_before_or_after_the_file(tmp_path: Path) -> None:
    file, purpose = ('name="file"; filename="rows.csv"', b"text,label\ngood,1\n"), ('name="purpose"', b"fine-tune")
    declared = ('name="format"', b"text")
    async with http_gateway(tmp_path) as it:
        refused = await it.raw.post("/v1/files", **form(purpose, file))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "ambiguous_dataset")
        for parts in ((declared, purpose, file), (file, purpose, declared)):
            made = await it.raw.post("/v1/files", **form(*parts))
            assert made.json()["graft"]["format"] == "text", made.text
        wrong = await it.raw.post("/v1/files", **form(purpose, ('name="format"', b"xml"), file))
        assert wrong.json()["error"]["param"] == "format"
        by_client = await uploaded(it, b"text,label\ngood,1\n", extra_body={"format": "fields"})
        assert by_client.model_extra is not None
        assert by_client.model_extra["graft"]["format"] == "fields"
        assert len(kept(it)) == 3
