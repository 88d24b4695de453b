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
from types import TracebackType
from typing import Self

LIMIT_S = 1.0
"""An honest pattern takes milliseconds on the longest answer; starting the process is in the first one's time."""

MOST_GIVEN_UP = 3
"""A pattern that was given up so often is looked for no more: a thousand answers must not take a thousand seconds."""

_PROGRAM = """
import json, re, sys
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
        """Whether the pattern is somewhere in the text; None where looking took too long."""
        if self._given_up[pattern] >= MOST_GIVEN_UP:
            return None
        answer = self._ask(json.dumps([pattern, ignore_case, text]).encode() + b"\n")
        if answer not in (b"0", b"1"):
            self._end()
            self._given_up[pattern] += 1
            return None
        return answer == b"1"

    def _ask(self, question: bytes) -> bytes:
        process = self._process
        if process is None or process.poll() is not None:
            pipe = subprocess.PIPE
            command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
            process = self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self._limit_s, process.kill)
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            return process.stdout.readline().strip()
        except OSError:  # killed, or ended by a pattern that it cannot take
            return b""
        finally:
            timer.cancel()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
