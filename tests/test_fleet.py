"""Several endpoints as one target: who is asked what, that one's death is not the others', and what is told of each."""

from __future__ import annotations

import asyncio
import csv
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.ladder import stop_after
from loadbench.analysis.rundir import read as read_run
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import AtEndpoint, Level, Rss
from loadbench.commands import load
from loadbench.errors import TargetError, UsageError
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.scenario.shapes import StopRules
from loadbench.target.fake import FakeServer
from loadbench.target.fleet import Fleet, together
from loadbench.target.probe import serve_probe
from tests import rundirs
from tests.asking import scripted
from tests.command import ROOT, ended, events, eventually, rows, started, summary

SERVICE = {"flavour": "foundry2", "prefix": "/catalogs/local", "models": ("m:1",)}
URLS = ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")


@asynccontextmanager
async def fleet(*scripts: dict[str, Any]) -> AsyncIterator[list[FakeServer]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(scripted(**script)) for script in scripts]


def write(folder: Path, stages: str, more: str = "") -> None:
    text = "request: {max_tokens: 4}\nwarmup: {requests: 1}\ndrain: 3s\nprompts:\n  - {name: a, text: one}\n"
    (folder / "f.yaml").write_text(f"{text}{more}\nstages: {stages}\n", encoding="utf-8")


async def begin(folder: Path, servers: Sequence[FakeServer], *more: str) -> asyncio.subprocess.Process:
    urls = [word for server in servers for word in ("--endpoint", server.base_url)]
    return await started("run", "f.yaml", *urls, "--out", "out", *more, cwd=folder)


def load_rows(folder: Path, level: int) -> list[dict[str, Any]]:
    return [r for r in rows(folder / "out" / "samples.jsonl") if (r["phase"], r["level"]) == ("load", level)]


def answered(server: FakeServer, phase: str) -> Counter[str]:
    names = (str(truth.request_id) for truth in server.records)
    return Counter(name for name in names if name.startswith(f"{phase}-"))


@pytest.mark.parametrize("workers", [1, 2])
async def test_requests_go_round_and_each_endpoint_has_its_own_rows(tmp_path: Path, workers: int) -> None:
    write(tmp_path, "[{concurrency: 5, requests: 61}, {rate: 60/s, requests: 60}]")
    async with (
        fleet({"first_token_ms": 5}, {"first_token_ms": 40}, {"first_token_ms": 5}) as servers,
        AsyncExitStack() as stack,
    ):
        probes = [await serve_probe("127.0.0.1", 0, None, pid=os.getpid()) for _ in servers]
        for probe in probes:
            stack.push_async_callback(probe.close)
        named = ",".join(probe.url for probe in probes)
        more = ("--workers", str(workers), "--set", f"target_probe={named}")
        code, _, err = await ended(await begin(tmp_path, servers, *more))
        assert code == 0, err
        for place, server in enumerate(servers):
            mine = [row for level in (0, 1) for row in load_rows(tmp_path, level) if row["endpoint"] == place]
            assert Counter(f"load-{row['level']}-{row['seq']}" for row in mine) == answered(server, "load")
            assert answered(server, "warmup").total() >= workers
            assert answered(server, "canary").total() == 3  # before the first level, and after each
    closed, open_ = load_rows(tmp_path, 0), load_rows(tmp_path, 1)
    assert len(closed) == 61
    assert all(abs(n - 61 / 3) <= workers for n in Counter(row["endpoint"] for row in closed).values())
    assert all(row["endpoint"] == row["seq"] % 3 for row in open_)
    document = summary(tmp_path / "out")
    for level, found in zip(document["levels"], (closed, open_), strict=True):
        assert [here["url"] for here in level["endpoints"]] == [server.base_url for server in servers]
        assert sum(here["requests"]["ok"] for here in level["endpoints"]) == level["requests"]["ok"] == len(found)
        fast, slow, _ = (here["latency_ms"]["ttft"]["service"]["p50"] for here in level["endpoints"])
        assert fast < 30 < 40 <= slow < 80
        assert [here["state"] for here in level["endpoints"]] == ["healthy"] * 3
        for here in level["endpoints"]:
            assert here["rss_bytes"]["peak"] >= here["rss_bytes"]["before"] > 1 << 20
        assert "endpoints_differ" in {caution["about"] for caution in level["cautions"]}
    with (tmp_path / "out" / "endpoints.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["level"], row["endpoint"]) for row in table] == [
        (str(level), server.base_url) for level in (0, 1) for server in servers
    ]
    assert sum(int(row["ok"]) for row in table) == 61 + len(open_)
    assert "## By endpoint" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert document["memory_source"]["because"] == Fleet.unwatched


