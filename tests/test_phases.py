"""Prefill and decode apart, on servers that take a known time for each."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadbench.analysis.findings import Phases
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.records import Closed, Load, Open
from tests.rundirs import Planned, write_run

ONE = Planned(Closed(1), duration_s=60.0)


def phases(path: Path, *planned: Planned, change: Callable[[dict[str, Any]], None] = lambda line: None) -> Phases:
    """Those of the one model of a run whose samples were changed."""
    write_run(path, planned)
    lines = [orjson.loads(line) for line in (path / "samples.jsonl").read_bytes().splitlines()]
    for line in lines:
        change(line)
    (path / "samples.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (found,) = summarise(read(path)).phases
    return found


def prefilling(
    ms_per_token: float, fixed_ms: float, low: int = 50, high: int = 500
) -> Callable[[dict[str, Any]], None]:
    """Prompts of so many tokens, each of which takes so long before the first token, give or take 5 %."""
    randomness = random.Random(3)

    def change(line: dict[str, Any]) -> None:
        tokens = randomness.randint(low, high)
        took_ms = (fixed_ms + ms_per_token * tokens) * randomness.gauss(1, 0.05)
        line.update(input_tokens=tokens, first_token_ns=line["sent_ns"] + int(took_ms * 1e6))

    return change


def test_the_time_a_prompt_token_takes_is_found_beside_the_fixed_cost(tmp_path: Path) -> None:
    found = phases(tmp_path, ONE, change=prefilling(0.4, 20.0))
    assert found.prefill.not_told is None
    assert found.prefill.slope_ms == pytest.approx(0.4, rel=0.05)
    assert found.prefill.fixed_ms == pytest.approx(20.0, abs=5.0)
    low, high = found.prefill.slope_ms_interval_95 or (0.0, 0.0)
    assert low < 0.4 < high < 0.45
    assert found.prefill_tokens_per_s == pytest.approx(2_500, rel=0.05)
    assert found.prefill.levels == (0,)
    assert found.prefill.n > 200


def test_a_tenth_of_freezes_does_not_move_it(tmp_path: Path) -> None:
    prefill, randomness = prefilling(0.4, 20.0), random.Random(4)

    def change(line: dict[str, Any]) -> None:
        prefill(line)
        line["first_token_ns"] += 2_000_000_000 if randomness.random() < 0.1 else 0

    assert phases(tmp_path, ONE, change=change).prefill.slope_ms == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize("busy", [Closed(8), Open(4.0)], ids=["8 users", "4 a second"])
def test_prefill_is_told_from_levels_in_which_nothing_queues(tmp_path: Path, busy: Load) -> None:
    found = phases(tmp_path, ONE, Planned(busy, duration_s=60.0), Planned(Open(0.5), duration_s=60.0))
    assert found.prefill.levels == (0, 2)


@pytest.mark.parametrize(
    ("planned", "change", "reason"),
    [
        (ONE, lambda line: line.update(input_tokens=None), "the server gave no input token counts"),
        (ONE, prefilling(0.4, 20.0, 90, 110), "prompts vary too little: 92 to 108 input tokens for 8 of 10"),
        (Planned(Closed(1), duration_s=3.0), prefilling(0.4, 20.0), "14 requests at the lowest load; it takes 30"),
        (ONE, prefilling(0.0, 60.0), "TTFT does not grow with the input tokens beyond chance"),
        (Planned(Closed(1), stream=False), lambda line: None, "no answer was streamed"),
        (Planned(Open(9.0), duration_s=60.0), lambda line: None, "no level in which nothing queues"),
    ],
    ids=["no counts", "alike", "few", "flat", "in one piece", "busy"],
)
def test_where_prefill_cannot_be_told_the_reason_is(
    tmp_path: Path, planned: Planned, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    found = phases(tmp_path, planned, change=change)
    assert (found.prefill.not_told or "").startswith(reason)
    assert found.prefill.slope_ms is found.prefill_tokens_per_s is None


def test_decode_on_a_shared_processor_is_a_line_through_its_levels(tmp_path: Path) -> None:
    found = phases(tmp_path, *(Planned(Closed(users)) for users in (1, 2, 4, 8)))
    assert found.decode.not_told is None
    assert found.decode.slope_ms == pytest.approx(5.0, rel=0.05)
    assert found.decode.fixed_ms == pytest.approx(0.0, abs=0.5)
    assert found.decode.levels == (0, 1, 2, 3)


def test_decode_that_does_not_depend_on_the_users_is_a_line_too(tmp_path: Path) -> None:
    found = phases(tmp_path, *(Planned(Closed(users), batches=64) for users in (1, 4, 16)))
    assert found.decode.not_told is None
    assert found.decode.slope_ms == pytest.approx(0.0, abs=0.02)
    assert found.decode.fixed_ms == pytest.approx(5.0, rel=0.05)


def test_where_no_line_describes_decode_none_is_told(tmp_path: Path) -> None:
    found = phases(tmp_path, *(Planned(Closed(users), batches=8) for users in (1, 2, 4, 8, 16, 32)))
    assert (found.decode.not_told or "").startswith("no line describes it: the best is ")
    assert found.decode.slope_ms is None
    assert found.decode.n == 6


def test_two_numbers_of_users_make_no_line(tmp_path: Path) -> None:
    found = phases(tmp_path, *(Planned(Closed(users)) for users in (1, 2, 2)))
    assert found.decode.not_told == "a line takes a firm TPOT at 3 numbers of users; there are 2"


def test_each_model_has_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, [ONE, Planned(Closed(2), model="phi:1")])
    found = summarise(read(tmp_path)).phases
    assert [(one.model, one.prefill.levels) for one in found] == [("synthetic-edge:1", (0,)), ("phi:1", (1,))]


def test_prompts_whose_tokens_take_longer_the_more_there_are_make_no_line(tmp_path: Path) -> None:
    """Attention is quadratic: a line through it would begin at -30 ms."""

    def change(line: dict[str, Any]) -> None:
        tokens = 50 + 35 * (line["seq"] % 100)
        line.update(
            input_tokens=tokens, first_token_ns=line["sent_ns"] + int((2 + 0.002 * tokens + 2e-6 * tokens**2) * 1e6)
        )

    found = phases(tmp_path, ONE, change=change).prefill
    assert found.slope_ms is None
    assert re.match(r"no line describes it: the best is \d+% off at 50 to \d+ input tokens", found.not_told or "")


def test_four_levels_make_a_line_whose_interval_is_not_told(tmp_path: Path) -> None:
    """Of slopes through four points the 95 % hold the truth in 92, through three in 68."""
    few = phases(tmp_path / "few", *(Planned(Closed(users)) for users in (1, 2, 4, 8)))
    assert (few.decode.not_told, few.decode.slope_ms_interval_95) == (None, None)
    enough = phases(tmp_path / "enough", *(Planned(Closed(users)) for users in (1, 2, 4, 8, 16)))
    assert enough.decode.slope_ms_interval_95 is not None


def test_a_speed_that_may_be_three_times_as_high_is_none(tmp_path: Path) -> None:
    """Four milliseconds for 450 tokens, in a first token of 100 ms that varies by 5 %."""
    found = phases(tmp_path, ONE, change=prefilling(0.008, 100.0)).prefill
    assert found.slope_ms is None
    assert re.fullmatch(r"the prompts tell no speed: [\d,]+ to [\d,]+ tokens/s", found.not_told or ""), found.not_told
