"""A cluster of two nodes on this machine: what its load processes send together, what is lost with one, what is said.

The nodes are Ray's own processes, as on two machines, but for the clock, which they share with the tests: so what is
read of it, and what begins when, can be held against the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import psutil
import pytest
from scipy import stats

from loadbench import __version__
from loadbench.engine.cluster import Cluster, _check_versions, _Mailbox, _shipped
from loadbench.errors import UsageError
from loadbench.hdr import Hdr, HlogReader, split_tag
from loadbench.target.fake import FakeServer, Script, Truth, serve
from tests.asking import measured, scripted
from tests.command import ROOT, ended, environment, eventually, rows, started, summary

pytestmark = pytest.mark.alone

pytest.importorskip("ray", reason="Ray has no wheel for this Python: NOTHING here is tested")

ALL_IN_NS = 5_000_000
ADDED_NS = 2_000_000
FIRST_MS, PER_TOKEN_MS = 600, 4
KEY = "sk-none-of-the-logs-has-this"
RATE_PER_S, SECONDS = 100, 2

LONG = "request: {max_tokens: 8}\nwarmup: {requests: 1}\nprompts: [{name: a, text: one}]\n"
LONG += "stages: [{concurrency: 6, duration: 60s}]\n"
TRACE = "timestamp,input_tokens,output_tokens\n" + "".join(f"{0.05 * n:.2f},20,4\n" for n in range(12))


def write(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    (folder / "prompts.json").write_text('["one two three four five", "six seven eight nine ten"]', encoding="utf-8")
    (folder / "trace.csv").write_text(TRACE, encoding="utf-8")


async def told(folder: Path, *words: str, **env: str) -> tuple[int, str]:
    """The exit code and stderr of a run with these words, against an endpoint that is there."""
    write(folder, LONG)
    async with scripted() as server:
        ran = ("run", "s.yaml", "--endpoint", server.base_url, "--quiet", *words)
        code, _, err = await ended(await started(*ran, cwd=folder, **env))
    return code, err


async def test_an_address_at_which_there_is_no_cluster_is_one_line(tmp_path: Path) -> None:
    form = "--cluster: expected auto, HOST:PORT or ray://HOST:PORT, got"
    refused = "cannot be connected to: Connection refused"
    for address, line in (
        ("nonsense", f"{form} nonsense"),
        ("http://h:x", f"{form} http://h:x"),
        ("[::1:5", f"{form} [::1:5"),
        ("127.0.0.1:1", f"--cluster 127.0.0.1:1: {refused}"),
        ("ray://127.0.0.1:1", f"--cluster ray://127.0.0.1:1: {refused}"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
            await Cluster.connect(address)


@pytest.mark.parametrize("ahead_ns", [3_600_000_000_000, -3_600_000_000_000])
async def test_a_clock_that_is_an_hour_ahead_or_behind_reads_the_runs_time(ahead_ns: int) -> None:
    """The nodes of the cluster above share one clock: an offset of the wrong sign would be too small to be seen."""

    def theirs() -> SimpleNamespace:
        done: Future[int] = Future()
        done.set_result(perf_counter_ns() + ahead_ns)
        return SimpleNamespace(future=lambda: done)

    ray = SimpleNamespace(exceptions=SimpleNamespace(RayError=RuntimeError))
    line = _Mailbox(ray, SimpleNamespace(now_ns=SimpleNamespace(remote=theirs)), Path(), 0)
    await line.read_clock("")
    assert abs(line.facts["offset_ns"] - ahead_ns) <= line.facts["error_ns"] < 50_000_000


async def test_where_no_cluster_runs_it_is_said_how_to_start_one(tmp_path: Path) -> None:
    if any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        pytest.skip("a Ray cluster runs on this machine, which auto would find")
    said = "loadbench: --cluster auto: expected a Ray cluster, found none that runs here; start one with:"
    assert await told(tmp_path, "--cluster", "auto", RAY_TMPDIR=str(tmp_path)) == (2, f"{said} ray start --head\n")


def test_without_the_extra_it_is_said_what_to_install(tmp_path: Path) -> None:
    write(tmp_path, LONG)
    code = "import sys; sys.modules['ray'] = None; from loadbench.cli import main; main()"
    words = ("run", "s.yaml", "--endpoint", "http://127.0.0.1:9/v1", "--quiet", "--cluster", "auto")
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = "loadbench: --cluster: expected Ray, which is not installed: pip install 'loadbench[ray]'\n"
    assert (done.returncode, done.stderr) == (2, said)


NODES = """
import sys
from ray.cluster_utils import Cluster
small = {"num_cpus": 3, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
cluster.add_node(**small)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs and sockets, whose paths may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="lb-ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address(ray_folder: Path) -> Iterator[str]:
    """Of a cluster of two nodes with three logical CPUs each."""
    env = environment(PYTHONPATH=str(ROOT), RAY_TMPDIR=str(ray_folder), RAY_USAGE_STATS_ENABLED="0")
    nodes = subprocess.Popen([sys.executable, "-c", NODES], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert nodes.stdin is not None and nodes.stdout is not None
    try:
        found = nodes.stdout.readline().decode().strip()
        assert found, "the cluster did not start"
        yield found
    finally:
        nodes.stdin.close()
        nodes.wait(60)


SCENARIO = f"""
request: {{max_tokens: 4}}
warmup: {{requests: 1}}
drain: 10s
canary: false
prompts:
  - {{name: made, weight: 4, input_tokens: {{mean: 60, stdev: 18, min: 20, max: 110}}}}
  - {{name: read, file: prompts.json}}
stages:
  - {{rate: {RATE_PER_S}/s, duration: {SECONDS}s}}
  - {{trace: trace.csv}}
"""
Done = tuple[list[Truth], Path]


async def done(folder: Path, workers: int, cluster: str | None) -> Done:
    """A run of the scenario against an endpoint of its own, which asks for the key and keeps the truth.

    Prompts of other lengths take other times, in every run the same: the distribution is wide, and what a machine adds
    to a first token of more than a second is not seen in three digits.
    """
    write(folder, SCENARIO)
    server: FakeServer = await serve(
        Script(first_token_ms=FIRST_MS, prefill_ms=PER_TOKEN_MS, gap_ms=20), "127.0.0.1", token=KEY
    )
    try:
        words = ["run", "s.yaml", "--endpoint", server.base_url, "--workers", str(workers), "--out", "out"]
        words += [] if cluster is None else ["--cluster", cluster]
        code, out, err = await ended(await started(*words, cwd=folder, OPENAI_API_KEY=KEY))
    finally:
        await server.close()
    assert code == 0, err
    (folder / "console.txt").write_text(out)
    return list(server.records), folder / "out"


@pytest.fixture(scope="module")
def runs(address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Done]:
    """The same scenario with 2 and with 4 actors, and (1) with the one process of a run without a cluster.

    Again, while a busy machine keeps a process from its core for longer than all are to begin in, or than is lost in
    the third digit of a first token.
    """
    folder = tmp_path_factory.mktemp("runs")

    async def make(workers: int) -> Done:
        tries = (folder / f"{workers}-{number}" for number in itertools.count())
        cluster = None if workers == 1 else address
        return await measured(
            lambda: done(next(tries), workers, cluster),
            lambda run: latest_ns(run[1]) <= ALL_IN_NS and added_ns(run[1]) <= ADDED_NS,
            tries=3,
        )

    return {workers: asyncio.run(make(workers)) for workers in (1, 2, 4)}


def spoilt(out: Path) -> bool:
    """Whether the machine had so much else to do that nothing can be said of milliseconds."""
    busy = psutil.getloadavg()[0] > 2 * (os.cpu_count() or 1)
    return busy and (latest_ns(out) > ALL_IN_NS or added_ns(out) > ADDED_NS)


def load_rows(out: Path, level: int | None = None) -> list[dict[str, Any]]:
    found = (row for row in rows(out / "samples.jsonl") if row["phase"] == "load")
    return sorted((row for row in found if level in (None, row["level"])), key=lambda row: row["seq"])


def starts_ns(out: Path) -> dict[int, int]:
    telemetry = rows(out / "telemetry.jsonl")
    return {event["level"]: event["t_ns"] for event in telemetry if event["event"] == "level_start"}


def level_ends(out: Path) -> list[dict[str, Any]]:
    return [event for event in rows(out / "telemetry.jsonl") if event["event"] == "level_end"]


def latest_ns(out: Path) -> int:
    """How long after a level's start the last of all began it."""
    return max(int(level["client"]["start_late_ns"]) for level in level_ends(out))


def added_ns(out: Path) -> int:
    """What the machine added to the first tokens that were scripted, but for the worst of them."""
    added = [
        row["first_token_ns"] - row["sent_ns"] - 1e6 * (FIRST_MS + PER_TOKEN_MS * row["input_tokens"])
        for row in load_rows(out, 0)
    ]
    return int(np.quantile(added, 0.9))


def run_json(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((out / "run.json").read_bytes())
    return found


@pytest.mark.parametrize("workers", [2, 4])
def test_what_was_merged_is_the_endpoints_own_log_request_by_request(runs: dict[int, Done], workers: int) -> None:
    truth, out = runs[workers]
    named = Counter(str(one.request_id) for one in truth if str(one.request_id).startswith("load-"))
    found = load_rows(out)
    assert Counter(f"load-{row['level']}-{row['seq']}" for row in found) == named
    assert max(named.values()) == 1
    tokens = {str(one.request_id): one.tokens for one in truth}
    assert all(tokens[f"load-{row['level']}-{row['seq']}"] == row["output_tokens"] for row in found)
    attempted = [level["requests"]["attempted"] for level in summary(out)["levels"]]
    assert attempted == [len(load_rows(out, level)) for level in (0, 1)]
    assert attempted[1] == 12
    assert not (out / "shards").exists()


@pytest.mark.parametrize("workers", [2, 4])
def test_the_schedule_is_that_of_one_process_to_the_nanosecond(runs: dict[int, Done], workers: int) -> None:
    sent = {}
    for number in (1, workers):
        out = runs[number][1]
        begun = starts_ns(out)
        sent[number] = [
            (row["level"], row["seq"], row["kind"], row["due_ns"] - begun[row["level"]]) for row in load_rows(out)
        ]
    assert sent[workers] == sent[1]
    due_s = np.sort([row["due_ns"] for row in load_rows(runs[workers][1], 0)]).astype(float) / 1e9
    assert len(due_s) > 0.7 * RATE_PER_S * SECONDS
    assert stats.kstest(np.diff(due_s), "expon", args=(0, 1 / RATE_PER_S)).pvalue > 0.001


def histograms(out: Path) -> dict[str, Hdr]:
    """Those of the first level, by metric."""
    found: dict[str, Hdr] = {}
    for interval in HlogReader(out / "histograms.hlog"):
        metric, _, level = split_tag(interval.tag or "") or ("", "", -1)
        if level == 0:
            found.setdefault(metric, Hdr()).merge(interval.hdr)
    return found


@pytest.mark.parametrize("workers", [2, 4])
def test_percentiles_are_those_of_one_process(runs: dict[int, Done], workers: int) -> None:
    if any(spoilt(runs[number][1]) for number in (1, workers)):
        pytest.skip("the machine is too busy for milliseconds")
    alone, together = (histograms(runs[number][1]) for number in (1, workers))
    assert together["ttft_service"].total == alone["ttft_service"].total == len(load_rows(runs[1][1], 0))
    own = sorted(row["first_token_ns"] - row["sent_ns"] for row in load_rows(runs[workers][1], 0))
    for percent in (10, 50, 90):
        found = together["ttft_service"].percentile(percent) or 0
        assert found == pytest.approx(own[int(np.ceil(percent / 100 * len(own))) - 1], rel=0.001)
        assert found == pytest.approx(alone["ttft_service"].percentile(percent), rel=0.002)  # each to three digits
    assert own[-1] > 1.5 * own[0]


@pytest.mark.parametrize("workers", [2, 4])
def test_every_worker_begins_within_5_ms_of_the_moment_that_all_were_told(runs: dict[int, Done], workers: int) -> None:
    truth, out = runs[workers]
    if spoilt(out):
        pytest.skip("the machine is too busy for milliseconds")
    for level in level_ends(out):
        clients = level["client"]["workers"]
        assert [client["worker"] for client in clients] == list(range(workers))
        late_ns = [client["start_late_ns"] for client in clients]
        assert level["client"]["start_late_ns"] == max(late_ns) <= ALL_IN_NS
        # Their own word, held against the truth: the clock is one here, so that an offset is an error.
        origin_ns = run_json(out)["anchors"]["start"]["monotonic_ns"]
        begun = starts_ns(out)[level["level"]]
        for index, told in enumerate(run_json(out)["cluster"]["workers"]):
            first = next(row for row in load_rows(out, level["level"]) if row["seq"] % workers == index)
            name = f"load-{level['level']}-{first['seq']}"
            (came_ns,) = (one.received_ns - origin_ns for one in truth if one.request_id == name)
            due_ns = first["due_ns"] - begun
            assert -abs(told["offset_ns"]) <= came_ns - begun - due_ns <= 10 * ALL_IN_NS
    assert summary(out)["levels"][0]["client"]["start_late_ms"] <= ALL_IN_NS / 1e6


@pytest.mark.parametrize("workers", [2, 4])
def test_clocks_are_read_twice_and_no_further_off_than_is_said(runs: dict[int, Done], workers: int) -> None:
    out = runs[workers][1]
    told = run_json(out)["cluster"]["workers"]
    assert [worker["index"] for worker in told] == list(range(workers))
    for worker in told:  # which is one machine's clock here, so that no offset is the truth
        assert abs(worker["offset_ns"]) <= worker["error_ns"] < 50_000_000
        assert abs(worker["end_offset_ns"]) <= worker["end_error_ns"] < 50_000_000
    found = summary(out)["cluster"]["workers"]
    assert [worker["error_ms"] for worker in found] == [worker["error_ns"] / 1e6 for worker in told]
    for name in ("report.md", "report.html"):
        assert "clocks read to" in (out / name).read_text(encoding="utf-8")
    assert "clocks read to" in " ".join((out.parent / "console.txt").read_text().split())


def test_actors_leave_nothing_on_their_nodes(runs: dict[int, Done]) -> None:
    for worker in run_json(runs[4][1])["cluster"]["workers"]:
        assert not Path(worker["folder"]).exists()
        assert not psutil.pid_exists(worker["pid"])


def test_each_warms_up_once_and_keeps_its_connections_from_level_to_level(runs: dict[int, Done]) -> None:
    for workers in (2, 4):
        out = runs[workers][1]
        warm = Counter(row["level"] for row in rows(out / "samples.jsonl") if row["phase"] == "warmup")
        assert warm == {0: 1 + workers}
        for client in level_ends(out)[1]["client"]["workers"]:
            assert client["connections_opened_before"] > 100 / workers  # those of the level before
            assert client["new_connections"] == 0


def test_the_key_is_in_no_file_of_the_run_and_in_none_of_rays(runs: dict[int, Done], ray_folder: Path) -> None:
    files = [path for path in (*ray_folder.rglob("*"), *runs[2][1].rglob("*")) if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


async def test_a_lost_actor_makes_the_run_invalid_and_what_it_had_sent_is_kept(address: str, tmp_path: Path) -> None:
    write(tmp_path, LONG)
    async with scripted(gap_ms=5) as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--workers", "2", "--cluster", address)
        process = await started(*words, "--out", "out", cwd=tmp_path)
        parts = [tmp_path / "out" / "shards" / str(index) / "samples.jsonl" for index in range(2)]
        await eventually(lambda: all(len(rows(part)) > 50 for part in parts))
        before = {(row["phase"], row["seq"]) for part in parts for row in rows(part)}
        posts = [psutil.Process(one["post_pid"]) for one in run_json(tmp_path / "out")["cluster"]["workers"]]
        assert len({post.ppid() for post in posts}) == 2  # one on each node
        (victim,) = (one for one in run_json(tmp_path / "out")["cluster"]["workers"] if one["index"] == 1)
        os.kill(victim["post_pid"], signal.SIGKILL)
        code, out, err = await ended(process)
    assert code == 94, err
    told = " ".join(out.split())
    assert f"worker 1 on {victim['node']} was lost: its actor died, " in told
    assert " s into level 0" in told
    document = summary(tmp_path / "out")
    assert document["status"] == "failed"
    assert before <= {(row["phase"], row["seq"]) for row in rows(tmp_path / "out" / "samples.jsonl")}
    assert document["levels"][0]["littles_law_error"] is None  # of what was in flight there nothing is known
    await eventually(lambda: not psutil.pid_exists(victim["pid"]))
    shutil.rmtree(victim["folder"], ignore_errors=True)


async def test_ctrl_c_drains_every_actor(address: str, tmp_path: Path) -> None:
    write(tmp_path, LONG)
    async with scripted(gap_ms=10) as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--workers", "2", "--cluster", address)
        process = await started(*words, "--out", "out", cwd=tmp_path)
        await eventually(lambda: len(server.records) > 30)
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    document = summary(tmp_path / "out")
    assert (document["status"], document["levels"][0]["requests"]["failed"]) == ("interrupted", {})
    answered = Counter(str(one.request_id) for one in server.records if one.status == 200)
    found = rows(tmp_path / "out" / "samples.jsonl")
    loads = Counter(f"load-0-{row['seq']}" for row in found if row["phase"] == "load")
    assert loads == Counter(name for name in answered.elements() if name.startswith("load-"))


async def test_an_endpoint_that_a_node_cannot_reach_is_one_line(address: str) -> None:
    cluster = await Cluster.connect(address)
    order = {"prompts": ".", "scenario": {"prompts": [], "stages": []}, "folder": ".", "index": 0}
    with pytest.raises(UsageError, match=r"cannot connect to the endpoint at 127\.0\.0\.1:1: Connection refused$"):
        await cluster.start({**order, "endpoints": [("127.0.0.1", 1)]})
    (made,) = cluster.facts()["workers"]
    await cluster.close()
    assert not Path(made["folder"]).exists()  # noqa: ASYNC240


def test_what_a_scenario_reads_is_sent_along_by_other_names(tmp_path: Path) -> None:
    for name in ("a.json", "b.csv"):
        (tmp_path / name).write_text(name)
    stages = [{"trace": "b.csv", "speed": 2}, {"rate": 1}, {"trace": "b.csv"}]
    prompts = [{"name": "a", "file": "a.json"}, {"name": "b", "text": "b"}]
    scenario = {"prompts": prompts, "stages": stages}
    files, order = _shipped({"prompts": str(tmp_path), "scenario": scenario})
    assert files == {"0-a.json": b"a.json", "1-b.csv": b"b.csv"}
    assert order["scenario"]["prompts"] == [{"name": "a", "file": "0-a.json"}, {"name": "b", "text": "b"}]
    assert order["traces"] == {(tmp_path / "b.csv").as_posix(): "1-b.csv"}
    assert prompts[0]["file"] == "a.json"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({}, None),
        ({"python": "3.8.1"}, f"expected python {platform.python_version()} on node-b, as here, got 3.8.1"),
        ({"loadbench": "0.0.1"}, f"expected loadbench {__version__} on node-b, as here, got 0.0.1"),
    ],
)
def test_a_node_with_other_versions_is_refused_by_name(theirs: dict[str, str], said: str | None) -> None:
    facts = {"loadbench": __version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}.99", **theirs}
    refused = pytest.raises(UsageError, match=f"^--cluster: {re.escape(said or '')}$")
    with refused if said else contextlib.nullcontext():
        _check_versions("node-b", facts)
