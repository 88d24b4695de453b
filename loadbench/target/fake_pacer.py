"""Call things at their time, to some tens of microseconds: the clock of the scripted endpoint.

One heap holds everything that is due; one timer wakes the loop for its head. Loop timers would not do: uvloop's are
whole milliseconds and fire up to 1.3 ms early, asyncio's wait is rounded up to a millisecond. On Linux the timer is a
timerfd (absolute, on CLOCK_MONOTONIC, which is the clock of ``perf_counter_ns``); elsewhere the loop's timer ends
early and the rest is spun.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from time import perf_counter_ns
from typing import Protocol

REST_NS = 250_000
"""The shortest sleep. What falls due within it is called together, at most this much late. With 512 streams of an event
every 20 ms, evenly spread, a wake-up for each event cost 23 µs of CPU an event; this costs 7, and 0.15 ms of median
lateness, which the log records."""

TURN_NS = 1_000_000
"""The longest turn. Then the sockets are read before more is written, however far behind the heap is."""


class Pacer:
    """Calls ``call(due_ns)`` once ``perf_counter_ns`` has reached ``due_ns``; never before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._heap: list[tuple[int, int, Callable[[int], None]]] = []
        self._turn = count()
        self._running = False
        self._alarm: _Alarm = _TimerFd(loop, self._run) if sys.platform == "linux" else _LoopTimer(loop, self._run)

    def call_at(self, due_ns: int, call: Callable[[int], None]) -> None:
        """Call at ``due_ns``, or as soon as possible where that is past; equal times are called in order of asking."""
        heap = self._heap
        heappush(heap, (due_ns, next(self._turn), call))
        if not self._running and heap[0][0] == due_ns:
            self._alarm.set(due_ns)

    def postpone(self, by_ns: int) -> None:
        """Move everything that is waiting ``by_ns`` later. The order stays, so the heap stays a heap."""
        self._heap[:] = [(due_ns + by_ns, turn, call) for due_ns, turn, call in self._heap]

    def close(self) -> None:
        self._heap.clear()
        self._alarm.close()

    def _run(self) -> None:
        heap = self._heap
        now_ns = perf_counter_ns()
        stop_ns = now_ns + TURN_NS
        self._running = True
        try:
            while heap and heap[0][0] <= now_ns < stop_ns:
                due_ns, _, call = heappop(heap)
                call(due_ns)
                now_ns = perf_counter_ns()
        finally:
            self._running = False
            if heap:
                self._alarm.set(now_ns if now_ns >= stop_ns else max(heap[0][0], now_ns + REST_NS))
            else:
                self._alarm.clear()


class _Alarm(Protocol):
    def set(self, at_ns: int) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...


class _TimerFd:
    """A timer of the kernel that the loop polls like a socket. Setting it clears what it had to say: no read needed."""

    ABSOLUTE = 1  # TFD_TIMER_ABSTIME, <sys/timerfd.h>

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: giving up the GIL costs more than the call
        self._set_time = libc.timerfd_settime
        self._loop = loop
        self._fd: int = libc.timerfd_create(1, os.O_NONBLOCK | os.O_CLOEXEC)  # 1: CLOCK_MONOTONIC
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._spec = (ctypes.c_long * 4)()  # interval s, ns; value s, ns
        loop.add_reader(self._fd, call)

    def set(self, at_ns: int) -> None:
        self._spec[2], self._spec[3] = divmod(at_ns, 1_000_000_000)
        self._set_time(self._fd, self.ABSOLUTE, self._spec, None)

    def clear(self) -> None:
        self._spec[2] = self._spec[3] = 0  # zero disarms
        self._set_time(self._fd, self.ABSOLUTE, self._spec, None)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


class _LoopTimer:
    """The loop's own timer up to 1.5 ms before the time (it may be 1.3 ms early), then a turn of the loop at a time."""

    EARLY_NS = 1_500_000

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop = loop
        self._call = call
        self._handle: asyncio.Handle | None = None

    def set(self, at_ns: int) -> None:
        self.clear()
        wait_ns = at_ns - perf_counter_ns() - self.EARLY_NS
        later = self._loop.call_later
        self._handle = later(wait_ns / 1e9, self._call) if wait_ns > 0 else self._loop.call_soon(self._call)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def close(self) -> None:
        self.clear()
