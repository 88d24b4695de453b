"""What differs between operating systems: event loop, child processes, quick acknowledgements, open files, locks.

Linux is run here; the Windows and macOS sides are written from their documentation.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.metadata
import os
import platform
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_TCP_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux


def run_in_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run the program in the fastest event loop there is: uvloop, on Windows winloop, else asyncio's own."""
    return asyncio.Runner(loop_factory=loop_factory()).run(main)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the fastest event loop that is installed; None: asyncio's own."""
    try:
        module = importlib.import_module("winloop" if sys.platform == "win32" else "uvloop")
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = module.new_event_loop
    return factory


def loop_name() -> str:
    """The running event loop, with its version, for the run's record."""
    module = type(asyncio.get_running_loop()).__module__.split(".")[0]
    return module if module == "asyncio" else f"{module} {importlib.metadata.version(module)}"


def acknowledge_at_once(sock: socket.socket) -> None:
    """Make the kernel acknowledge what it has, now. Linux forgets the wish at every send: ask after every read.

    Foundry Local 2.2.1 leaves Nagle on and writes token by token. Against a delayed acknowledgement (40 ms on Linux)
    its kernel then holds back what it has, and the first token of every request but a connection's first arrived in one
    read with all of the next 40 ms: TTFT read 43 ms, whatever it was. Costs 0.7 µs.
    """
    if _TCP_QUICKACK is not None:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 1)


def acknowledge_always(sock: socket.socket) -> None:
    """Once per connection, where the wish is lasting: Windows (SIO_TCP_SET_ACK_FREQUENCY 1). macOS has no such wish."""
    if sys.platform == "win32":
        import ctypes

        one, returned = ctypes.c_ulong(1), ctypes.c_ulong()
        ctypes.windll.ws2_32.WSAIoctl(
            sock.fileno(), 0x98000017, ctypes.byref(one), 4, None, 0, ctypes.byref(returned), None, None
        )


def raise_open_file_limit() -> None:
    """A stream is a file descriptor; shells start with 256 (macOS) or 1,024 (Linux) and allow far more."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


LOCKED_AT = 1 << 30
"""The byte that is locked on Windows, far beyond the end of any of our files: what is locked cannot be read there."""


def try_lock(descriptor: int) -> bool:
    """Take the lock on an open file unless another has it. It is gone with who holds it, however that ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, LOCKED_AT, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Linux and macOS; Windows
        return False
    return True


def apart() -> dict[str, Any]:
    """Keywords that start a process out of reach of the terminal's Ctrl-C: it has to work until we have drained."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def clock_id() -> str:
    """The same for all processes and containers that read one machine's clocks; it names neither machine nor user."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # Linux: containers have names of their own and this in common
    told = boot.read_text() if boot.exists() else f"{platform.node()} {uuid.getnode()}"
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def describe_exit(code: int) -> str:
    """An exit code in words; negative ones are signals, as Python's subprocess reports them."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
