"""The embedded Foundry Local, for real: it serves what was registered, and its process ends whatever happens to us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from loadbench.errors import TargetError
from loadbench.outcomes import classify
from loadbench.target import foundry as foundry_module
from loadbench.target.foundry import EmbeddedFoundry, cache_dir
from loadbench.target.synthetic import SYNTHETIC, SyntheticModel, ensure

SMALL_ENGINE = replace(SYNTHETIC["batching"], hidden=64, layers=2, heads=4, feed_forward=128)
DEADLINE_S = 20.0  # what takes longer here has hung

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about the process")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@contextlib.asynccontextmanager
async def serving(
    cache: Path, *names: str
) -> AsyncIterator[tuple[EmbeddedFoundry, aiohttp.ClientSession, list[SyntheticModel]]]:
    """The service with the models of these names loaded."""
    models = [ensure(name, cache) for name in names]
    async with (
        await EmbeddedFoundry.start({model.model_id: model.path for model in models}, cache) as foundry,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session,
    ):
        for model in models:
            async with session.get(f"{foundry.root_url}/catalogs/local/models/load/{model.alias}") as response:
                assert response.status == 200, await response.text()
        yield foundry, session, models


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def has_ended(pidfd: int) -> bool:
    """Wait for the end of a process. Unlike psutil's wait, this asks nobody to have reaped it."""
    try:
        return select.select([pidfd], [], [], DEADLINE_S)[0] == [pidfd]
    finally:
        os.close(pidfd)


def freeze(child: int) -> None:
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED)


