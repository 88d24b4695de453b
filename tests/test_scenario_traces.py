"""Traces: which files are read, what their rows come to, and that every mistake is one line that says where it is."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path

import pytest

from loadbench.analysis import rundir
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import OpenLoad, ShapedLoad
from loadbench.errors import UsageError
from loadbench.records import Leg, Level, Open, Trace, load_title
from loadbench.scenario.arrivals import schedule
from loadbench.scenario.load import Loaded, load_scenario
from loadbench.scenario.plan import describe, levels
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.traces import Row, read_trace
from tests.rundirs import Planned, write_run

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 00:00:00.003041+00:00,2162,5
2024-05-12 00:00:00.217941+00:00,2399,6
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 2287, "output_length": 316, "hash_ids": [0, 42]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,API log
"""


def rows(text: str, timestamps: str | None = None, speed: float = 1.0) -> list[Row]:
    Path("t").write_text(text, encoding="utf-8")
    return list(read_trace(Path("t"), timestamps, speed).rows)


def due_ms(text: str, timestamps: str | None = None, speed: float = 1.0) -> list[float]:
    return [row.due_ns / 1e6 for row in rows(text, timestamps, speed)]


def load(text: str, trace: str = '{"timestamp": 0}\n{"timestamp": 10}\n{"timestamp": 40}\n') -> Loaded:
    Path("t.jsonl").write_text(trace)
    Path("s.yaml").write_text(text)
    return load_scenario(Path("s.yaml"))


# The files


def test_the_public_traces_are_read_as_they_are(home: Path) -> None:
    assert rows(AZURE_2023) == [(0, 374, 44), (4_314_579_000, 396, 109), (4_541_877_000, 879, 55)]
    assert rows(AZURE_2024) == [(0, 2162, 5), (214_900_000, 2399, 6)]
    assert rows(MOONCAKE) == [(0, 6758, 500), (3_052_000_000, 2287, 316)]
    assert rows(BURSTGPT) == [(0, 472, 18), (40_000_000_000, 1087, 1)]


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ('{"timestamp": 2}\n{"timestamp": 2.5}', 500),  # seconds, like every number without a unit
        ('{"timestamp_s": 2}\n{"timestamp_s": 2.5}', 500),
        ('{"timestamp_ms": 2}\n{"timestamp_ms": 502}', 500),
        ("timestamp,input_length\n0,9\n500,9\n", 500),  # Mooncake's columns
        ('{"timestamp": 1763820000000}\n{"timestamp": 1763820000500}', 500),  # milliseconds since 1970
        ('{"timestamp": 1763820000}\n{"timestamp": 1763820000.5}', 500),  # seconds since 1970
        ('{"timestamp": "2026-11-22T14:00:00Z"}\n{"timestamp": "2026-11-22T15:00:00.500+01:00"}', 500),
        ('{"timestamp": "2026-11-22 14:00"}\n{"timestamp": "2026-11-22 14:00:00.5"}', 500),
        ('{"timestamp": "1.5"}\n{"timestamp": "2"}', 500),
    ],
)
def test_a_timestamp_is_a_number_or_a_date_relative_or_absolute(home: Path, text: str, milliseconds: float) -> None:
    assert due_ms(text) == [0, milliseconds]


def test_a_unit_that_is_stated_comes_before_the_columns(home: Path) -> None:
    assert due_ms('{"timestamp": 0}\n{"timestamp": 500}', "ms") == [0, 500]
    assert due_ms(MOONCAKE, "s") == [0, 3_052_000]
    assert due_ms(AZURE_2024, "ms") == [0, 214.9]  # a date has no unit


def test_speed_shortens_every_gap(home: Path) -> None:
    assert due_ms('{"timestamp": 0}\n{"timestamp": 1}\n{"timestamp": 4}', speed=2.0) == [0, 500, 2000]
    assert due_ms('{"timestamp": 0}\n{"timestamp": 1}', speed=0.5) == [0, 2000]


def test_lengths_may_be_missing_everywhere_or_here_and_there(home: Path) -> None:
    assert rows("timestamp\n0\n1\n") == [(0, None, None), (10**9, None, None)]
    assert rows("timestamp,input_tokens,output_tokens\n0,,5\n1,7.0,\n") == [(0, None, 5), (10**9, 7, None)]
    mixed = '{"timestamp": 0}\n{"timestamp": 1, "input_tokens": null, "output_tokens": 3}\n'
    assert rows(mixed) == [(0, None, None), (10**9, None, 3)]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_do_not_matter(home: Path) -> None:
    assert due_ms('\ufeff{"timestamp": 0}\r\n\r\n{"timestamp": 1}\r\n') == [0, 1000]
    assert due_ms("\ufefftimestamp, input_tokens\r\n0, 5\r\n1, 5\r\n") == [0, 1000]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "t: expected requests, got none"),
        ("timestamp,input_tokens\n", "t: expected requests, got none"),
        ("time,tokens\n0,5\n", "t:1: expected a timestamp, got 'time, tokens'"),
        ('{"timestamp": 0}\n\n{"time": 1}\n', "t:3: expected a timestamp, got 'time'"),
        ('{"timestamp": 0}\n{"timestamp": 1\n', "t:2: expected a JSON object: unexpected end of data"),
        ('{"timestamp": 0}\n[1]\n', "t:2: expected a JSON object, got a list"),
        ('{"timestamp": 0}\n{"timestamp": true}\n', "t:2: timestamp: expected a number or a date and time, got True"),
        (
            "timestamp\n0\nyesterday\n",
            "t:3: timestamp: expected a number or a date and time, got 'yesterday'",
        ),
        ("timestamp,a\n0,1\n,2\n", "t:3: timestamp: expected a number or a date and time, got nothing"),
        ("timestamp\nnan\n", "t:2: timestamp: expected a number or a date and time, got 'nan'"),
        ("timestamp\n1e300\n", "t:2: timestamp: expected a number or a date and time, got '1e300'"),
        ("timestamp\n5\n4\n", "t:3: timestamp: expected the requests in order of time, got an earlier one"),
        (
            '{"timestamp": 0, "input_tokens": -1}',
            "t:1: input_tokens: expected a number of tokens, got -1",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12,5,many\n",
            "t:2: GeneratedTokens: expected a number of tokens, got 'many'",
        ),
        ('{"timestamp": 0, "output_tokens": 1.5}', "t:1: output_tokens: expected a number of tokens, got 1.5"),
        ('{"timestamp": 0, "output_tokens": [1]}', "t:1: output_tokens: expected a number of tokens, got [1]"),
        ('timestamp\n"a\nb\n', "t:3: timestamp: expected a number or a date and time, got 'a\\nb\\n'"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(home: Path, text: str, problem: str) -> None:
    with pytest.raises(UsageError) as raised:
        rows(text)
    assert str(raised.value) == problem


def test_a_file_that_is_not_there_or_not_text_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match=r"^nope: expected a trace file: No such file"):
        read_trace(Path("nope"), None, 1.0)
    Path("t").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(UsageError, match=r"^t: expected JSONL or CSV in UTF-8, got other bytes$"):
        read_trace(Path("t"), None, 1.0)


# In a scenario


def test_a_trace_is_found_beside_its_scenario_and_hashed(home: Path) -> None:
    Path("sub").mkdir()
    Path("sub/t.csv").write_text(AZURE_2023)
    Path("sub/s.yaml").write_text("stages: [{trace: t.csv, speed: 2}]")
    loaded = load_scenario(Path("sub/s.yaml"))
    sha256 = hashlib.sha256(AZURE_2023.encode()).hexdigest()
    assert loaded.scenario.stages[0].sha256 == sha256
    assert loaded.traces == {0: Trace("sub/t.csv", sha256, None, 2.0, requests=3, length_s=2.2709385)}


