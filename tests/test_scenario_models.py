"""Scenarios of several models: which they are and in which order, what is known of them, prompts in order, power."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadbench.errors import UsageError
from loadbench.records import Prompt
from loadbench.report.plan import print_plan
from loadbench.scenario.load import Loaded, Overrides, load_scenario
from loadbench.scenario.models_file import ModelNote, read_models_file
from loadbench.scenario.plan import describe, levels, order_of_models
from loadbench.scenario.prompts import PromptMix
from loadbench.scenario.quality import Quality
from loadbench.scenario.schema import Scenario, schema_json

VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_json()))


def read(text: str, overrides: Overrides | None = None, **env: str) -> Loaded:
    Path("s.yaml").write_text(text, encoding="utf-8")
    return load_scenario(Path("s.yaml"), overrides, env)


def refusal(text: str, *sets: str, **env: str) -> str:
    """The one line that a mistake comes to."""
    with pytest.raises(UsageError) as raised:
        read(text, Overrides(sets=sets), **env)
    message = str(raised.value)
    assert "\n" not in message
    return message


def noted(content: Any, name: str = "models.json") -> None:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def drawn(loaded: Loaded, many: int, *, seed: int = 1) -> list[Prompt]:
    return list(itertools.islice(PromptMix(loaded.scenario, loaded.folder).draw(seed), many))


def plan(loaded: Loaded) -> str:
    stream = io.StringIO()
    print_plan(loaded, stream)
    return stream.getvalue()


# Which models, and in which order


def test_the_flag_comes_before_the_variable_and_the_variable_before_the_file(home: Path) -> None:
    text = "models: [written]"
    assert read(text).scenario.models == ("written",)
    loaded = read(text, BENCH_MODELS=" phi-4-mini, qwen2.5-0.5b@cpu ,,")
    assert (loaded.scenario.models, loaded.models_source) == (("phi-4-mini", "qwen2.5-0.5b@cpu"), "BENCH_MODELS")
    flagged = read(text, Overrides(models=("b", "a")), BENCH_MODELS="phi-4-mini")
    assert (flagged.scenario.models, flagged.models_source) == (("b", "a"), "--model")


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_variable_counts_as_unset(home: Path, empty: str) -> None:
    assert read("models: [written]", BENCH_MODELS=empty, FOUNDRY_LOCAL_ENDPOINT=empty).scenario.models == ("written",)


def test_a_variable_with_no_model_or_one_twice_is_refused_by_its_name(home: Path) -> None:
    assert refusal("seed: 1", BENCH_MODELS=" , ") == "BENCH_MODELS: expected models with commas between them, got ,"
    assert (
        refusal("seed: 1", BENCH_MODELS="a, ,b") == "BENCH_MODELS: expected models with commas between them, got a, ,b"
    )
    assert refusal("seed: 1", BENCH_MODELS="a,b,a") == "BENCH_MODELS: models: expected each model once, got a 2 times"
    assert refusal("seed: 1\nmodels: [a, a]") == "s.yaml:2: models: expected each model once, got a 2 times"


def test_a_shuffled_order_comes_from_the_seed_and_holds_every_model_once(home: Path) -> None:
    def order(seed: int, how: str) -> tuple[int, ...]:
        return order_of_models(read(f"models: [a, b, c, d, e]\nmodel_order: {how}\nseed: {seed}").scenario)

    assert order(7, "as_written") == (0, 1, 2, 3, 4)
    assert order(7, "shuffled") == order(7, "shuffled")
    assert sorted(order(7, "shuffled")) == [0, 1, 2, 3, 4]
    assert len({order(seed, "shuffled") for seed in range(20)}) > 10


def test_the_plan_lists_the_models_in_the_order_in_which_they_run(home: Path) -> None:
    loaded = read("models: [a, b, c]\nmodel_order: shuffled\nseed: 2\nstages: [{concurrency: 1, requests: 5}]")
    order = [loaded.scenario.models[place] for place in order_of_models(loaded.scenario)]
    assert order != ["a", "b", "c"]
    told = plan(loaded)
    assert f"Models    {', '.join(order)} (from s.yaml:1; one after another, in an order drawn by seed 2)" in told
    rows = [line.split()[1] for line in told.splitlines() if "1 user" in line]
    assert rows == order
    assert "Models    a, b (from --model; one after another)" in plan(read("seed: 1", Overrides(models=("a", "b"))))


# What is known of them


def test_the_workshops_file_of_models_names_them_and_what_is_known(home: Path) -> None:
    noted(
        {
            "phi-4-mini": {"capabilities": ["general", "summarise"], "size_mb": 3600, "priority": 2},
            "qwen2.5-0.5b": {"capabilities": [], "size_mb": 822.5},
            "mistral-7b": {},
        }
    )
    loaded = read("models_file: models.json")
    assert loaded.scenario.models == ("phi-4-mini", "qwen2.5-0.5b", "mistral-7b")
    assert loaded.models_source == "models.json"
    assert loaded.models_file == {
        "phi-4-mini": ModelNote(("general", "summarise"), 3_600_000_000),
        "qwen2.5-0.5b": ModelNote((), 822_500_000),
        "mistral-7b": ModelNote((), None),
    }
    assert loaded.note_of("phi-4-mini@gpu") == loaded.models_file["phi-4-mini"]
    assert loaded.note_of("phi-4") is None


def test_models_that_are_named_come_before_those_of_the_file_which_still_says_what_it_knows(home: Path) -> None:
    noted({"a": {"size_mb": 1}, "b": {}})
    for loaded in (
        read("models: [b, a]\nmodels_file: models.json"),
        read("models_file: models.json", BENCH_MODELS="b,a"),
        read("models_file: models.json", Overrides(models=("b", "a"))),
        read("seed: 1", Overrides(models=("b", "a"), sets=("models_file=models.json",))),
    ):
        assert loaded.scenario.models == ("b", "a")
        assert loaded.note_of("a") == ModelNote((), 1_000_000)


def test_a_file_of_models_is_looked_up_beside_the_scenario(home: Path) -> None:
    Path("there").mkdir()
    Path("there/s.yaml").write_text("models_file: models.json")
    noted({"a": {}}, "there/models.json")
    assert load_scenario(Path("there/s.yaml")).scenario.models == ("a",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "models.json:1: expected valid JSON: "),
        ("[]", "models.json: expected an object of {alias: {capabilities, size_mb}}, got []"),
        ("{}", "models.json: expected an object of {alias: {capabilities, size_mb}}, got {}"),
        ('{"a": 5}', "models.json: a: expected an object with capabilities and size_mb, got 5"),
        ('{"a": {"size_mb": "big"}}', 'models.json: a.size_mb: expected a number of megabytes above 0, got "big"'),
        ('{"a": {"size_mb": true}}', "models.json: a.size_mb: expected a number of megabytes above 0, got true"),
        ('{"a": {"size_mb": 0}}', "models.json: a.size_mb: expected a number of megabytes above 0, got 0"),
        ('{"a": {"size_mb": NaN}}', "models.json: a.size_mb: expected a number of megabytes above 0, got NaN"),
        ('{"a": {"capabilities": "x"}}', 'models.json: a.capabilities: expected a list of texts, got "x"'),
        ('{"a": {"capabilities": [1]}}', "models.json: a.capabilities: expected a list of texts, got [1]"),
        ('{"a": {}, "a": {}}', "models.json: a: expected this key once, got it 2 times"),
        (
            "[" * 200_000,
            "models.json: expected an object of {alias: {capabilities, size_mb}}, got lists or mappings nested",
        ),
    ],
)
def test_a_file_of_models_that_cannot_be_used_is_refused_with_its_place(home: Path, content: str, problem: str) -> None:
    noted(content)
    assert refusal("seed: 1\nmodels_file: models.json").startswith(f"s.yaml:2: models_file: {problem}")


def test_a_file_of_models_that_is_not_there_is_refused_with_its_place(home: Path) -> None:
    shape = "an object of {alias: {capabilities, size_mb}}"
    expected = f"s.yaml:1: models_file: nope.json: expected {shape}: No such file or directory"
    assert refusal("models_file: nope.json") == expected
    assert refusal("seed: 1", "models_file=nope.json").startswith("--set models_file: models_file: nope.json: expected")
    assert refusal("models_file: ''").startswith("s.yaml:1: models_file: expected some text")
    Path("latin.json").write_bytes(b'{"\xe9": {}}')
    with pytest.raises(UsageError, match=r"latin\.json: expected JSON in UTF-8, got other bytes"):
        read_models_file(Path("latin.json"))


# Prompts in order


def test_sequential_prompts_come_as_in_the_file_round_and_round_in_every_level_alike(home: Path) -> None:
    noted(["one", {"prompt": "two", "max_tokens": 3}, [{"role": "user", "content": "three"}]], "p.json")
    loaded = read("prompts: [{name: p, file: p.json, order: sequential}]")
    prompts = drawn(loaded, 7, seed=1)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["one", "two", "three"] * 2 + ["one"]
    assert [prompt.place for prompt in prompts] == [0, 1, 2, 0, 1, 2, 0]
    assert [prompt.max_tokens for prompt in prompts[:3]] == [64, 3, 64]
    assert drawn(loaded, 7, seed=2) == prompts


def test_each_kind_keeps_its_own_order_in_a_mix(home: Path) -> None:
    noted(["one", "two", "three"], "p.json")
    noted(["a", "b"], "q.json")
    text = (
        "prompts:\n  - {name: p, file: p.json, order: sequential}\n"
        "  - {name: q, file: q.json, order: sequential}\n  - {name: made, input_tokens: {mean: 9}}"
    )
    prompts = drawn(read(text), 90)
    for kind, count in (("p", 3), ("q", 2)):
        places = [prompt.place for prompt in prompts if prompt.kind == kind]
        assert places == [number % count for number in range(len(places))]
    assert {prompt.place for prompt in prompts if prompt.kind == "made"} == {None}


def test_prompts_at_random_know_their_place_in_the_file_too(home: Path) -> None:
    noted(["one", "two", "three"], "p.json")
    prompts = drawn(read("prompts: [{name: p, file: p.json}, {name: t, text: Hi}]"), 60)
    texts = {(prompt.kind, prompt.place): prompt.messages[0]["content"] for prompt in prompts}
    assert texts == {("p", 0): "one", ("p", 1): "two", ("p", 2): "three", ("t", 0): "Hi"}


def test_the_workshops_lists_of_prompts_are_read_as_they_are(home: Path) -> None:
    noted(
        [
            {
                "id": "rag",
                "category": "retrieval",
                "prompt": "What is RAG?",
                "expected_aspects": ["retrieval", "index"],
            },
            {"text": "Name two benefits.", "rubric": "5: both named"},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why small?"}]},
        ],
        "prompts.json",
    )
    loaded = read(
        "prompts: [{name: p, file: prompts.json, order: sequential}]\nquality: {prompts: prompts.json, repeats: 2}"
    )
    assert [prompt.messages[-1]["content"] for prompt in drawn(loaded, 3)] == [
        "What is RAG?",
        "Name two benefits.",
        "Why small?",
    ]
    assert [(prompt.id, prompt.category, prompt.aspects) for prompt in loaded.quality_prompts] == [
        ("rag", "retrieval", ("retrieval", "index")),
        ("2", None, ()),
        ("3", None, ()),
    ]
    assert "Quality   3 prompts, 2 times each, whose answers are kept for marking" in plan(loaded)


def test_prompts_that_are_made_up_have_no_order(home: Path) -> None:
    text = "seed: 1\nprompts:\n  - {name: p, order: sequential, input_tokens: {mean: 9}}"
    assert refusal(text).startswith("s.yaml:3: prompts[0]: expected prompts of one's own beside order: sequential")
    assert refusal("prompts: [{name: p, text: Hi, order: random}]").startswith("s.yaml:1: prompts[0].order: expected")


# Rounds


def test_rounds_are_so_many_requests_as_make_every_prompts_turns(home: Path) -> None:
    noted(["one", "two", "three", "four"], "p.json")
    text = "prompts: [{name: p, file: p.json, order: sequential}]\nstages: [{concurrency: [1, 2], rounds: 3}]"
    loaded = read(text)
    assert [level.requests for level in levels(loaded.scenario, ("m",))] == [12, 12]
    assert [level.duration_s for level in levels(loaded.scenario, ("m",))] == [None, None]
    one = read("prompts: [{name: p, text: Hi}]\nstages: [{concurrency: 1, rounds: 3}]")
    assert one.scenario.stages[0].requests == 3


def test_saved_rounds_read_back_as_they_were_and_follow_the_file(home: Path) -> None:
    noted(["one", "two"], "p.json")
    loaded = read("prompts: [{name: p, file: p.json, order: sequential}]\nstages: [{concurrency: 1, rounds: 2}]")
    saved = json.dumps(loaded.scenario.public_json())
    assert read(saved).scenario == loaded.scenario
    assert "expected 2, which are 1 rounds of 2 prompts, or none, got 4" in refusal(saved, "stages.0.rounds=1")


def test_flags_come_before_rounds(home: Path) -> None:
    text = "prompts: [{name: p, text: Hi}]\nstages: [{concurrency: 1, rounds: 3}, {rate: 1/s, rounds: 9}]"
    assert [stage.requests for stage in read(text, Overrides(requests=5)).scenario.stages] == [5, 5]
    (stage,) = read(text, Overrides(concurrency="1,2")).scenario.stages
    assert (stage.concurrency, stage.requests) == ((1, 2), 3)


@pytest.mark.parametrize(
    ("prompts", "stage", "problem"),
    [
        ("{name: a, file: p.json}", "rounds: 2", "stages[0].rounds: expected a mix of one kind in sequential order"),
        ("{name: a, input_tokens: {mean: 9}}", "rounds: 2", "stages[0].rounds: expected a mix of one kind"),
        ("{name: a, text: a}, {name: b, text: b}", "rounds: 2", "stages[0].rounds: expected a mix of one kind"),
        ("{name: a, text: a}", "rounds: 0", "stages[0].rounds: expected a number of at least 1, got 0"),
        ("{name: a, text: a}", "rounds: 2, requests: 3", "stages[0].requests: expected 2, which are 2 rounds of 1"),
        ("{name: a, text: a}", "rounds: 2, min_requests: 3", "stages[0].min_requests: expected at most 2, got 3"),
    ],
)
def test_rounds_that_cannot_be_counted_are_refused(home: Path, prompts: str, stage: str, problem: str) -> None:
    noted(["one", "two"], "p.json")
    message = refusal(f"prompts: [{prompts}]\nstages:\n  - {{concurrency: 1, {stage}}}")
    assert message.startswith(f"s.yaml:3: {problem}")


# Beside the levels


def test_keys_beside_the_levels_are_read_with_their_units_and_told_by_check(home: Path) -> None:
    loaded = read("keep_warm: 1m\npower: 1.2kW\nprice_per_kwh: 0.30\ncurrency: EUR")
    scenario = loaded.scenario
    assert (scenario.keep_warm_s, scenario.power_w) == (60.0, 1200.0)
    assert (scenario.price_per_kwh, scenario.currency) == (0.3, "EUR")
    told = plan(loaded)
    assert "Warm      a light prompt to a model that has been idle for 1m" in told
    assert "Power     1200W, as stated" in told
    assert "Price     0.3 EUR per kWh" in told
    plain = read("seed: 1").scenario
    assert (plain.keep_warm_s, plain.power_w, plain.price_per_kwh, plain.currency) == (None,) * 4
    assert (plain.quality, plain.models_file, plain.model_order) == (None, None, "as_written")


def test_set_reaches_the_new_keys_and_null_takes_them_back(home: Path) -> None:
    sets = ("power=45W", "keep_warm=90s", "model_order=shuffled", "price_per_kwh=0.3", "currency=CHF")
    scenario = read("power: 60", Overrides(sets=sets)).scenario
    assert (scenario.power_w, scenario.keep_warm_s, scenario.model_order) == (45.0, 90.0, "shuffled")
    assert read("power: 60\nkeep_warm: 5s", Overrides(sets=("power=null", "keep_warm=null"))).scenario.power_w is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("power: 45V", 'power: expected a power such as 45W or 1.2kW, got "45V"'),
        ("power: 0W", 'power: expected a number above 0, got "0W"'),
        ("keep_warm: 0s", 'keep_warm: expected a number above 0, got "0s"'),
        ("keep_warm: often", 'keep_warm: expected a duration such as 15s, 250ms or 2m, got "often"'),
        ("price_per_kwh: -1", "price_per_kwh: expected a number of at least 0.0, got -1"),
        (
            "slo: {ttft: {p95: 1s}}\nrequest: {stream: false}",
            "slo.ttft: expected request.stream: true beside it, got false",
        ),
        ("price_per_kwh: 0.3", "price_per_kwh: expected currency beside it, got none"),
        ("currency: ''", 'currency: expected text like ^\\S{1,8}$, got ""'),
        ("model_order: random", "model_order: expected 'as_written' or 'shuffled', got \"random\""),
        ("quality: {}", "quality.prompts: expected this key, got nothing"),
        ("quality: {prompts: q.json}", "quality.prompts: q.json: expected a prompt file: No such file or directory"),
        ("quality: {promts: q.json}", "quality.promts: unknown key; did you mean prompts?"),
        ("models_fill: m.json", "models_fill: unknown key; did you mean models_file?"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(home: Path, line: str, problem: str) -> None:
    assert refusal(f"seed: 1\n{line}").startswith(f"s.yaml:2: {problem}")


def test_answers_for_quality_count_in_the_longest_time(home: Path) -> None:
    scenario = Scenario.model_validate({"models": ["a", "b"], "deadlines": {"total": "100s"}})
    laid_out = levels(scenario, scenario.models)
    assert describe(scenario, laid_out, 3).at_most_s - describe(scenario, laid_out).at_most_s == 600


news = st.fixed_dictionaries(
    {},
    optional={
        "model_order": st.sampled_from(["as_written", "shuffled"]),
        "models_file": st.text(min_size=1),
        "keep_warm": st.floats(1e-9, 1e9),
        "power": st.floats(1e-6, 1e9) | st.sampled_from(["45W", "0.8kW", "350mW"]),
        "price_per_kwh": st.floats(0, 1e6),
        "currency": st.sampled_from(["EUR", "€", "US$"]),
        "quality": st.fixed_dictionaries(
            {"prompts": st.text(min_size=1)},
            optional={"max_tokens": st.integers(1, 10**6), "repeats": st.integers(1, 100)},
        ),
        "prompts": st.just([{"name": "a", "file": "p.json", "order": "sequential"}]),
        "stages": st.just([{"concurrency": 1, "rounds": 4}]),
    },
)


@settings(deadline=None)  # two busy cores are slow now and then
@given(news)
def test_the_new_keys_read_back_as_they_were_saved_and_fit_the_schema(keys: dict[str, Any]) -> None:
    scenario = Scenario.model_validate(keys)
    saved = json.loads(json.dumps(scenario.public_json()))
    assert Scenario.model_validate(saved) == scenario
    VALIDATOR.validate(saved)


def test_a_saved_scenario_of_a_whole_choice_reads_back_from_its_folder(home: Path) -> None:
    noted({"a": {"capabilities": ["x"], "size_mb": 5}, "b": {}})
    noted([{"prompt": "why?", "expected_aspects": ["y"]}], "q.json")
    loaded = read(
        "models_file: models.json\nmodel_order: shuffled\nquality: {prompts: q.json, max_tokens: 9}\npower: 45W\n"
        "price_per_kwh: 0.3\ncurrency: EUR\nkeep_warm: 1m\nprompts: [{name: p, text: Hi, order: sequential}]\n"
    )
    assert loaded.scenario.quality == Quality(prompts="q.json", max_tokens=9)
    assert read(json.dumps(loaded.scenario.public_json())).scenario == loaded.scenario


@pytest.mark.parametrize(
    "lines",
    [
        {"request": {"stream": "${STREAM:-1}", "max_tokens": "${MOST}", "temperature": "${HEAT:-0}"}},
        {"stages": [{"concurrency": 1, "rounds": "${ROUNDS:-3}"}], "seed": "${SEED:-1}"},
        {"power": "${WATTS:-45W}", "price_per_kwh": "${PRICE:-0.3}"},
    ],
)
def test_an_editor_lets_a_variable_stand_for_any_number_but_no_other_text(lines: dict[str, Any]) -> None:
    VALIDATOR.validate(lines)
    wrong = json.loads(json.dumps(lines).replace("${", "<").replace('}"', '>"'))
    assert not VALIDATOR.is_valid(wrong)
