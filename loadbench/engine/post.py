"""The post office of one load process on a machine of a cluster: starts it there, and passes on what goes to and fro.

It lives in a process of Ray's and measures nothing. Stamps taken there would wait for that process' own threads, which
share its interpreter lock: the load process is a child with an event loop of its own, the same that ``--workers``
starts on one machine. What it writes lies on its machine's disk until it is fetched; when its stdin closes, because
this process has ended in whatever way, it ends.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any, BinaryIO, NamedTuple

import loadbench
from loadbench.platform import apart

WRITTEN = ("samples.jsonl", "telemetry.jsonl", "histograms.hlog")
"""What a load process writes."""

PIECE_BYTES = 1 << 20
"""So much of what was written is fetched at once, at most: 10 ms of a gigabit line."""

REACH_TIMEOUT_S = 5.0

FORGOTTEN_S = 30.0
"""Asked for no post for so long, which is asked for four times a second, it is cut off from the run: a line broke, or
the cluster gave up its node. What it sends then is in nobody's figures."""


class Mail(NamedTuple):
    """What a load process has said and written since the last time; ``code``: it ended so, and that is all of it."""

    lines: list[bytes]
    pieces: dict[str, bytes]
    code: int | None


class Post:
    """One load process. Every method but `take` returns at once; they are called from several threads."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files: dict[str, BinaryIO] = {}
        self._lines: list[bytes] = []
        self._code: int | None = None
        self._news = threading.Condition()
        self._asked_s: float | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def open(self, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Start the process in a folder that has these files; returns where it is and what it is made of."""
        self._folder = folder = Path(tempfile.mkdtemp(prefix="loadbench-"))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        for name in WRITTEN:
            (folder / name).touch()
            self._files[name] = (folder / name).open("rb", buffering=0)
        # Whatever made this package importable here may not hold for a child: it is to be the same one.
        ours = str(Path(loadbench.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadbench.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            **apart(),
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        return {
            "node": socket.gethostname(),
            "pid": self._process.pid,
            "post_pid": os.getpid(),
            "folder": str(folder),
            "loadbench": loadbench.__version__,
            "python": platform.python_version(),
        }

    def now_ns(self) -> int:
        """This machine's clock, which is its load process' too: on Linux, macOS and Windows all processes share it."""
        return perf_counter_ns()

    def reaches(self, host: str, port: int) -> str | None:
        """Why an address cannot be connected to from here, None: it can."""
        try:
            socket.create_connection((host, port), REACH_TIMEOUT_S).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def tell(self, lines: bytes) -> None:
        """Pass on orders; to a process that has ended nothing is said any more."""
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(lines)
            self._process.stdin.flush()

    def take(self, wait_s: float) -> Mail:
        """What is new, as soon as it has said something, at the latest after so long.

        What it says is handed over when all that it had written by then has been: who hears that a level has been
        measured has its samples.
        """
        watched, self._asked_s = self._asked_s is not None, time.monotonic()
        if not watched:
            threading.Thread(target=self._watch, daemon=True).start()
        with self._news:
            self._news.wait_for(lambda: self._lines or self._code is not None, wait_s)
            lines, code = list(self._lines), self._code
        pieces, room = {}, PIECE_BYTES
        for name, file in self._files.items():
            if piece := file.read(room):
                pieces[name] = piece
                room -= len(piece)
        if not room:  # there may be more
            return Mail([], pieces, None)
        with self._news:
            del self._lines[: len(lines)]
        return Mail(lines, pieces, code)

    def kill(self) -> None:
        """End the process by force."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Remove what it wrote, all of which has been fetched."""
        for file in self._files.values():
            file.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self) -> None:
        while time.monotonic() - (self._asked_s or 0.0) < FORGOTTEN_S:
            time.sleep(1.0)
        os._exit(1)  # and with its stdin the load process ends, too

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._news:
                self._lines.append(line)
                self._news.notify_all()
        code = process.wait()
        with self._news:
            self._code = code
            self._news.notify_all()