def test_what_is_wrong_with_a_trace_is_said_where_the_scenario_names_it(home: Path) -> None:
    with pytest.raises(UsageError, match=r"^s\.yaml:2: stages\[0\]\.trace: t\.jsonl:1: expected a timestamp, got 'a'$"):
        load("stages:\n  - trace: t.jsonl", '{"a": 1}')
    with pytest.raises(UsageError, match=r"^s\.yaml:1: stages\[0\]\.sha256: expected f{64}, got .* for t\.jsonl$"):
        load(f"stages: [{{trace: t.jsonl, sha256: {'f' * 64}}}]")


@pytest.mark.parametrize(
    ("bounds", "requests", "length_s"),
    [("", 3, 40), ("duration: 40s", 2, 10), ("requests: 2", 2, 10), ("duration: 5s, min_requests: 2", 2, 10)],
)
def test_a_stages_bounds_bound_its_trace(home: Path, bounds: str, requests: int, length_s: float) -> None:
    loaded = load(f"stages: [{{trace: t.jsonl, {bounds}}}]")
    (level,) = levels(loaded.scenario, ("m",), loaded.traces)
    assert isinstance(level.load, Open) and level.load.trace is not None
    assert (level.load.trace.requests, level.load.trace.length_s) == (requests, length_s)
    assert level.load.rate_per_s == requests / length_s
    assert len(list(schedule(level.load, level.duration_s, level.requests, level.seed, level.min_requests))) == requests


def test_the_plan_knows_the_number_and_the_length_of_a_trace(home: Path) -> None:
    loaded = load("stages: [{trace: t.jsonl, speed: 4}, {trace: t.jsonl, duration: 20s}]\ndrain: 5s\n")
    first, second = describe(loaded.scenario, levels(loaded.scenario, ("m",), loaded.traces)).levels
    assert (first.expected_requests, first.issuing_s, first.at_most_s) == (3, 10, 15)
    assert (second.expected_requests, second.issuing_s) == (2, 10)
    assert (first.level.requests, first.level.duration_s) == (3, None)  # else nothing would end it
    assert (second.level.requests, second.level.duration_s) == (None, 20)


def test_requests_that_all_came_at_once_have_a_rate_that_is_a_number(home: Path) -> None:
    loaded = load("stages: [{trace: t.jsonl}]", '{"timestamp": 7}\n' * 5)
    (level,) = levels(loaded.scenario, ("m",), loaded.traces)
    assert level.load == Open(5.0, "trace", trace=loaded.traces[0])


def test_a_level_with_a_trace_survives_its_way_through_json(home: Path) -> None:
    loaded = load("stages: [{trace: t.jsonl, speed: 3}, {rate: {from: 1, to: 2}}, {rate: 1, burstiness: 2}]")
    for level in levels(loaded.scenario, ("m",), loaded.traces):
        assert Level.from_json(level.as_json()) == level
    saved = loaded.scenario.public_json()["stages"][0]
    sha256 = loaded.traces[0].sha256
    assert saved == {"trace": "t.jsonl", "speed": 3, "sha256": sha256, "min_requests": 0, "rest": "0s"}


def test_a_report_tells_the_load_that_was_asked_for(home: Path) -> None:
    trace = Trace("sub/t.csv", "0" * 64, None, 2.0, requests=40, length_s=20.0)
    shaped = [
        Open(2.0, "gamma", 0.5),
        Open(2.0, "constant", legs=(Leg("ramp", 1.0, 3.0, 20.0),)),
        Open(2.0, "trace", trace=trace),
    ]
    write_run(Path("run"), [Planned(asked, duration_s=20.0) for asked in (Open(2.0), *shaped)])
    plain, *others = [level.load for level in summarise(rundir.read(Path("run"))).levels]
    assert plain == OpenLoad(2.0, "poisson")  # nothing more: what reads summary.json may count on it
    assert others == [ShapedLoad(a.rate_per_s, a.arrivals, "open", a.burstiness, a.legs, a.trace) for a in shaped]
    titles = ["2/s poisson", "2/s gamma 0.5", "1→3/s constant", "trace t.csv ×2"]
    assert [load_title(told) for told in (plain, *others)] == titles


