"""The public Python API: what a program or a notebook gets of a run, and what running from one does."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

import loadbench
from loadbench.analysis.metrics import LATENCIES
from loadbench.records import Closed, Open
from loadbench.report.write import write_report
from loadbench.target.fake import Script, serve
from tests import rundirs
from tests.command import ROOT, environment
from tests.command import loadbench as command
from tests.rundirs import Planned, write_run

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SCENARIO: dict[str, Any] = {
    "models": ["auto"],
    "request": {"max_tokens": 8},
    "prompts": [{"name": "hello", "text": "Say hello"}],
    "stages": [{"concurrency": 2, "requests": 10}],
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A scripted endpoint on a loop in another thread, for calls that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(serve(Script(first_token_ms=5, gap_ms=1)), loop).result(10)
    yield server.base_url
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


# Importing


def test_importing_the_package_costs_next_to_nothing_and_using_a_name_imports_what_it_takes() -> None:
    code = (
        "import sys, loadbench; heavy = {'numpy', 'click', 'pydantic', 'aiohttp', 'orjson', 'rich', 'concurrent'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "loadbench.load_run; assert 'numpy' in sys.modules; assert 'aiohttp' not in sys.modules, 'for reading'"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=str(ROOT)), check=True)


@pytest.mark.parametrize("name", sorted(set(loadbench.__all__) - {"__version__"}))
def test_every_public_name_is_there_listed_and_documented(name: str) -> None:
    assert name in dir(loadbench)
    found = getattr(loadbench, name)
    assert inspect.getdoc(found)
    public = (
        [member for key, member in vars(found).items() if not key.startswith("_")] if inspect.isclass(found) else []
    )
    assert all(inspect.getdoc(member) for member in public if callable(member) or isinstance(member, property))


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        _ = loadbench.runs


# Reading


def test_figures_are_those_of_the_report(tmp_path: Path) -> None:
    told = write_report(rundirs.closed_ladder(tmp_path))
    run = loadbench.load_run(str(tmp_path))
    assert run.summary == told
    assert tuple(level.figures for level in run.levels) == told.levels
    assert [level.load for level in run.levels] == ["1 user", "2 users", "4 users", "8 users"]
    assert (run.name, run.status, run.exit_code, run.levels[1].model) == ("edge", "complete", 0, "synthetic-edge:1")
    assert repr(run).startswith("<Run edge: complete, 4 levels, ")


def test_loading_a_run_writes_nothing(tmp_path: Path) -> None:
    rundirs.failures(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run = loadbench.load_run(tmp_path)
    assert run.summary and run.samples and run.levels[0].histogram("gap")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_samples_are_columns_of_one_length_and_what_is_absent_is_nan_or_none(tmp_path: Path) -> None:
    run = loadbench.load_run(rundirs.failures(tmp_path))
    samples = run.samples
    columns = samples.columns()
    assert {column.shape for column in columns.values()} == {(len(samples),)}
    assert {column.dtype.kind for name, column in columns.items() if name.endswith("_ns")} == {"f"}
    failed = samples.where(samples.outcome != "ok")
    assert set(failed.outcome) == {"out_of_memory"}
    assert np.isnan(failed.first_token_ns).all() and set(failed.token_source) == {None}
    assert not np.isnan(failed.sent_ns).any()


def test_a_levels_samples_are_of_its_load_in_the_order_in_which_they_were_due(tmp_path: Path) -> None:
    run = loadbench.load_run(rundirs.failures(tmp_path))
    assert np.count_nonzero(run.samples.phase == "warmup") == 2
    for level in run.levels:
        assert len(level.samples) == level.figures.requests.attempted
        assert set(level.samples.phase) == {"load"} and set(level.samples.level) == {level.index}
        assert (np.diff(level.samples.due_ns) >= 0).all()


def test_a_latency_of_every_request_is_in_milliseconds(tmp_path: Path) -> None:
    level = loadbench.load_run(rundirs.open_loop(tmp_path)).levels[0]
    counted = level.counted
    service, response = counted.latency_ms("ttft"), counted.latency_ms("ttft", "response")
    assert np.allclose(service, (counted.first_token_ns - counted.sent_ns) / 1e6)
    assert np.sort(response)[int(np.ceil(len(response) / 2)) - 1] == level.figures.latency_ms["ttft"]["response"].p50


@pytest.mark.parametrize(
    "made",
    [
        rundirs.closed_ladder,
        rundirs.open_loop,
        rundirs.failures,
        rundirs.non_streaming,
        rundirs.empty_level,
        rundirs.torn,
        lambda path: write_run(path, [Planned(Closed(1), duration_s=120.0, cold_s=10.0)]),
        lambda path: write_run(path, [Planned(Closed(1)), Planned(Open(60.0), duration_s=20.0, slower=8.0)]),
    ],
)
def test_histograms_hold_what_the_figures_are_of(tmp_path: Path, made: Callable[[Path], Path]) -> None:
    for level in loadbench.load_run(made(tmp_path)).levels:
        for metric in LATENCIES.values():
            for series in metric.series:
                told, hdr = level.figures.latency_ms[metric.name][series], level.histogram(metric.name, series)
                assert len(hdr) == told.n
                if told.max is None:
                    assert hdr.max_ms is None
                else:
                    assert hdr.max_ms == pytest.approx(told.max, rel=2e-3, abs=1e-3)
                if told.p95 is not None:
                    assert hdr.percentile_ms(95) == pytest.approx(told.p95, rel=2e-3, abs=1e-3)


def test_a_histogram_is_of_the_headline_unless_another_series_is_named(tmp_path: Path) -> None:
    level = loadbench.load_run(rundirs.open_loop(tmp_path)).levels[0]
    assert level.histogram("ttft").max_ms == level.histogram("ttft", "response").max_ms
    assert level.histogram("ttft").max_ms != level.histogram("ttft", "service").max_ms
    assert len(level.histogram("tpot")) == len(level.histogram("tpot", "service"))


def test_merging_adds_counts_and_leaves_its_parts_alone(tmp_path: Path) -> None:
    one, two = (level.histogram("ttft") for level in loadbench.load_run(rundirs.failures(tmp_path)).levels)
    counts, both = (len(one), len(two)), one.merged(two)
    assert len(both) == sum(counts) and (len(one), len(two)) == counts
    assert one.min_ms is not None and both.min_ms == one.min_ms and both.max_ms == two.max_ms
    assert both.percentile_ms(50) == one.percentile_ms(100 * len(both) / 2 / len(one))  # the lower level's lie lower


def test_a_histogram_is_read_by_the_worlds_libraries(tmp_path: Path) -> None:
    hdr = loadbench.load_run(rundirs.failures(tmp_path)).levels[0].histogram("e2e")
    theirs = HdrHistogram.decode(hdr.encode())
    assert theirs.get_total_count() == len(hdr)
    assert theirs.get_mean_value() / 1e6 == pytest.approx(hdr.mean_ms, rel=1e-3)
    assert theirs.get_value_at_percentile(100) / 1e6 == pytest.approx(hdr.max_ms, rel=2e-3)


def test_an_empty_histogram_has_no_numbers() -> None:
    empty = loadbench.Histogram()
    assert (len(empty), empty.min_ms, empty.max_ms, empty.mean_ms, empty.percentile_ms(99)) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_what_cannot_be_answered_is_a_usage_error_that_says_what_can(tmp_path: Path) -> None:
    run = loadbench.load_run(rundirs.failures(tmp_path / "run"))
    for wrong, words in (
        (lambda: run.levels[0].histogram("ttfb"), "histogram: expected one of ttft service, .*, got ttfb"),
        (lambda: run.samples.latency_ms("gap"), "latency_ms: expected one of .*, got gap service"),
        (lambda: run.levels[0].histogram("ttft").percentile_ms(101), "percentile_ms: expected 0 to 100, got 101"),
        (lambda: loadbench.load_run(tmp_path), "expected a run directory with run.json, found none"),
        (lambda: loadbench.load_runs(tmp_path / "run" / "none"), "found no run.json"),
    ):
        with pytest.raises(loadbench.UsageError, match=words):
            wrong()


def test_a_run_that_was_killed_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = loadbench.load_run(rundirs.torn(tmp_path))
    assert run.status == "incomplete"
    assert [level.figures.complete for level in run.levels] == [True, False]


def test_the_runs_of_a_directory_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        rundirs.all_failed(tmp_path / str(number))
    assert [run.path.name for run in loadbench.load_runs(tmp_path)] == ["1", "2", "10"]


# Running


def test_a_mapping_is_run_reported_and_loaded(home: Path, endpoint: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = loadbench.run({"name": "mine", **SCENARIO}, endpoint=endpoint)
    assert (run.status, run.exit_code, run.name) == ("complete", 0, "mine")
    assert run.path.parent == Path("results")
    assert json.loads((home / run.path / "summary.json").read_bytes())["levels"][0]["requests"]["ok"] == 10
    assert len(run.levels[0].samples) == 10 and run.levels[0].figures.tokens.output_mean == 8
    assert capfd.readouterr() == ("", "")


async def test_it_runs_where_an_event_loop_is_running(home: Path, endpoint: str) -> None:
    """As in a notebook's cell."""
    assert loadbench.run(SCENARIO, endpoint=endpoint).status == "complete"
    beside = asyncio.create_task(asyncio.to_thread(loadbench.run, SCENARIO, endpoint=endpoint, out="beside"))
    assert (await beside).path == Path("beside")


