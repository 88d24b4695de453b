"""Sends a run's metrics to an OpenTelemetry collector, over OTLP/HTTP; the one door for OpenTelemetry, an extra.

Names, units and attributes are those of metrics.prom (``gauges``), all as gauges of the moment at which the run ended.
Where to is what OpenTelemetry's own variables say: OTEL_EXPORTER_OTLP_ENDPOINT, …_HEADERS, …_TIMEOUT. Nothing is sent
unless it is asked for.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from loadbench.analysis.summary import Summary
from loadbench.errors import UsageError
from loadbench.report.escape import plain
from loadbench.report.gauges import families, started_ns
from loadbench.scenario.redaction import redact_url, without_secrets

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricsData

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DEFAULT_ENDPOINT = "http://localhost:4318"  # the specification's, where neither is set
HEADERS_VARIABLES = ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
LOGGER = "opentelemetry"  # all of it: what reads the headers quotes one that it does not understand


def send(summary: Summary) -> None:
    """Send the metrics, trying again for ten seconds; UsageError where the extra is missing, or nobody takes them."""
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import MetricExportResult
    except ImportError:
        problem = "expected the OpenTelemetry exporter, found none: pip install 'loadbench[otlp]'"
        raise UsageError(f"--export otlp: {problem}") from None
    data, heard, logger = _data(summary), _Heard(), logging.getLogger(LOGGER)
    passed_on, logger.propagate = logger.propagate, False
    logger.addHandler(heard)
    try:
        exporter = OTLPMetricExporter()
        result = exporter.export(data)
        exporter.shutdown()
    except ValueError as error:  # a variable that does not say what it should
        got = _shown(str(error))
        raise UsageError(f"--export otlp: expected OpenTelemetry's variables to be valid, got {got}") from None
    finally:
        logger.removeHandler(heard)
        logger.propagate = passed_on
    if result is not MetricExportResult.SUCCESS:
        raise UsageError(f"--export otlp: expected a collector at {_endpoint()}, got: {heard.told()}")


def _endpoint() -> str:
    url = next((value for name in ENDPOINT_VARIABLES if (value := os.environ.get(name, "").strip())), DEFAULT_ENDPOINT)
    return plain(redact_url(url))


class _Heard(logging.Handler):
    """Keeps what the exporter says of a failure, which it only logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def told(self) -> str:
        return _shown("; ".join(dict.fromkeys(self.lines)) or "no reason")


def _shown(said: str) -> str:
    """What OpenTelemetry says, without what its variables hold that nobody else is to read."""
    urls = [os.environ.get(name, "") for name in ENDPOINT_VARIABLES]
    secrets = [os.environ.get(name, "") for name in HEADERS_VARIABLES]
    secrets += [value for url in urls for _, value in parse_qsl(url.partition("?")[2])]
    said = re.sub(r"//[^/\s@]*@", "//", re.sub(r"\?\S+", "?…", said))  # of any URL: short ones, and encoded anew
    return plain(without_secrets(said, {form: form for value in secrets for form in (value, unquote(value))}), 400)


def _data(summary: Summary) -> MetricsData:
    from opentelemetry.sdk.metrics.export import (
        Gauge,
        Metric,
        MetricsData,
        NumberDataPoint,
        ResourceMetrics,
        ScopeMetrics,
    )
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    ours = Resource({"service.name": "loadbench", "service.version": summary.loadbench})
    resource = ours.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES
    began_ns = started_ns(summary)
    span_ns = (began_ns, began_ns + round(summary.duration_s * 1e9))
    metrics = [
        Metric(
            family.name,
            family.about,
            family.unit,
            Gauge([NumberDataPoint(p.labels, *span_ns, p.value) for p in family.points]),
        )
        for family in families(summary)
    ]
    scope = ScopeMetrics(InstrumentationScope("loadbench", summary.loadbench), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])
