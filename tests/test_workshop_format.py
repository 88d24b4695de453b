"""``--format workshop``: the fields and the table of the workshop's exporter, from our figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from loadbench.records import Closed, Open
from loadbench.report.write import write_report
from tests.command import loadbench, summary
from tests.rundirs import Planned, model_row, write_run

GOLDEN = Path(__file__).parent / "golden" / "benchmark_report.md"
KEYS = ["alias", "latency_avg", "latency_p95", "tokens_per_sec_avg", "rounds"]

PLAYED = {
    "phi-4-mini": Planned(Closed(1), model="phi:4", duration_s=32.0),
    "qwen2.5-0.5b": Planned(Closed(1), model="qwen:1", duration_s=12.0, slower=0.4, fails=0.1),
    "three-rounds": Planned(Closed(1), model="three:1", duration_s=0.6),
    "one-piece": Planned(Closed(4), model="one-piece:2", duration_s=20.0, stream=False),
    "no|usage": Planned(Open(2.0), model="no-usage:1", duration_s=20.0, token_source="chunks"),
}


def played(folder: Path) -> Path:
    """Five models of every kind, one that cannot be loaded and one of which nothing came."""
    rows = [model_row(level.model, asked=asked) for asked, level in PLAYED.items()]
    rows.append(model_row("broken:1", asked="broken", status="failed", failed_at="load", reason="out of memory"))
    rows.append(model_row("mute:1", asked="mute"))
    mute = Planned(Closed(1), model="mute:1", duration_s=1.0, fails=1.0)
    return write_run(folder, [*PLAYED.values(), mute], models=rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = played(tmp_path_factory.mktemp("played") / "run")
    write_report(path, form="workshop")
    return path


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["alias"]: row for row in orjson.loads((folder / "benchmark_report.json").read_bytes())}


def test_the_markdown_is_the_golden_file(folder: Path) -> None:
    assert (folder / "benchmark_report.md").read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8")


def test_the_json_is_a_list_of_the_models_that_answered_with_the_workshop_s_keys_in_its_order(folder: Path) -> None:
    text = (folder / "benchmark_report.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert text == json.dumps(found, indent=2) + "\n"
    assert [row["alias"] for row in found] == [*PLAYED]
    for row in found:
        streamed = PLAYED[row["alias"]].stream
        assert list(row) == [*KEYS, *(["first_token_latency_avg"] if streamed else [])]


def test_times_are_the_report_s_in_seconds(folder: Path) -> None:
    found = rows(folder)
    for level, alias in zip(summary(folder)["levels"], PLAYED, strict=False):
        e2e, ttft = (level["latency_ms"][name]["service"] for name in ("e2e", "ttft"))
        assert found[alias]["latency_avg"] == e2e["mean"] / 1e3
        assert found[alias]["latency_p95"] == (None if e2e["p95"] is None else e2e["p95"] / 1e3)
        assert found[alias]["rounds"] == e2e["n"]
        assert found[alias].get("first_token_latency_avg") == (None if ttft["mean"] is None else ttft["mean"] / 1e3)


def test_tokens_per_second_are_the_workshop_s_the_prompt_s_among_them(folder: Path) -> None:
    lines = [orjson.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
    since_ns = 1e9 * (summary(folder)["levels"][1]["warmup_trimmed_s"] or 0)
    assert since_ns == 0
    rates = [
        (row["input_tokens"] + row["output_tokens"]) / (row["last_token_ns"] - row["sent_ns"]) * 1e9
        for row in lines
        if (row["level"], row["phase"], row["outcome"]) == (1, "load", "ok")
    ]
    assert rows(folder)["qwen2.5-0.5b"]["tokens_per_sec_avg"] == pytest.approx(np.mean(rates))
    assert rows(folder)["no|usage"]["tokens_per_sec_avg"] is None


def test_the_p95_of_three_rounds_is_not_told(folder: Path) -> None:
    three = rows(folder)["three-rounds"]
    assert three["rounds"] == 3
    assert three["latency_p95"] is None
    assert three["latency_avg"] > 0


def test_a_model_is_told_of_at_one_user_where_it_was_measured_so(tmp_path: Path) -> None:
    users = [Planned(Closed(n), model="m:1", duration_s=5.0) for n in (4, 1, 2)]
    write_report(write_run(tmp_path / "run", users), form="workshop")
    [row] = rows(tmp_path / "run").values()
    assert row["latency_avg"] == summary(tmp_path / "run")["levels"][1]["latency_ms"]["e2e"]["service"]["mean"] / 1e3


def test_where_nothing_answered_the_list_is_empty(tmp_path: Path) -> None:
    write_report(write_run(tmp_path / "run", [Planned(Closed(1), duration_s=1.0, fails=1.0)]), form="workshop")
    assert (tmp_path / "run" / "benchmark_report.json").read_text(encoding="utf-8") == "[]\n"


def test_the_command_writes_both_only_when_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [Planned(Closed(1))])
    assert loadbench("report", run, "--quiet").returncode == 0
    assert not list(run.glob("benchmark_report.*"))
    assert loadbench("report", run, "--quiet", "--format", "workshop").returncode == 0
    assert len(list(run.glob("benchmark_report.*"))) == 2
    refused = loadbench("report", run, "--format", "other")
    assert refused.returncode == 2
    assert "workshop" in refused.stderr
