"""Every outcome there is comes out of the engine, for every fault of the scripted endpoint, and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from loadbench.engine.load import Clock
from loadbench.engine.shard import Shard
from loadbench.outcomes import OUTCOMES
from loadbench.records import Open, Sample
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.schema import Scenario
from loadbench.target.fake_faults import FAULTS
from tests.asking import ask, client_to, faking, wire_to
from tests.virtual import level

on_every_loop = pytest.mark.asyncio(loop_factories=["fast", "asyncio"])

LATE = ("first_token_deadline", "total_deadline")
QUIET = ("ok", "empty")
"""Outcomes that need no detail: their names say it all."""

IN_ONE_PIECE = {
    "truncated_no_done": "ok",  # a JSON document has no [DONE] to miss
    "first_token_deadline": "total_deadline",  # it has no first token either
    "stream_error": "http_5xx",
    "stream_error_event": "http_5xx",
}
"""What a fault is to a request without stream, where that differs."""


def expected(name: str, stream: bool) -> str:
    outcome = FAULTS[name].outcome
    return outcome if stream else IN_ONE_PIECE.get(name, outcome)


def is_one_clean_line(text: str) -> bool:
    return text.isprintable() and text == text.strip() and 0 < len(text) <= 500


async def fail_then_ask_again(name: str, stream: bool) -> tuple[Sample, Sample]:
    """Provoke the fault, then ask for an honest answer, both by one client."""
    first_token_s, total_s = (0.15, 0.25) if expected(name, stream) in LATE else (5.0, 10.0)
    async with (
        faking() as server,
        client_to(server.port, stream=stream, first_token_s=first_token_s, total_s=total_s) as client,
    ):
        await client.open(2)
        return await ask(client, f"fake-fault:{name}"), await ask(client, seq=1)


@on_every_loop
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_called_what_it_is_and_the_next_request_is_none_the_worse(name: str, stream: bool) -> None:
    fault = FAULTS[name]
    failed, after = await fail_then_ask_again(name, stream)
    assert failed.outcome == expected(name, stream), failed.detail
    assert (after.outcome, after.http_status) == (fault.later, 200 if fault.later == "ok" else None), after.detail
    for sample in (failed, after):
        assert (sample.detail is None) == (sample.outcome in QUIET)
        assert sample.detail is None or is_one_clean_line(sample.detail)
    if fault.text is not None and failed.detail is not None:
        assert fault.text[:40] in failed.detail
        assert failed.http_status == (200 if stream and fault.in_stream else fault.status)


@on_every_loop
async def test_a_failure_leaves_the_answers_beside_it_alone() -> None:
    async with faking(first_token_ms=30) as server, client_to(server.port) as client:
        beside = [asyncio.create_task(ask(client, seq=seq)) for seq in range(4)]
        failed = await ask(client, "fake-fault:connection_lost", seq=4)
        samples = [await task for task in beside]
    assert failed.outcome == "connection_lost"
    assert [(sample.outcome, sample.chunks) for sample in samples] == [("ok", 6)] * 4


@on_every_loop
async def test_what_the_engine_itself_cuts_short_is_dropped_or_censored(tmp_path: Path) -> None:
    mix = PromptMix(Scenario.model_validate({"prompts": [{"name": "chat", "text": "hello"}]}), tmp_path)
    async with (
        faking(faults=("total_deadline",)) as server,
        Shard(tmp_path, Clock(), time.time_ns()) as shard,
    ):
        shard.talk_to(wire_to(server.port))
        await shard.measure(level(Open(200.0, "constant"), None, requests=8, max_in_flight=2), mix, drain_s=0.1)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    dropped = [sample for sample in samples if sample["outcome"] == "dropped"]
    censored = [sample for sample in samples if sample["outcome"] == "censored"]
    assert dropped and censored and len(dropped) + len(censored) == len(samples) == 8
    assert all(sample["sent_ns"] is None and sample["first_token_ns"] is None for sample in dropped)
    assert all(sample["first_token_ns"] is not None and sample["done_ns"] is not None for sample in censored)
    assert {sample["detail"] for sample in censored} == {"unfinished when the drain ended"}


def test_there_is_no_outcome_that_these_tests_do_not_produce() -> None:
    by_faults = {expected(name, stream) for name in FAULTS for stream in (True, False)}
    afterwards = {fault.later for fault in FAULTS.values()}
    by_the_engine = {"dropped", "censored"}
    assert by_faults | afterwards | by_the_engine == OUTCOMES.keys()
