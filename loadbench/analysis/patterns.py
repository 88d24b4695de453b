"""Looks for regular expressions in texts that others wrote, and gives up on those that would take for ever.

Python's matcher cannot be stopped from within: ``(a+)+$`` on thirty letters takes minutes. So another process looks,
which can be killed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

LIMIT_S = 1.0
"""An honest pattern takes milliseconds on the longest answer."""

START_LIMIT_S = 60.0  # Python starts in 0.1 s; a cold disk and a virus scanner take longer

MOST_GIVEN_UP = 3
"""A pattern that was given up so often is looked for no more: a thousand answers must not take a thousand seconds."""

_PROGRAM = """
import json, re, sys
sys.stdout.write("ready\\n")
sys.stdout.flush()
for line in sys.stdin:
    pattern, ignore_case, text = json.loads(line)
    found = re.search(pattern, text, re.IGNORECASE if ignore_case else 0)
    sys.stdout.write("1\\n" if found else "0\\n")
    sys.stdout.flush()
"""


class Patterns:
    """`found` by a process that starts when first asked; leave it as a context."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def all_found(self, patterns: Iterable[str], text: str, *, ignore_case: bool) -> bool | None:
        """Whether each is somewhere in the text; None where that was given up, and no other is missing."""
        found = [self.found(pattern, text, ignore_case=ignore_case) for pattern in patterns]
        return False if False in found else None if None in found else True

    def found(self, pattern: str, text: str, *, ignore_case: bool) -> bool | None:
        """Whether the pattern is somewhere in the text; None where looking took too long, or ended who looked."""
        if self._given_up[pattern] >= MOST_GIVEN_UP:
            return None
        answer = self._ask(json.dumps([pattern, ignore_case, text]).encode() + b"\n")
        if answer not in (b"0", b"1"):
            self._end()
            self._given_up[pattern] += 1
            return None
        return answer == b"1"

    def _ask(self, question: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._end()
            pipe = subprocess.PIPE
            command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            self._say(self._process, b"", START_LIMIT_S)  # how long it takes to start is not the pattern's
        return self._say(self._process, question, self._limit_s)

    def _say(self, process: subprocess.Popen[bytes], question: bytes, limit_s: float) -> bytes:
        """What it says to this, or when it has started; nothing where it ends, by the limit or by the pattern."""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            return process.stdout.readline().strip()
        except OSError:
            return b""
        finally:
            timer.cancel()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with suppress(OSError):  # a question that was never read may lie in the pipe still
                self._process.communicate()
            self._process = None
