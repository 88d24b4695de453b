"""Memory ladders and what goes with them: what a scenario may say, which rungs it comes to, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadbench.course import DEFAULT_BOUNDS, sought
from loadbench.errors import UsageError
from loadbench.records import Ask, Closed, Level, load_title
from loadbench.report.plan import print_plan
from loadbench.scenario.load import Loaded, Overrides, load_scenario
from loadbench.scenario.memory import LEAST_FLOOR_BYTES, MOST_RUNGS, MemoryLadder
from loadbench.scenario.plan import Plan, describe, levels
from loadbench.scenario.prompts import MEMORY, PromptMix
from loadbench.scenario.schema import Scenario, schema_json
from tests.command import loadbench

GIB, MIB = 1 << 30, 1 << 20
ELSEWHERE = "endpoint: http://h:1\n"
UNTIL_FAILURE = "stages:\n  - memory:\n      until: failure\n"


def read(text: str, **overrides: Any) -> Loaded:
    Path("s.yaml").write_text(text, encoding="utf-8")
    return load_scenario(Path("s.yaml"), Overrides(**overrides))


def refusal(text: str, **overrides: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(text, **overrides)
    return str(caught.value)


def ladder(**keys: Any) -> MemoryLadder:
    return MemoryLadder.model_validate({"until": "failure"} | keys)


def rungs(**keys: Any) -> list[tuple[int, int, int]]:
    return [
        (rung.concurrency, rung.ask.max_tokens, rung.ask.input_tokens) for rung in ladder(**keys).rungs() if rung.ask
    ]


def scenario(memory: dict[str, Any], duration: str = "20s", **keys: Any) -> Scenario:
    return Scenario.model_validate({"stages": [{"memory": memory, "duration": duration}]} | keys)


def plan_of(tested: Scenario) -> Plan:
    return describe(tested, levels(tested, ["m"]))


# Rungs


def test_rungs_climb_by_users_times_tokens_and_of_two_alike_fewer_users_come_first() -> None:
    assert rungs(concurrency=[2, 1, 4], max_tokens=[300, 100], input_tokens=100) == [
        (1, 100, 100),  # 200 tokens between all
        (1, 300, 100),  # 400
        (2, 100, 100),  # 400 as well: another shape of the same size
        (2, 300, 100),  # 800
        (4, 100, 100),  # 800
        (4, 300, 100),  # 1,600
    ]


@given(*(st.lists(st.integers(1, 100), min_size=1, max_size=4) for _ in range(3)))
def test_every_combination_is_one_rung_and_none_needs_less_than_the_one_before(
    users: list[int], answers: list[int], inputs: list[int]
) -> None:
    found = rungs(concurrency=users, max_tokens=answers, input_tokens=inputs)
    assert sorted(found) == sorted(set(itertools.product(users, answers, inputs)))
    weights = [count * (answer + asked) for count, answer, asked in found]
    assert weights == sorted(weights)


def test_users_and_tokens_are_numbers_lists_or_ladders_as_elsewhere() -> None:
    wanted = rungs(concurrency=[1, 2, 4], max_tokens=[100, 200, 400], input_tokens=[8])
    assert rungs(concurrency="1..4", max_tokens={"from": 100, "to": 400, "factor": 2}, input_tokens=8) == wanted
    assert rungs(concurrency="1,2,4", max_tokens=["100..200", 400], input_tokens="8") == wanted


def test_a_ladder_that_names_only_its_end_has_one_to_16_users_and_three_lengths_of_answers() -> None:
    found = rungs()
    assert len(found) == 5 * 3
    assert (found[0], found[-1]) == ((1, 256, 64), (16, 4096, 64))


def test_64_rungs_are_the_most() -> None:
    assert len(rungs(concurrency=list(range(1, MOST_RUNGS + 1)), max_tokens=1)) == MOST_RUNGS
    with pytest.raises(ValueError, match=r"expected at most 64 rungs in a memory ladder, got 65: name fewer numbers"):
        ladder(concurrency=list(range(1, MOST_RUNGS + 2)), max_tokens=1)


def test_a_rung_is_a_level_of_one_request_a_user_bounded_by_the_stages_duration() -> None:
    tested = scenario({"until": "failure", "concurrency": 3, "max_tokens": 9, "input_tokens": 5}, duration="7s")
    (level,) = levels(tested, ["m"])
    assert level.load == Closed(3, ask=Ask(max_tokens=9, input_tokens=5))
    assert (level.requests, level.duration_s, level.at_most_s, level.purpose) == (3, None, 7, "rung")
    assert level.start_spacing_s == 0  # all at once: they are to be in memory together
    assert Level.from_json(json.loads(json.dumps(level.as_json()))) == level
    assert load_title(level.load) == "3 users × 14 tokens"


def test_a_rung_takes_20_seconds_at_most_unless_stated_and_other_levels_have_no_such_bound() -> None:
    tested = Scenario.model_validate({"stages": [{"memory": {"until": "failure"}}, {"concurrency": 1}]})
    assert {(level.purpose, level.at_most_s) for level in levels(tested, ["m"])} == {("rung", 20), ("level", None)}


# Where it ends


@pytest.mark.parametrize(
    ("until", "bytes_", "share", "failure"),
    [
        ("failure", None, None, True),
        ("1.5GiB", 3 * GIB // 2, None, False),
        ("512 MiB", 512 * MIB, None, False),
        ("2GB", 2 * 10**9, None, False),
        (1073741824, GIB, None, False),
        ("80%", None, 0.8, False),
        ("100 %", None, 1.0, False),
    ],
)
def test_it_ends_at_failure_at_a_size_or_at_a_share(
    until: object, bytes_: int | None, share: float | None, failure: bool
) -> None:
    found = ladder(until=until)
    assert (found.until_bytes, found.until_share, found.until_failure) == (bytes_, share, failure)


@pytest.mark.parametrize("until", ["0.8", "512", "0%", "120%", "-1GiB", "faliure", "0.8.1%", "", "1e999%"])
def test_an_end_that_is_neither_is_refused_with_its_line(home: Path, until: str) -> None:
    text = f'stages:\n  - memory:\n      concurrency: 4\n      until: "{until}"\n'
    expected = "expected failure, a size such as 1.5GiB or a share such as 80%"
    assert refusal(text) == f's.yaml:4: stages[0].memory.until: {expected}, got "{until}"'


def test_the_guard_is_a_twentieth_of_the_hosts_memory_or_half_a_gibibyte_unless_stated() -> None:
    assert ladder().floor_of(64 * GIB) == round(3.2 * GIB)
    assert ladder().floor_of(4 * GIB) == LEAST_FLOOR_BYTES == 512 * MIB
    assert ladder(floor="100MiB").floor_of(64 * GIB) == 100 * MIB


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages:\n  - memory: {}", "2: stages[0].memory.until: expected this key, got nothing"),
        (
            "stages:\n  - memory: {until: failure, floor: 512}",
            "2: stages[0].memory.floor: expected 1MiB or more, got 512",
        ),
        (
            "stages:\n  - memory: {until: failure, flor: 1GiB}",
            "2: stages[0].memory.flor: unknown key; did you mean floor?",
        ),
        (
            "stages:\n  - memory:\n      until: failure\n      max_tokens: [1, 0]",
            "4: stages[0].memory.max_tokens[1]: expected a number of at least 1, got 0",
        ),
        (
            "stages:\n  - {memory: {until: failure}, concurrency: 2}",
            "2: stages[0]: expected exactly one of concurrency, rate, over_time, trace, memory,"
            " got concurrency and memory",
        ),
        (
            "stages:\n  - {memory: {until: failure}, requests: 2}",
            "2: stages[0]: expected requests in a stage with concurrency or rate or trace, got it beside memory",
        ),
        (
            "stages:\n  - {memory: {until: failure}, min_requests: 2}",
            "2: stages[0]: expected min_requests in a stage whose load stays, got it beside memory",
        ),
        (
            "stages:\n  - {memory: {until: failure}, stop: true}",
            "2: stages[0]: expected stop in a stage with concurrency or rate, got it beside memory",
        ),
        ("memory_limit: 2 gigs", '1: memory_limit: expected a number of bytes such as 2GiB or 500MB, got "2 gigs"'),
        ("memory_limit: 2", "1: memory_limit: expected 64MiB or more, for a service to start, got 2"),
        ("memory_limit: 63MiB", '1: memory_limit: expected 64MiB or more, for a service to start, got "63MiB"'),
        (
            "on_target_death: resurrect",
            "1: on_target_death: expected 'stop', 'restart' or 'skip_model', got \"resurrect\"",
        ),
        (
            "seed: 1\nendpoint: http://h:1\nmemory_limit: 2GiB",
            "3: memory_limit: expected the embedded service beside it, got an endpoint elsewhere",
        ),
        (
            "target_probe: http://h:5280",
            "1: target_probe: expected an endpoint elsewhere beside it, got the embedded service",
        ),
        (
            ELSEWHERE + "target_probe: h",
            '2: target_probe: expected the URL of a loadbench probe, such as http://192.168.1.7:5280, got "h"',
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(home: Path, text: str, message: str) -> None:
    assert refusal(text) == f"s.yaml:{message}"


# Death, limit and probe


def test_the_embedded_service_is_restarted_and_the_run_on_another_ends_unless_it_says_otherwise(home: Path) -> None:
    assert read("seed: 1").scenario.on_target_death == "restart"
    assert read("on_target_death: null").scenario.on_target_death == "restart"
    assert read(ELSEWHERE).scenario.on_target_death == "stop"
    assert read("seed: 1", endpoint="http://h:1").scenario.on_target_death == "stop"
    assert read(ELSEWHERE + "on_target_death: skip_model").scenario.on_target_death == "skip_model"


def test_the_flag_for_the_limit_comes_before_the_file_and_is_where_its_mistakes_are(home: Path) -> None:
    assert read("memory_limit: 2GiB", memory_limit="1.5GiB").scenario.memory_limit_bytes == 3 * GIB // 2
    assert read("seed: 1").scenario.memory_limit_bytes is None
    assert refusal("seed: 1", memory_limit="little").startswith("--memory-limit: memory_limit: expected a number of")
    assert refusal(ELSEWHERE, memory_limit="1GiB").startswith("--memory-limit: memory_limit: expected the embedded")


@pytest.mark.parametrize("probe", ["http://me:hunter22@h:5280", "http://h:5280/?token=hunter22", "hunter22@h"])
def test_a_probe_with_a_key_in_its_url_is_refused_and_the_key_not_repeated(home: Path, probe: str) -> None:
    found = refusal(f"{ELSEWHERE}target_probe: {probe}")
    assert found.startswith("s.yaml:2: target_probe: expected a URL without user name, key or query")
    assert "LOADBENCH_PROBE_TOKEN" in found
    assert "hunter22" not in found


def test_a_saved_scenario_reads_back_as_the_same_and_needs_no_defaults() -> None:
    memory = {"until": "1.5GiB", "concurrency": "1..8", "max_tokens": [64, "128..512"], "floor": "1GiB"}
    for keys in ({"memory_limit": "1.5GiB"}, {"endpoint": "http://h:1", "target_probe": "h:5280"}):
        asked = scenario(memory, **keys)
        saved = json.loads(json.dumps(asked.public_json()))
        assert Scenario.model_validate(saved) == asked
        assert saved["on_target_death"] in ("restart", "stop")
        jsonschema.validate(saved, json.loads(schema_json()))
    assert saved["target_probe"] == "http://h:5280"


@pytest.mark.parametrize(
    "memory", [{}, {"until": "faliure"}, {"until": "failure", "users": 4}, {"until": "1GiB", "floor": "some"}], ids=str
)
def test_the_schema_shows_an_editor_a_wrong_memory_ladder(memory: dict[str, Any]) -> None:
    assert not jsonschema.Draft202012Validator(json.loads(schema_json())).is_valid({"stages": [{"memory": memory}]})


# Whose target it is


def test_breaking_what_is_not_ours_takes_a_flag_and_the_error_names_the_line(home: Path) -> None:
    loaded = read(ELSEWHERE + UNTIL_FAILURE)
    with pytest.raises(
        UsageError, match=r"^s\.yaml:4: stages\[0\]\.memory\.until: failure: expected --i-own-the-target"
    ):
        loaded.ask_owner(owned=False)
    loaded.ask_owner(owned=True)


@pytest.mark.parametrize("text", [UNTIL_FAILURE, ELSEWHERE + "stages: [{memory: {until: 80%}}, {concurrency: 1}]"])
def test_our_own_service_and_a_ladder_that_ends_before_failure_take_none(home: Path, text: str) -> None:
    read(text).ask_owner(owned=False)


# Prompts


def test_every_prompt_of_a_rung_has_its_lengths_and_none_is_like_another() -> None:
    tested = scenario({"until": "failure", "concurrency": 4, "max_tokens": 300, "input_tokens": 50})
    (level,) = levels(tested, ["m"])
    for chars_per_token in (1.0, 4.0):
        mix = PromptMix(tested, Path(), chars_per_token)
        drawn = list(itertools.islice(mix.draw(level.seed, level.load), 8))
        texts = [prompt.messages[0]["content"] for prompt in drawn]
        assert {len(text) for text in texts} == {50 * chars_per_token}
        assert len({text[:8] for text in texts}) == 8
        assert {(prompt.kind, prompt.max_tokens) for prompt in drawn} == {(MEMORY, 300)}
        assert [prompt.index for prompt in drawn] == list(range(8))
        assert drawn == list(itertools.islice(mix.draw(level.seed, level.load), 8))


# The plan


def test_a_memory_ladder_is_planned_by_its_bounds() -> None:
    deadlines = {"first_token": "5s", "total": "10s"}
    keys: dict[str, Any] = {"warmup": {"requests": 0}, "deadlines": deadlines}
    plan = plan_of(scenario({"until": "failure", "concurrency": [1, 2], "max_tokens": [8, 16]}, "3s", **keys))
    assert [row.expected_requests for row in plan.levels] == [1, 1, 2, 2]
    assert (plan.estimated_s, plan.may_end_early, plan.open_ended) == (4 * 3, True, False)
    # A canary for the model; for every rung one on its fresh service and one after it.
    assert plan.at_most_s == 4 * 3 + (1 + 4 + 4) * 10
    elsewhere = scenario({"until": "80%", "concurrency": [1, 2]}, "3s", endpoint="http://h:1", **keys)
    assert plan_of(elsewhere).at_most_s == 6 * 3 + (1 + 6) * 10


def printed(text: str, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    print_plan(read(text), out)
    return out.getvalue().splitlines()


SEVERAL = (
    "memory_limit: 1GiB\nstages:\n"
    "  - memory: {until: failure, concurrency: 1..16, max_tokens: [256, 4096]}\n    duration: 3s\n"
    "  - {concurrency: 2}\n"
    "  - memory: {until: 80%, floor: 2GiB, concurrency: 4, max_tokens: 8}\n"
)


def test_the_printed_plan_has_one_row_for_a_ladder_of_rungs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(SEVERAL, 120, monkeypatch)
    assert [re.split(r" {2,}", line.strip()) for line in lines if re.match(r" +\d+ ", line)] == [
        ["0 to 9", "auto", "1..16 users × 320..4,160 tokens", "at most 62", "at most 0:30"],
        ["10", "auto", "2 users", "as many as it answers", "0:15"],
        ["11", "auto", "4 users × 72 tokens", "at most 4", "at most 0:20"],
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_printed_plan_tells_the_rungs_the_end_and_the_guard_within_the_width(
    home: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    lines = printed(SEVERAL, width, monkeypatch)
    assert "Limit     1 GiB of memory" in lines
    assert "On death  restart it and go on" in lines
    start = next(place for place, line in enumerate(lines) if line.startswith("Levels 0"))
    assert all(len(line) <= width for line in lines[:-2])
    assert re.sub(r"\n {4}", " ", "\n".join(lines[start:-2])).splitlines() == [
        "Levels 0 to 9: concurrency 1, 2, 4, 8, 16 × max_tokens 256, 4,096 × input_tokens 64, least memory first;"
        " a fresh service and at most 3s for each;"
        " until it fails, or the host has less than 5 % of its memory, or 512 MiB, left",
        "Level 11: concurrency 4 × max_tokens 8 × input_tokens 64; a fresh service and at most 20s;"
        " until it takes 80% of its limit, its GPU or the machine, or the host has less than 2 GiB left",
    ]


def test_the_printed_plan_says_what_a_run_needs_and_where_memory_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ELSEWHERE + "target_probe: http://h:5280\non_target_death: restart\n" + UNTIL_FAILURE
    lines = printed(text, 80, monkeypatch)
    assert "A run needs --i-own-the-target: s.yaml:6: stages[0].memory.until: failure" in lines
    assert "Probe     http://h:5280, with the token in LOADBENCH_PROBE_TOKEN" in lines
    assert "On death  wait for it to come back and go on" in lines
    assert not any("--i-own-the-target" in line for line in printed(UNTIL_FAILURE, 80, monkeypatch))


def test_a_flag_that_names_a_load_leaves_memory_ladders_out(home: Path) -> None:
    stages = read(UNTIL_FAILURE + "  - {concurrency: 4}\n", concurrency="1,2").scenario.stages
    assert [stage.memory for stage in stages] == [None]
    assert [load_title(load) for load in stages[0].loads()] == ["1 user", "2 users"]


def test_a_search_for_a_capacity_leaves_memory_ladders_out(home: Path) -> None:
    slo = "slo: {error_rate: 1%}\n"
    found = sought("max-concurrency", read(slo + UNTIL_FAILURE + "  - {concurrency: 2..8}\n"))
    assert (found.like.stage, found.low, found.high, found.like.load) == (1, 2, 8, Closed(2))
    alone = sought("max-concurrency", read(slo + UNTIL_FAILURE))
    assert (alone.low, alone.high) == DEFAULT_BOUNDS["max-concurrency"]


# The command line


def test_a_run_that_would_break_somebodys_target_ends_before_it_is_asked_anything(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("endpoint: http://nobody.invalid:1\n" + UNTIL_FAILURE)
    refused = loadbench("run", "s.yaml", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(
        "loadbench: s.yaml:4: stages[0].memory.until: failure: expected --i-own-the-target"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]
    allowed = loadbench("run", "s.yaml", "--i-own-the-target", "--quiet", cwd=tmp_path)
    assert allowed.returncode == 3
    assert "nobody.invalid" in allowed.stderr


def test_check_takes_the_limit_as_a_flag_and_probe_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("seed: 1")
    assert "Limit     2 GiB of memory" in loadbench("check", "s.yaml", "--memory-limit", "2GiB", cwd=tmp_path).stdout
    assert "Serve the memory figures of the model's host" in loadbench("probe", "--help").stdout
