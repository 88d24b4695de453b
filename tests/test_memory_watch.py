"""What a watch reads of a real process: resident, shared, highest; what is absent, and how often it looks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from loadbench.target.memory import MemoryWatch, Roots
from loadbench.target.memory_figures import GpuFigures, MemoryFigures
from loadbench.target.processes import find_service
from loadbench.vigil import in_gpus

MEBIBYTE = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Takes so many MiB at each line, gives all back at an empty one.
HOLD = """
import sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    if line.strip():
        held.append(bytearray(int(line) << 20))
        held[-1][::4096] = b"x" * (len(held[-1]) // 4096)
    else:
        held.clear()
    print("done", flush=True)
"""


class Child:
    """A process that holds as much as it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def hold(self, mebibytes: int | None) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{'' if mebibytes is None else mebibytes}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def child() -> Iterator[Child]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield Child(process)
        finally:
            process.kill()


def grew(after: int | None, before: int | None) -> float:
    """By how many MiB."""
    assert after is not None and before is not None
    return (after - before) / MEBIBYTE


@linux
def test_what_a_process_takes_shows_in_resident_shared_and_unique_bytes_and_in_the_peak_after_it_gave_it_back() -> None:
    with child() as it:
        watch = MemoryWatch(it.pid)
        before = watch.read()
        it.hold(200)
        held = watch.read(everything=True)
        it.hold(None)
        after = watch.read(everything=True)
        watch.reset_peak()
        reset = watch.read()
    for figure in ("rss_bytes", "pss_bytes", "uss_bytes", "peak_rss_bytes"):
        assert 196 < grew(getattr(held, figure), getattr(before, figure)) < 212, figure
    assert grew(held.rss_bytes, after.rss_bytes) > 190
    assert grew(after.peak_rss_bytes, before.rss_bytes) > 196
    assert abs(grew(reset.peak_rss_bytes, reset.rss_bytes)) < 2
    assert before.processes == 1 and before.swap_bytes is not None


@linux
def test_a_process_that_ended_is_absent_with_the_reason_and_the_machine_is_still_read() -> None:
    with child() as it:
        watch = MemoryWatch(it.pid)
        assert watch.read().processes == 1 and "process" not in watch.absent
    figures = watch.read()
    assert figures.rss_bytes is None and figures.processes is None
    assert watch.absent["process"] == "the process has ended"
    assert figures.total_bytes is not None and figures.available_bytes is not None


def test_without_a_process_the_machine_is_watched_and_the_reason_is_kept() -> None:
    watch = MemoryWatch(None, "the endpoint is in a container")
    figures = watch.read(7)
    assert watch.absent["process"] == "the endpoint is in a container"
    assert figures.t_ns == 7 and figures.rss_bytes is None
    assert 0 < (figures.available_bytes or 0) <= (figures.total_bytes or 0)
    watch.reset_peak()


def test_what_is_none_is_left_out_of_the_json() -> None:
    row = MemoryWatch(None).read(5).as_json()
    assert row["t_ns"] == 5 and "available_bytes" in row
    assert None not in row.values() and "rss_bytes" not in row
    assert row.get("gpus") != ()


def test_devices_that_are_not_there_are_absent_in_one_line_each() -> None:
    watch = MemoryWatch(None, roots=Roots(drm=Path("/nowhere")))
    if "nvidia" in watch.absent:  # else this machine has one
        assert watch.absent["nvidia"] and "\n" not in watch.absent["nvidia"]
        assert watch.read().gpus == ()
    if sys.platform == "linux":
        assert watch.absent["amd"] == "no card of the amdgpu driver"


def test_the_cost_of_reading_is_counted() -> None:
    watch = MemoryWatch(os.getpid())
    for _ in range(20):
        watch.read()
    assert 0 < watch.cost_s < 20 * 0.1


# A recorded tree in which this process holds what the test says.


def _recorded(proc: Path, pid: int, rss_kib: int = 1000, pss_kib: int = 700) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status").write_text(
        f"Name:\tfoundry\nVmHWM:\t    {rss_kib + 9} kB\nVmRSS:\t    {rss_kib} kB\nVmSwap:\t       3 kB\nThreads:\t4\n"
    )
    (folder / "smaps_rollup").write_text(
        "55c49f459000-7ffddc7b8000 ---p 00000000 00:00 0                          [rollup]\n"
        f"Rss:                {rss_kib} kB\nPss:                 {pss_kib} kB\nPss_Dirty:           112 kB\n"
        "Private_Clean:        64 kB\nPrivate_Dirty:       112 kB\n"
    )


