"""Watches ourselves: is the event loop late, what CPU do we use, does the collector or the hypervisor stop us?

A load tool that is late stamps late. Whoever reads the numbers must be able to see that it was not us, or that it was.
"""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from time import perf_counter_ns
from typing import Any

import numpy as np
import psutil

BEAT_NS = 10_000_000
"""One beat each 10 ms: fine enough to see a pause that moves a first-token time."""

GC_THRESHOLDS = (100_000, 50, 100)
"""Nothing on the hot path makes cycles, so what the collector finds is only what is alive; 512 streams hold some 10,000
objects, and the default of 700 had it walk them again and again (28 times in 10 s, up to 23 ms)."""


class Pulse:
    """A heartbeat in the event loop. `begin` and `facts` bracket a level; `lag_max_ns` is reset by `take_lag_max`."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._lags = array("q")
        self._lag_max_ns = 0
        self._gc_began_ns = 0
        self._gc_pauses_ns: list[int] = []
        self._beat_due_ns = 0
        self._timer: asyncio.TimerHandle | None = None
        self.begin()

    def start(self) -> None:
        gc.set_threshold(*GC_THRESHOLDS)
        gc.callbacks.append(self._on_gc)
        self._beat_due_ns = perf_counter_ns()
        self._beat()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.callbacks.remove(self._on_gc)

    def begin(self) -> None:
        """A level starts: forget what was before it, and let the collector skip all that is alive now."""
        gc.collect()
        gc.freeze()  # one full collection over 450,000 records paused 605 ms
        self._lags = array("q")
        self._gc_pauses_ns = []
        self._cpu_s = time.process_time()
        self._began_ns = perf_counter_ns()
        self._times = psutil.cpu_times()

    def cpu_s(self) -> float:
        """CPU seconds of this process since it began."""
        return time.process_time()

    def rss_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def take_lag_max(self) -> int:
        """The latest beat since this was last asked, in nanoseconds late."""
        lag_max_ns, self._lag_max_ns = self._lag_max_ns, 0
        return lag_max_ns

    def facts(self) -> dict[str, Any]:
        """The client's own state over the level so far, as ``level_end.client`` in telemetry.jsonl."""
        lags = np.array(self._lags, dtype=np.int64)
        cpu_s = time.process_time() - self._cpu_s
        elapsed_s = (perf_counter_ns() - self._began_ns) / 1e9
        return {
            "cpu_s": round(cpu_s, 3),
            "cpu_share": round(cpu_s / elapsed_s, 4),
            "loop_lag_p99_ns": int(np.quantile(lags, 0.99)) if len(lags) else None,
            "loop_lag_max_ns": int(lags.max()) if len(lags) else None,
            "gc_pauses": len(self._gc_pauses_ns),
            "gc_pause_max_ns": max(self._gc_pauses_ns, default=None),
            "steal_share": self._steal_share(),
            "machine_cpu_s": round(_busy_s(psutil.cpu_times()) - _busy_s(self._times), 3),
            "elapsed_s": round(elapsed_s, 3),
            "rss_bytes": self.rss_bytes(),
        }

    def _steal_share(self) -> float | None:
        """Share of the machine's CPU time that the hypervisor gave to others; None where the platform does not say."""
        now, then = psutil.cpu_times(), self._times
        if not hasattr(now, "steal"):
            return None
        total = sum(now[:8]) - sum(then[:8])  # guest times are already inside user and nice
        return round((now.steal - then.steal) / total, 4) if total > 0 else None

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began_ns = perf_counter_ns()
        else:
            self._gc_pauses_ns.append(perf_counter_ns() - self._gc_began_ns)

    def _beat(self) -> None:
        """A timer, not a task: it costs a third. One that fires early (uvloop's may, by 1.3 ms) is not late."""
        late_ns = max(0, perf_counter_ns() - self._beat_due_ns)
        self._lags.append(late_ns)
        if late_ns > self._lag_max_ns:
            self._lag_max_ns = late_ns
        self._beat_due_ns += BEAT_NS * (1 + late_ns // BEAT_NS)  # a long pause is one late beat, not a burst of them
        delay_s = (self._beat_due_ns - perf_counter_ns()) / 1e9
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._beat)


HARMS = {"cpu_share", "loop_lag_p99_ns", "loop_lag_max_ns", "gc_pause_max_ns", "steal_share", "start_late_ns"}
"""What spoils the stamps of the process that has it: of several the worst counts."""


def together(own: dict[str, Any], workers: list[dict[str, Any]]) -> dict[str, Any]:
    """The client's facts over a level that several processes measured: costs are added up, of what harms the worst
    counts. ``own`` are those of whoever put them to work: it costs, and stamps nothing.
    """
    facts = dict(own)
    for name in HARMS:
        facts[name] = max((one[name] for one in workers if one.get(name) is not None), default=None)
    for name in ("cpu_s", "gc_pauses", "rss_bytes"):
        facts[name] = sum(one[name] for one in (*workers, own))
    for name in ("new_connections", "connections_opened_before", "in_flight_ns"):
        facts[name] = sum(one[name] for one in workers)
    return facts | {"workers": workers}


def _busy_s(times: Any) -> float:
    """CPU seconds that this machine's programs have used, all cores together; guest times are inside user and nice."""
    names = ("user", "nice", "system", "irq", "softirq")  # Windows has its interrupts inside system
    return float(sum(getattr(times, name, 0.0) for name in names))
