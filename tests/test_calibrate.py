"""Is it us? What `loadbench calibrate` measures, where it is kept, who reads it, and that it leaves nothing behind."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from loadbench import __version__
from loadbench.calibrate import Effort, read_calibration, shape_of
from loadbench.records import Closed, Open
from loadbench.report.calibration import print_calibration
from loadbench.scenario.load import Loaded, load_scenario
from tests.asking import scripted
from tests.command import ROOT, ended, environment, eventually, loadbench, rows, started

SCENARIO = """
name: s
request: {max_tokens: 4}
prompts: [{name: hello, text: Say hello}]
stages: [{concurrency: [2, 8], requests: 8}, {concurrency: 4, requests: 8}]
"""


def scenario(folder: Path, **keys: Any) -> Loaded:
    (folder / "s.yaml").write_bytes(orjson.dumps(keys))  # JSON is YAML
    return load_scenario(folder / "s.yaml")


def python(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of Python with an empty cache."""
    env = environment(PYTHONPATH=str(ROOT), LOADBENCH_CACHE=str(cache))
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=60
    )


def in_cache(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def lives(process: psutil.Process) -> bool:
    """Whether it still does something; one that has ended may wait long for init to take notice."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(cache: Path) -> dict[str, Any]:
    """What a short calibration with the shape of a scenario printed as JSON; it is kept in ``cache``."""
    (cache.parent / "s.yaml").write_text(SCENARIO, encoding="utf-8")
    words = ("calibrate", cache.parent / "s.yaml", "--seconds", "0.4", "--json")
    # Whoever serves a scripted endpoint of his own may have its token in the environment.
    done = loadbench(*words, LOADBENCH_CACHE=str(cache), LOADBENCH_FAKE_TOKEN="for-another-one")
    assert done.returncode == 0, done.stderr
    assert "TTFT error" in done.stderr, "no word of where it is"
    document: dict[str, Any] = orjson.loads(done.stdout)
    return document


# What it measures


def test_it_finds_ceilings_of_both_processes_and_the_error_of_our_first_token(found: dict[str, Any]) -> None:
    assert found["events_per_s"] > 1000 and found["requests_per_s"] > 100
    assert found["endpoint"]["events_per_s"] > 1000 and found["endpoint"]["requests_per_s"] > 100
    assert found["ttft_error_n"] >= 8
    assert 0 < found["ttft_error_p50_ms"] < 20, "on one clock we can only be late"
    assert found["usable_cores"] >= 1


def test_it_takes_the_shape_of_the_scenario_s_heaviest_level(found: dict[str, Any]) -> None:
    assert found["shape"] == {"load": {"kind": "closed", "concurrency": 8}, "tokens": 4, "gap_ms": 20}


def test_a_percentile_on_too_few_requests_is_absent_and_one_on_few_is_named(found: dict[str, Any]) -> None:
    n = found["ttft_error_n"]
    assert (found["ttft_error_p99_ms"] is None) == (n < 100)
    assert ("ttft_error_p99_ms" in found["indicative"]) == (100 <= n < 662)
    assert "ttft_error_p50_ms" not in found["indicative"] or n < 11


@pytest.mark.parametrize(
    ("stages", "load"),
    [
        ([{"concurrency": [1, 4, 2]}], Closed(4)),
        ([{"concurrency": 4}, {"rate": "100/s"}], Open(100.0)),
        ([{"concurrency": 4}, {"rate": "5/s"}], Closed(4)),
        ([{"rate": {"from": "80/s", "to": "20/s"}, "duration": "9s"}, {"rate": "60/s"}], Open(80.0)),
    ],
    ids=["most users", "more streams by its rate", "more streams by its users", "the top of a ramp"],
)
def test_the_heaviest_level_is_the_one_with_most_streams_at_once(
    stages: list[Any], load: object, tmp_path: Path
) -> None:
    assert shape_of(scenario(tmp_path, stages=stages, request={"max_tokens": 16})).load == load


def test_answers_are_as_long_as_the_mix_has_them_on_average(tmp_path: Path) -> None:
    prompts = [{"name": "a", "text": "a", "weight": 3}, {"name": "b", "text": "b", "max_tokens": 80}]
    assert shape_of(scenario(tmp_path, prompts=prompts, request={"max_tokens": 40})).tokens == 50


@pytest.mark.parametrize("path", sorted((ROOT / "scenarios").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_scenario_has_a_shape(path: Path) -> None:
    assert shape_of(load_scenario(path)).streams > 0


def test_without_a_scenario_it_is_64_users() -> None:
    assert shape_of(None).load == Closed(64)


@pytest.mark.parametrize(
    ("client_s", "endpoint_s", "cores", "limit"),
    [
        (0.5, 0.4, 2, "pace"),
        (0.99, 0.4, 2, "client"),
        (0.5, 0.99, 2, "endpoint"),
        (0.5, 0.49, 1, "core"),
        (0.2, 0.2, 1, "pace"),
    ],
)
def test_whoever_fills_its_core_is_the_limit(client_s: float, endpoint_s: float, cores: int, limit: str) -> None:
    assert Effort(1, 1, 1.0, client_s, endpoint_s).limit(cores) == limit


# What it says


def test_the_table_says_what_the_figures_are_and_what_follows(found: dict[str, Any]) -> None:
    stream = io.StringIO()
    figures = {"events_per_s": 50_000.0, "requests_per_s": 8_000.0, "ttft_error_p50_ms": 0.21, "ttft_error_p99_ms": 1.5}
    full = {"limit": {"events": "pace", "requests": "endpoint"}, "indicative": ["ttft_error_p99_ms"]}
    print_calibration(found | figures | full | {"usable_cores": 2}, stream)
    said = " ".join(stream.getvalue().split())
    for words in (
        "50,000 tokens/s",
        "8,000 requests/s",
        "0.21 ms",
        "~1.50 ms",
        "8 users, 4 tokens 20 ms apart",
        "The endpoint's core was full with requests.",
        "marked client-bound: 25,000 tokens/s or 4,000 requests/s",
        "A TTFT under 15.0 ms",
    ):
        assert words in said
    assert "shared one core" not in said


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system lets no process choose its core")
def test_on_one_core_it_says_that_both_shared_it(tmp_path: Path) -> None:
    pin = "import os, sys; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})"
    done = python(f"{pin}; from loadbench.cli import main; main(['calibrate', '--seconds', '0.2'])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Client and endpoint shared one core" in done.stdout
    (kept,) = in_cache(tmp_path)
    assert orjson.loads(kept.read_bytes())["usable_cores"] == 1


# Who reads it


async def test_a_run_carries_what_was_kept_for_its_machine_or_null(
    found: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(SCENARIO, encoding="utf-8")
    async with scripted(first_token_ms=1, gap_ms=1) as server:
        for out, kept_in, expected in (("a", cache, found), ("b", tmp_path / "nothing", None)):
            words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", out, "--quiet")
            code, _, err = await ended(await started(*words, cwd=tmp_path, LOADBENCH_CACHE=str(kept_in)))
            assert code == 0, err
            assert orjson.loads((tmp_path / out / "run.json").read_bytes())["calibration"] == expected
    # What report.html draws with is kept there, too.
    kept = [path for path in in_cache(tmp_path / "nothing") if path.parent.name != "plots"]
    assert not kept, "a run calibrates nothing by itself"


def test_it_holds_for_the_machine_and_the_version_it_was_measured_on(
    found: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADBENCH_CACHE", str(cache))
    machine = found["machine"]
    assert read_calibration(machine) == found
    assert machine["loadbench"] == __version__
    for name in ("cpu", "cores", "os", "python", "event_loop"):
        assert read_calibration(machine | {name: "another"}) is None, name


# What goes wrong: one line, nothing left behind


@pytest.mark.parametrize("seconds", ["0", "61", str(math.nan)])
def test_a_length_that_makes_no_sense_is_refused(seconds: str, tmp_path: Path) -> None:
    done = loadbench("calibrate", "--seconds", seconds, LOADBENCH_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("loadbench: --seconds: expected 0.1 to 60, got ") and done.stderr.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = loadbench("calibrate", LOADBENCH_CACHE=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a cache folder to write to" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", [shutil.which("false") or "false", "/no/such/python"])
def test_an_endpoint_that_does_not_start_is_named_in_one_line(program: str, tmp_path: Path) -> None:
    line = f"import sys; sys.executable = {program!r}; from loadbench.cli import main; main(['calibrate'])"
    done = python(line, tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[-1].startswith("loadbench: the scripted endpoint did not start: ")
    assert "Traceback" not in done.stderr
    assert not in_cache(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)])
async def test_however_it_is_ended_no_process_stays_and_nothing_is_kept(number: signal.Signals, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = await started(
        "calibrate", "--seconds", "60", LOADBENCH_CACHE=str(tmp_path / "cache"), TMPDIR=str(scratch)
    )
    await eventually(lambda: any(len(rows(path)) > 20 for path in scratch.rglob("samples.jsonl")))
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(number)
    code, out, err = await ended(process)
    assert code == (130 if number is signal.SIGINT else -number), err
    assert out == "" and "Traceback" not in err
    await eventually(lambda: not any(lives(child) for child in family))
    assert not in_cache(tmp_path / "cache")
    if number is signal.SIGINT:
        assert not list(scratch.iterdir())