@linux
def test_shares_are_read_no_more_than_every_ten_seconds_and_the_rest_each_time(tmp_path: Path) -> None:
    now_ns = 1
    watch = MemoryWatch(os.getpid(), roots=Roots(tmp_path, tmp_path), clock=lambda: now_ns)
    seen = []
    for tenth in range(250):  # 25 s at 10 Hz; each reading finds other files
        _recorded(tmp_path, os.getpid(), 1000 + tenth, 700 + tenth)
        figures = watch.read()
        assert figures.rss_bytes == (1000 + tenth) << 10
        seen += [tenth] if figures.pss_bytes is not None else []
        now_ns += 100_000_000
    assert seen == [0, 100, 200]
    assert watch.read(everything=True).pss_bytes == 949 << 10


@linux
def test_a_dear_source_rests_for_a_hundred_times_what_it_took(tmp_path: Path) -> None:
    steps = iter(range(0, 10**15, 500_000_000))  # each look at the clock is half a second later
    _recorded(tmp_path, os.getpid())
    watch = MemoryWatch(os.getpid(), roots=Roots(tmp_path, tmp_path), clock=lambda: next(steps))
    found = [watch.read().pss_bytes for _ in range(20)]
    assert found == [700 << 10] + 19 * [None]


@linux
def test_a_peak_that_may_not_be_set_back_is_absent_until_it_may(tmp_path: Path) -> None:
    _recorded(tmp_path, os.getpid())
    watch = MemoryWatch(os.getpid(), roots=Roots(tmp_path, tmp_path))
    assert watch.read().peak_rss_bytes == 1009 << 10
    wall = tmp_path / str(os.getpid()) / "clear_refs"
    wall.mkdir()  # what nobody may write to, root neither
    watch.reset_peak()
    assert watch.read().peak_rss_bytes is None
    assert "may not be set back" in watch.absent["peak"]
    wall.rmdir()
    watch.reset_peak()
    assert wall.read_text() == "5"
    assert watch.read().peak_rss_bytes == 1009 << 10 and "peak" not in watch.absent


def test_a_service_is_found_by_pid_and_one_that_is_not_there_is_named() -> None:
    with child() as it:
        assert find_service(pid=it.pid)[0] == it.pid
    assert find_service(pid=it.pid) == (None, f"there is no process {it.pid}")
    pid, reason = find_service(name="no-such-service-anywhere")
    assert pid is None and reason.startswith("no process is called like no-such-service-anywhere")


FORKED = """
import os, socket, sys
listening = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    print(listening.getsockname()[1], flush=True)
sys.stdin.read()
"""


@linux
def test_of_processes_that_share_a_listening_socket_the_parent_is_the_service() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", FORKED], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        pid, what = find_service(port=port)
        watch = MemoryWatch(pid)
        assert (pid, watch.read().processes) == (process.pid, 2)
        assert what.endswith(f"({process.pid}) on port {port}")
        process.stdin.close()
    assert find_service(port=port) == (None, f"port {port} is not listened on")


def test_what_windows_counts_on_the_gpus_comes_before_what_the_driver_does_as_in_the_report() -> None:
    driver = GpuFigures(0, "A100", used_bytes=6 << 30, total_bytes=8 << 30, process_bytes=2 << 30)
    assert in_gpus(MemoryFigures(gpus=(driver,))) == (2 << 30, 8 << 30)
    assert in_gpus(MemoryFigures(gpus=(driver,), gpu_dedicated_bytes=5 << 30)) == (5 << 30, 8 << 30)
    unknown = replace(driver, process_bytes=None)
    assert in_gpus(MemoryFigures(gpus=(unknown,), gpu_dedicated_bytes=5 << 30)) == (5 << 30, 8 << 30)
    assert in_gpus(MemoryFigures(gpu_dedicated_bytes=5 << 30)) == (5 << 30, None)
    assert in_gpus(MemoryFigures()) == (0, None)
