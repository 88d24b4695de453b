"""The scripted endpoint as a whole: its stall, its log, who it says it is, its script, its command and its process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from loadbench.errors import UsageError
from loadbench.outcomes import classify
from loadbench.target.fake import Script, serve
from loadbench.target.fake_cli import fake_command
from loadbench.target.fake_faults import FAULTS
from loadbench.target.fake_script import script_from, script_from_file
from tests.raw import MS, ask, exchange, faulty, get, holds, is_answering, logged, request_bytes, running

# --- the whole server -------------------------------------------------------------------------------------------------


async def test_in_a_stall_of_the_server_nothing_moves_and_afterwards_everything_goes_on() -> None:
    async with running(gap_ms=10, tokens=10, stall_at_s=0.05, stall_for_s=0.2, keep_alive_ms=30) as server:
        streaming = asyncio.create_task(ask(server))
        await holds(lambda: is_answering(server))
        await holds(lambda: server.stands_still)
        asked_ns = perf_counter_ns()
        models, late = await asyncio.gather(get(server, "/v1/models"), ask(server))
        got = await streaming
        first, second = await logged(server, 2)
    thawed_ns = first.received_ns + 250 * MS
    assert asked_ns < thawed_ns <= min(models.reads[0][0], late.reads[0][0])
    assert got.keep_alives == 0, "a server that stands still sends no comments"
    assert first.last_token_ns is not None and first.last_token_ns >= first.received_ns + 290 * MS
    assert second.received_ns < thawed_ns <= second.received_ns + (second.slot_wait_ns or 0)
    arrivals = [at_ns for at_ns, _ in got.reads]
    assert max(later - earlier for earlier, later in pairwise(arrivals)) > 100 * MS


async def test_memory_that_a_request_leaks_is_resident_and_stays() -> None:
    process = psutil.Process()
    # Above 32 MiB glibc always maps: smaller ones may fill pages that tests before this one left resident.
    async with running(leak_bytes=48 << 20) as server:
        before = process.memory_info().rss
        await ask(server)
        await ask(server)
        assert process.memory_info().rss - before > 80 << 20


async def test_without_the_token_there_is_no_answer_and_beyond_loopback_no_server() -> None:
    async with running(token="secret") as server:
        assert (await ask(server)).status == 401
        assert (await ask(server, {"Authorization": "Bearer wrong"})).status == 401
        assert (await ask(server, {"Authorization": "Bearer secret"})).done
    with pytest.raises(
        UsageError, match=r"^fake: --host: expected a loopback address unless --token is given, got 0\."
    ):
        await serve(Script(), host="0.0.0.0")
    everywhere = await serve(Script(), host="0.0.0.0", token="secret")
    assert everywhere.base_url == f"http://127.0.0.1:{everywhere.port}/v1"
    await everywhere.close()


async def test_small_writes_are_held_back_only_if_asked() -> None:
    for nagle in (True, False):
        async with running(nagle=nagle, first_token_ms=60_000) as server:
            asking = asyncio.create_task(ask(server))
            await holds(lambda: is_answering(server))
            [connection] = server.connections
            sock = connection.transport.get_extra_info("socket")
            assert bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) is not nagle
            asking.cancel()


async def test_a_log_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^fake: --log: expected a file that can be written, got .*: Is a directory$"):
        await serve(Script(), log=tmp_path)


async def test_a_port_that_is_taken_is_an_error_of_one_line() -> None:
    async with running() as server:
        with pytest.raises(UsageError, match=f"^fake: cannot listen on 127.0.0.1:{server.port}: .*in use"):
            await serve(Script(), port=server.port)


async def test_the_log_has_a_line_a_request_as_soon_as_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "truth.jsonl"
    async with running(log=log) as server:
        await ask(server, {"X-Request-Id": "one"})
        await faulty(server, "http_5xx")
        truths = await logged(server, 2)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines == [truth._asdict() for truth in server.records]
        unfinished = asyncio.create_task(ask(server, {"X-Fake-Fault": "first_token_deadline"}))
        await holds(lambda: is_answering(server))
    await unfinished
    assert len(truths) == 2
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["fault"], last["done_ns"]) == ("first_token_deadline", None)


# --- who it says it is ------------------------------------------------------------------------------------------------


async def test_foundry_2_tells_its_pid_lists_its_models_and_knows_nothing_else() -> None:
    async with running(flavour="foundry2", models=("tiny:1",)) as server:
        status = (await get(server, "/status")).json
        assert status["endpoints"] == [f"http://127.0.0.1:{server.port}"]
        assert status["pid"] == psutil.Process().pid
        models = (await get(server, "/v1/models")).json
        assert [model["id"] for model in models["data"]] == ["tiny:1"]
        lost = await get(server, "/health")
    assert lost.status == 404 and "text/plain" in lost.head


async def test_foundry_2_loads_by_alias_and_serves_by_id_what_is_loaded() -> None:
    async with running(flavour="foundry2", models=("tiny:1", "edge:1"), loaded=("edge:1",)) as server:
        assert (await get(server, "/models/loaded")).json == ["edge:1"]
        refused = await ask(server, model="tiny:1")
        assert refused.status == 400 and classify(refused.text.decode(), "") == "model_not_loaded"
        assert (await get(server, "/models/load/tiny:1")).status == 404
        assert (await get(server, "/models/load/tiny")).json == {"status": "loaded"}
        assert (await ask(server, model="tiny:1")).done
        assert (await get(server, "/models/unload/edge")).status == 200
        assert (await get(server, "/models/loaded")).json == ["tiny:1"]
        unknown = await ask(server, model="tiny")
    assert unknown.status == 404 and classify(unknown.text.decode(), "") == "model_not_found"


async def test_foundry_2_serves_models_of_ones_own_below_their_prefix_only() -> None:
    async with running(flavour="foundry2", prefix="/catalogs/local", models=("tiny:1",)) as server:
        assert server.base_url.endswith("/catalogs/local/v1")
        assert (await exchange(server, request_bytes(path="/catalogs/local/v1/chat/completions", model="tiny:1"))).done
        assert (await ask(server, model="tiny:1")).status == 404
        assert (await get(server, "/v1/models")).json["data"] == []
        assert (await get(server, "/catalogs/local/models/loaded")).json == ["tiny:1"]
        assert (await get(server, "/models/loaded")).json == []
        assert (await get(server, "/catalogs/local/models/unload/tiny")).status == 200
        assert (await get(server, "/catalogs/local/models/loaded")).json == []
        assert (await get(server, "/status")).status == 200


async def test_foundry_0_8_answers_its_own_routes() -> None:
    async with running(flavour="foundry08", models=("tiny-cpu:1",), loaded=()) as server:
        assert (await get(server, "/openai/status")).json["endpoints"] == [f"http://127.0.0.1:{server.port}"]
        assert (await get(server, "/openai/models")).json == ["tiny-cpu:1"]
        assert (await get(server, "/openai/load/tiny-cpu:1?ttl=600")).status == 200
        assert (await get(server, "/openai/loadedmodels")).json == ["tiny-cpu:1"]
        [row] = (await get(server, "/foundry/list")).json
    assert (row["name"], row["alias"], row["fileSizeMb"]) == ("tiny-cpu:1", "tiny-cpu", 822)


@pytest.mark.parametrize(
    ("flavour", "path", "key"),
    [
        ("ollama", "/api/version", "version"),
        ("ollama", "/api/tags", "models"),
        ("llamacpp", "/props", "default_generation_settings"),
        ("vllm", "/version", "version"),
        ("lmstudio", "/api/v0/models", "data"),
    ],
)
async def test_the_others_are_told_by_their_routes(flavour: str, path: str, key: str) -> None:
    async with running(flavour=flavour) as server, running() as plain:
        assert key in (await get(server, path)).json
        assert (await get(server, "/v1/models")).json["data"][0]["id"] == "fake-model:1"
        assert (await get(plain, path)).status == 404


async def test_ollama_loads_and_unloads_by_post() -> None:
    async with running(flavour="ollama", models=("llama:1b",), loaded=()) as server:
        assert (await get(server, "/api/ps")).json == {"models": []}
        for keep_alive, loaded in ((60, ["llama:1b"]), (0, [])):
            load = request_bytes(path="/api/generate", model="llama:1b", keep_alive=keep_alive)
            assert (await exchange(server, load)).status == 200
            assert [model["name"] for model in (await get(server, "/api/ps")).json["models"]] == loaded
        assert (await ask(server, model="other")).status == 404


# --- the script, the command, the process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"gap_ms": -1}, "here: gap_ms: Input should be greater than or equal to 0, got -1"),
        ({"gap_ms": "fast"}, "here: gap_ms: .*, got 'fast'"),
        ({"slots": 0}, "here: slots: .*, got 0"),
        ({"gap": 1}, "here: gap: Unexpected keyword argument, got 1"),
        ({"faults": ["oom"]}, "here: faults: .*expected NAME, NAME:PROBABILITY or NAME@EVERY"),
        ({"faults": ["empty:2"]}, "here: faults: .*expected a probability from 0 to 1"),
        ({"flavour": "tgi"}, "here: flavour: .*expected one of openai, foundry2"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_name(values: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=f"^{error}") as caught:
        script_from(values, "here")
    assert "\n" not in str(caught.value)


def test_a_script_file_is_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text('{"gap_ms": 3, "faults": ["empty@2"]}')
    assert (script_from_file(path).gap_ms, script_from_file(path).faults) == (3, ("empty@2",))
    path.write_text("[1]")
    with pytest.raises(UsageError, match=r"script\.json: expected a JSON object"):
        script_from_file(path)
    with pytest.raises(UsageError, match=r"none\.json: expected a JSON file that can be read: No such file"):
        script_from_file(tmp_path / "none.json")


def test_the_command_has_an_option_for_every_value_and_tells_every_fault() -> None:
    text = CliRunner().invoke(fake_command, ["--help"]).output
    for name in (script_field.name for script_field in fields(Script)):
        assert re.search(rf"--{name.replace('_', '-').removesuffix('s')}", text), name
    for name in FAULTS:
        assert re.search(rf"^ +{name} ", text, re.MULTILINE), name


def test_an_option_that_makes_no_sense_is_one_line() -> None:
    for options, error in (
        (["--gap-ms", "-1"], r"fake: gap_ms: .*got '-1'"),
        (["--duration", "soon"], r"fake: --duration: expected a duration such as 15s, .*got 'soon'"),
    ):
        with pytest.raises(UsageError, match=error):
            CliRunner().invoke(fake_command, options, catch_exceptions=False)


def started(*options: str) -> tuple[subprocess.Popen[str], str]:
    code = "from loadbench.target.fake_cli import fake_command; fake_command()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_process_of_its_own_prints_its_url_first_and_stamps_with_our_clock(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text('{"first_token_ms": 30, "gap_ms": 50, "tokens": 2}')
    log = tmp_path / "truth.jsonl"
    process, url = started("--script", str(tmp_path / "script.json"), "--gap-ms", "2", "--log", str(log))
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/v1", url)[1])  # type: ignore[index]
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sent_ns = perf_counter_ns()
        sock.sendall(request_bytes())
        while sock.recv(1 << 16):
            pass
        ended_ns = perf_counter_ns()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    [truth] = [json.loads(line) for line in log.read_text().splitlines()]
    assert sent_ns <= truth["received_ns"] <= truth["first_token_ns"] - 30 * MS
    assert truth["first_token_ns"] < truth["last_token_ns"] <= truth["done_ns"] <= ended_ns
    assert truth["last_token_ns"] - truth["received_ns"] <= 32 * MS + truth["max_late_ns"]


@pytest.mark.parametrize("how", ["stdin closes", "duration", "SIGINT"])
def test_the_process_ends_when_it_was_told_to(how: str) -> None:
    options = {"stdin closes": ["--until-stdin-closes"], "duration": ["--duration", "100ms"], "SIGINT": []}[how]
    process, url = started(*options)
    assert url.startswith("http://127.0.0.1:")
    if how == "stdin closes":
        assert process.stdin is not None
        process.stdin.close()
    elif how == "SIGINT":
        process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
