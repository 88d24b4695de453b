"""The workshop's ways: each of its variables drives ``loadbench run scenarios/workshop.yaml``, and no key is kept."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.target.fake import FakeServer
from loadbench.target.fake_script import Script
from loadbench.target.fake_wire import Connection, Message
from tests.command import ROOT, ended, facts, loadbench, rows, started, summary

WORKSHOP = ROOT / "scenarios" / "workshop.yaml"
KEY = "s3cret-of-the-workshop"
EVERY = {
    "BENCH_MODELS": "fake-model:1",
    "BENCH_ROUNDS": "2",
    "BENCH_PROMPT": "Say: hello",
    "BENCH_STREAM": "1",
    "BENCH_MAX_TOKENS": "7",
    "BENCH_TEMPERATURE": "0.5",
}


class Listener(FakeServer):
    """The scripted endpoint, with what it was sent."""

    heard: list[Message]

    def take(self, connection: Connection, message: Message) -> None:
        self.heard.append(message)
        super().take(connection, message)

    def chats(self) -> list[dict[str, Any]]:
        return [orjson.loads(message.body) for message in self.heard if message.path.endswith("/chat/completions")]

    def keys(self) -> set[str | None]:
        return {message.header(b"authorization") for message in self.heard}


@asynccontextmanager
async def listening(token: str | None = None, **values: Any) -> AsyncIterator[Listener]:
    server = Listener(Script(**{"first_token_ms": 1, "gap_ms": 0, **values}), None, token)
    server.heard = []
    await server.listen("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.close()


async def run(folder: Path, server: Listener, *words: str, **env: str) -> tuple[int, str, str]:
    """The workshop's scenario, with nothing but variables."""
    variables = {"FOUNDRY_LOCAL_ENDPOINT": server.base_url} | env
    return await ended(await started("run", WORKSHOP, "--out", "out", *words, cwd=folder, **variables))


def measured(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder / "out" / "samples.jsonl") if row["phase"] == "load"]


def prompts_of(server: Listener) -> list[str]:
    return [chat["messages"][-1]["content"] for chat in server.chats()]


async def test_without_variables_it_is_what_the_workshop_does(tmp_path: Path) -> None:
    async with listening() as server:
        code, _, err = await run(tmp_path, server)
    assert code == 0, err
    assert len(measured(tmp_path)) == 3
    assert len([row for row in rows(tmp_path / "out" / "samples.jsonl") if row["phase"] == "warmup"]) == 1
    asked = [chat for chat in server.chats() if chat["max_tokens"] == 120]  # not the canaries
    assert {chat["temperature"] for chat in asked} == {0.2}
    assert not any(chat.get("stream") for chat in asked)
    assert {chat["messages"][-1]["content"] for chat in asked} == {"Explain retrieval augmented generation briefly."}
    assert server.keys() == {None}
    assert max(row["sent_ns"] for row in measured(tmp_path)[1:]) > measured(tmp_path)[0]["done_ns"]  # one by one


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/"])
async def test_the_endpoint_may_come_with_or_without_v1(tmp_path: Path, suffix: str) -> None:
    async with listening() as server:
        url = server.base_url.removesuffix("/v1") + suffix
        code, _, err = await run(tmp_path, server, "--quiet", FOUNDRY_LOCAL_ENDPOINT=url)
    assert code == 0, err
    assert len(measured(tmp_path)) == 3
    assert {message.path for message in server.heard if message.method == "POST"} == {"/v1/chat/completions"}


async def test_the_models_are_measured_one_after_another_and_come_before_the_alias(tmp_path: Path) -> None:
    async with listening(models=("phi:1", "qwen:2", "other:1")) as server:
        code, _, err = await run(tmp_path, server, BENCH_MODELS=" qwen:2 , phi:1,", FOUNDRY_LOCAL_ALIAS="other:1")
    assert code == 0, err
    assert [row["asked"] for row in facts(tmp_path)["models"]] == ["qwen:2", "phi:1"]
    assert [level["model"] for level in summary(tmp_path / "out")["levels"]] == ["qwen:2", "phi:1"]
    asked = [chat["model"] for chat in server.chats()]
    assert asked == sorted(asked, reverse=True)
    assert set(asked) == {"qwen:2", "phi:1"}


async def test_the_alias_is_the_model_where_none_are_listed(tmp_path: Path) -> None:
    async with listening(models=("phi:1", "qwen:2")) as server:
        code, _, err = await run(tmp_path, server, FOUNDRY_LOCAL_ALIAS="qwen:2", BENCH_MODELS="")
    assert code == 0, err
    assert {chat["model"] for chat in server.chats()} == {"qwen:2"}


