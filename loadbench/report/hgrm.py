"""Writes ``<metric>.<series>.L<level>.hgrm``: percentile distributions for HdrHistogram's plotters, in milliseconds.

Exact values from the samples, gaps from the histogram log; the same requests that the summary tells of.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from loadbench.analysis.measured import Measured
from loadbench.analysis.road import told_spans
from loadbench.analysis.rundir import RunData, read_gaps
from loadbench.analysis.summary import Level
from loadbench.files import write_whole
from loadbench.hdr import Hdr


def write_hgrm(run: RunData, levels: Sequence[Level]) -> None:
    """One file for each of these levels' every latency that has values, into the run's directory."""
    spans = {level.index: span for level, span in told_spans(run, levels)}
    gaps = read_gaps(run, {level: span.since_ns for level, span in spans.items()})
    for level, span in spans.items():
        for metric, series, values_ns in Measured.of(span.counted).values():
            hdr = Hdr.sum_of(gaps[level].values())
            if values_ns is not None:
                hdr = Hdr()
                hdr.add(values_ns[~np.isnan(values_ns)].astype(np.int64))
            if hdr.total:
                text = io.StringIO()
                hdr.write_hgrm(text)
                name = f"{metric.name}.{series}.L{level}.hgrm"
                write_whole(run.path / name, text.getvalue().encode("ascii"))