# What is replayed


def drawn(text: str, trace: str, chars_per_token: float = 1.0) -> list[tuple[str, int, int, int]]:
    """Each request's kind of prompt, index, characters and max_tokens."""
    loaded = load(text, trace)
    mix = PromptMix(loaded.scenario, loaded.folder, chars_per_token)
    (level,) = levels(loaded.scenario, ("m",), loaded.traces)
    prompts = mix.draw(level.seed, level.load)
    return [(p.kind, p.index, len(p.messages[0]["content"]), p.max_tokens) for p in islice(prompts, 100)]


def test_recorded_lengths_make_the_prompts_and_what_is_not_recorded_comes_from_the_mix(home: Path) -> None:
    text = "prompts: [{name: fixed, text: hello, max_tokens: 9}]\nrequest: {max_tokens: 33}\nstages: [{trace: t.jsonl}]"
    trace = """{"timestamp": 0, "input_tokens": 120, "output_tokens": 24}
{"timestamp": 1, "output_tokens": 7}
{"timestamp": 2, "input_tokens": 4}
{"timestamp": 3}
"""
    assert drawn(text, trace) == [("trace", 0, 120, 24), ("fixed", 1, 5, 7), ("trace", 2, 4, 33), ("fixed", 3, 5, 9)]
    assert [characters for _, _, characters, _ in drawn(text, trace, 4.0)] == [480, 5, 16, 5]


def test_recorded_prompts_begin_differently_and_are_the_same_again_with_the_same_seed(home: Path) -> None:
    loaded = load("stages: [{trace: t.jsonl}]", '{"timestamp": 0, "input_tokens": 40}\n' * 200)
    mix = PromptMix(loaded.scenario, loaded.folder)
    (level,) = levels(loaded.scenario, ("m",), loaded.traces)
    first, again, other = (list(mix.draw(seed, level.load)) for seed in (1, 1, 2))
    assert first == again
    assert first[0] != other[0]
    assert len({prompt.messages[0]["content"][:8] for prompt in first}) == 200


def test_a_shard_of_a_trace_has_the_prompts_of_its_own_rows(home: Path) -> None:
    trace = "".join(f'{{"timestamp": {at}, "input_tokens": {100 + at}}}\n' for at in range(10))
    loaded = load("stages: [{trace: t.jsonl}]", trace)
    mix = PromptMix(loaded.scenario, loaded.folder, 1.0)
    (level,) = levels(loaded.scenario, ("m",), loaded.traces)
    assert isinstance(level.load, Open)
    due_s = [due_ns // 10**9 for due_ns in islice(schedule(level.load, None, None, 1), 1, None, 3)]
    lengths = [len(p.messages[0]["content"]) for p in islice(mix.draw(1, level.load), 1, None, 3)]
    assert due_s == [1, 4, 7]
    assert lengths == [101, 104, 107]


def test_a_trace_that_has_changed_since_it_was_read_is_refused_before_the_level_begins(home: Path) -> None:
    loaded = load("stages: [{trace: t.jsonl}]")
    (level,) = levels(loaded.scenario, ("m",), loaded.traces)
    assert isinstance(level.load, Open)
    Path("t.jsonl").write_text('{"timestamp": 0}\n')
    with pytest.raises(UsageError, match=r"^t\.jsonl: expected the trace as it was when the scenario was read"):
        schedule(level.load, None, None, 1)


@pytest.mark.parametrize(("column", "due_ns"), [("timestamp_s", 10**10), ("timestamp_ms", 10**7), ("timestamp", 10**7)])
def test_a_column_that_names_its_unit_is_believed_whatever_stands_beside_it(
    tmp_path: Path, column: str, due_ns: int
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"{column}": 0, "input_length": 5}}\n{{"{column}": 10, "input_length": 5}}\n', encoding="utf-8")
    assert [row.due_ns for row in read_trace(path, None, 1.0).rows] == [0, due_ns]