def question(model: SyntheticModel, text: str, **more: Any) -> dict[str, Any]:
    return {"model": model.model_id, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


async def stream(foundry: EmbeddedFoundry, session: aiohttp.ClientSession, body: dict[str, Any]) -> list[Any]:
    """All the events of a streamed answer, decoded but for ``[DONE]``."""
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{foundry.base_url}/chat/completions", json=body) as response:
        lines = (await response.text()).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


@pytest.mark.parametrize("name", ["tiny", "small-engine"])
async def test_a_stream_has_exactly_max_tokens_printable_tokens(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SYNTHETIC, "small-engine", SMALL_ENGINE)
    async with serving(cache, name) as (foundry, session, [model]):
        for temperature in (0, 0.9):
            *events, usage, done = await stream(
                foundry, session, question(model, "Tell me", max_tokens=37, temperature=temperature)
            )
            deltas = [event["choices"][0]["delta"].get("content") for event in events]
            said = [delta for delta in deltas if delta]
            assert done == "[DONE]"
            assert events[-1]["choices"][0]["finish_reason"] == "length"
            assert re.fullmatch("[a-z ]{37}", "".join(said)) and len(said) == 37
            assert usage["usage"]["completion_tokens"] == 37


async def test_a_prompt_has_a_token_a_character_one_a_message_and_one_for_the_answer(cache: Path) -> None:
    async with serving(cache, "tiny") as (foundry, session, [model]):
        for texts in (["a"], ["Two  spaces,\n\nit's 3,000 tokens!"], ["You are terse.", "Hello", "Hi.", "x" * 500]):
            roles = ["system", "user", "assistant", "user"] if len(texts) > 1 else ["user"]
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            body = {"model": model.model_id, "messages": messages, "max_tokens": 1}
            async with session.post(f"{foundry.base_url}/chat/completions", json=body) as response:
                usage = (await response.json())["usage"]
            assert usage["prompt_tokens"] == sum(map(len, texts)) + len(texts) + 1


async def test_more_than_the_context_holds_is_an_error_inside_a_stream_with_status_200(cache: Path) -> None:
    async with serving(cache, "tiny") as (foundry, session, [model]):
        fits = await stream(foundry, session, question(model, "x" * 100, max_tokens=model.context_length - 102))
        assert fits[-1] == "[DONE]"
        [event] = await stream(foundry, session, question(model, "x" * 100, max_tokens=model.context_length - 101))
        assert classify(event["error"]["message"], "unrecognised") == "context_exceeded"


async def test_the_service_tells_who_it_is_and_sends_nothing_home(cache: Path) -> None:
    async with serving(cache, "tiny") as (foundry, session, [model]):
        async with session.get(f"{foundry.root_url}/status") as response:
            assert (await response.json())["pid"] == foundry.pid
        async with session.get(f"{foundry.base_url}/models") as response:
            listed = [entry["id"] for entry in (await response.json())["data"]]
        assert listed == list(foundry.model_ids) == [model.model_id]
        assert foundry.versions["foundry-local-sdk"] == "2.2.1"
        assert all(re.match(r"\d+\.\d+", version) for version in foundry.versions.values())
        environment = psutil.Process(foundry.pid).environ()
        assert (environment["CI"], environment["ORT_TELEMETRY_DISABLED"]) == ("true", "1")


async def test_two_at_once_do_not_disturb_each_other(cache: Path) -> None:
    async with serving(cache, "tiny") as (first, session, [model]):
        async with serving(cache, "tiny") as (second, _, _):
            assert first.base_url != second.base_url
            assert (await stream(second, session, question(model, "hello", max_tokens=5)))[-1] == "[DONE]"
        assert (await stream(first, session, question(model, "hello", max_tokens=5)))[-1] == "[DONE]"


async def test_a_stopped_one_is_gone_with_its_folder(cache: Path) -> None:
    async with serving(cache, "tiny") as (foundry, _, _):
        assert foundry.alive() and foundry.returncode is None
        assert foundry.log.exists()
    assert not psutil.pid_exists(foundry.pid)
    assert foundry.returncode == 0  # it ended by itself, and was not killed
    assert not foundry.log.parent.exists()


@linux
async def test_one_that_died_leaves_its_log_until_we_have_ended_too(cache: Path) -> None:
    async with serving(cache, "tiny") as (foundry, _, _):
        os.kill(foundry.pid, signal.SIGKILL)
        assert has_ended(os.pidfd_open(foundry.pid))
        assert await foundry.wait() == -signal.SIGKILL and not foundry.alive()
    assert foundry.log.exists()


@linux
async def test_the_end_of_its_log_is_told_and_no_more_than_that(cache: Path) -> None:
    async with await EmbeddedFoundry.start({}, cache) as foundry:
        before = foundry.log_bytes()
        say(foundry.log, "x" * 100_000 + "the end")
        assert foundry.log_tail().endswith("xthe end") and len(foundry.log_tail()) == 64 << 10
        assert foundry.log_tail(before + 100_000) == "the end"
    assert foundry.log_tail() == "" and foundry.log_bytes() == 0


def say(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(text)


@linux
async def test_one_that_does_not_react_is_killed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundry_module, "STOP_TIMEOUT_S", 0.1)
    async with serving(cache, "tiny") as (foundry, _, _):
        freeze(foundry.pid)
    assert foundry.returncode == -signal.SIGKILL


@linux
async def test_one_that_does_not_answer_is_not_asked_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundry_module, "STOP_TIMEOUT_S", 0.1)
    async with await EmbeddedFoundry.start({}, cache) as foundry:
        with pytest.raises(TargetError, match="nothing to do by the name of dance"):
            await foundry.ask({"do": "dance"})
        freeze(foundry.pid)
        with pytest.raises(TargetError, match=r"the embedded service did not load within 0\.1 s"):
            await foundry.ask({"do": "load", "id": "x:1"}, timeout_s=0.1)
        with pytest.raises(TargetError, match="the embedded service has not answered to: load"):
            await foundry.ask({"do": "list"})


async def test_a_wedged_engine_cannot_keep_its_process_alive(cache: Path) -> None:
    async def until_stuck(foundry: EmbeddedFoundry, session: aiohttp.ClientSession, model: SyntheticModel) -> None:
        """Read until nothing but keep-alives come, which are 250 ms apart. Two of 224 tokens do not fit 256."""
        body = question(model, "x" * 22, max_tokens=200, stream=True)
        async with session.post(f"{foundry.base_url}/chat/completions", json=body) as response:
            keep_alives = 0
            async for line in response.content:
                keep_alives += line.startswith(b":")
                if line.startswith(b"data"):
                    keep_alives = 0
                if keep_alives == 3:
                    return
        pytest.fail("the stream ended: it was not stuck")

    async with serving(cache, "wedge") as (foundry, session, [model]):
        await asyncio.gather(*(until_stuck(foundry, session, model) for _ in range(2)))
    assert foundry.returncode == 0


