"""The memory of a process tree, and whose process it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from loadbench.target import processes
from loadbench.target.processes import ProcessTree, find_process, is_this_machine

MEBIBYTE = 1 << 20
HOLD = "import sys; held = bytearray(b'x' * int(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"


@contextmanager
def _process(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code that prints ``ready``, then waits for the end of its input."""
    command = [sys.executable, "-c", code, *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_resident_bytes_are_those_that_the_process_holds() -> None:
    with _process(HOLD, "0") as small, _process(HOLD, str(64 * MEBIBYTE)) as large:
        figures = [ProcessTree(process.pid).sample() for process in (small, large)]
    assert figures[0] is not None and figures[1] is not None
    assert figures[0].processes == figures[1].processes == 1
    assert 60 * MEBIBYTE < figures[1].rss_bytes - figures[0].rss_bytes < 72 * MEBIBYTE


PARENT = f"""
import subprocess, sys
while True:
    command = [sys.executable, "-c", {HOLD!r}, "33554432"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    print("ready", flush=True)
    sys.stdin.readline()
    child.kill()
    child.wait()
    print("alone", flush=True)
    sys.stdin.readline()
"""


def test_children_count_one_that_ended_no_longer_does_and_its_successor_does() -> None:
    with _process(PARENT) as process:
        assert process.stdin is not None and process.stdout is not None
        tree = ProcessTree(process.pid)
        seen = [tree.sample()]
        for said in ("alone\n", "ready\n"):
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == said
            seen.append(tree.sample())
    assert [figures and figures.processes for figures in seen] == [2, 1, 2]
    assert seen[0] is not None and seen[1] is not None and seen[0].rss_bytes - seen[1].rss_bytes > 32 * MEBIBYTE


def test_a_child_that_came_later_is_found_when_asked_for_or_when_the_list_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me = ProcessTree(os.getpid())
    before = me.sample()
    with _process(HOLD, "0"):
        seen = [me.sample(), me.sample(relist=True)]
        with _process(HOLD, "0"):
            monkeypatch.setattr(processes, "RELIST_NS", 0)
            seen.append(me.sample())
    assert before is not None
    assert [figures and figures.processes - before.processes for figures in seen] == [0, 1, 2]


def test_a_process_that_has_ended_has_no_figures_even_before_its_parent_knows() -> None:
    with _process(HOLD, "0") as process:
        tree = ProcessTree(process.pid)
        assert tree.sample() is not None
        process.kill()
        if sys.platform == "linux":
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until it is reaped
            assert tree.sample() is None
        process.wait()
        assert tree.sample() is None
    assert ProcessTree(process.pid).sample() is None


def test_loopback_and_own_interfaces_are_this_machine_and_others_are_not() -> None:
    own = {a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET}
    for ip in {"127.0.0.1", "127.9.9.9", "::1"} | own:
        assert is_this_machine(ip)
    assert not is_this_machine("192.0.2.1")  # TEST-NET-1: nobody's
    assert not is_this_machine("2001:db8::1")


def test_a_pid_counts_only_if_that_process_listens_on_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, _process(HOLD, "0") as other:
        port = listening.getsockname()[1]
        assert find_process("127.0.0.1", port, os.getpid(), None) == (os.getpid(), None)
        pid, reason = find_process("127.0.0.1", port, other.pid, None)
        assert pid is None and reason is not None and "does not listen on port" in reason
    pid, reason = find_process("127.0.0.1", port, os.getpid(), None)
    assert pid is None and reason is not None and "behind a tunnel or in a container" in reason


def test_a_pid_of_another_machine_is_not_looked_up_here() -> None:
    assert find_process("192.0.2.1", 5273, os.getpid(), None) == (None, "the endpoint is on another machine")


def test_a_pid_that_nobody_has_is_said_to_be_none() -> None:
    with _process(HOLD, "0") as gone:
        pass
    pid, reason = find_process("127.0.0.1", 5273, gone.pid, None)
    assert pid is None and reason is not None and f"no process {gone.pid} on this machine" in reason


def test_without_a_pid_the_listener_of_the_port_is_taken_if_it_is_the_server_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        name = psutil.Process().name()
        assert find_process("127.0.0.1", port, None, name) == (os.getpid(), None)
        pid, reason = find_process("127.0.0.1", port, None, "ollama")  # as where ssh forwards the port
        assert pid is None and reason == f"port {port} is served by {name}, which does not hold the models itself"
        pid, how = find_process("127.0.0.1", port, None, None)  # a kind of server whose process has no name to go by
        assert pid == os.getpid() and how is not None and how.startswith(f"{name} ({pid}) on port {port}: what listens")
    pid, reason = find_process("127.0.0.1", port, None, None)
    assert (pid, reason) == (None, f"port {port} is not listened on")


def test_a_listener_that_is_known_to_serve_for_others_is_not_taken_for_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(processes, "CARRIERS", psutil.Process().name())
        pid, reason = find_process("127.0.0.1", port, None, None)
    assert pid is None and reason is not None and reason.endswith("does not hold the models itself")
