"""Memory limits for the embedded service, and what it means to go beyond them: all on the real Foundry Local."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadbench.errors import UsageError
from loadbench.target.containment import CGROUP_V2, RLIMIT_DATA, Limit, _make_cgroup, limit_for
from tests.embedded import embedded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set and watched as on Linux")
GIB, MIB = 1 << 30, 1 << 20

TAKE = """
import sys
taken = []
try:
    for _ in range(int(sys.argv[1])):
        taken.append(bytearray(1 << 20))
except MemoryError:
    print("refused")
    raise SystemExit(3)
print("taken")
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models are made once for all these tests."""
    os.environ["LOADBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def take(limit: Limit) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(limit.command, capture_output=True, text=True, timeout=20, check=False)
    finally:
        limit.release()


def taking(mib: int) -> list[str]:
    return [sys.executable, "-c", TAKE, str(mib)]


def needs_cgroup() -> None:
    limit = limit_for(["true"], GIB)
    limit.release()
    if not limit.kills:
        pytest.skip(f"no cgroup can be made here: {limit.instead_of}")


def test_under_rlimit_data_an_allocation_fails_and_the_process_sees_to_it() -> None:
    assert take(limit_for(taking(10), 128 * MIB, RLIMIT_DATA)).stdout == "taken\n"
    ended = take(limit_for(taking(300), 128 * MIB, RLIMIT_DATA))
    assert (ended.stdout, ended.returncode) == ("refused\n", 3)


def test_in_a_cgroup_the_kernel_kills_and_counts_it_and_nothing_is_left() -> None:
    needs_cgroup()
    limit = limit_for(taking(300), 128 * MIB)
    ended = subprocess.run(limit.command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.stdout, ended.returncode, limit.oom_kills) == ("", -signal.SIGKILL, 1)
    assert limit.peak_bytes is not None and 0.9 * 128 * MIB < limit.peak_bytes <= 128 * MIB
    assert limit.folder is not None and limit.folder.is_dir()
    limit.release()
    assert not limit.folder.exists()


def test_a_limit_says_what_holds_it_and_why_nothing_better_does() -> None:
    asked = limit_for(["true"], GIB, RLIMIT_DATA)
    assert asked.as_json() == {"kind": "RLIMIT_DATA", "bytes": GIB, "instead_of": "it was asked for"}
    best = limit_for(["true"], GIB)
    best.release()
    assert best.kind.startswith("cgroup") or (best.kind == RLIMIT_DATA and best.instead_of)


def test_where_no_cgroup_may_be_made_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readonly = Path("/proc")
    monkeypatch.setattr("loadbench.target.containment._hierarchies", lambda: [("cgroup v2", readonly)])
    limit = limit_for(["true"], GIB)
    assert limit.kind == RLIMIT_DATA
    assert limit.instead_of is not None and limit.instead_of.startswith("no cgroup v2 in /proc: ")


def test_a_cgroup_whose_run_was_killed_is_removed_by_the_next_one() -> None:
    needs_cgroup()
    first = limit_for(["true"], GIB)
    assert first.folder is not None
    nobody = first.folder.with_name("loadbench-4194305-left")  # a pid beyond the highest that Linux gives
    first.release()
    nobody.mkdir()
    limit_for(["true"], GIB).release()
    assert not nobody.exists()


def plain_hierarchy(root: Path, ours: str) -> Path:
    """Folders with the files that cgroup v2 has, for a machine that has v1: what is written where can be read there."""
    here = root / ours
    here.mkdir(parents=True)
    for folder in (here, here.parent):
        (folder / "cgroup.type").write_text("domain\n")
        (folder / "cgroup.subtree_control").write_text("cpu memory\n" if folder != here else "")
    return here


def test_in_cgroup_v2_the_child_goes_beside_us_since_ours_has_processes(tmp_path: Path) -> None:
    here = plain_hierarchy(tmp_path, "user.slice/ours.scope")
    folder = _make_cgroup(CGROUP_V2, here, GIB)
    assert folder.parent == here.parent and (folder / "memory.max").read_text() == str(GIB)
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    (folder / "memory.peak").write_text("1073741824\n")
    limit = Limit(CGROUP_V2, GIB, (), folder=folder)
    assert (limit.oom_kills, limit.peak_bytes, limit.kills) == (2, GIB, True)


def test_a_cgroup_of_a_kernel_too_old_to_tell_its_peak_says_nothing_of_it(tmp_path: Path) -> None:
    limit = Limit(CGROUP_V2, GIB, (), folder=tmp_path)
    assert (limit.oom_kills, limit.peak_bytes) == (None, None)


def test_a_limit_beyond_the_machine_holds_nothing_and_is_refused_without_an_exponent() -> None:
    with pytest.raises(UsageError, match=r"no more than this machine's [\d,.]+ GiB, got 921,600.0 GiB$"):
        limit_for(["true"], 900 << 40)


def test_where_no_limit_can_be_held_the_message_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match=r"got darwin, which enforces none; go without one: --set memory_limit=null$"):
        limit_for(["true"], 64 << 20)


# --- the service under a limit ----------------------------------------------------------------------------------------


async def test_a_service_that_fits_its_limit_is_healthy_and_its_limit_is_in_the_facts() -> None:
    async with embedded("synthetic:kv", GIB) as asked:
        state, words = await asked.verdict(await asked.ask(2, 20, 100))
        assert state == "healthy" and len(words) == 1
        assert asked.target.facts()["facts"]["memory_limit"]["bytes"] == GIB


async def test_allocations_that_fail_and_that_it_survives_are_told_as_reported() -> None:
    # 90 MiB and 125 of cache for a single one: none of them fits.
    async with embedded("synthetic:kv", 192 * MIB, RLIMIT_DATA) as asked:
        samples = await asked.ask(4, 20, 8000)
        assert [sample.outcome for sample in samples] == ["out_of_memory"] * 4
        state, words = await asked.verdict(samples)
        assert state == "oom_reported" and words[-1] == "4 requests failed for want of memory and it lives"


async def test_an_abort_for_want_of_memory_is_a_crash_with_that_as_its_likely_cause() -> None:
    # A request takes a thread, and a thread 8 MiB of stack to be had: 128 of them are the limit. The exception that the
    # 120th throws is caught by nobody.
    async with embedded("synthetic:kv", GIB, RLIMIT_DATA) as asked:
        state, words = await asked.verdict(await asked.ask(200, 20, 100))
        assert asked.target.foundry is not None and asked.target.foundry.returncode == -signal.SIGABRT
        assert state == "crashed"
        assert words[0] == "the service's process ended: killed by SIGABRT"
        assert "it ran under a limit of 1024 MiB (RLIMIT_DATA)" in words
        assert words[-1] == "likely cause: want of memory"


async def test_a_kill_by_the_kernel_is_told_with_its_count_as_evidence() -> None:
    needs_cgroup()
    async with embedded("synthetic:kv", 192 * MIB) as asked:
        samples = await asked.ask(4, 20, 8000)
        assert {sample.outcome for sample in samples} <= {"connection_lost", "connect_refused"}
        state, words = await asked.verdict(samples)
        assert state == "oom_killed"
        assert "its cgroup's count of processes killed for want of memory rose from 0 to 1" in words
        if asked.target.kernel_log_absent is None:
            assert any(line.startswith("the kernel's log: ") and "Killed process" in line for line in words)


async def test_a_kill_by_somebody_else_under_a_limit_is_not_taken_for_want_of_memory() -> None:
    async with embedded("synthetic:kv", GIB) as asked:
        assert asked.target.foundry is not None
        os.kill(asked.target.foundry.pid, signal.SIGKILL)
        state, words = await asked.verdict([])
        assert (state, words) == (
            "crashed",
            [
                "the service's process ended: killed by SIGKILL",
                "the kernel counted no kill for want of memory",
                "cause not established",
            ],
        )


# --- what the cache takes, against arithmetic -------------------------------------------------------------------------


def status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def begin_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")


PROMPT_TOKENS = 150  # a tensor of the cache is 512 B a token: none is ever below the 64 KiB of the growing test


async def peak_growth(name: str, streams: int, max_tokens: int, total_s: float) -> int:
    """By how many bytes a fresh service grows at its highest. Fresh: what glibc keeps of one load hides the next's."""
    async with embedded(name) as asked:
        await asked.canary()
        assert asked.target.foundry is not None
        pid = asked.target.foundry.pid
        before = status_bytes(pid, "VmRSS")
        begin_peak(pid)
        await asked.ask(streams, PROMPT_TOKENS, max_tokens, total_s=total_s)
        return status_bytes(pid, "VmHWM") - before


@pytest.mark.parametrize(("streams", "max_tokens"), [(1, 4000), (4, 2000)])
async def test_a_cache_that_is_reserved_takes_what_the_arithmetic_says(streams: int, max_tokens: int) -> None:
    # All of it from the first token on: the answers need not be awaited.
    grown = await peak_growth("synthetic:kv", streams, max_tokens, total_s=1.5)
    assert grown == pytest.approx(streams * (PROMPT_TOKENS + max_tokens) * (16 << 10), rel=0.15)


async def test_a_cache_that_grows_takes_twice_the_arithmetic_at_its_peak() -> None:
    short, long = [await peak_growth("synthetic:kv-growing", 1, tokens, total_s=15) for tokens in (100, 400)]
    assert (long - short) / 300 == pytest.approx(2 * (16 << 10), rel=0.15)
