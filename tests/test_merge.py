"""The runs of shards become one run: nothing is lost, nothing counted twice, and what does not belong is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.verdict import exit_code, why
from loadbench.engine import merge, sums
from loadbench.engine.merge import merge_shards
from loadbench.errors import UsageError
from loadbench.hdr import Hdr, HlogReader, HlogWriter
from loadbench.records import Closed
from loadbench.shard_facts import Part, read_parts
from loadbench.shards import put_together
from tests.command import loadbench, rows
from tests.rundirs import STARTED_NS, Planned, model_row, write_run


def shard(folder: Path, index: int, count: int = 2, machine: str = "m", **facts: Any) -> Path:
    """A shard as a run leaves it: four users for 15 s, each shard's answers of its own."""
    told: dict[str, Any] = {"shard": {"index": index, "count": count, "machine": machine}, "workers": 1} | facts
    return write_run(folder / f"part-{index}", [Planned(Closed(4), batches=4)], seed=index + 1, **told)


def rewrite(part: Path, name: str, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change every line of a file of JSON lines."""
    changed = [orjson.dumps(how(row)) + b"\n" for row in rows(part / name)]
    (part / name).write_bytes(b"".join(changed))


def together(parts: list[Path], out: Path) -> Path:
    put_together(read_parts(parts), out)
    return out


def counts(*logs: Path) -> dict[str, Any]:
    """The sum of each tag."""
    found: dict[str, Hdr] = {}
    for log in logs:
        for interval in HlogReader(log):
            found.setdefault(interval.tag or "", Hdr()).merge(interval.hdr)
    return {tag: hdr._counts.tolist() for tag, hdr in found.items()}


def test_samples_are_joined_in_the_order_in_which_they_ended_and_counts_are_added(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index, 3) for index in (2, 0, 1)]
    out = together(parts, tmp_path / "out")
    lines = (out / "samples.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(
        line for part in parts for line in (part / "samples.jsonl").read_bytes().splitlines()
    )
    ended = [row["done_ns"] for row in rows(out / "samples.jsonl") if row["done_ns"] > 3e9]  # after the warm-up
    assert ended == sorted(ended)
    assert counts(out / "histograms.hlog") == counts(*(part / "histograms.hlog" for part in parts))
    run = read(out)
    assert (run.facts["status"], run.facts["reason"], "shard" in run.facts) == ("complete", None, False)
    assert [row["index"] for row in run.facts["shards"]] == [0, 1, 2]
    (level,) = summarise(run).levels
    assert level.requests.attempted == len(lines) - 3 * 2  # warm-up
    assert exit_code(summarise(run)) == 0


def test_a_level_ends_with_its_last_shard_and_with_the_worst_that_any_saw(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]

    def worse(row: dict[str, Any]) -> dict[str, Any]:
        if row["event"] == "level_end":
            row["target"] |= {"state": "degraded", "evidence": ["a canary failed: http_5xx"]}
            row["client"] |= {"cpu_s": 3.0, "loop_lag_p99_ns": 9_000_000}
            row["t_ns"] += 5
        return row | ({"reason": "interrupted", "t_ns": row["t_ns"] + 7} if row["event"] == "issue_end" else {})

    before = [read(part).levels[0] for part in parts]
    rewrite(parts[1], "telemetry.jsonl", worse)
    (level,) = read(together(parts, tmp_path / "out")).levels
    assert level.start_ns == before[0].start_ns
    assert (level.issue_end_ns, level.ended_by) == (7 + (before[1].issue_end_ns or 0), "interrupted")
    assert level.end is not None
    assert level.end["target"]["state"] == "degraded"
    assert level.end["target"]["evidence"] == ["shard 1: a canary failed: http_5xx"]
    client, first = level.end["client"], (before[0].end or {})["client"]
    assert client["cpu_s"] == 4.2
    assert client["loop_lag_p99_ns"] == 9_000_000
    assert client["in_flight_ns"] == first["in_flight_ns"] + (before[1].end or {})["client"]["in_flight_ns"]
    assert [one["shard"] for one in client["workers"]] == [0, 1]


def test_other_events_are_kept_and_say_whose_they_are(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    ticks = [[row for row in rows(part / "telemetry.jsonl") if row["event"] == "tick"] for part in parts]
    events = rows(together(parts, tmp_path / "out") / "telemetry.jsonl")
    for index, mine in enumerate(ticks):
        found = [row for row in events if row["event"] == "shard_tick" and row["shard"] == index]
        assert [row["t_ns"] for row in found] == [row["t_ns"] for row in mine]
    assert [row["event"] for row in events if not row["event"].startswith("shard_")] == [
        *("level_start", "issue_end", "level_end")
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loadbench": "0.0.9"}, "found loadbench 0.1.0 and 0.0.9"),
        ({"scenario": {"name": "edge", "seed": 7}}, 'found scenario.warmup {"requests":2} and none'),
        ({"started": "2026-11-22T14:30:00Z"}, "found start 2026-11-22T14:20:00.123Z and 2026-11-22T14:30:00Z"),
        ({"models": [model_row("other:1")]}, "found models[0] synthetic-edge:1 and other:1"),
        ({"shard": {"index": 1, "count": 3, "machine": "m"}}, "found shards 2 and 3"),
    ],
)
def test_shards_of_different_runs_are_refused_with_the_first_thing_that_differs(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    parts = [shard(tmp_path, 0), shard(tmp_path, 1, **change)]
    with pytest.raises(UsageError) as refused:
        read_parts(parts)
    assert str(refused.value).startswith(f"{parts[0]} and {parts[1]}: expected shards of one run, ")
    assert told in str(refused.value)


def test_a_shard_that_is_there_twice_and_a_run_that_is_none_are_refused(tmp_path: Path) -> None:
    first, copy = shard(tmp_path, 0), shard(tmp_path / "copy", 0)
    with pytest.raises(UsageError, match="expected each shard once, found shard 0/2 in both"):
        read_parts([first, copy])
    own = write_run(tmp_path / "own", [Planned(Closed(1))])
    with pytest.raises(UsageError, match="expected a run made with --shard, found one of its own"):
        read_parts([first, own])


def test_a_shard_of_which_half_was_copied_is_refused_or_named_and_its_levels_are_not_complete(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    samples = (parts[1] / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (parts[1] / "samples.jsonl").write_bytes(b"".join(samples[: len(samples) // 2]))
    summary = summarise(read(together(parts, tmp_path / "out")))
    assert (exit_code(summary), summary.levels[0].complete) == (94, False)
    told = "samples.jsonl and telemetry.jsonl of shard 1/2 do not belong together: copied in part"
    assert why(summary, 94).endswith(told)
    (parts[1] / "samples.jsonl").write_bytes(b"".join(samples))
    rewrite(parts[1], "telemetry.jsonl", lambda row: row | ({"ended": 10**4} if row["event"] == "tick" else {}))
    assert read(together(parts, tmp_path / "ticks")).facts["reason"] == told
    for name in ("samples.jsonl", "telemetry.jsonl", "histograms.hlog"):
        whole = (parts[0] / name).read_bytes()
        (parts[0] / name).unlink()
        with pytest.raises(UsageError, match=f"expected the three files of a shard, found no {name}"):
            read_parts(parts)
        (parts[0] / name).write_bytes(whole)


def test_lines_that_cannot_be_read_are_counted_and_told(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    for name, torn in (("samples.jsonl", '{"lev\n7\n'), ("telemetry.jsonl", '{"t\n'), ("histograms.hlog", "Tag=x,1\n")):
        with (parts[1] / name).open("a") as file:
            file.write(torn)
    with (parts[0] / "histograms.hlog").open("a") as file:
        file.write("".join(f"Tag=gap.chat.L0,{start},1.0,1.0,HISTFAAAA\n" for start in ("inf", "nan", "1e300", "3.0")))
    run = read(together(parts, tmp_path / "out"))
    assert run.facts["torn"] == {"samples.jsonl": 2, "telemetry.jsonl": 1, "histograms.hlog": 5}
    told = [caution.reason for caution in summarise(run).cautions if caution.about == "torn"]
    assert "5 unreadable lines in histograms.hlog left out when shards were put together" in told
    assert len(told) == 3 and run.facts["status"] == "complete"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"models": None}, "'NoneType' object is not iterable"),
        ({"shard": {"index": "a", "count": 2, "machine": "m"}}, "shard a of 2"),
        ({"shard": {"index": 7, "count": 2, "machine": "m"}}, "shard 7 of 2"),
        ({"shard": [1]}, "list indices must be integers"),
        ({"status": "wat"}, "status wat"),
        ({"anchors": {}}, "found none with 'start'"),
        ({"shards": [], "shard": None}, "found one of its own"),
        ({"shards": [1]}, "found one of shards that are together already"),
    ],
)
def test_a_run_json_that_is_none_of_ours_is_one_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_parts([shard(tmp_path, 0), shard(tmp_path, 1, **change)])
    assert str(refused.value).startswith(str(tmp_path / "part-1")) and told in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "of"),
    [
        ("telemetry.jsonl", {"target": {"state": "wat", "evidence": []}}, "level_end"),
        ("telemetry.jsonl", {"client": None}, "level_end"),
        ("telemetry.jsonl", {"level": [], "event": "level_start"}, None),
        ("samples.jsonl", {"done_ns": "soon"}, None),
    ],
)
def test_a_line_that_is_none_of_ours_is_told_with_its_place(
    tmp_path: Path, name: str, change: dict[str, Any], of: str | None
) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    rewrite(parts[1], name, lambda row: row | (change if row.get("event") == of or not of else {}))
    with pytest.raises(UsageError) as refused:
        together(parts, tmp_path / "out")
    place = f"{parts[1] / name}:{len(rows(parts[1] / name)) if of else 1}: "  # the level ends last
    assert str(refused.value).startswith(place + "expected a line as loadbench run writes it, found ")
    assert not (tmp_path / "out").exists()


def test_a_run_goes_to_a_link_or_to_where_one_is_and_not_into_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    together(parts, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "run.json").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    together(parts, Path())
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        ("run.json", "samples.jsonl", "telemetry.jsonl", "histograms.hlog")
    )
    with pytest.raises(UsageError, match="expected a directory that is not inside a shard"):
        together(parts, parts[0] / "merged")


def test_missing_shards_are_named_and_make_the_run_invalid(tmp_path: Path) -> None:
    for index in (0, 3):
        shard(tmp_path / "parts", index, 4)
    done = loadbench("merge", "parts", "-o", "out", "--quiet", cwd=tmp_path)
    assert done.returncode == 94, done.stderr
    assert done.stderr == "loadbench: result invalid: shards 1 and 2 of 4 are missing\n"
    assert "shard 0's of 2 (on 1 machine, load processes: 2)" in (tmp_path / "out" / "report.md").read_text()
    assert not any(
        level["complete"] for level in orjson.loads((tmp_path / "out" / "summary.json").read_bytes())["levels"]
    )
    assert not (tmp_path / "results").exists()
    noted = loadbench("merge", "parts", "-o", "results/whole", "--quiet", cwd=tmp_path)
    (row,) = rows(tmp_path / "results" / "history.jsonl")
    assert (noted.returncode, row["path"], row["commit"], row["status"]) == (94, "whole", None, "failed")
    bare = loadbench("merge", "parts", "-o", "bare", "--no-report", cwd=tmp_path)
    assert (bare.returncode, bare.stderr) == (94, done.stderr)
    assert not (tmp_path / "bare" / "report.md").exists()


@pytest.mark.parametrize(
    ("facts", "status", "code", "told"),
    [
        ({"status": "interrupted"}, "interrupted", 130, "shard 1/2 was interrupted"),
        ({"status": "failed", "reason": "disk"}, "failed", 94, "shard 1/2 failed: disk"),
        ({"status": "target_died", "reason": "gone"}, "target_died", 93, "shard 1/2 saw the target die: gone"),
        ({"status": "running"}, "failed", 94, "shard 1/2 was cut off"),
    ],
)
def test_what_became_of_a_shard_becomes_of_the_run(
    tmp_path: Path, facts: dict[str, Any], status: str, code: int, told: str
) -> None:
    summary = summarise(read(together([shard(tmp_path, 0), shard(tmp_path, 1, **facts)], tmp_path / "out")))
    assert (summary.status, summary.reason) == (status, told)
    assert exit_code(summary) == code
    if code != 130:
        assert told in why(summary, code)


def test_a_shard_that_was_killed_gives_what_it_had_written(tmp_path: Path) -> None:
    whole, cut = shard(tmp_path, 0), shard(tmp_path, 1, status="running")
    telemetry = (cut / "telemetry.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "telemetry.jsonl").write_bytes(b"".join(telemetry[:5]) + telemetry[5][:20])
    samples = (cut / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "samples.jsonl").write_bytes(b"".join(samples[:40]) + samples[40][:20])
    run = read(together([whole, cut], tmp_path / "out"))
    assert len(run.samples) == len(rows(whole / "samples.jsonl")) + 40
    (level,) = run.levels
    assert level.end is not None and level.end["complete"] is False
    assert level.issue_end_ns is not None
    assert summarise(run).levels[0].littles_law_error is None  # nobody counted what it had in flight


def test_the_clocks_of_several_machines_are_doubted_and_those_of_one_are_not(tmp_path: Path) -> None:
    for machines, doubted in ((("a", "a"), False), (("a", "b"), True)):
        folder = tmp_path / "".join(machines)
        parts = [shard(folder, index, machine=machine) for index, machine in enumerate(machines)]
        summary = summarise(read(together(parts, folder / "out")))
        assert any(caution.about == "clocks_unknown" for caution in summary.cautions) is doubted


def test_many_samples_stay_where_they_are_and_are_read_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    joined = summarise(read(together(parts, tmp_path / "joined")))
    monkeypatch.setattr(merge, "MOST_JOINED_BYTES", 0)
    out = together(parts, tmp_path / "out")
    (out / "shards" / ".DS_Store").touch()  # as a file manager leaves it
    for index, part in enumerate(parts):
        assert (out / "shards" / str(index) / "samples.jsonl").samefile(part / "samples.jsonl")
    assert (out / "samples.jsonl").read_bytes() == b""
    assert summarise(read(out)) == joined


@pytest.mark.parametrize("moved", [None, 0, 1, 2])
def test_workers_that_wrote_too_much_to_join_are_merged_but_for_their_samples_wherever_it_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int | None
) -> None:
    monkeypatch.setattr(merge, "MOST_JOINED_BYTES", 0)
    for part, done in ((tmp_path, [1]), (tmp_path / "shards" / "0", [2, 4]), (tmp_path / "shards" / "1", [3])):
        part.mkdir(parents=True, exist_ok=True)
        lines = "".join(f'{{"done_ns": {ns}, "t_ns": {ns}, "event": "tick"}}\n' for ns in done)
        for name in ("samples.jsonl", "telemetry.jsonl", "histograms.hlog"):
            (part / name).write_text(lines)
    if moved is None:
        merge_shards(tmp_path, 0)
        assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
            *("histograms.hlog", "samples.jsonl", "samples.jsonl", "samples.jsonl", "telemetry.jsonl")
        ]
    else:  # what a kill leaves after so many files have been moved
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / merge.SIDE_BY_SIDE).touch()
        for place, name in enumerate(("telemetry.jsonl", "histograms.hlog")):
            ((tmp_path if place < moved else tmp_path / "merged") / name).write_text("")
    found = [row["done_ns"] for path in merge.parts(tmp_path, "samples.jsonl") for row in rows(path)]
    assert sorted(found) == [1, 2, 3, 4]
    assert merge.parts(tmp_path, "histograms.hlog")[0].exists()


def test_a_directory_that_is_not_empty_is_refused_and_a_merge_that_fails_leaves_nothing(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    with pytest.raises(UsageError, match=r"expected a new or an empty directory"):
        together(parts, parts[0])
    rewrite(parts[1], "telemetry.jsonl", lambda row: {"event": row["event"]})
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(
        UsageError, match=r"part-1/telemetry\.jsonl:1: expected a line as loadbench run writes it, found t_ns missing"
    ):
        together(parts, empty)
    assert {path.name for path in tmp_path.iterdir()} == {"part-0", "part-1", "empty"}
    assert list(empty.iterdir()) == []


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    parts = [shard(tmp_path, index) for index in (0, 1)]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="the shards cannot be put together: Not a directory"):
        together(parts, tmp_path / "file" / "out")


def log(path: Path, seed: int) -> Path:
    """Five seconds of two tags, one of which has the odd value that fits no bucket, and a torn line."""
    draw = np.random.default_rng(seed)
    with path.open("w", encoding="ascii") as out:
        writer = HlogWriter(out, STARTED_NS)
        for second in range(5):
            for tag, least in (("gap.chat.L0", 0), ("lag.chat.L0", -5)):
                hdr = Hdr()
                hdr.add(np.append(draw.lognormal(17, 1, 200), least or 1e6).astype(np.int64))
                writer.write(tag, second * 10**9 + seed * 10**6, (second + 1) * 10**9, hdr)
        out.write("Tag=gap.chat.L0,4.0,1.0,3.0,HISTFA")
    return path


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_logs_are_added_up_to_the_last_count_in_one_process_or_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    logs = [log(tmp_path / f"{seed}.hlog", seed) for seed in range(5)]
    if processes > 1:
        monkeypatch.setattr(sums, "SHARE_BYTES", 1)
        monkeypatch.setattr(os, "cpu_count", lambda: processes)
    assert sums.add_up([*logs, tmp_path / "missing.hlog"], STARTED_NS, tmp_path / "sum.hlog") == len(logs)  # are torn
    found = list(HlogReader(tmp_path / "sum.hlog"))
    assert [(one.tag, int(one.start_s)) for one in found] == [
        (tag, second) for second in range(5) for tag in ("gap.chat.L0", "lag.chat.L0")
    ]
    assert counts(tmp_path / "sum.hlog") == counts(*logs)
    intervals = [one for log in logs for one in HlogReader(log)]
    for one in found:
        parts = [other for other in intervals if (other.tag, int(other.start_s)) == (one.tag, int(one.start_s))]
        assert one.hdr.max_ns == max(part.hdr.max_ns or 0 for part in parts)
        assert one.start_s == min(part.start_s for part in parts)
        assert one.start_s + one.length_s == pytest.approx(max(part.start_s + part.length_s for part in parts))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{n}.hlog" for n in range(5)), "sum.hlog"]


def test_a_process_that_cannot_write_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [log(tmp_path / f"{seed}.hlog", seed) for seed in range(2)]
    monkeypatch.setattr(sums, "SHARE_BYTES", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(OSError, match="No such file or directory"):
        sums.add_up(logs, STARTED_NS, tmp_path / "nowhere" / "sum.hlog")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_process_that_was_killed_is_named_with_the_signal_and_one_whose_parent_has_gone_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck.hlog")  # opening it waits for a writer that never comes
    for end, told in (
        ("kill", "was killed by SIGKILL, likely for want of memory"),
        ("close", "ended with exit code 1"),
    ):
        with sums._process([tmp_path / "stuck.hlog"], STARTED_NS, tmp_path / "out.hlog") as process:
            assert process.stdin is not None
            process.kill() if end == "kill" else process.stdin.close()
            assert sums._ended(process.wait(20)) == told


def test_a_part_knows_its_name(tmp_path: Path) -> None:
    (part,) = read_parts([shard(tmp_path, 1)])
    assert isinstance(part, Part) and part.name == "shard 1/2"