async def test_rounds_are_how_often_each_model_is_asked(tmp_path: Path) -> None:
    async with listening() as server:
        code, _, err = await run(tmp_path, server, BENCH_ROUNDS="5")
    assert code == 0, err
    assert len(measured(tmp_path)) == 5
    assert facts(tmp_path)["scenario"]["stages"][0]["rounds"] == 5


async def test_the_prompt_is_asked_as_it_stands(tmp_path: Path) -> None:
    prompt = 'Say: {"no": 1} # and "why"\nin two lines, für ${HOME}'
    async with listening() as server:
        code, _, err = await run(tmp_path, server, BENCH_PROMPT=prompt)
    assert code == 0, err
    assert prompts_of(server).count(prompt) == 4  # with the warm-up
    assert facts(tmp_path)["scenario"]["prompts"][0]["text"] == prompt


@pytest.mark.parametrize(("said", "streams"), [("1", True), ("0", False), ("true", True), ("", False)])
async def test_a_stream_is_asked_for_and_gives_a_time_to_first_token(tmp_path: Path, said: str, streams: bool) -> None:
    async with listening() as server:
        code, _, err = await run(tmp_path, server, BENCH_STREAM=said)
    assert code == 0, err
    assert {bool(chat.get("stream")) for chat in server.chats() if chat["max_tokens"] == 120} == {streams}
    assert all((row["first_token_ns"] is not None) == streams for row in measured(tmp_path))


async def test_most_tokens_and_temperature_reach_the_server(tmp_path: Path) -> None:
    async with listening() as server:
        code, _, err = await run(tmp_path, server, BENCH_MAX_TOKENS="9", BENCH_TEMPERATURE="0")
    assert code == 0, err
    assert [chat["temperature"] for chat in server.chats() if chat["max_tokens"] == 9] == [0] * 4
    assert {row["output_tokens"] for row in measured(tmp_path)} == {9}


