"""Several models in one run, on the real Foundry Local: what comes of each, and how they leave the service."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadbench.lineup import telling
from loadbench.scenario.load import Overrides, load_scenario
from loadbench.scenario.plan import order_of_models
from loadbench.target.models import list_models
from loadbench.target.synthetic import ensure
from loadbench.target.target import Target
from tests.asking import scripted
from tests.catalogue import Catalogue, Entry, needs_openssl, serving
from tests.command import ROOT, ended, eventually, facts, loadbench, rows, started, summary

CHOOSE = ROOT / "scenarios" / "choose.yaml"
NAMES = ("synthetic:tiny", "synthetic:broken", "synthetic:kv")
IDS = [f"{name.replace(':', '-')}:1" for name in NAMES]
SEED = 2  # draws another order than the one that is written
IDLE_NS = 200_000_000
REDUCED = {"keep_warm": "200ms", "stages.0.rest": "700ms", "model_order": "shuffled", "quality.max_tokens": "12"}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """choose.yaml with smaller models and shorter levels, run once: its folder, and how the command ended."""
    folder = tmp_path_factory.mktemp("choose")
    words = [word for name in NAMES for word in ("--model", name)]
    words += [word for path, value in REDUCED.items() for word in ("--set", f"{path}={value}")]
    words += ["--concurrency", "1,2", "--duration", "1s", "--set", "stages.0.rest=700ms", "--seed", str(SEED)]
    return folder, loadbench("run", CHOOSE, *words, "--out", "out", cwd=folder)


def samples(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [row for row in rows(folder / "out" / "samples.jsonl") if row["phase"] == phase]


Chosen = tuple[Path, subprocess.CompletedProcess[str]]


def test_each_model_has_its_row_and_the_broken_one_its_reason(chosen: Chosen) -> None:
    folder, done = chosen
    assert done.returncode == 3, done.stderr  # a pipeline must notice
    tiny, broken, kv = facts(folder)["models"]
    assert [row["id"] for row in (tiny, broken, kv)] == IDS
    assert (broken["status"], broken["failed_at"]) == ("failed", "load")
    assert broken["reason"].startswith("Foundry Local 2 refused to load it")
    assert broken["size_bytes"] > tiny["size_bytes"] and broken["first_ms"] is broken["rss_loaded_bytes"] is None
    assert done.stderr.splitlines()[-1].startswith("loadbench: not every model could be served: ")
    for row in (tiny, kv):
        assert (row["status"], row["failed_at"], row["reason"], row["downloaded_ms"]) == ("ok", None, None, None)
        assert row["load_ms"] > 0 and row["first_ms"] > 0
        assert (row["device"], row["execution_provider"]) == ("CPU", "CPUExecutionProvider")
        assert 10_000_000 < row["rss_idle_bytes"] < row["rss_loaded_bytes"]
    # A process of its own for each: none begins with what another has left behind.
    assert abs(tiny["rss_idle_bytes"] - kv["rss_idle_bytes"]) < 10 << 20


def test_the_seed_draws_the_order_in_which_they_are_measured(chosen: Chosen) -> None:
    folder, _ = chosen
    overrides = Overrides(models=NAMES, seed=SEED, sets=("model_order=shuffled",))
    order = order_of_models(load_scenario(CHOOSE, overrides).scenario)
    assert tuple(facts(folder)["model_order"]) == order != (0, 1, 2)
    measured = [level["model"] for level in summary(folder / "out")["levels"]]
    assert list(dict.fromkeys(measured)) == [IDS[place] for place in order if place != 1]


def test_light_prompts_come_in_the_rests_only_and_count_nowhere(chosen: Chosen) -> None:
    folder, _ = chosen
    warm, load = samples(folder, "keep_warm"), samples(folder, "load")
    levels = summary(folder / "out")["levels"]
    assert {row["level"] for row in warm} == {level["index"] for level in levels[::2]}  # the first of each model
    for row in warm:
        before = [other["done_ns"] for other in load if other["level"] == row["level"]]
        after = [other["sent_ns"] for other in load if other["level"] == row["level"] + 1]
        assert row["outcome"] == "ok"
        assert max(before) + IDLE_NS <= row["sent_ns"] and row["done_ns"] <= min(after)
    for level in levels:
        assert level["requests"]["attempted"] == sum(row["level"] == level["index"] for row in load)
    assert "which no figure counts" in " ".join((folder / "out" / "report.md").read_text("utf-8").split())


def test_every_model_that_serves_is_asked_for_quality_and_its_answers_are_checked(chosen: Chosen) -> None:
    folder, _ = chosen
    answers = rows(folder / "out" / "answers.jsonl")
    order = [place for place in facts(folder)["model_order"] if place != 1]
    asked = ["summary", "capital", "refusal", "letters"]
    assert [(row["model"], row["id"]) for row in answers] == [(IDS[place], name) for place in order for name in asked]
    assert all(row["outcome"] == "ok" and len(row["answer"]) == row["output_tokens"] == 12 for row in answers)
    assert answers[1]["checks"] == {"contains": ["Paris"]}
    begun = min(row["sent_ns"] for row in samples(folder, "load"))
    assert sum(row["sent_ns"] < begun for row in samples(folder, "quality")) == 4
    checks = {told["model"]: told["checks"] for told in summary(folder / "out")["quality"]}
    assert len(checks) == 2 and all(0 < told["passed"] < told["of"] == 4 for told in checks.values())


def test_the_models_are_told_side_by_side_with_the_reason_of_the_broken_one(chosen: Chosen) -> None:
    folder, done = chosen
    decision = summary(folder / "out")["decision"]["candidates"]
    assert [candidate["model"] for candidate in decision] == IDS
    for text in (done.stdout, (folder / "out" / "report.md").read_text("utf-8")):
        assert "Decision" in text and "synthetic-broken:1 failed at load: Foundry Local 2" in " ".join(text.split())
    assert "levels were not run" not in done.stdout  # that it failed says it


async def loaded(target: Target) -> set[str]:
    models = await list_models(target.endpoint, base_url=target.foundry.base_url if target.foundry else None)
    return {model.id for model in models if model.loaded}


SCENARIO = """
name: s
models: [{models}]
request: {{max_tokens: 8}}
prompts: [{{name: hello, text: Say hello}}]
warmup: {{requests: 1}}
stages: [{{concurrency: 1, requests: 3}}]
drain: 3s
"""
QUALITY = "quality: {prompts: prompts.json}\n"


def write(folder: Path, *models: str, more: str = "") -> None:
    (folder / "s.yaml").write_text(SCENARIO.format(models=", ".join(models)) + more, encoding="utf-8")
    (folder / "prompts.json").write_text('["one", "two", "three"]', encoding="utf-8")


async def test_on_a_service_that_is_not_ours_only_what_the_run_has_loaded_is_unloaded(tmp_path: Path) -> None:
    write(tmp_path, *(f'"{model_id}"' for model_id in IDS))
    target = await Target.embedded(NAMES, "test")
    try:
        for before in (set(), {IDS[0]}):
            for model_id in before:
                await target.load(await target.resolve(NAMES[IDS.index(model_id)]))
            out = tmp_path / str(len(before))
            words = ("run", "s.yaml", "--endpoint", target.endpoint.url, "--out", out, "--quiet")
            code, _, err = await ended(await started(*words, cwd=tmp_path))
            assert code == 3, err
            assert await loaded(target) == before
            (out / "out").symlink_to(out)
            told = [(row["status"], row["load_ms"] is None) for row in facts(out)["models"]]
            assert told == [("ok", bool(before)), ("failed", True), ("ok", False)]
    finally:
        await target.close()
    assert "it was loaded before the run and stays so" in facts(out)["models"][0]["how"]


async def test_the_only_reasons_are_all_told_where_no_model_is_left(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    async with scripted() as server:
        words = ("run", "s.yaml", "--endpoint", server.base_url, "--out", "out", "--quiet")
        code, _, err = await ended(await started(*words, cwd=tmp_path))
    assert code == 3 and not (tmp_path / "out").exists()
    (line,) = err.splitlines()
    assert "there is no model a" in line and "there is no model b" in line


# Interrupted


async def interrupted(folder: Path, ready: Path, *words: str, times: int = 1, lines: int = 1) -> tuple[int, str]:
    """Run until a file has so many lines, and press Ctrl-C so often: how it exits, and what it said."""
    process = await started("run", "s.yaml", "--out", "out", *words, cwd=folder)
    await eventually(lambda: len(rows(ready)) >= lines)
    process.send_signal(signal.SIGINT)
    for _ in range(times - 1):
        await asyncio.sleep(0.3)  # nothing tells that the first one has been heard
        process.send_signal(signal.SIGINT)
    code, _, err = await ended(process)
    return code, err


async def test_ctrl_c_while_answers_are_gathered_keeps_them_and_begins_no_level(tmp_path: Path) -> None:
    write(tmp_path, "m1", "m2", more=QUALITY)
    answers = tmp_path / "out" / "answers.jsonl"
    async with scripted(models=("m1", "m2"), gap_ms=40) as server:
        code, err = await interrupted(tmp_path, answers, "--endpoint", server.base_url)
    assert code == 130, err
    found = facts(tmp_path)
    assert found["status"] == "interrupted"
    assert [(row["status"], row["reason"]) for row in found["models"]] == [
        ("ok", None),
        ("skipped", "the run ended before its turn"),
    ]
    assert len(rows(answers)) == len(samples(tmp_path, "quality")) in (1, 2)  # what was in flight was waited for
    assert samples(tmp_path, "load") == []


async def test_ctrl_c_twice_quits_while_an_answer_to_be_marked_does_not_end(tmp_path: Path) -> None:
    write(tmp_path, "m1", more=QUALITY)
    sent = tmp_path / "out" / "answers.jsonl"
    async with scripted(models=("m1",), gap_ms=40) as server:
        words = ("--endpoint", server.base_url, "--set", "quality.max_tokens=3000", "--set", "quality.repeats=50")
        (tmp_path / "prompts.json").write_text('[{"prompt": "x", "max_tokens": 2}, "for ever"]', encoding="utf-8")
        code, err = await interrupted(tmp_path, sent, *words, times=2)
    assert code == 130, err
    assert facts(tmp_path)["status"] == "interrupted"
    assert len(rows(sent)) >= 1


async def test_a_run_killed_while_answers_are_gathered_can_be_reported(tmp_path: Path) -> None:
    write(tmp_path, "m1", more=QUALITY)
    async with scripted(models=("m1",), gap_ms=40) as server:
        process = await started("run", "s.yaml", "--out", "out", "--endpoint", server.base_url, cwd=tmp_path)
        await eventually(lambda: len(rows(tmp_path / "out" / "answers.jsonl")) >= 2)
        process.kill()
        await ended(process)
    done = loadbench("report", "out", cwd=tmp_path)
    assert done.returncode == 94, done.stderr
    assert summary(tmp_path / "out")["quality"][0]["answers"] == 2


async def test_answers_alone_are_a_run_that_is_done(tmp_path: Path) -> None:
    write(tmp_path, "m1", "m2", more=QUALITY)
    async with scripted(models=("m1", "m2")) as server:
        words = ("quality", "collect", "s.yaml", "--endpoint", server.base_url, "--out", "out")
        code, _, err = await ended(await started(*words, cwd=tmp_path))
    assert code == 0, err
    assert len(rows(tmp_path / "out" / "answers.jsonl")) == 6
    done = loadbench("report", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Nothing was measured" not in done.stdout


# Downloaded


def test_a_download_tells_its_rate_and_the_time_left_of_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    tell = telling("m:1", 100 << 20, said.append)
    for now_s, percent in ((0.0, 40.0), (1.0, 41.0), (20.0, 60.0), (25.0, 70.0)):
        monkeypatch.setattr("loadbench.lineup.monotonic", lambda now_s=now_s: now_s)
        tell(percent)
    assert said[0] == "downloading m:1 · 40 % · 40 MiB of 100 MiB"
    assert said[1] == "downloading m:1 · 41 % · 41 MiB of 100 MiB · 1 MiB/s · 0:59 left"
    assert said[-1] == "downloading m:1 · 70 % · 70 MiB of 100 MiB · 1.21 MiB/s · 0:25 left"


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalogue]:
    """A catalogue of one model, and a cache of our own."""
    monkeypatch.setenv("LOADBENCH_CACHE", str(tmp_path / "cache"))
    tiny = ensure("tiny", tmp_path / "made").path
    with serving([Entry("phi-x-generic-cpu", "phi-x", tiny, 2, licence="Apache-2.0")], tmp_path) as served:
        for name, value in served.environment.items():
            monkeypatch.setenv(name, value)
        yield served


@needs_openssl
async def test_a_model_of_the_catalogue_is_downloaded_before_it_is_loaded(catalogue: Catalogue, tmp_path: Path) -> None:
    write(tmp_path, "synthetic:tiny", "phi-x@cpu")
    code, _, err = await ended(await started("run", "s.yaml", "--out", "out", cwd=tmp_path))
    assert code in (0, 94), err  # three requests are too few to vouch for
    phi = facts(tmp_path)["models"][1]
    assert (phi["id"], phi["alias"], phi["licence"]) == ("phi-x-generic-cpu:2", "phi-x", "Apache-2.0")
    assert phi["capabilities"] and phi["size_bytes"] and phi["downloaded_ms"] > 0
    assert phi["rss_idle_bytes"] < phi["rss_loaded_bytes"]


@needs_openssl
async def test_ctrl_c_during_a_download_ends_the_run_and_keeps_what_was_measured(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    write(tmp_path, "synthetic:tiny", "phi-x")
    catalogue.stall_if = lambda name, first: name.endswith("model.onnx")
    process = await started("run", "s.yaml", "--out", "out", cwd=tmp_path)
    await eventually(lambda: bool(catalogue.sent))  # smaller files come first
    process.send_signal(signal.SIGINT)
    code, _, err = await ended(process)
    assert code == 130, err
    assert [row["status"] for row in facts(tmp_path)["models"]] == ["ok", "skipped"]
    assert [level["complete"] for level in summary(tmp_path / "out")["levels"]] == [True]