async def test_one_endpoints_death_ends_neither_the_level_nor_the_run_and_it_is_seen_to_come_back(
    tmp_path: Path,
) -> None:
    write(tmp_path, "[{concurrency: 4, duration: 1500ms}, {rate: '40/s,40/s', duration: 1s, rest: 700ms}]")
    async with fleet(SERVICE, SERVICE) as servers:
        mortal = servers[1]
        process = await begin(tmp_path, servers)
        await eventually(lambda: answered(mortal, "load").total() >= 20)
        mortal.crash()
        await eventually(lambda: len(events(tmp_path, "level_end")) == 2)
        mortal._shelf.loaded.clear()  # as a service has that was started anew
        mortal.listening = True
        await mortal.listen("127.0.0.1", mortal.port)
        code, out, err = await ended(process)
    assert code == 93, err
    assert f"target died: {mortal.base_url} was found unreachable after level 0" in err
    assert "it was back after level 2" in err
    assert mortal.base_url in out
    first, second, third = (events(tmp_path, "level_end")[n]["target"] for n in range(3))
    assert [one["state"] for one in first["endpoints"]] == ["healthy", "unreachable"]
    assert [one["state"] for one in second["endpoints"]] == ["healthy", "unreachable"]
    assert [one["state"] for one in third["endpoints"]] == ["healthy", "healthy"]
    assert (first["state"], third["state"]) == ("degraded", "healthy")
    levels = summary(tmp_path / "out")["levels"]
    assert all(level["complete"] for level in levels)
    whole, dead = levels[1]["endpoints"]
    assert whole["requests"]["failed"] == {} and whole["requests"]["ok"] == whole["requests"]["attempted"] > 10
    assert dead["requests"]["ok"] == 0 and dead["requests"]["failed"] == {
        "connect_refused": dead["requests"]["attempted"]
    }
    assert levels[2]["requests"]["failed"] == {}
    moment_s = levels[0]["endpoints"][1]["died_after_s"]
    lost = [row for row in load_rows(tmp_path, 0) if row["endpoint"] == 1 and row["outcome"] != "ok"]
    began_ns = events(tmp_path, "level_start")[0]["t_ns"]
    assert moment_s == pytest.approx((min(row["done_ns"] for row in lost) - began_ns) / 1e9)
    assert levels[0]["latency_ms"]["e2e"]["service"]["n"] == levels[0]["requests"]["ok"]


async def test_a_level_ends_when_all_endpoints_are_gone_and_the_run_goes_on_with_the_first_that_is_back(
    tmp_path: Path,
) -> None:
    write(tmp_path, "[{rate: 80/s, duration: 60s}, {concurrency: 2, requests: 12}]", "on_target_death: restart")
    async with fleet({}, {}) as servers:
        process = await begin(tmp_path, servers)
        await eventually(lambda: answered(servers[1], "load").total() >= 10)
        for server in servers:
            server.crash()
        await eventually(lambda: bool(events(tmp_path, "level_end")))
        servers[1].listening = True
        await servers[1].listen("127.0.0.1", servers[1].port)
        code, _, err = await ended(process)
    assert code == 93, err
    first, _ = events(tmp_path, "issue_end")
    assert first["reason"] == "target_died"
    dead, half = (event["target"] for event in events(tmp_path, "level_end"))
    assert (dead["state"], half["state"]) == ("unreachable", "degraded")
    refused = [row for row in load_rows(tmp_path, 0) if row["outcome"] == "connect_refused"]
    assert min(Counter(row["endpoint"] for row in refused).values()) >= 19  # 20 in a row, one cut off at its death
    (back,) = events(tmp_path, "recovery")
    assert (back["back"], back["restarted"]) == (True, False)
    ok = Counter(row["endpoint"] for row in load_rows(tmp_path, 1) if row["outcome"] == "ok")
    assert ok == {1: 6}


async def test_an_endpoint_that_cannot_serve_the_model_at_the_start_is_named() -> None:
    async with fleet({}, {"models": ("other:1",)}) as servers:
        target = await Fleet.of([server.base_url for server in servers], "test", {})
        with pytest.raises(TargetError, match=f"{servers[1].base_url}: there is no model fake-model:1"):
            await target.resolve("fake-model:1")
        servers[1].crash()
        with pytest.raises(TargetError, match=f"127.0.0.1:{servers[1].port}"):
            await Fleet.of([server.base_url for server in servers], "test", {})