PARENT = """
import asyncio, pathlib, sys
from loadbench.target.foundry import EmbeddedFoundry

async def main():
    foundry = await EmbeddedFoundry.start({}, pathlib.Path(sys.argv[1]))
    print(foundry.pid, foundry.log.parent, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def orphan(cache: Path) -> tuple[int, Path]:
    """A pidfd of a child whose parent has just been killed, and the child's folder."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(cache)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().decode().split()
    pidfd = os.pidfd_open(int(pid))
    parent.kill()
    parent.communicate()
    return pidfd, Path(folder)


@linux
async def test_it_dies_with_a_parent_that_was_killed_and_the_next_start_tidies_up(
    orphan: tuple[int, Path], cache: Path
) -> None:
    pidfd, folder = orphan
    assert has_ended(pidfd)
    assert folder.exists()
    async with await EmbeddedFoundry.start({}, cache) as foundry:
        assert not folder.exists() and foundry.log.parent.exists()


@linux
async def test_the_terminals_interrupt_does_not_reach_it(cache: Path) -> None:
    async with await EmbeddedFoundry.start({}, cache) as foundry:
        assert os.getpgid(foundry.pid) != os.getpgid(0)
        assert os.getsid(foundry.pid) != os.getsid(0)


async def test_a_model_that_the_service_refuses_has_its_reason_and_the_others_are_served(cache: Path) -> None:
    tiny = ensure("tiny", cache)
    async with await EmbeddedFoundry.start({"ghost:1": cache / "ghost", tiny.model_id: tiny.path}, cache) as foundry:
        assert "model_path must be an existing directory" in foundry.refused["ghost:1"]
        assert foundry.model_ids == (tiny.model_id,)
        assert "model_path must be an existing directory" in read(str(foundry.log))


async def test_a_port_that_is_taken_is_one_clear_line(cache: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(TargetError, match=r"did not start: .*Address already in use"),
    ):
        await EmbeddedFoundry.start({}, cache, port=taken.getsockname()[1])


def impostor(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package of the SDK's name before the real one."""
    (folder / "foundry_local_sdk.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
        ("import os; os.abort()", "it ended without a word"),
    ],
)
async def test_an_sdk_that_does_not_work_is_one_clear_line(
    code: str, expected: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impostor(tmp_path, code, monkeypatch)
    with pytest.raises(TargetError, match=re.escape(f"did not start: {expected} (log: ")):
        await EmbeddedFoundry.start({}, cache)


async def test_one_that_does_not_answer_in_time_is_ended(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impostor(tmp_path, "import threading; threading.Event().wait()", monkeypatch)
    monkeypatch.setattr(foundry_module, "START_TIMEOUT_S", 0.2)
    with pytest.raises(TargetError, match="did not start: no answer within"):
        await EmbeddedFoundry.start({}, cache)
    assert psutil.Process().children() == []


async def test_a_start_that_is_cancelled_leaves_no_process_and_no_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impostor(tmp_path, f"open({str(tmp_path / 'here')!r}, 'w').close(); import time; time.sleep(60)", monkeypatch)
    before = set((cache / "instances").iterdir())
    start = asyncio.create_task(EmbeddedFoundry.start({}, cache))
    await asyncio.sleep(0)  # far enough to have spawned the child
    assert psutil.Process().children() != []
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert psutil.Process().children() == []
    assert set((cache / "instances").iterdir()) <= before


async def test_bound_to_every_interface_it_is_called_on_loopback(cache: Path) -> None:
    async with await EmbeddedFoundry.start({}, cache, host="0.0.0.0") as foundry:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", foundry.root_url)
        assert foundry.base_url == foundry.root_url + "/v1"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"LOADBENCH_CACHE": "/x/chosen"}, "/x/chosen"),
        ("linux", {"XDG_CACHE_HOME": "/x/xdg"}, "/x/xdg/loadbench"),
        ("linux", {}, "/home/me/.cache/loadbench"),
        ("darwin", {"XDG_CACHE_HOME": "/x/xdg"}, "/home/me/Library/Caches/loadbench"),
        ("win32", {"LOCALAPPDATA": "/x/local"}, "/x/local/loadbench"),
    ],
)
def test_the_cache_is_where_the_system_keeps_such(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOADBENCH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_dir() == Path(expected)
