"""Writes metrics.prom: a run in Prometheus' text format, for the textfile collector of its node exporter.

The format is version 0.0.4 (prometheus.io, "Exposition formats"); which metrics there are is ``gauges``'s. They have no
time stamps, which that collector refuses: loadbench_run_start_time_seconds says of when they are.
"""

from __future__ import annotations

import math

from loadbench.analysis.summary import Summary
from loadbench.report.gauges import families


def prometheus_text(summary: Summary) -> str:
    """The file's text; a number that does not exist has no line."""
    lines = []
    for family in families(summary):
        lines.append(f"# HELP {family.name} {_escaped(family.about)}")
        lines.append(f"# TYPE {family.name} gauge")
        for point in family.points:
            labels = ",".join(f'{name}="{_quoted(value)}"' for name, value in point.labels.items())
            lines.append(f"{family.name}{{{labels}}} {_number(point.value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', '\\"')


def _number(value: float | int) -> str:
    return "+Inf" if value == math.inf else repr(value)