async def test_an_endpoint_whose_canary_fails_at_the_start_is_named(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 1, requests: 3}]")
    async with fleet({}, {"faults": ("http_5xx",)}) as servers:
        code, _, err = await ended(await begin(tmp_path, servers))
    assert code == 3
    assert f"fake-model:1 at {servers[1].base_url}: a canary failed: http_5xx" in err


async def test_with_per_user_each_user_stays_at_one_endpoint_and_asks_by_the_id_it_has_there(tmp_path: Path) -> None:
    write(tmp_path, "[{concurrency: 5, requests: 40}]", "balance: per_user")
    async with fleet({"models": ("chat:1",)}, {"models": ("chat:2",)}) as servers:
        code, _, err = await ended(await begin(tmp_path, servers, "--model", "chat", "--workers", "2"))
        assert code == 0, err
        document = orjson.loads((tmp_path / "out" / "run.json").read_bytes())
        assert document["levels"][0]["model"] == document["models"][0]["id"] == "chat"
        how = document["models"][0]["how"]
        assert all(f"chat:{n} at {server.base_url}" in how for n, server in enumerate(servers, 1))
        assert [one["url"] for one in document["endpoint"]["endpoints"]] == [server.base_url for server in servers]
        with pytest.raises(TargetError, match="auto: expected the same model at each endpoint"):
            await (await Fleet.of([server.base_url for server in servers], "test", {})).resolve("auto")
    assert {(row["user"], row["endpoint"]) for row in load_rows(tmp_path, 0)} == {(n, n % 2) for n in range(5)}


async def test_each_endpoint_loads_the_model_and_only_where_we_loaded_it_is_it_unloaded() -> None:
    async with fleet(SERVICE, {**SERVICE, "loaded": ()}) as servers:
        target = await Fleet.of([server.base_url for server in servers], "test", {})
        model = await target.resolve("m:1")
        assert model.loaded is False
        loaded = await target.load(model)
        assert loaded.loaded and loaded.load_ms is not None
        assert [one.load_ms is None for one in loaded.members] == [True, False]
        await target.unload_patiently(loaded)
        assert [one.loaded for one in (await target.resolve("m:1")).members] == [True, False]
        await target.close()


async def test_one_server_under_two_names_is_no_fleet() -> None:
    async with scripted() as server:
        with pytest.raises(UsageError, match="expected each server of a fleet once"):
            await Fleet.of([server.base_url, f"http://localhost:{server.port}"], "test", {})


def test_a_fleet_is_dead_when_all_of_it_is_and_degraded_while_one_serves() -> None:
    fine, gone, slow = ("healthy", ["ok"]), ("unreachable", ["refused"]), ("degraded", ["503"])
    assert together([fine, fine], URLS) == ("healthy", ["2 canaries answered"])
    assert together([fine, gone], URLS) == ("degraded", [f"{URLS[1]} unreachable: refused"])
    assert together([slow, gone], URLS)[0] == "degraded"
    assert together([gone, ("crashed", ["exit 1"])], URLS)[0] == "crashed"
    assert together([gone], URLS[:1]) == ("unreachable", ["refused"])


def test_a_ladder_goes_on_beside_a_dead_endpoint_and_asks_how_those_are_that_live(tmp_path: Path) -> None:
    found = summarise(read_run(rundirs.closed_ladder(tmp_path))).levels[0]

    def level(*states: str) -> Level:
        """Each was asked 30 times; at a dead one all failed, at a sick one six."""
        lost = {"healthy": 0, "degraded": 6, "unreachable": 30}
        told = [replace(found.requests, attempted=30, ok=30 - lost[state]) for state in states]
        here = tuple(
            AtEndpoint(url, asked, found.throughput, found.tokens, found.latency_ms, state, (), Rss(), None)
            for url, asked, state in zip(("http://a:1", "http://b:1", "http://c:1"), told, states, strict=True)
        )
        both = replace(found.requests, attempted=90, ok=sum(asked.ok for asked in told))
        whole = "unreachable" if set(states) == {"unreachable"} else "degraded"
        return replace(found, requests=both, endpoints=here, target=replace(found.target, state=whole))

    rules, by_errors = StopRules(), StopRules(degraded=False)
    assert stop_after(rules, [level("healthy", "unreachable", "healthy")], 0.0) is None
    assert stop_after(by_errors, [level("healthy", "unreachable", "unreachable")], 0.0) is None
    sick = [level("healthy", "unreachable", "degraded")]
    assert stop_after(rules, sick, 0.0) == ("degraded", "http://c:1 was degraded after it")
    told = ("error_rate", "6 of 60 requests failed by endpoints that live at 1 user: 10%, over 5%")
    assert stop_after(StopRules(degraded=False, error_rate=0.05), sick, 0.0) == told
    assert stop_after(rules, [level(*["unreachable"] * 3)], 0.0) == ("degraded", "the target was unreachable after it")


