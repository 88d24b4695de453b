"""A whole run, from the command line to what it leaves, against the real Foundry Local and the scripted endpoint."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import orjson
import psutil
import pytest

from tests.asking import scripted
from tests.command import ROOT, ended, environment, eventually, loadbench, rows, started, summary

FILES = {
    "histograms.hlog",
    "junit.xml",
    "report.html",
    "report.md",
    "run.json",
    "samples.jsonl",
    "summary.csv",
    "summary.json",
    "telemetry.jsonl",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to run in, with a small scenario."""
    write(tmp_path, "stages: [{concurrency: [1, 2], requests: 12}]")
    yield tmp_path


def write(folder: Path, *lines: str) -> Path:
    path = folder / "s.yaml"
    text = "name: s\nrequest: {max_tokens: 8}\nprompts: [{name: hello, text: Say hello}]\ndrain: 3s\n"
    path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return path


async def run(folder: Path, *words: str, **env: str) -> tuple[int, str, str]:
    return await ended(await started("run", "s.yaml", "--out", "out", *words, cwd=folder, **env))


def on_tiny(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run on an embedded service, to the end."""
    return loadbench("run", "s.yaml", "--model", "synthetic:tiny", "--out", "out", *words, cwd=folder)


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


# The real service


def test_a_run_on_the_embedded_service_ends_with_every_file_and_says_what_it_means(folder: Path) -> None:
    done = on_tiny(folder)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (folder / "out").iterdir()} == FILES
    document = summary(folder / "out")
    jsonschema.validate(document, orjson.loads((ROOT / "loadbench/schemas/summary.schema.json").read_bytes()))
    assert [level["load"] for level in document["levels"]] == [
        {"kind": "closed", "concurrency": 1, "legs": [], "ask": None},
        {"kind": "closed", "concurrency": 2, "legs": [], "ask": None},
    ]
    for level in document["levels"]:
        assert level["requests"] == {"attempted": 12, "ok": 12, "failed": {}}
        assert level["target"]["state"] == "healthy"
        assert level["target"]["rss_bytes"]["peak"] > 10_000_000
        assert level["tokens"]["source"] == {"usage": 12}
        assert level["tokens"]["output_mean"] == 8
    assert document["verdict"]["target"] == "healthy"
    assert "random weights" in done.stdout
    assert done.stdout.rstrip().endswith("Repeat   loadbench run s.yaml --model synthetic:tiny")
    assert f"Results  {Path('out')}" in done.stdout


def test_a_run_without_streams_has_no_first_token(folder: Path) -> None:
    done = on_tiny(folder, "--set", "request.stream=false")
    assert done.returncode == 0, done.stderr
    level = summary(folder / "out")["levels"][0]
    assert level["latency_ms"]["ttft"]["service"]["n"] == 0
    assert level["latency_ms"]["ttft"]["service"]["p50"] is None
    assert level["latency_ms"]["e2e"]["service"]["n"] == 12
    assert level["tokens"]["output_mean"] == 8


def test_open_loop_on_the_embedded_service(folder: Path) -> None:
    done = on_tiny(folder, "--rate", "50/s", "--duration", "2s")
    assert done.returncode == 0, done.stderr
    level = summary(folder / "out")["levels"][0]
    assert level["load"] == {"kind": "open", "rate_per_s": 50.0, "arrivals": "poisson"}
    assert level["headline"] == "response"
    sent = [row for row in rows(folder / "out" / "samples.jsonl") if row["phase"] == "load"]
    assert len(sent) == level["requests"]["attempted"] > 50
    assert all(row["sent_ns"] >= row["due_ns"] for row in sent)


def test_a_context_that_is_exceeded_is_recognised_under_http_200(folder: Path) -> None:
    write(
        folder,
        "stages: [{concurrency: 1, requests: 3}]",
        "warmup: {requests: 0}",
    )
    done = on_tiny(folder, "--set", "prompts=[{name: long, input_tokens: {mean: 4000}}]")
    assert done.returncode == 94, done.stderr
    level = summary(folder / "out")["levels"][0]
    assert level["requests"]["failed"] == {"context_exceeded": 3}
    assert {row["http_status"] for row in rows(folder / "out" / "samples.jsonl") if row["phase"] == "load"} == {200}
    assert "exceeds the model's maximum context length of 2048 tokens" in " ".join(done.stdout.split())


def test_requests_given_up_do_not_hurt_the_service(folder: Path) -> None:
    write(folder, "stages: [{concurrency: 2, requests: 4}]", "warmup: {requests: 0}")
    deadlines = "deadlines={first_token: 0.3s, total: 0.3s}"
    done = on_tiny(folder, "--set", deadlines, "--set", "request.max_tokens=1900")
    assert done.returncode == 94, done.stderr
    level = summary(folder / "out")["levels"][0]
    assert set(level["requests"]["failed"]) == {"total_deadline"}
    assert level["target"]["state"] == "healthy"


async def test_the_service_killed_mid_level_ends_the_run_that_is_to_stop_and_keeps_what_was_measured(
    folder: Path,
) -> None:
    write(folder, "stages: [{concurrency: [2, 4], duration: 60s}]", "on_target_death: stop")
    process = await started("run", "s.yaml", "--model", "synthetic:tiny", "--out", "out", cwd=folder)
    samples = folder / "out" / "samples.jsonl"
    await eventually(lambda: sum(row["phase"] == "load" for row in rows(samples)) > 20)
    (service,) = [child for child in children_of(process.pid) if "foundry_child" in " ".join(child.cmdline())]
    service.kill()
    code, out, err = await ended(process)
    assert code == 93, err
    document = summary(folder / "out")
    assert (document["status"], document["verdict"]["target"]) == ("target_died", "crashed")
    assert document["levels"][0]["requests"]["ok"] > 20
    assert len(document["levels"]) == 1
    assert "killed by SIGKILL" in out


async def test_kill_9_keeps_every_finished_request_and_leaves_no_process(folder: Path) -> None:
    write(folder, "stages: [{concurrency: 4, duration: 60s}]")
    process = await started("run", "s.yaml", "--model", "synthetic:tiny", "--out", "out", cwd=folder)
    samples = folder / "out" / "samples.jsonl"
    await eventually(lambda: sum(row["phase"] == "load" for row in rows(samples)) > 20)
    family = children_of(process.pid)
    assert family
    process.kill()
    await process.wait()
    await eventually(lambda: not any(child.is_running() for child in family))
    report = loadbench("report", "out", cwd=folder)
    assert "incomplete" in report.stdout
    assert summary(folder / "out")["status"] == "incomplete"
    assert summary(folder / "out")["levels"][0]["requests"]["ok"] > 20


# The scripted endpoint


async def test_every_request_that_had_ended_is_on_disk_when_the_process_is_killed(folder: Path) -> None:
    write(folder, "stages: [{concurrency: 8, duration: 60s}]")
    async with scripted() as server:
        process = await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", cwd=folder)
        await eventually(lambda: len(server.records) > 300)
        process.kill()
        await process.wait()
        answered = {truth.request_id for truth in server.records if truth.done_ns is not None and truth.tokens == 8}
    kept = {f"{row['phase']}-{row['level']}-{row['seq']}" for row in rows(folder / "out" / "samples.jsonl")}
    assert len(kept) > 250
    # What the endpoint had answered but the client had not read yet, at the most one request a user, is not ended.
    assert len(answered - kept - {None}) <= 8


async def test_ctrl_c_once_drains_and_writes(folder: Path) -> None:
    write(folder, "stages: [{concurrency: 4, duration: 60s}]")
    async with scripted(gap_ms=20) as server:
        process = await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", cwd=folder)
        await eventually(lambda: len(server.records) > 20)
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    assert {path.name for path in (folder / "out").iterdir()} == FILES | {"intervals.csv"}  # of a level of a minute
    document = summary(folder / "out")
    assert document["status"] == "interrupted"
    assert document["levels"][0]["requests"]["failed"] == {}
    assert document["levels"][0]["ended_by"] == "interrupted"


async def test_ctrl_c_twice_quits_at_once_and_still_writes(folder: Path) -> None:
    write(folder, "stages: [{concurrency: 2, duration: 60s}]")
    async with scripted(faults=("first_token_deadline@3",), keep_alive_ms=50) as server:
        process = await started(
            "run", "s.yaml", "--endpoint", server.base_url, "--out", "out", "--set", "warmup.requests=0", cwd=folder
        )
        await eventually(lambda: len(rows(folder / "out" / "samples.jsonl")) >= 3)
        process.send_signal(signal.SIGINT)
        telemetry = folder / "out" / "telemetry.jsonl"
        await eventually(lambda: any(row["event"] == "issue_end" for row in rows(telemetry)))
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert orjson.loads((folder / "out" / "run.json").read_bytes())["status"] == "interrupted"


async def test_ctrl_c_before_anything_is_measured_leaves_nothing(folder: Path) -> None:
    async with scripted(faults=("first_token_deadline",), keep_alive_ms=50) as server:
        process = await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", cwd=folder)
        await eventually(lambda: bool(server.connections))
        await eventually(lambda: len(server._active) > 0)
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert err.endswith("\nloadbench: interrupted before anything was measured\n")
    assert not (folder / "out").exists()


async def test_the_line_of_a_level_that_ended_in_its_drain_has_no_rates_that_the_report_has_otherwise(
    folder: Path,
) -> None:
    write(folder, "stages: [{concurrency: 4, requests: 3}, {concurrency: 2, requests: 40}]")
    async with scripted(first_token_ms=100) as server:
        process = await started("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", cwd=folder)
        _, _, err = await ended(process)
    short, long = (line for line in err.splitlines() if " ended: " in line)
    assert "req/s" not in short and "TTFT p50" in short and "0 failed" in short
    assert "req/s" in long
    assert summary(folder / "out")["levels"][0]["throughput"]["requests_per_s"] > 5


async def test_the_report_is_made_from_the_directory_alone(folder: Path) -> None:
    async with scripted() as server:
        code, out, err = await run(folder, "--endpoint", server.base_url)
    assert code == 0, err
    made = {name: (folder / "out" / name).read_bytes() for name in ("summary.json", "summary.csv", "report.md")}
    for name in made:
        (folder / "out" / name).unlink()
    (folder / "out").rename(folder / "elsewhere")
    again = loadbench("report", "elsewhere", cwd=folder)
    assert again.returncode == 0
    assert {name: (folder / "elsewhere" / name).read_bytes() for name in made} == made
    assert again.stdout.replace("elsewhere", "out") == out


async def test_json_prints_the_summary_and_nothing_else(folder: Path) -> None:
    async with scripted() as server:
        _, out, _ = await run(folder, "--endpoint", server.base_url, "--json")
    assert orjson.loads(out) == summary(folder / "out")


async def test_no_key_is_ever_written(folder: Path) -> None:
    async with scripted() as server:
        code, out, err = await run(
            folder,
            "--endpoint",
            server.base_url,
            "--header",
            "X-Api-Key: s3cret-header",
            "--header=Authorization: Bearer s3cret-flag",
            "--set",
            "request.headers.Api-Key=s3cret-set",
            OPENAI_API_KEY="s3cret-environment",
        )
    assert code == 0, err
    written = b"".join(path.read_bytes() for path in (folder / "out").iterdir())
    assert b"s3cret" not in written
    assert "s3cret" not in out + err


async def test_a_target_that_dies_is_named_and_the_rest_is_not_run(folder: Path) -> None:
    write(folder, "stages: [{concurrency: [4, 8], duration: 60s}]")
    async with scripted(refuse_after=200, connection_close=True) as server:
        code, _, err = await run(folder, "--endpoint", server.base_url)
    assert code == 93, err
    document = summary(folder / "out")
    assert (document["status"], document["verdict"]["target"]) == ("target_died", "unreachable")
    assert (len(document["levels"]), document["levels_planned"]) == (1, 2)


async def test_a_run_in_which_everything_fails_is_invalid(folder: Path) -> None:
    async with scripted(faults=("http_5xx@2", "truncated@3", "empty@5")) as server:
        code, out, err = await run(folder, "--endpoint", server.base_url)
    assert code == 94, err
    failed = summary(folder / "out")["levels"][0]["requests"]["failed"]
    assert {"http_5xx", "truncated"} <= set(failed)
    assert "http_5xx" in out


async def test_a_model_that_cannot_answer_a_canary_is_not_measured(folder: Path) -> None:
    async with scripted(faults=("empty",)) as server:
        code, _, err = await run(folder, "--endpoint", server.base_url, "--quiet")
    assert code == 3
    assert err == f"loadbench: fake-model:1 at {server.base_url}: a canary failed: empty\n"
    assert not (folder / "out").exists()


async def test_neither_a_url_nor_a_setting_gives_a_secret_away(folder: Path) -> None:
    code, out, err = await run(folder, "--endpoint", "http://usr:s3cret-url@127.0.0.1:9/v1?api_key=s3cret-query")
    assert code in (2, 3)
    assert "s3cret" not in out + err
    async with scripted() as server:
        words = ("--set", "request={max_tokens: 4, headers: {X-Custom: s3cret-custom}, extra: {token: s3cret-extra}}")
        code, out, err = await run(folder, "--endpoint", server.base_url, *words, "--header", "X-Plain: s3cret-plain")
    assert code == 0, err
    assert b"s3cret" not in b"".join(path.read_bytes() for path in (folder / "out").iterdir())
    assert "s3cret" not in out + err
    assert "X-Plain" in (folder / "out" / "run.json").read_text()


async def test_the_repeated_command_names_the_endpoint_and_makes_a_directory_of_its_own(folder: Path) -> None:
    async with scripted() as server:
        code, out, err = await run(folder, FOUNDRY_LOCAL_ENDPOINT=server.base_url)
    assert code == 0, err
    assert out.rstrip().endswith(f"Repeat   loadbench run s.yaml --endpoint {server.base_url}")


async def test_of_two_runs_that_want_one_directory_one_gets_it(folder: Path) -> None:
    (folder / "out").mkdir()
    async with scripted() as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", "out")
        both = [await started(*words, cwd=folder) for _ in range(2)]
        done = [await ended(process) for process in both]
    assert sorted(code for code, _, _ in done) == [0, 2]
    (refused,) = [err for code, _, err in done if code == 2]
    assert refused == "loadbench: --out out: expected a new or an empty directory\n"
    assert summary(folder / "out")["levels"][0]["requests"]["attempted"] == 12


async def test_a_directory_that_was_there_stays_when_nothing_is_measured(folder: Path) -> None:
    (folder / "out").mkdir()
    code, _, _ = await run(folder, "--endpoint", "http://127.0.0.1:9/v1")
    assert code == 3
    assert list((folder / "out").iterdir()) == []


async def test_a_dead_target_is_noticed_without_a_canary_too(folder: Path) -> None:
    write(folder, "stages: [{concurrency: [4, 8], duration: 60s}]", "canary: false")
    async with scripted(refuse_after=200, connection_close=True) as server:
        code, _, err = await run(folder, "--endpoint", server.base_url)
    assert code == 93, err
    document = summary(folder / "out")
    assert (document["status"], document["verdict"]["target"]) == ("target_died", "unreachable")
    assert len(document["levels"]) == 1
    assert err.splitlines()[-1].startswith("loadbench: target died: unreachable after level 0")


async def test_a_model_that_fails_has_a_row_with_its_reason_and_the_rest_goes_on(folder: Path) -> None:
    write(
        folder, "stages: [{concurrency: 1, requests: 5}]", "models: [good:1, 'fake-fault:http_5xx', nobody, better:1]"
    )
    async with scripted(models=("good:1", "fake-fault:http_5xx", "better:1")) as server:
        code, _, err = await run(folder, "--endpoint", server.base_url)
    assert code == 3, err
    document = summary(folder / "out")
    assert [model["status"] for model in document["models"]] == ["ok", "failed", "failed", "ok"]
    assert "a canary failed: http_5xx" in document["models"][1]["reason"]
    assert "nobody" in document["models"][2]["reason"]
    assert [level["model"] for level in document["levels"]] == ["good:1", "better:1"]
    assert err.splitlines()[-1].startswith("loadbench: not every model could be served: ")


async def test_an_exit_code_that_is_not_0_has_one_line_that_says_why(folder: Path) -> None:
    async with scripted(faults=("http_5xx@2", "truncated@3")) as server:
        code, _, err = await run(folder, "--endpoint", server.base_url, "--quiet")
    assert code == 94
    (line,) = err.splitlines()
    assert line.startswith("loadbench: result invalid: ") and "http_5xx" in line
    write(folder, "stages: [{concurrency: 1, requests: 20}]", "slo: {error_rate: 1%}")
    async with scripted(faults=("http_5xx@4",)) as server:
        words = ("run", "s.yaml", "--out", "missed", "--endpoint", server.base_url, "--quiet", "--set", "canary=false")
        code, _, err = await ended(await started(*words, cwd=folder))
    assert (code, err) == (99, "loadbench: SLO missed: error_rate at 1 user\n")


# What the user does wrong: one line, the right exit code, nothing left behind


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["missing.yaml"], 2, "missing.yaml"),
        (["broken.yaml"], 2, "broken.yaml:2"),
        (["unknown-key.yaml"], 2, "unknown-key.yaml:1"),
        (["s.yaml", "--rate", "-1/s"], 2, "rate"),
        (["s.yaml", "--endpoint", "http://127.0.0.1:9/v1"], 3, "http://127.0.0.1:9"),
        (["s.yaml", "--model", "nonsense"], 3, "nonsense"),
        (["s.yaml", "--model", "synthetic:nonsense"], 2, "tiny"),
        (["not-json.yaml"], 2, "prompts.json"),
        (["s.yaml", "--model", "synthetic:tiny", "--out", "s.yaml/out"], 2, "s.yaml/out"),
        (["s.yaml", "--set", "stages.7.duration=1s"], 2, "stages.7"),
        (["s.yaml", "--endpoint", "not a url"], 2, "not a url"),
        (["s.yaml", "--duration", "soon"], 2, "soon"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_answered_in_one_line(folder: Path, words: list[str], code: int, says: str) -> None:
    (folder / "broken.yaml").write_text("name: x\nstages: [}\n", encoding="utf-8")
    (folder / "unknown-key.yaml").write_text("concurency: 4\n", encoding="utf-8")
    (folder / "prompts.json").write_text("not json", encoding="utf-8")
    (folder / "not-json.yaml").write_text("prompts: [{name: a, file: prompts.json}]\n", encoding="utf-8")
    before = sorted(folder.iterdir())
    done = loadbench("run", *words, "--quiet", cwd=folder)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0], done.stderr
    leftover = [path for path in folder.iterdir() if path not in before]
    assert [path for path in leftover if path.name != "results" or any(path.iterdir())] == []


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX's")
async def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_was_written(folder: Path) -> None:
    write(folder, "stages: [{concurrency: 8, duration: 60s}]")
    env = environment(PYTHONPATH=os.fspath(ROOT))
    async with scripted() as server:
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            'ulimit -f 64; exec "$0" -m loadbench run s.yaml --out out --endpoint "$1"',
            sys.executable,
            server.base_url,
            cwd=folder,
            env={
                name: value for name, value in env.items() if not name.startswith("COV")
            },  # its file has the limit too
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        code, _, err = await ended(process)
    assert "Traceback" not in err, err
    assert code not in (0, 1), err
    assert "cannot be written" in err
    assert len(rows(folder / "out" / "samples.jsonl")) > 50
