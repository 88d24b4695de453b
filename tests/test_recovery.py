"""The way back after a failure: an embedded service is started anew, others are waited for, and nothing waits long."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import cast

import pytest

from loadbench.aftermath import Canaries
from loadbench.engine.crew import Crew
from loadbench.engine.load import Clock
from loadbench.errors import UsageError
from loadbench.records import Sample
from loadbench.target import foundry as foundry_module
from loadbench.target import target as target_module
from loadbench.target.fake import Script, serve
from loadbench.target.models import Resolved
from loadbench.target.recovery import Recovery, recover
from loadbench.target.target import Target
from tests.asking import answering, ask_once, faking, head, listening, wire_to
from tests.embedded import Asked, embedded

linux = pytest.mark.skipif(sys.platform != "linux", reason="stops processes as on Linux")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models are made once for all these tests."""
    os.environ["LOADBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


class Now:
    """The clock of a run that began with the process."""

    def now_ns(self) -> int:
        return perf_counter_ns()


def since_s(start_ns: int) -> float:
    return (perf_counter_ns() - start_ns) / 1e9


def process(asked: Asked) -> int:
    assert asked.target.foundry is not None
    return asked.target.foundry.pid


def steps(found: Recovery) -> list[float]:
    reached = [found.to_port_s, found.to_status_s, found.to_token_s, found.to_usual_s]
    return [seconds for seconds in reached if seconds is not None]


async def come_back(asked: Asked, name: str) -> Recovery:
    async def canary(model: Resolved) -> Sample:
        asked.model = model
        return await asked.canary()

    before = asked.target.rss_bytes()
    start_ns = perf_counter_ns()
    await asked.target.restart()
    return await recover(
        asked.target, name, canary, Now(), since_ns=start_ns, ttft_before_ms=20.0, rss_before_bytes=before, limit_s=20
    )


async def test_two_requests_that_do_not_fit_together_wedge_it_and_a_restart_cures_it() -> None:
    async with embedded("synthetic:wedge") as asked:
        [alone] = await asked.ask(1, 24, 200)
        assert alone.outcome == "ok"
        stuck = await asked.ask(2, 24, 200, total_s=2.0)
        assert [sample.outcome for sample in stuck] == ["total_deadline"] * 2
        start_ns = perf_counter_ns()
        state, words = await asked.verdict(stuck, first_token_s=1.0)
        assert since_s(start_ns) < 1.0 + 5.0
        assert (state, words[-1]) == ("wedged", "its status route answers")
        first, port = process(asked), asked.target.endpoint.address.port
        found = await come_back(asked, "synthetic:wedge")
        assert found.back and steps(found) == sorted(steps(found)) and len(steps(found)) == 4
        assert process(asked) != first and asked.target.endpoint.address.port != port
        assert found.rss_before_bytes and found.rss_after_bytes
        assert (await asked.verdict(await asked.ask(1, 24, 200)))[0] == "healthy"


@linux
async def test_one_that_was_killed_in_a_stream_has_crashed_and_comes_back() -> None:
    async with embedded("synthetic:kv", 1 << 30) as asked:
        streams = asyncio.ensure_future(asked.ask(2, 24, 4000))
        while (await asked.canary()).outcome != "ok":  # when it is answered, the streams are on their way
            pass
        os.kill(process(asked), signal.SIGKILL)
        lost = await streams
        assert [sample.outcome for sample in lost] == ["connection_lost"] * 2
        state, words = await asked.verdict(lost)
        assert state == "crashed" and words[-1] == "cause not established"
        found = await come_back(asked, "synthetic:kv")
        assert found.back and found.told().startswith("back: port after ")
        assert asked.target.foundry is not None and asked.target.foundry.limit is not None
        assert asked.target.foundry.limit.limit_bytes == 1 << 30


@linux
async def test_one_that_is_stopped_hangs_nobody_and_is_killed_for_its_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundry_module, "STOP_TIMEOUT_S", 0.2)
    monkeypatch.setattr(target_module, "DISCOVER_TIMEOUT_S", 0.5)
    async with embedded("synthetic:tiny") as asked:
        os.kill(process(asked), signal.SIGSTOP)
        start_ns = perf_counter_ns()
        state, words = await asked.verdict([], first_token_s=0.5)
        assert state == "unreachable"
        assert words[1:] == ["its process is stopped", "its status route does not answer"]
        assert since_s(start_ns) < 4.0
        waited = await recover(asked.target, "synthetic:tiny", never, Now(), limit_s=0.5)
        assert not waited.back and waited.to_port_s is not None and waited.to_status_s is None
        assert since_s(start_ns) < 6.0
        assert (await come_back(asked, "synthetic:tiny")).back


