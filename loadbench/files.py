"""Writes a file whole: a reader, or a power cut, finds the old one or the new one and never half. And line by line;
and reads the lines of many side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from loadbench.errors import UsageError
from loadbench.platform import try_lock

LOCK_WAIT_S = 10.0  # who adds a line has the lock for less than a millisecond
LOCK_TURN_S = 0.02


def write_whole(path: Path, data: bytes) -> None:
    """Under a temporary name first, then renamed. UsageError where the disk does not take it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: expected a file that can be written, found {error.strerror}") from error


@contextmanager
def locked(path: Path, wait_s: float = 0.0) -> Iterator[FileIO]:
    """The file, made if it is not there, to read and to add to, while no other process has it so.

    BlockingIOError where one still has it after ``wait_s``. Nobody has to clear up after a process that was killed: the
    system takes its lock away.
    """
    with path.open("ab+", buffering=0) as file:
        until = time.monotonic() + wait_s
        while not try_lock(file.fileno()):
            if time.monotonic() >= until:
                raise BlockingIOError(f"{path}: in use")
            time.sleep(LOCK_TURN_S)
        yield file


def add_line(path: Path, line: bytes) -> None:
    """Add a line in one write, after whatever half a line a power cut has left. OSError where that is not possible."""
    with locked(path, LOCK_WAIT_S) as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")


def lines_of(path: Path, block_bytes: int = 1 << 15) -> Iterator[bytes]:
    """The lines of a file with their ends; none where there is no file, and a last one without an end as it is.

    It is opened anew for every block: a thousand files can be read side by side where 256 may be open.
    """
    at, rest = 0, b""
    while path.exists():
        with path.open("rb") as file:
            file.seek(at)
            block = file.read(block_bytes)
        if not block:
            break
        at += len(block)
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest
