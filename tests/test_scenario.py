"""Scenario files: what is read, what overrides what, and that every mistake is one line that says where it is."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loadbench.errors import UsageError
from loadbench.records import Closed, Leg, Open
from loadbench.scenario.load import Loaded, Overrides, load_scenario
from loadbench.scenario.plan import levels
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.schema import Scenario, schema_json

SHIPPED = sorted((Path(__file__).parent.parent / "scenarios").glob("*.yaml"))
DOCS = Path(__file__).parent.parent / "docs"


def read(text: str, overrides: Overrides | None = None, env: dict[str, str] | None = None) -> Loaded:
    Path("s.yaml").write_text(text, encoding="utf-8")
    return load_scenario(Path("s.yaml"), overrides, env)


def refusal(text: str, overrides: Overrides | None = None, env: dict[str, str] | None = None) -> str:
    """The one line that a mistake comes to."""
    with pytest.raises(UsageError) as raised:
        read(text, overrides, env)
    message = str(raised.value)
    assert "\n" not in message
    return message


# What is read


def test_five_lines_are_a_scenario(home: Path) -> None:
    scenario = read("schema: 1\nname: mine\nmodels: [phi]\nstages:\n  - {concurrency: [1, 2]}\n").scenario
    assert scenario.models == ("phi",)
    assert scenario.stages[0].loads() == (Closed(1), Closed(2))
    assert scenario.stages[0].duration_s == 15
    assert scenario.stages[0].start_spacing_s == 0.001


def test_quantities_are_read_with_their_units(home: Path) -> None:
    scenario = read(
        "stages: [{rate: [120/min, 0.5], duration: 2m}]\n"
        "deadlines: {first_token: 250ms, total: 1}\n"
        "slo: {ttft: {p95: 2s, p50: 500ms}, tpot: {p99: 100ms}, error_rate: 1%}\n"
    ).scenario
    assert scenario.stages[0].loads() == (Open(2.0, "poisson"), Open(0.5, "poisson"))
    assert scenario.stages[0].duration_s == 120
    assert (scenario.deadlines.first_token_s, scenario.deadlines.total_s) == (0.25, 1)
    assert scenario.slo is not None
    assert scenario.slo.error_rate == 0.01
    assert list(scenario.slo.limits()) == [("ttft", "p50", 0.5), ("ttft", "p95", 2.0), ("tpot", "p99", 0.1)]


def test_a_rate_may_change_over_the_duration_and_stand_in_a_list_with_others(home: Path) -> None:
    text = (
        "stages: [{rate: [2/s, {from: 60/min, to: 8/s}], arrivals: constant, duration: 20s}, {rate: {from: 0, to: 1}}]"
    )
    first, second = read(text).scenario.stages
    assert first.loads() == (Open(2.0, "constant"), Open(4.5, "constant", legs=(Leg("ramp", 1.0, 8.0, 20.0),)))
    assert second.loads() == (Open(0.5, "poisson", legs=(Leg("ramp", 0.0, 1.0, 15.0),)),)


def test_burstiness_means_gamma_arrivals(home: Path) -> None:
    plain, stated = read(
        "stages: [{rate: 2/s, burstiness: 0.5}, {rate: 2/s, arrivals: gamma, burstiness: 2}]"
    ).scenario.stages
    assert plain.loads() == (Open(2.0, "gamma", 0.5),)
    assert stated.loads() == (Open(2.0, "gamma", 2.0),)


def test_a_stage_with_requests_alone_has_no_duration(home: Path) -> None:
    stage = read("stages: [{concurrency: 2, requests: 9}]").scenario.stages[0]
    assert (stage.duration_s, stage.requests) == (None, 9)


def test_a_scenario_without_a_name_is_called_like_its_file(home: Path) -> None:
    assert read("seed: 1").scenario.name == "s"


def test_anchors_and_merge_keys_work(home: Path) -> None:
    text = "stages:\n  - &base {concurrency: 1, duration: 5s}\n  - {<<: *base, concurrency: 4}\n"
    first, second = read(text).scenario.stages
    assert (second.concurrency, second.duration_s) == ((4,), first.duration_s)


def test_a_file_may_begin_with_a_byte_order_mark(home: Path) -> None:
    assert read("\ufeffseed: 5\n").scenario.seed == 5


# The environment


def test_the_environment_is_put_into_texts(home: Path) -> None:
    text = "name: ${NAME}\ndescription: from ${WHERE:-nowhere}\nrequest: {headers: {X-A: '$${NAME}'}}\n"
    scenario = read(text, env={"NAME": "mine"}).scenario
    assert (scenario.name, scenario.description) == ("mine", "from nowhere")
    assert scenario.request.headers == {"X-A": "${NAME}"}


def test_a_variable_that_is_not_set_and_has_no_default_is_named_with_its_line(home: Path) -> None:
    expected = "s.yaml:2: models[0]: expected MODEL in the environment, got nothing (a default: ${MODEL:-…})"
    assert refusal("seed: 1\nmodels: ['${MODEL}']") == expected
    assert refusal("seed: 1\nmodels: ['${MODEL}']", env={"MODEL": ""}) == expected


def test_a_variable_that_a_flag_makes_needless_need_not_be_set(home: Path) -> None:
    assert read("models: ['${MODEL}']", Overrides(models=("a", "b"))).scenario.models == ("a", "b")


# What overrides what


@pytest.mark.parametrize(
    ("text", "flag", "env", "endpoint", "source"),
    [
        (
            "endpoint: http://file/v1",
            "http://flag",
            {"FOUNDRY_LOCAL_ENDPOINT": "http://env"},
            "http://flag",
            "--endpoint",
        ),
        (
            "endpoint: http://file/v1",
            None,
            {"FOUNDRY_LOCAL_ENDPOINT": "http://env"},
            "http://env",
            "FOUNDRY_LOCAL_ENDPOINT",
        ),
        ("endpoint: http://file/v1", None, {"FOUNDRY_LOCAL_ENDPOINT": ""}, "http://file/v1", "s.yaml:1"),
        ("seed: 1\nendpoint: http://file/v1", None, {}, "http://file/v1", "s.yaml:2"),
        ("seed: 1", None, {}, "embedded", "default"),
    ],
)
def test_the_endpoint_is_the_flags_then_the_environments_then_the_files_then_embedded(
    home: Path, text: str, flag: str | None, env: dict[str, str], endpoint: str, source: str
) -> None:
    loaded = read(text, Overrides(endpoint=flag), env)
    assert (loaded.scenario.endpoint, loaded.endpoint_source) == (endpoint, source)


def test_a_host_and_a_port_are_an_endpoint(home: Path) -> None:
    assert read("endpoint: windows-host:5273").scenario.endpoint == "http://windows-host:5273"
    assert read("seed: 1", Overrides(endpoint="[::1]:80/v1")).scenario.endpoint == "http://[::1]:80/v1"


def test_flags_set_what_they_name(home: Path) -> None:
    overrides = Overrides(
        sets=("stages.1.arrivals=constant", "request.max_tokens=9", "slo.ttft.p95=1s", "stages.0.duration=1h"),
        models=("a",),
        concurrency="1,8",
        rate="3/s",
        duration="5s",
        requests=7,
        seed=3,
        headers=("X-One: 1", "authorization: Bearer new"),
    )
    text = "stages:\n  - {concurrency: 2}\n  - {rate: 1/s}\nrequest: {headers: {Authorization: Bearer old}}\n"
    scenario = read(text, overrides).scenario
    assert scenario.stages[0].loads() == (Closed(1), Closed(8))
    assert scenario.stages[1].loads() == (Open(3.0, "constant"),)
    assert [(stage.duration_s, stage.requests) for stage in scenario.stages] == [(5, 7), (5, 7)]
    assert (scenario.models, scenario.seed, scenario.request.max_tokens) == (("a",), 3, 9)
    assert scenario.request.headers == {"Authorization": "Bearer new", "X-One": "1"}
    assert scenario.slo is not None
    assert list(scenario.slo.limits()) == [("ttft", "p95", 1.0)]


def test_a_load_that_is_named_is_the_only_one(home: Path) -> None:
    text = "stages:\n  - {concurrency: 2, duration: 9s}\n  - {rate: 1/s}\n  - {rate: 2/s}\n"
    alone = read(text, Overrides(rate="3/s")).scenario.stages
    assert [stage.rates_per_s for stage in alone] == [(3.0,)]
    made = read("stages: [{concurrency: 2, duration: 9s}]", Overrides(rate="3/s")).scenario.stages
    assert [(stage.rates_per_s, stage.concurrency) for stage in made] == [((3.0,), None)]


def test_flags_make_the_stages_of_a_file_that_has_none(home: Path) -> None:
    both = read("seed: 1", Overrides(concurrency="2", rate="1/s")).scenario.stages
    assert [stage.loads() for stage in both] == [(Closed(2),), (Open(1.0),)]
    (bounded,) = read("seed: 1", Overrides(sets=("stages.0.duration=5s",))).scenario.stages
    assert (bounded.loads(), bounded.duration_s) == ((Closed(1),), 5)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            Overrides(sets=("stages.3.duration=5s",)),
            "--set stages.3.duration: expected the path of a value, got 3 where",
        ),
        (Overrides(sets=("seed.x=5s",)), "--set seed.x: expected the path of a value, got x where seed has none"),
        (
            Overrides(sets=("stages.0.duratoin=5s",)),
            "--set stages.0.duratoin: stages[0].duratoin: unknown key; did you mean",
        ),
        (
            Overrides(sets=("stages.0.duration=abc",)),
            "--set stages.0.duration: stages[0].duration: expected a duration",
        ),
        (Overrides(sets=("seed",)), "--set: expected PATH=VALUE such as stages.0.duration=5s, got seed"),
        (Overrides(sets=("seed=[",)), "--set seed: expected a value that YAML can read"),
        (
            Overrides(concurrency="1,zero"),
            '--concurrency: stages[0].concurrency: expected a whole number, got "1,zero"',
        ),
        (Overrides(rate="0/s"), "--rate: stages[0].rate: expected a"),
        (Overrides(duration="5"), ""),
        (Overrides(duration="long"), "--duration: stages[0].duration: expected a duration such as 15s, 250ms or 2m"),
        (Overrides(endpoint="here"), "--endpoint: endpoint: expected embedded or a URL such as"),
        (Overrides(headers=("Authorization",)), "--header: expected 'Name: value'"),
        (Overrides(headers=("A B: c",)), "--header: expected headers that HTTP allows, got 'A B'"),
        (Overrides(headers=("X-A: b\r\nX-B: c",)), "--header: expected headers that HTTP allows, got 'X-A'"),
        (
            Overrides(headers=("content-length: 5",)),
            "--header: expected headers that the client does not set itself, got",
        ),
        (Overrides(sets=("seed=" + "[" * 5000,)), "--set seed: expected a value that YAML can read"),
        (
            Overrides(rate="1/s", sets=("stages.1.duration=5s",)),
            "--set stages.1.duration: expected the path of a value, got 1 where stages has none",
        ),
    ],
)
def test_a_flag_that_does_not_fit_is_named(home: Path, overrides: Overrides, problem: str) -> None:
    text = "seed: 1\nstages: [{concurrency: 1}]"
    if not problem:
        assert read(text, overrides).scenario.stages[0].duration_s == 5
    else:
        assert refusal(text, overrides).startswith(problem)


EDGE_STAGE = "stages: [{concurrency: [1, 2], duration: 15s, min_requests: 130}]"


def test_a_flag_for_the_requests_lowers_the_least_of_them_and_never_raises_it(home: Path) -> None:
    (fewer,) = read(EDGE_STAGE, Overrides(requests=20)).scenario.stages
    assert (fewer.requests, fewer.min_requests) == (20, 20)
    (more,) = read(EDGE_STAGE, Overrides(requests=200)).scenario.stages
    assert (more.requests, more.min_requests) == (200, 130)
    (from_env,) = read(EDGE_STAGE.replace("130", "'${LEAST:-130}'"), Overrides(requests=20)).scenario.stages
    assert from_env.min_requests == 20


def test_a_flag_for_the_duration_drops_the_least_number_of_requests_unless_it_is_set_too(home: Path) -> None:
    (short,) = read(EDGE_STAGE, Overrides(duration="2s")).scenario.stages
    assert (short.duration_s, short.min_requests) == (2, 0)
    (kept,) = read(EDGE_STAGE, Overrides(duration="2s", sets=("stages.0.min_requests=9",))).scenario.stages
    assert kept.min_requests == 9


def test_what_is_set_in_a_stage_means_the_stages_that_the_flags_leave(home: Path) -> None:
    text = "stages: [{concurrency: 2}, {rate: 1/s, arrivals: constant}]"
    (valved,) = read(text, Overrides(rate="100/s", sets=("stages.0.max_in_flight=4",))).scenario.stages
    assert (valved.loads(), valved.max_in_flight) == ((Open(100.0, "constant"),), 4)
    (flagged,) = read(text, Overrides(rate="3/s", sets=("stages.0.rate=9/s",))).scenario.stages
    assert flagged.rates_per_s == (3.0,)  # what has a flag of its own is meant more


# Mistakes

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MERGE_BOMB = BOMB.replace("[x]", "{x: 1}").replace(" [", " {<<: [").replace("]", "]}")
CHAIN = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}\n" for n in range(1, 2000)) + "<<: *a1999\n"
DEEP = "lists and mappings at most 64 deep, got more"
MUCH = "at most 100,000 values, aliases counted as what they name, got more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: " + "[" * 5000, f"s.yaml:1: expected valid YAML: {DEEP}"),
        ("seed: 1\nmodels: " + "{a: " * 500, f"s.yaml:2: expected valid YAML: {DEEP}"),
        (CHAIN, f"s.yaml:64: expected valid YAML: {DEEP}"),
        (BOMB, f"s.yaml:6: expected valid YAML: {MUCH}"),
        (MERGE_BOMB, f"s.yaml:6: expected valid YAML: {MUCH}"),
    ],
    ids=["lists", "mappings", "merges of merges", "aliases", "merges"],
)
def test_a_file_that_would_exhaust_its_reader_is_refused_with_its_line(home: Path, text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    "name", ["Transfer-Encoding", "content-length", "Connection", "Host", "Expect", "X-Request-ID"]
)
def test_a_header_that_the_client_sets_is_refused(home: Path, name: str) -> None:
    expected = f"s.yaml:2: request: expected headers that the client does not set itself, got {name}"
    assert refusal(f"seed: 1\nrequest: {{headers: {{{name}: 'x'}}}}") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nstages:\n  - {rate: 0}", "s.yaml:3: stages[0].rate: expected a number above 0, got 0"),
        (
            "stages:\n  - duration: 5s\n    rate: -2/s",
            's.yaml:3: stages[0].rate: expected a number above 0, got "-2/s"',
        ),
        (
            "stages:\n  - concurrency: [1,\n      0]",
            "s.yaml:3: stages[0].concurrency[1]: expected a number of at least 1, got 0",
        ),
        ("stages:\n  - concurency: 4", "s.yaml:2: stages[0].concurency: unknown key; did you mean concurrency?"),
        ("slo:\n  tftt: {p95: 1s}", "s.yaml:2: slo.tftt: unknown key; did you mean ttft?"),
        (
            "request:\n  zzz: 1",
            "s.yaml:2: request.zzz: unknown key; expected one of stream, max_tokens, temperature, headers, extra",
        ),
        (
            "prompts:\n  - {nmae: x, text: hi}",
            "s.yaml:2: prompts[0].nmae: unknown key; did you mean name? (and 1 more)",
        ),
        ("prompts:\n\n  - text: hi", "s.yaml:3: prompts[0].name: expected this key, got nothing"),
        (
            "prompts: [{name: a, text: hi, file: b}]",
            "s.yaml:1: prompts[0]: expected exactly one of file, text, messages, input_tokens, got file and text",
        ),
        (
            "prompts: [{name: a b, text: hi}]",
            's.yaml:1: prompts[0].name: expected a name of letters, digits, - and _, got "a b"',
        ),
        (
            "prompts: [{name: a, text: x}, {name: a, text: y}]",
            "s.yaml:1: prompts: expected a different name for each entry, got a twice",
        ),
        (
            "prompts: [{name: a, input_tokens: {mean: 5, min: 9}}]",
            "s.yaml:1: prompts[0].input_tokens: expected min ≤ mean ≤ max, got 9, 5 and none",
        ),
        (
            "stages: [{concurrency: 1, rate: 1/s}]",
            "s.yaml:1: stages[0]: expected exactly one of concurrency, rate, over_time, trace, memory,"
            " got concurrency and rate",
        ),
        (
            "stages: [{duration: 5s}]",
            "s.yaml:1: stages[0]: expected exactly one of concurrency, rate, over_time, trace, memory, got none",
        ),
        (
            "stages:\n  - rate: [1/s,\n      {from: -1/s, to: 2/s}]",
            's.yaml:3: stages[0].rate[1].from: expected a number of at least 0, got "-1/s"',
        ),
        (
            "stages:\n  - rate:\n      from: 1/s\n      to: 0",
            "s.yaml:4: stages[0].rate.to: expected a number above 0, got 0",
        ),
        ("stages: [{rate: {from: 1/s}}]", "s.yaml:1: stages[0].rate.to: expected this key, got nothing"),
        (
            "stages: [{rate: {frm: 1/s, to: 2/s}}]",
            "s.yaml:1: stages[0].rate.frm: unknown key; did you mean from? (and 1 more)",
        ),
        (
            "stages: [{rate: {from: 1/s, to: 2/s}, requests: 5}]",
            "s.yaml:1: stages[0]: expected a duration beside a rate with from and to, got none",
        ),
        (
            "stages: [{rate: 1/s, arrivals: gamma}]",
            "s.yaml:1: stages[0]: expected burstiness beside gamma arrivals, got none",
        ),
        (
            "stages: [{rate: 1/s, arrivals: constant, burstiness: 2}]",
            "s.yaml:1: stages[0]: expected gamma arrivals beside burstiness, got constant",
        ),
        (
            "stages:\n  - rate: 1/s\n    burstiness: 0",
            "s.yaml:3: stages[0].burstiness: expected a number of at least 1e-06, got 0",
        ),
        (
            "stages: [{rate: 1/s, speed: 2}]",
            "s.yaml:1: stages[0]: expected speed in a stage with trace, got it beside rate",
        ),
        (
            "stages: [{concurrency: 1, max_in_flight: 2}]",
            "s.yaml:1: stages[0]: expected max_in_flight in a stage with rate or trace, got it beside concurrency",
        ),
        (
            "stages: [{trace: t, arrivals: poisson}]",
            "s.yaml:1: stages[0]: expected arrivals in a stage with rate, got it beside trace",
        ),
        (
            "stages: [{trace: t, timestamps: us}]",
            "s.yaml:1: stages[0].timestamps: expected 's' or 'ms', got \"us\"",
        ),
        (
            "stages: [{concurrency: 1, arrivals: poisson}]",
            "s.yaml:1: stages[0]: expected arrivals in a stage with rate, got it beside concurrency",
        ),
        (
            "stages: [{rate: 1, start_spacing: 1s}]",
            "s.yaml:1: stages[0]: expected start_spacing in a stage with concurrency, got it beside rate",
        ),
        (
            "stages: [{rate: 1, requests: 5, min_requests: 6}]",
            "s.yaml:1: stages[0]: expected min_requests ≤ requests, got 6 and 5",
        ),
        ("stages: []", "s.yaml:1: stages: expected at least 1 in the list, got a list of 0"),
        ("stages:\n", "s.yaml:1: stages: expected a list, got nothing"),
        ("seed: yes", "s.yaml:1: seed: expected a whole number, got true"),
        ("schema: 2", "s.yaml:1: schema: expected 1, got 2"),
        ("slo: {}", "s.yaml:1: slo: expected at least one limit, got none"),
        ("slo: {error_rate: 5}", "s.yaml:1: slo.error_rate: expected a number of at most 1, got 5"),
        ("deadlines: {first_token: 5m}", "s.yaml:1: deadlines: expected first_token ≤ total, got 300s and 180s"),
        (
            "request: {extra: {model: x}}",
            "s.yaml:1: request: expected keys in extra that request has not itself, got model",
        ),
        (
            "endpoint: localhost/5273",
            's.yaml:1: endpoint: expected embedded or a URL such as http://127.0.0.1:5273/v1, got "localhost/5273"',
        ),
        ("seed: 1\nseed: 2", "s.yaml:2: seed: expected this key once, got it here and on line 1"),
        ("", "s.yaml:1: expected keys such as name, models and stages, got an empty file"),
        ("- 1", "s.yaml:1: expected keys such as name, models and stages, got a list"),
        ("? [a]\n: b", "s.yaml:1: expected a plain key, got a list or mapping"),
        ("models: &m [*m]", "s.yaml:1: models[0]: expected a value, got an alias of what it is part of"),
        ("name: 2025-13-01", "s.yaml:1: name: expected a plain value, got 2025-13-01"),
        ("name: !!bool maybe", "s.yaml:1: name: expected a plain value, got maybe"),
        ("stages: {<<: 5}", "s.yaml:1: stages: expected a mapping behind <<"),
        ("seed: 1\nname: \x07", "s.yaml:2: expected valid YAML: special characters are not allowed"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(home: Path, text: str, message: str) -> None:
    assert refusal(text) == message


def test_broken_yaml_is_refused_with_its_line(home: Path) -> None:
    assert refusal("seed: 1\nmodels: [a\nstages: b}").startswith("s.yaml:3: expected valid YAML: ")


def test_a_file_that_is_not_there_or_not_text_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match=r"^nope\.yaml: expected a scenario file: No such file"):
        load_scenario(Path("nope.yaml"))
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UsageError, match=r"^latin\.yaml: expected UTF-8 text, got byte 0xe9$"):
        load_scenario(Path("latin.yaml"))


def test_a_prompt_file_that_is_missing_or_not_json_is_refused_with_the_line_that_names_it(home: Path) -> None:
    text = "prompts:\n  - name: chat\n    file: p.json\n"
    assert refusal(text).startswith("s.yaml:3: prompts[0].file: p.json: expected a prompt file: No such file")
    Path("p.json").write_text("hello")
    assert refusal(text) == "s.yaml:3: prompts[0].file: p.json:1: expected valid JSON: Expecting value"


def test_an_error_does_not_show_a_secret(home: Path) -> None:
    assert "sk-123" not in refusal("request: {headers: {Authorization: [sk-123]}}")


EDGE = next(path for path in SHIPPED if path.stem == "edge").read_text(encoding="utf-8")


@settings(deadline=None)  # two busy cores are slow now and then
@given(
    start=st.integers(0, len(EDGE)), length=st.integers(0, 9), text=st.text(":{}[]-&*!|>'\"#%@, \n\t<\x00\ud7ff$0es")
)
def test_a_file_damaged_anywhere_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, start: int, length: int, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(EDGE[:start] + text + EDGE[start + length :], encoding="utf-8")
    try:
        load_scenario(path)
    except UsageError as error:
        assert "\n" not in str(error)


# Prompt files and hashes


def test_prompt_files_are_found_beside_the_scenario_and_hashed(home: Path) -> None:
    Path("sub").mkdir()
    Path("sub/p.json").write_text('["hi"]')
    Path("sub/s.yaml").write_text("prompts: [{name: chat, file: p.json}]")
    loaded = load_scenario(Path("sub/s.yaml"))
    assert loaded.scenario.prompts[0].sha256 == hashlib.sha256(b'["hi"]').hexdigest()
    assert next(PromptMix(loaded.scenario, loaded.folder).draw(1)).messages[0]["content"] == "hi"


def test_a_prompt_file_that_is_not_the_one_meant_is_refused(home: Path) -> None:
    Path("p.json").write_text('["hi"]')
    problem = refusal(f"prompts: [{{name: chat, file: p.json, sha256: {'f' * 64}}}]")
    assert problem.startswith("s.yaml:1: prompts[0].sha256: expected ffff")


# What is saved


def test_a_saved_scenario_holds_no_secret(home: Path) -> None:
    text = """