def test_it_runs_the_embedded_service_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # its process looks from here
    run = loadbench.run({**SCENARIO, "models": ["synthetic:tiny"]}, requests=4)
    assert run.facts["endpoint"]["embedded"] and run.levels[0].figures.requests.ok == 4


def test_a_file_and_flags_say_what_they_say_at_the_command_line(home: Path, endpoint: str) -> None:
    Path("s.yaml").write_text(json.dumps(SCENARIO), encoding="utf-8")
    flags = {"endpoint": endpoint, "seed": 7, "sets": {"stages.0.requests": 6, "name": "other"}, "concurrency": [1, 2]}
    run = loadbench.run("s.yaml", headers={"X-Mine": "secret-1234"}, out="mine", **flags)  # type: ignore[arg-type]
    assert [level.load for level in run.levels] == ["1 user", "2 users"]
    words = ["--endpoint", endpoint, "--seed", "7", "--set", "stages.0.requests=6", "--set", "name=other"]
    done = command("run", "s.yaml", "--concurrency", "1,2", *words, "--header", "X-Mine: x", "--out", "c", cwd=home)
    assert done.returncode == 0, done.stderr
    assert loadbench.load_run("c").facts["scenario"] == run.facts["scenario"]
    assert run.facts["command"].startswith("loadbench run s.yaml --set stages.0.requests=6 --set 'name=\"other\"'")
    assert "secret-1234" not in json.dumps(run.facts) and "--header 'X-Mine: …'" in run.facts["command"]


