"""What is said of several load processes: which did worst, and how far the clocks of other machines may be off."""

from __future__ import annotations

from typing import Any

import pytest

from loadbench.analysis.clients import clocks, cluster_of, late_start, whose
from loadbench.engine.pulse import HARMS, Pulse, together


def worker(index: int, offset_ms: float, error_ms: float, *end_ms: float) -> dict[str, Any]:
    names = ("offset_ns", "error_ns", "end_offset_ns", "end_error_ns")
    stamps = dict(zip(names, (int(ms * 1e6) for ms in (offset_ms, error_ms, *end_ms)), strict=False))
    return {"index": index, "node": f"n{index}", **stamps}


@pytest.mark.parametrize(
    ("last", "apart"),
    [
        (worker(1, 9e6, 0.3, 9e6, 0.4), None),  # what is known exactly does not matter
        (worker(1, 9e6, 0.3, 9e6 + 36, 0.4), 36.4),  # 10 ppm over an hour
        (worker(1, -7.0, 6.0), 6.0),  # lost, and read badly
    ],
)
def test_clocks_that_may_be_more_than_5_ms_apart_are_a_caution(last: dict[str, Any], apart: float | None) -> None:
    cluster = cluster_of({"cluster": {"address": "a", "ray": "2", "workers": [worker(0, 0, 0.2, 0.1, 0.3), last]}})
    found = [reason for _, reason, _ in clocks(cluster)]
    if apart is None:
        assert found == []
    else:
        assert found[0].startswith(f"the clock of worker 1 on n1 may be off by {apart} ms against the others'")
        assert ("it gained 36.0 ms over the run" in found[0]) == (apart > 10)


def test_a_late_beginning_and_a_sick_client_are_told_by_name() -> None:
    one = {"worker": 0, "node": "a", "cpu_share": 0.1, "start_late_ns": 7_100_000}
    other = {"worker": 1, "node": "b", "cpu_share": 0.9, "start_late_ns": 1_000}
    names = whose({"workers": [one, other, {"worker": 2, "node": "c"}]})
    assert names == {"cpu_share": "worker 1 on b", "start_late_ms": "worker 0 on a"}
    ((about, reason, _),) = late_start(7.1, names["start_late_ms"])
    assert (about, reason) == ("late_start", "worker 0 on a began 7.1 ms after the level's start")
    assert list(late_start(4.9, None)) == []
    assert whose({"cpu_share": 0.5}) == {}


def test_of_several_processes_the_worst_lateness_counts_and_all_costs_do() -> None:
    told = Pulse().facts() | {"start_late_ns": None}
    own = told | {"cpu_s": 0.5, "loop_lag_p99_ns": 9_000_000}  # of one that stamps nothing
    counted = {"new_connections": 1, "connections_opened_before": 2, "in_flight_ns": 3}
    one = told | counted | {"cpu_s": 1.0, "loop_lag_p99_ns": 2_000_000, "start_late_ns": 5, "rss_bytes": 10}
    other = told | counted | {"cpu_s": 2.0, "loop_lag_p99_ns": 1_000_000, "start_late_ns": 7, "rss_bytes": 20}
    facts = together(own | {"rss_bytes": 1}, [one, other])
    assert (facts["cpu_s"], facts["loop_lag_p99_ns"], facts["start_late_ns"]) == (3.5, 2_000_000, 7)
    assert (facts["rss_bytes"], facts["new_connections"], facts["in_flight_ns"]) == (31, 2, 6)
    assert all(together(own, [])[name] is None for name in HARMS)  # whoever measured is gone