async def test_variables_that_are_set_but_empty_count_as_unset(tmp_path: Path) -> None:
    empty = dict.fromkeys((*EVERY, "FOUNDRY_LOCAL_ALIAS", "API_KEY", "OPENAI_API_KEY"), "")
    async with listening() as server:
        code, _, err = await run(tmp_path, server, **empty)
    assert code == 0, err
    assert len(measured(tmp_path)) == 3
    assert server.keys() == {None}


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("BENCH_ROUNDS", "three", 'stages[0].rounds: expected a whole number, got "three" (from BENCH_ROUNDS)'),
        ("BENCH_ROUNDS", "0", 'stages[0].rounds: expected a number of at least 1, got "0" (from BENCH_ROUNDS)'),
        ("BENCH_STREAM", "maybe", 'request.stream: expected true or false, got "maybe" (from BENCH_STREAM)'),
        ("BENCH_MAX_TOKENS", "-4", 'expected a number of at least 1, got "-4" (from BENCH_MAX_TOKENS)'),
        ("BENCH_TEMPERATURE", "hot", 'expected a number, got "hot" (from BENCH_TEMPERATURE)'),
        ("BENCH_TEMPERATURE", "inf", 'expected a number that is finite, got "inf" (from BENCH_TEMPERATURE)'),
        ("FOUNDRY_LOCAL_ALIAS", ",", 'models: expected some text, got ","'),
        ("BENCH_MODELS", ",", "BENCH_MODELS: expected models with commas between them, got ,"),
        ("FOUNDRY_LOCAL_ENDPOINT", "ftp://x", "FOUNDRY_LOCAL_ENDPOINT: endpoint: expected embedded or a URL"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(name: str, value: str, problem: str) -> None:
    variables: dict[str, Any] = {name: value}
    done = loadbench("check", WORKSHOP, **variables)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert problem in done.stderr
    assert name in done.stderr


async def test_the_command_to_repeat_asks_the_same_without_the_variables(tmp_path: Path) -> None:
    async with listening() as server:
        code, out, err = await run(tmp_path, server, API_KEY=KEY, **EVERY)
        assert code == 0, err
        first = server.chats()
        command = shlex.split(out.splitlines()[-1].removeprefix("Repeat"))
        assert facts(tmp_path)["command"] == shlex.join(command)
        assert command[:3] == ["loadbench", "run", str(WORKSHOP)]
        server.heard.clear()
        code, _, err = await ended(await started(*command[1:], "--out", "again", cwd=tmp_path))
    assert code == 0, err
    assert server.chats() == first
    assert len(first) == 3 + 2  # two rounds, a warm-up, and a canary at either end


async def test_flags_come_before_variables_and_are_what_the_repeated_command_has(tmp_path: Path) -> None:
    async with listening() as server:
        words = ("--model", "fake-model:1", "--set", "stages.0.rounds=1", "--set=request.max_tokens=5")
        code, out, err = await run(tmp_path, server, *words, **EVERY | {"BENCH_MODELS": "nobody"})
    assert code == 0, err
    assert len(measured(tmp_path)) == 1
    (repeat,) = [line for line in out.splitlines() if line.startswith("Repeat")]
    assert "rounds=2" not in repeat
    assert "max_tokens=7" not in repeat
    assert "nobody" not in repeat
    assert "--set request.temperature=0.5" in repeat


# The key


@pytest.mark.parametrize(
    ("env", "sent"),
    [
        ({"API_KEY": KEY}, KEY),
        ({"API_KEY": KEY, "OPENAI_API_KEY": "s3cret-first"}, "s3cret-first"),
        ({"API_KEY": KEY, "OPENAI_API_KEY": ""}, KEY),
    ],
)
async def test_the_key_is_sent_with_every_request_and_kept_nowhere(
    tmp_path: Path, env: dict[str, str], sent: str
) -> None:
    async with listening(token=sent) as server:
        code, out, err = await run(tmp_path, server, **env)
        assert server.keys() == {f"Bearer {sent}"}
    assert code == 0, err
    assert "s3cret" not in out + err
    assert not any(b"s3cret" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


async def test_a_server_that_repeats_the_key_does_not_give_it_away(tmp_path: Path) -> None:
    class Echo(Listener):
        def take(self, connection: Connection, message: Message) -> None:
            self.heard.append(message)
            if message.method != "POST":
                FakeServer.take(self, connection, message)
                return
            said = {"error": {"message": f"no {message.header(b'authorization')} here", "type": "x"}}
            self._reply(connection, message, 403, json.dumps(said).encode())

    server = Echo(Script(), None, None)
    server.heard = []
    await server.listen("127.0.0.1", 0)
    try:
        code, out, err = await run(tmp_path, server, API_KEY=KEY)
    finally:
        await server.close()
    assert code == 3
    assert "here" in err
    assert KEY not in out + err


async def test_a_key_that_a_header_of_the_file_takes_from_the_environment_is_kept_nowhere(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "request: {max_tokens: 4, headers: {X-Custom: 'k ${API_KEY}'}, extra: {user: '${WHO}', token: '${API_KEY}'}}\n"
        "prompts: [{name: p, text: Hi}]\nstages: [{concurrency: 1, requests: 2}]\n"
    )
    async with listening() as server:
        words = ("run", "s.yaml", "--out", "out", "--endpoint", server.base_url)
        code, out, err = await ended(await started(*words, cwd=tmp_path, API_KEY=KEY, WHO="me"))
    assert code == 0, err
    assert {message.header(b"x-custom") for message in server.heard} == {f"k {KEY}"}
    assert KEY not in out + err
    assert out.rstrip().endswith("--set request.extra.user=me")
    assert not any(KEY.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


@pytest.mark.parametrize("line", ["description: with ${API_KEY}", "request: {extra: {user: 'x ${OPENAI_API_KEY}'}}"])
def test_a_key_where_it_would_be_saved_is_refused_without_being_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "s.yaml").write_text(f"seed: 1\n{line}\n")
    done = loadbench("check", "s.yaml", cwd=tmp_path, API_KEY=KEY, OPENAI_API_KEY=KEY)
    assert done.returncode == 2
    assert "expected a key in request.headers only, which are never saved" in done.stderr
    assert done.stderr.startswith("loadbench: s.yaml:2: ")
    assert KEY not in done.stdout + done.stderr


def test_a_secret_in_the_wrong_place_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("power: ${MY_TOKEN}\n")
    done = loadbench("check", "s.yaml", cwd=tmp_path, MY_TOKEN=KEY)
    assert "got something that is not shown (from MY_TOKEN)" in done.stderr
    assert KEY not in done.stdout + done.stderr


# Lists of prompts


async def test_a_list_of_prompts_is_asked_in_its_order_round_after_round(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(["one", {"id": 7, "prompt": "two", "category": "x"}, "three"]))
    text = WORKSHOP.read_text(encoding="utf-8").replace("\n    text: ${BENCH_PROMPT", "\n    file: prompts.json #")
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    async with listening() as server:
        words = ("run", "s.yaml", "--out", "out", "--endpoint", server.base_url)
        code, _, err = await ended(await started(*words, cwd=tmp_path, BENCH_ROUNDS="2"))
    assert code == 0, err
    asked = [text for text, chat in zip(prompts_of(server), server.chats(), strict=True) if chat["max_tokens"] == 120]
    assert asked == ["one", *["one", "two", "three"] * 2]  # the warm-up first
    assert [row["place"] for row in measured(tmp_path)] == [0, 1, 2] * 2
