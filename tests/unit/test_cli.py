"""The `graft` command against a real gateway: what each command prints, as text and as JSON, and its exit codes."""

import asyncio
import json
from pathlib import Path

import pytest

from graft.cli.output import print_json, print_table
from graft.domain.errors import Unavailable
from tests.support.command import Ran, graft
from tests.support.gateways import BASE, ROWS, Gateway, gateway, registry
from tests.support.ports import free_port

REVIEWS = f"{BASE}:reviews"


async def ran(it: Gateway, *arguments: str | Path, stdin: str = "") -> Ran:
    return await graft(*arguments, stdin=stdin, GRAFT_ADDRESS=it.address)


async def uploaded(it: Gateway, folder: Path) -> str:
    file = folder / "films [1].jsonl"
    file.write_bytes(ROWS)
    answer = await ran(it, "datasets", "upload", file, "--json")
    return str(answer.json["name"]).rsplit("/", 1)[1]


async def test_models_are_listed_as_text_and_as_json(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        text, as_json = await asyncio.gather(ran(it, "models"), ran(it, "models", "--json"))
    assert text.code == as_json.code == 0
    assert text.out.splitlines()[1].split() == [BASE, "135M", "270.0", "MB", "2048", "tokens", "Apache-2.0", "yes"]
    assert as_json.json[0]["model"] == BASE
    assert as_json.json[0]["target_modules"] == ["q_proj", "v_proj"]


async def test_a_data_set_is_uploaded_listed_shown_and_deleted(tmp_path: Path) -> None:
    file = tmp_path / "films [1].jsonl"
    file.write_bytes(ROWS)
    async with gateway(tmp_path) as it:
        upload = await ran(it, "datasets", "upload", file)
        assert upload.code == 0
        dataset = upload.out.split()[0]
        assert upload.out == f"{dataset}  prompt_completion, 2 rows, {len(ROWS)} bytes\n"
        named = (await ran(it, "datasets", "upload", file, "--name", "films", "--json")).json
        assert (named["display_name"], named["row_count"]) == ("films", "2")

        listed, as_json, shown, shown_json = await asyncio.gather(
            ran(it, "datasets", "list"),
            ran(it, "datasets", "list", "--json"),
            ran(it, "datasets", "get", dataset),
            ran(it, "datasets", "get", dataset, "--json"),
        )
        # A file name in brackets is no markup.
        assert f"{dataset}  films [1].jsonl  prompt_completion  2" in listed.out
        assert len(as_json.json) == 2
        assert "prompt_completion" in shown.out
        assert shown_json.json["digest"].startswith("sha256:")

        deleted, deleted_json = await asyncio.gather(
            ran(it, "datasets", "delete", dataset), ran(it, "datasets", "delete", named["name"], "--json")
        )
        assert deleted.out == f"Data set {dataset} is deleted.\n"
        assert deleted_json.json == {"deleted": named["name"].rsplit("/", 1)[1]}
        empty, gone = await asyncio.gather(ran(it, "datasets", "list"), ran(it, "datasets", "get", dataset, "--json"))
        assert "graft datasets upload" in empty.out
        assert (gone.code, gone.error["code"], gone.error["reason"]) == (3, "NOT_FOUND", "DATA_SET_NOT_FOUND")


async def test_files_that_are_no_data_sets_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n{"prompt": "a", "completion": "b"}\n')
    async with gateway(tmp_path) as it:
        absent, folder, empty, bad, bad_json = await asyncio.gather(
            ran(it, "datasets", "upload", tmp_path / "absent.jsonl"),
            ran(it, "datasets", "upload", tmp_path),
            ran(it, "datasets", "upload", tmp_path / "empty.jsonl"),
            ran(it, "datasets", "upload", tmp_path / "bad.jsonl"),
            ran(it, "datasets", "upload", tmp_path / "bad.jsonl", "--json"),
        )
    assert [each.code for each in (absent, folder, empty, bad, bad_json)] == [2] * 5
    assert absent.err == f"{tmp_path / 'absent.jsonl'} cannot be read: No such file or directory.\n"
    assert folder.err == f"{tmp_path} cannot be read: Is a directory.\n"
    assert "no rows" in empty.err or "empty" in empty.err
    assert "line 1: prompt" in bad.err
    assert bad_json.out == ""
    assert bad_json.error["violations"][0]["field"].startswith("line 1")
    for refused in (absent, folder, empty, bad):
        assert "Traceback" not in refused.err


async def test_an_upload_says_what_it_recognised_and_takes_a_declared_format(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("text,label\ngood,1\nbad,0\n")
    async with gateway(tmp_path) as it:
        ambiguous, fields, wrong = await asyncio.gather(
            ran(it, "datasets", "upload", file),
            ran(it, "datasets", "upload", file, "--format", "fields"),
            ran(it, "datasets", "upload", file, "--format", "xml"),
        )
    assert (ambiguous.code, fields.code, wrong.code) == (2, 0, 2)
    assert "text (would ignore `label`) or fields (would ignore nothing)" in ambiguous.err
    assert fields.out.split("  ")[1] == "fields, 2 rows, 24 bytes\n"
    assert "question_answer" in wrong.err


async def test_an_upload_comes_from_any_file_system_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://folder/rows.jsonl", "wb") as file:
        file.write(ROWS)
    async with gateway(tmp_path) as it:
        uploaded = await ran(it, "datasets", "upload", "memory://folder/rows.jsonl", "--json")
        assert (uploaded.json["display_name"], uploaded.json["row_count"]) == ("rows.jsonl", "2")
        absent, unknown, without = await asyncio.gather(
            ran(it, "datasets", "upload", "memory://folder/absent.jsonl"),
            ran(it, "datasets", "upload", "nothing://rows.jsonl"),
            ran(it, "datasets", "upload", "dropbox://rows.jsonl"),
        )
    assert [each.code for each in (absent, unknown, without)] == [2, 2, 2]
    assert "memory://folder/absent.jsonl cannot be read" in absent.err
    assert "nothing" in unknown.err
    assert "Install" in without.err or "install" in without.err


async def test_adapters_are_listed_shown_and_placed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        (
            listed,
            listed_json,
            adapter,
            adapter_json,
            version,
            version_json,
            versions,
            versions_json,
        ) = await asyncio.gather(
            ran(it, "adapters", "list"),
            ran(it, "adapters", "list", "--json"),
            ran(it, "adapters", "get", REVIEWS),
            ran(it, "adapters", "get", REVIEWS, "--json"),
            ran(it, "adapters", "get", f"{REVIEWS}@champion"),
            ran(it, "adapters", "get", f"{REVIEWS}@1", "--json"),
            ran(it, "adapters", "versions", REVIEWS),
            ran(it, "adapters", "versions", REVIEWS, "--json"),
        )
        assert listed.out.splitlines()[1].split() == [REVIEWS, "3", "champion", "→", "3"]
        assert listed_json.json[0]["aliases"] == {"champion": 3}
        assert "newest version  3" in adapter.out
        assert adapter_json.json["newest_version"] == 3
        assert f"{REVIEWS}@3" in version.out
        assert "train_loss         0.5" in version.out
        assert version_json.json["version"] == 1
        assert [line.split()[0] for line in versions.out.splitlines()] == ["MODEL", f"{REVIEWS}@3", f"{REVIEWS}@1"]
        assert [one["version"] for one in versions_json.json] == [3, 1]

        loaded = await ran(it, "adapters", "load", REVIEWS)
        assert loaded.out.splitlines()[1].split(maxsplit=5) == ["fake-1", "yes", "1", "of", "4", f"{REVIEWS}@3"]
        loaded_json = await ran(it, "adapters", "load", f"{REVIEWS}@1", "--json")
        assert {held["model"] for held in loaded_json.json[0]["adapters"]} == {f"{REVIEWS}@1", f"{REVIEWS}@3"}
        assert loaded_json.json[0]["adapters"][0]["tier"] == "TIER_ENGINE"
        held = await ran(it, "adapters", "residency")
        assert "2 of 4" in held.out
        unloaded = await ran(it, "adapters", "unload", REVIEWS)
        assert "1 of 4" in unloaded.out
        unloaded_json = await ran(it, "adapters", "unload", f"{REVIEWS}@1", "--json")
        assert unloaded_json.json[0]["adapters"] == []
        assert (await ran(it, "adapters", "residency", "--json")).json[0]["ready"] is True
        missing = await ran(it, "adapters", "load", f"{REVIEWS}@2")
        assert missing.code == 3
        assert f"Existing: {REVIEWS}@3, {REVIEWS}@1" in missing.err


async def test_an_alias_is_pointed_at_a_version(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:

        async def fulfil() -> None:
            for _ in range(2):
                while not (wishes := await it.store.pending_alias_wishes()):  # noqa: ASYNC110 - a row, not an event
                    await asyncio.sleep(0.01)
                await it.store.replace_registry(registry({"champion": 3, wishes[0].alias: wishes[0].version}))
                await it.store.finish_alias_wish(wishes[0].id, None)

        fulfilled = asyncio.create_task(fulfil())
        text = await ran(it, "adapters", "alias", REVIEWS, "candidate", "1")
        assert text.out == f"{REVIEWS}@candidate is version 1.\n"
        as_json = await ran(it, "adapters", "alias", REVIEWS, "candidate", "3", "--json")
        assert as_json.json["aliases"] == {"champion": 3, "candidate": 3}
        await fulfilled
        wrong = await ran(it, "adapters", "alias", REVIEWS, "latest", "1")
        assert wrong.code == 2
        assert "'latest'" in wrong.err


async def test_generate_takes_its_prompt_from_the_line_or_from_standard_input(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        text = await ran(it, "generate", REVIEWS, "A film")
        assert text.out == f"[{REVIEWS}@3] A film\n"
        options = [
            "--temperature",
            "0.5",
            "--top-p",
            "0.9",
            "--seed",
            "7",
            "--max-tokens",
            "5",
            "--stop",
            "a",
            "--stop",
            "b",
        ]
        piped = await ran(it, "generate", BASE, "-", *options, "--json", stdin="From a pipe")
        assert piped.json["text"] == "[base] From a pipe"
        assert piped.json["model"] == BASE
        assert piped.json["usage"] == {"prompt_tokens": 3, "completion_tokens": 5}
        _, body = it.engine.requests[-1]
        asked = {name: body[name] for name in ("temperature", "top_p", "seed", "max_tokens", "stop")}
        assert asked == {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 5, "stop": ["a", "b"]}
        await ran(it, "generate", BASE, "x", "--choice", "yes", "--choice", "no")
        assert "yes" in json.dumps(it.engine.requests[-1][1])


async def test_chat_answers_once_or_turn_by_turn_with_its_history(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        once = await ran(
            it, "chat", REVIEWS, "hello", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9"
        )
        assert once.out == f"[{REVIEWS}@3] one two three\n"
        _, body = it.engine.requests[-1]
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 9)

        talk = await ran(it, "chat", BASE, "--system", "Be kind.", stdin="first\n\nsecond\n")
        assert talk.code == 0
        assert talk.out == "[base] one two three\n" * 2
        _, body = it.engine.requests[-1]
        assert [(turn["role"], turn["content"]) for turn in body["messages"]] == [
            ("system", "Be kind."),
            ("user", "first"),
            ("assistant", "[base] one two three"),
            ("user", "second"),
        ]

        as_json = await ran(it, "chat", BASE, "--json", stdin="first\nsecond\n")
        assert [answer["text"] for answer in as_json.json_lines] == ["[base] first", "[base] second"]
        it.engine.refuse = 400
        refused = await ran(it, "chat", BASE, "hello", "--json")
        assert (refused.code, refused.out, refused.error["code"]) == (2, "", "INVALID_ARGUMENT")


async def test_a_failure_of_the_engine_has_the_exit_code_of_unavailable(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        it.engine.error = Unavailable("The engine starts.", reason="ENGINE_STARTING", retry_after_seconds=1)
        text, as_json = await asyncio.gather(ran(it, "generate", BASE, "x"), ran(it, "chat", BASE, "x", "--json"))
    assert (text.code, text.out, text.err) == (4, "", "The engine starts.\n")
    assert (as_json.code, as_json.error["reason"]) == (4, "ENGINE_STARTING")


async def test_unknown_names_are_told_with_those_that_exist(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, tmp_path)
        model, data, job, adapter = await asyncio.gather(
            ran(it, "tune", "create", "llama", dataset),
            ran(it, "tune", "create", BASE, "ds-none", "--json"),
            ran(it, "tune", "get", "ft-none"),
            ran(it, "chat", f"{BASE}:nope", "x"),
        )
    assert [each.code for each in (model, data, job, adapter)] == [3] * 4
    assert "'llama'" in model.err
    assert BASE in model.err
    assert model.err.count("llama") == 1
    assert data.error["reason"] == "TRAINING_DATASET_NOT_FOUND"
    assert dataset in data.error["message"]
    assert "'ft-none'" in job.err
    assert "reviews" in adapter.err


async def test_without_a_gateway_the_address_and_the_remedy_are_told(tmp_path: Path) -> None:
    port = free_port()
    named, own, as_json = await asyncio.gather(
        graft("models", GRAFT_ADDRESS=f"127.0.0.1:{port}"),
        # Without an address it is the home's own gateway, wherever its settings put it.
        graft("tune", "watch", "ft-1", GRAFT_HOME=tmp_path, GRAFT_GATEWAY_GRPC_PORT=port, GRAFT_GATEWAY_HOST="0.0.0.0"),
        graft("datasets", "list", "--json", GRAFT_ADDRESS=f"127.0.0.1:{port}"),
    )
    for refused in (named, own):
        assert refused.code == 4
        assert refused.err.startswith(f"No Graft gateway answers at 127.0.0.1:{port}. Start one with `graft up`")
    assert (as_json.code, as_json.error["reason"]) == (4, "GATEWAY_UNREACHABLE")


async def test_the_version_and_the_help_come_without_a_gateway() -> None:
    version, help_text, tune = await asyncio.gather(graft("--version"), graft("--help"), graft("tune", "--help"))
    assert version.out.startswith("graft 0.")
    assert "doctor" in help_text.out
    assert "Exit codes" in help_text.out
    assert "checkpoints" in tune.out


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("status",)])
async def test_commands_without_a_gateway_import_no_grpc_and_nothing_heavier(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    program = (
        "import sys, runpy\n"
        f"sys.argv = ['graft', *{arguments!r}]\n"
        "try: runpy.run_module('graft.cli.main', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'google.protobuf', 'graft.client', 'ray', 'torch', 'mlflow', 'vllm', 'numpy', 'sqlalchemy'}\n"
        "sys.exit(f'imported {found}' if (found := heavy & set(sys.modules)) else 0)\n"
    )
    import sys

    from tests.support.command import environment

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(GRAFT_HOME=tmp_path),
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()


def test_off_a_terminal_a_row_of_a_table_is_one_line_whatever_its_cells_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(["ID", "RESULT"], [["ft-1", "It failed.\nSee the log."], ["ft-2", "ok"]])
    assert capsys.readouterr().out.splitlines() == ["ID    RESULT", "ft-1  It failed. See the log.", "ft-2  ok"]


@pytest.mark.parametrize("arguments", [(), ("a prompt", "--input", "review=x")])
async def test_generate_takes_a_prompt_or_inputs_and_says_so(arguments: tuple[str, ...]) -> None:
    refused = await graft("generate", BASE, *arguments, GRAFT_ADDRESS="127.0.0.1:1")
    assert (refused.code, refused.err.startswith("Give either a PROMPT")) == (2, True)


def test_what_is_printed_as_json_is_json_also_where_a_number_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "steps": [1, float("-inf"), 0.5]}, line=True)
    assert capsys.readouterr().out == '{"loss": null, "steps": [1, null, 0.5]}\n'