def test_a_rate_is_not_kept_up_with_where_an_endpoint_was_dead(tmp_path: Path) -> None:
    run = read_run(rundirs.open_loop(tmp_path))
    assert "It keeps up with 3/s poisson." in summarise(run).verdict.text
    run.facts["endpoint"]["endpoints"] = [{"url": url} for url in URLS]
    for level in run.levels:
        assert level.end is not None
        level.end["target"]["endpoints"] = [{"state": "healthy"}, {"state": "unreachable"}]
    text = summarise(run).verdict.text
    assert "It keeps up" not in text
    assert "is undecided: an endpoint of the fleet was dead." in text


def test_endpoints_of_several_flags_are_never_read_as_one() -> None:
    path = ROOT / "scenarios" / "open-loop.yaml"
    with pytest.raises(UsageError, match="expected URLs in the list, got something else as number 2"):
        load({"scenario": path, "endpoint": ("http://a:1/v1", "embedded")})
    several = load({"scenario": path, "endpoint": ("http://a:1/v1,b:2", "http://c:3")})
    assert several.scenario.endpoints == ("http://a:1/v1", "http://b:2", "http://c:3")


def read(folder: Path, text: str, overrides: Overrides | None = None, **env: str) -> Any:
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    return load_scenario(folder / "s.yaml", overrides, env).scenario


@pytest.mark.parametrize(
    ("text", "flag", "env"),
    [
        ("endpoint: [http://a:1/v1, 'b:2']", None, {}),
        ("endpoint: http://a:1/v1, b:2", None, {}),
        ("seed: 1", "http://a:1/v1,b:2", {}),
        ("seed: 1", None, {"FOUNDRY_LOCAL_ENDPOINT": "http://a:1/v1,b:2"}),
    ],
)
def test_a_fleet_is_a_list_or_urls_with_commas(
    tmp_path: Path, text: str, flag: str | None, env: dict[str, str]
) -> None:
    scenario = read(tmp_path, text, Overrides(endpoint=flag), **env)
    assert scenario.endpoint == scenario.endpoints == ("http://a:1/v1", "http://b:2")
    assert type(scenario).model_validate(scenario.public_json()) == scenario


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("endpoint: [http://a:1]", "expected 2 to 64 URLs in the list, got 1"),
        ("endpoint: [http://a:1, http://a:1]", "expected each URL once, got number 2 twice"),
        ("endpoint: [http://a:1, embedded]", "expected URLs in the list, got something else as number 2"),
        ("endpoint: {a: 1}", "expected embedded or a URL such as http://127.0.0.1:5273/v1, or a list of URLs"),
        ("endpoint: http://a:1\nbalance: per_user", "balance: expected a list of endpoints beside it, got one"),
        (
            "endpoint: [http://a:1, http://b:1]\nbalance: per_user\nstages: [{rate: 1/s, duration: 1s}]",
            "balance: expected stages with users beside per_user, got stages.0",
        ),
        (
            "endpoint: [http://a:1, http://b:1]\ntarget_probe: http://a:2",
            "target_probe: expected one for each endpoint, 2, got 1",
        ),
        (
            "endpoint: [http://a:1, http://b:1]\nstages: [{memory: {until: 1GiB}}]",
            "expected one endpoint, whose memory it is, got a fleet",
        ),
    ],
)
def test_what_is_no_fleet_is_refused_with_its_reason(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert told in str(error.value)


def test_no_password_of_any_endpoint_is_saved(tmp_path: Path) -> None:
    scenario = read(tmp_path, "endpoint: ['http://u:hunter2@a:1', 'http://b:2/v1?api_key=hunter2']")
    assert "hunter2" not in orjson.dumps(scenario.public_json()).decode()