async def never(model: Resolved) -> Sample:
    raise AssertionError("nothing there to ask")


async def test_one_that_comes_back_by_itself_is_waited_for_and_only_then_asked() -> None:
    async with faking() as first:
        port = first.port
        target = await Target.at(first.base_url, "test", {})
    asked: list[str] = []

    async def canary(model: Resolved) -> Sample:
        asked.append(model.id)
        return await ask_once(port, model=model.id)

    waiting = asyncio.ensure_future(recover(target, "auto", canary, Now(), ttft_before_ms=5.0, limit_s=10))
    await asyncio.sleep(0)  # it has begun to ask a port that is closed
    second = await serve(Script(first_token_ms=0, gap_ms=1, tokens=6), "127.0.0.1", port)
    try:
        found = await waiting
    finally:
        await second.close()
    assert found.back and steps(found) == sorted(steps(found)) and len(steps(found)) == 4
    assert len(asked) == found.canaries == 1
    assert "model" not in found.as_json() and found.as_json()["back"] is True


async def test_one_that_stays_away_is_given_up_at_the_limit() -> None:
    async with faking() as server:
        target = await Target.at(server.base_url, "test", {})
    found = await recover(target, "auto", never, Now(), limit_s=0.3)
    assert steps(found) == [] and found.as_json()["back"] is False
    assert (
        found.told() == "did not come back within 0 s; no connection: Connect call failed" or "did not" in found.told()
    )


async def test_a_503_zombie_has_a_port_and_no_status() -> None:
    zombie = answering(head("Content-Length: 0", status="503 Service Unavailable"))
    async with faking() as server:
        target = await Target.at(server.base_url, "test", {})
    async with listening(zombie) as port:
        address, url = target.endpoint.address, target.endpoint.url.replace(str(server.port), str(port))
        target.endpoint = replace(target.endpoint, url=url, address=replace(address, port=port))
        found = await recover(target, "auto", never, Now(), limit_s=0.5)
    assert found.to_port_s is not None and found.to_status_s is None
    assert found.last_failure is not None and "503" in found.last_failure


async def test_answers_that_fail_and_answers_that_are_slow_are_not_yet_back() -> None:
    async with faking() as server:
        target = await Target.at(server.base_url, "test", {})
        good = await ask_once(server.port)
        assert good.first_token_ns is not None and good.sent_ns is not None
        slow = good._replace(first_token_ns=good.sent_ns + 500_000_000)
        answers = [good._replace(outcome="http_5xx", detail="zombie"), slow, slow, good]

        async def canary(model: Resolved) -> Sample:
            return answers.pop(0)

        found = await recover(target, "auto", canary, Now(), ttft_before_ms=10.0, limit_s=10)
    assert (found.canaries, found.last_failure, answers) == (4, None, [])
    assert cast(float, found.to_usual_s) - cast(float, found.to_token_s) >= 0.2  # two polls later
    assert found.to_token_s is not None and found.to_token_s >= 0.1


async def test_a_service_that_is_not_ours_is_not_restarted() -> None:
    async with faking() as server:
        target = await Target.at(server.base_url, "test", {})
        with pytest.raises(UsageError, match="only the embedded service is ours to restart"):
            await target.restart()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_usual_before_a_death_is_absent_without_streaming_and_not_zero(
    stream: bool, tmp_path: Path
) -> None:
    async with faking(first_token_ms=5) as server, Crew(tmp_path, Clock(), 0) as crew:
        crew.talk_to(wire_to(server.port, stream=stream))
        canaries = Canaries(crew)
        (sample,) = await canaries.send(0)
    assert sample.outcome == "ok"
    assert (canaries.usual_ms is not None) == stream
    assert canaries.usual_ms != 0.0