def test_what_was_asserted_is_held_against_the_run_whenever_it_is_loaded(home: Path, endpoint: str) -> None:
    run = loadbench.run(SCENARIO, endpoint=endpoint, requests=20, asserts=["e2e.p50<1ms", "ttft.p50<9s"])
    assert [gate.result for gate in run.summary.gates] == ["fail", "pass"]
    assert (run.exit_code, loadbench.load_run(run.path).exit_code) == (99, 99)
    assert run.facts["command"].endswith("}, asserts=('e2e.p50<1ms', 'ttft.p50<9s'))")


def test_a_run_is_noted_in_the_history_of_its_results(home: Path, endpoint: str) -> None:
    run = loadbench.run(SCENARIO, endpoint=endpoint, results="mine")
    (row,) = (home / "mine" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert run.path.name in row


def test_the_call_that_repeats_a_mapping_is_noted_without_its_secrets(home: Path, endpoint: str) -> None:
    secret = {**SCENARIO, "request": {"max_tokens": 8, "headers": {"X-Mine": "secret-1234"}}}
    run = loadbench.run(secret, endpoint=endpoint, requests=3, out="one")
    noted = run.facts["command"]
    assert "secret-1234" not in (home / "one" / "run.json").read_text(encoding="utf-8")
    assert noted.startswith("loadbench.run({") and "'X-Mine': '…'" in noted
    again = eval(noted.replace("…", "x"), {"loadbench": loadbench})
    assert again.facts["scenario"] == run.facts["scenario"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: loadbench.run({"stages": [{"concurrency": 0}]}), r"<mapping>: stages\[0\].concurrency: expected"),
        (
            lambda: loadbench.run({"stages": [object()]}),
            "<mapping>: expected values that .* got a value of type object",
        ),
        (lambda: loadbench.run({"repeat": 5}), "<mapping>: repeat: expected 1, got 5"),
        (lambda: loadbench.run({}, workers=0), "workers: expected auto or a number from 1 to 64, got 0"),
        (lambda: loadbench.run({}, find="max-rate", rate="2/s"), "--rate: expected two loads to search between"),
        (lambda: loadbench.run("nowhere.yaml"), "nowhere.yaml: expected a scenario file"),
        (lambda: loadbench.run({}, endpoint="http://127.0.0.1:1"), "http://127.0.0.1:1: connection refused"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_raised_and_nothing_printed_or_left(
    home: Path, capfd: pytest.CaptureFixture[str], wrong: Callable[[], object], words: str
) -> None:
    with pytest.raises(loadbench.LoadbenchError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not list(home.rglob("*.json*"))


def test_the_program_has_its_garbage_collector_back(home: Path, endpoint: str) -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    loadbench.run(SCENARIO, endpoint=endpoint)
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C alone there")
def test_ctrl_c_ends_what_is_in_flight_writes_and_interrupts_the_program(home: Path, endpoint: str) -> None:
    code = (
        "import loadbench\n"
        "try:\n"
        f"    loadbench.run({SCENARIO!r}, endpoint={endpoint!r}, requests=10**6, out='out', quiet=False)\n"
        "except KeyboardInterrupt as stopped:\n"
        "    print(*stopped.__notes__)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:  # the first after the level has begun
        if "2 in flight" in line:
            break
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert out.strip() == "what was measured until then is in out"
    run = loadbench.load_run("out")
    assert (run.status, run.exit_code) == ("interrupted", 130)
    assert run.levels[0].figures.requests.ok > 0


# The page


def test_every_block_of_the_page_runs(home: Path, endpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("http://127.0.0.1:8080/v1", endpoint), "docs/python.md", "exec"), names)
    assert len(blocks) >= 5
    printed = capsys.readouterr().out
    for line in re.findall(r"# (<mapping>.*)", PAGE):
        assert line in printed
    assert "40 requests, 40 of them ok" in printed