endpoint: https://user:hunter2@host:8443/v1?api_key=hunter2&api-version=1
request:
  headers:
    {Authorization: Bearer hunter2, X-Api-Key: hunter2, Ocp-Apim-Subscription-Key: hunter2, Cookie: hunter2, X-Run: ok}
  extra: {api_key: hunter2, auth: {user: hunter2}, nested: [{accessToken: hunter2}], max_completion_tokens: 5}
"""
    loaded = read(text)
    assert loaded.scenario.request.headers["Authorization"] == "Bearer hunter2"
    saved = loaded.scenario.public_json()
    assert "hunter2" not in json.dumps(saved)
    assert saved["endpoint"] == "https://host:8443/v1?api_key=redacted&api-version=1"
    assert saved["request"]["headers"]["X-Run"] == "ok"
    assert saved["request"]["extra"]["max_completion_tokens"] == 5
    assert Scenario.model_validate(saved) == loaded.scenario.redacted()


def test_a_saved_scenario_speaks_in_units_and_leaves_out_what_was_not_asked(home: Path) -> None:
    saved = read(
        "stages: [{rate: 2/s, duration: 20s}, {concurrency: [1, 2]}]\nrequest: {temperature: null}"
    ).scenario.public_json()
    assert saved["stages"] == [
        {"rate": ["2/s"], "arrivals": "poisson", "duration": "20s", "min_requests": 0, "rest": "0s"},
        {"concurrency": [1, 2], "duration": "15s", "min_requests": 0, "start_spacing": "1ms", "rest": "0s"},
    ]
    assert saved["request"]["temperature"] is None
    assert "slo" not in saved


seconds = st.floats(1e-9, 1e9)
shares = st.floats(0, 1)
limits = st.fixed_dictionaries({}, optional={"p50": seconds, "p90": seconds, "p95": seconds, "p99": seconds})
bounds: dict[str, Any] = {"duration": seconds, "requests": st.integers(100, 10**9), "min_requests": st.integers(0, 100)}
closed = st.fixed_dictionaries(
    {"concurrency": st.lists(st.integers(1, 10**6), min_size=1)}, optional={**bounds, "start_spacing": seconds}
)
opened = st.fixed_dictionaries(
    {"rate": st.lists(seconds, min_size=1)},
    optional={**bounds, "arrivals": st.sampled_from(["constant", "poisson"]), "max_in_flight": st.integers(1, 10**6)},
)
ramps = st.fixed_dictionaries({"from": st.just(0) | seconds, "to": seconds})
shaped = st.fixed_dictionaries(
    {"rate": st.lists(seconds | ramps, min_size=1) | ramps, "duration": seconds},
    optional={"burstiness": st.floats(0.01, 100), "requests": st.integers(1, 10**9)},
)
replayed = st.fixed_dictionaries(
    {"trace": st.text(min_size=1)},
    optional={**bounds, "timestamps": st.sampled_from(["s", "ms"]), "speed": st.floats(0.01, 100)},
)
scenarios = st.fixed_dictionaries(
    {},
    optional={
        "description": st.text(),
        "models": st.lists(st.text(min_size=1), min_size=1),
        "request": st.fixed_dictionaries(
            {},
            optional={"temperature": st.none() | st.floats(0, 2), "extra": st.dictionaries(st.just("stop"), st.none())},
        ),
        "prompts": st.just([{"name": "a", "text": "hi"}, {"name": "b", "weight": 0.1, "input_tokens": {"mean": 9}}]),
        "stages": st.lists(closed | opened | shaped | replayed, min_size=1),
        "drain": seconds,
        "slo": st.fixed_dictionaries({"error_rate": shares}, optional={"ttft": limits, "goodput": shares}),
        "seed": st.integers(0, 2**63 - 1),
    },
)


@settings(deadline=None)  # two busy cores are slow now and then
@given(scenarios)
def test_a_saved_scenario_reads_back_as_the_same_and_fits_the_schema(keys: dict[str, Any]) -> None:
    scenario = Scenario.model_validate(keys)
    saved = json.loads(json.dumps(scenario.public_json()))
    assert Scenario.model_validate(saved) == scenario
    VALIDATOR.validate(saved)


# What is shipped, and what editors are told

VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_json()))


def test_the_schema_is_a_schema_and_describes_every_key() -> None:
    schema = json.loads(schema_json())
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for key, described in part["properties"].items():
            named = schema["$defs"].get(str(described.get("$ref")).rpartition("/")[2], described)
            assert described.get("description") or named["description"], key


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": [{"concurrency": 1, "rate": "1/s"}]},
        {"stages": [{"concurrency": 0}]},
        {"stages": [{"concurrency": 1, "duration": "15 sec"}]},
        {"stages": [{"rate": {"from": "1/s"}}]},
        {"stages": [{"rate": "1/s", "trace": "t.jsonl"}]},
        {"prompts": [{"name": "a"}]},
        {"sead": 1},
        {"schema": 2},
    ],
)
def test_the_schema_shows_an_editor_what_is_wrong(wrong: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(wrong)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_scenario_loads_fits_the_schema_and_names_it(path: Path) -> None:
    scenario = load_scenario(path).scenario
    assert scenario.name == path.stem
    models = {
        "wedge": ("synthetic:wedge",),
        "memory": ("synthetic:kv",),
        "choose": ("synthetic:tiny", "synthetic:broken", "synthetic:edge"),
    }.get(path.stem, ("auto",))
    assert (scenario.endpoint, scenario.models) == ("embedded", models)
    if scenario.memory_limit_bytes is None:
        assert load_scenario(path, env={"FOUNDRY_LOCAL_ENDPOINT": "http://h:1"}).scenario.endpoint == "http://h:1"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../loadbench/schemas/scenario.schema.json\n")
    VALIDATOR.validate(yaml.safe_load(text))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_prompts_of_a_shipped_scenario_fit_2048_tokens_where_a_byte_is_one(path: Path) -> None:
    loaded = load_scenario(path)
    mix = PromptMix(loaded.scenario, loaded.folder, chars_per_token=1.0)
    laid_out = levels(loaded.scenario, ("m",), loaded.traces)
    for level in (level for level in laid_out if level.purpose == "level"):  # a memory ladder is to ask for more
        for prompt in itertools.islice(mix.draw(level.seed, level.load), 200):
            template = len(prompt.messages) + 1
            assert sum(len(str(m["content"]).encode()) for m in prompt.messages) + template + prompt.max_tokens <= 2048


def test_the_fourteen_scenarios_are_shipped() -> None:
    names = [
        "capacity",
        "choose",
        "edge",
        "long-context",
        "memory",
        "non-streaming",
        "open-loop",
        "repeat",
        "smoke",
        "soak",
        "sweep",
        "trace",
        "wedge",
        "workshop",
    ]
    assert [path.stem for path in SHIPPED] == names


def test_the_stages_that_the_page_on_open_loops_shows_are_valid(home: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "open-loop.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    Path("traces").symlink_to(SHIPPED[0].parent / "traces")
    assert len(read(shown).scenario.stages) == 6
