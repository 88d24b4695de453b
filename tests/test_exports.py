"""What monitoring gets of a run: a file that Prometheus' own parser reads, what OpenTelemetry collectors are sent."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadbench.analysis.gates import asked
from loadbench.analysis.metrics import LATENCIES, RATES
from loadbench.errors import UsageError
from loadbench.records import Closed
from loadbench.report.otlp import send
from loadbench.report.prometheus import prometheus_text
from loadbench.report.write import write_report
from tests import rundirs
from tests.command import ROOT, environment, loadbench
from tests.rundirs import Planned, write_run

PAGE = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
# A name has words of lower case and base units; no unit is abbreviated (promlint's lists).
NAME = re.compile(r"loadbench_[a-z0-9]+(_[a-z0-9]+)*")
ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d", "pct", "percent"}

Found = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Found:
    """Every number by its name and labels; the parser refuses what is no exposition."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.type == "gauge" and family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "one number twice"
    return found


def one(found: Found, name: str, **labels: str) -> float:
    """The one number of that name that has these labels."""
    (value,) = (value for (n, has), value in found.items() if n == name and labels.items() <= dict(has).items())
    return value


# Prometheus


def test_every_number_is_the_summarys_in_base_units(tmp_path: Path) -> None:
    summary = write_report(rundirs.open_loop(tmp_path), exports=["prometheus"])
    found = parsed((tmp_path / "metrics.prom").read_text(encoding="utf-8"))
    for level in summary.levels:
        here = {"level": str(level.index), "model": level.model, "load": f"{2 + level.index}/s poisson"}
        for metric in LATENCIES:
            for series, told in level.latency_ms[metric].items():
                name, there = f"loadbench_{metric}_seconds", here | {"series": series}
                assert one(found, name, percentile="p50", **there) == pytest.approx((told.p50 or 0) / 1e3)
                assert one(found, f"loadbench_{metric}_samples", **there) == told.n
        assert one(found, "loadbench_output_tokens_per_second", **here) == level.throughput["output_tokens_per_s"]
        assert one(found, "loadbench_level_requests", outcome="ok", **here) == level.requests.ok
        assert one(found, "loadbench_offered_requests_per_second", **here) == 2 + level.index
        assert one(found, "loadbench_target_memory_bytes", moment="peak", **here) == 140 << 20
    assert one(found, "loadbench_run_start_time_seconds", scenario="edge") == 1_795_357_200.123


def test_what_does_not_exist_has_no_line_and_what_is_indicative_says_so(tmp_path: Path) -> None:
    summary = write_report(rundirs.failures(tmp_path))
    found = parsed(prometheus_text(summary))
    shown = {
        (labels["level"], labels["percentile"], labels.get("indicative"))
        for name, labels in ((name, dict(labels)) for name, labels in found)
        if name == "loadbench_ttft_seconds" and labels["series"] == "service"
    }
    for level in summary.levels:
        told = level.latency_ms["ttft"]["service"]
        for name in ("p50", "p90", "p95", "p99", "p99_9", "p99_all"):
            doubt = "true" if name in told.indicative else None
            assert ((str(level.index), name, doubt) in shown) == (told.value(name) is not None)
    assert not any("goodput" in name or "slo" in name for name, _ in found)
    assert one(found, "loadbench_ttft_seconds", level="1", series="service", percentile="p99_all") == math.inf


def test_names_are_as_prometheus_wants_them_and_the_page_has_them(tmp_path: Path) -> None:
    slo = {"name": "edge", "slo": {"ttft": {"p95": "2s"}}}
    summary = write_report(rundirs.closed_ladder(tmp_path, scenario=slo))
    names = {name for name, _ in parsed(prometheus_text(summary))}
    assert len(names) > 30
    page = PAGE.replace("`_", "`loadbench_")
    for name in names:
        assert NAME.fullmatch(name) and not ABBREVIATED & set(name.split("_")), name
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info")) or name == "loadbench_run_info"
        of_metrics = any(name.startswith(f"loadbench_{metric}_") for metric in LATENCIES) or any(
            name == "loadbench_" + re.sub("_share$", "_ratio", rate.replace("_per_s", "_per_second")) for rate in RATES
        )
        assert of_metrics or f"`{name}`" in page, f"docs/exports.md does not name {name}"


def test_a_gate_is_one_number_for_each_level_that_it_is_of(tmp_path: Path) -> None:
    texts = ["ttft.p50<1ms", "ttft.p50<1ms", "e2e.p50<1h", "ttft.p99_9<1h"]
    run = write_run(tmp_path, [Planned(Closed(1))])
    found = parsed(prometheus_text(write_report(run, gates=asked(texts, False))))
    told = [dict(labels) | {"is": value} for (name, labels), value in found.items() if name == "loadbench_gate_met"]
    assert sorted((each["asserted"], each["is"], each["level"]) for each in told) == [
        ("e2e.p50<1h", 1, "0"),
        ("ttft.p50<1ms", 0, "0"),
    ]


def test_foreign_text_stays_within_its_label(tmp_path: Path) -> None:
    evil = 'a"} 1\nloadbench_fake{x="\\" 2 \x1b[31m'
    summary = write_report(write_run(tmp_path, [Planned(Closed(1), model=evil)]))
    text = prometheus_text(replace(summary, name=evil))
    found = parsed(text)
    assert "\x1b" not in text and all(name != "loadbench_fake" for name, _ in found)
    assert {dict(labels)["scenario"] for _, labels in found} == {'a"} 1 loadbench_fake{x="\\" 2 \\x1b[31m'}


def test_a_run_in_which_nothing_succeeded_has_its_failures(tmp_path: Path) -> None:
    found = parsed(prometheus_text(write_report(rundirs.all_failed(tmp_path))))
    assert one(found, "loadbench_run_exit_code") == 94
    assert one(found, "loadbench_level_requests", outcome="ok") == 0
    assert one(found, "loadbench_level_requests", outcome="http_5xx") > 0
    assert not any(name == "loadbench_e2e_mean_seconds" for name, _ in found)


def test_the_file_is_written_when_asked_for_and_not_otherwise(tmp_path: Path) -> None:
    write_report(rundirs.all_failed(tmp_path))
    assert not (tmp_path / "metrics.prom").exists()
    assert loadbench("report", tmp_path, "--quiet", "--export", "prometheus").returncode == 94
    assert parsed((tmp_path / "metrics.prom").read_text(encoding="utf-8"))


# OpenTelemetry


class Collector(ThreadingHTTPServer):
    """Records what it is sent, and answers as it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.bodies: list[tuple[str, dict[str, str], bytes]] = []
        self.status = 200
        self.reason: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(self.server.status, self.server.reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra loadbench[otlp] is not installed")
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        yield server
        server.shutdown()
        thread.join()


def sent(collector: Collector) -> tuple[dict[str, str], dict[str, Any]]:
    """The resource of the one request, and its metrics by name."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    ((path, headers, body),) = collector.bodies
    assert (path, headers["content-type"]) == ("/v1/metrics", "application/x-protobuf")
    ((resource,),) = [ExportMetricsServiceRequest.FromString(body).resource_metrics]
    attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
    return attributes, {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}


def reported(run: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return loadbench("report", run, "--quiet", "--export", "otlp", cwd=ROOT, **env)


def test_a_collector_gets_the_numbers_of_the_file_at_the_time_of_the_run(tmp_path: Path, collector: Collector) -> None:
    summary = write_report(rundirs.failures(tmp_path), exports=["otlp"])
    resource, metrics = sent(collector)
    assert resource["service.name"] == "loadbench"
    numbers = {
        (name, frozenset((each.key, each.value.string_value) for each in point.attributes)): point.as_double
        or point.as_int
        for name, metric in metrics.items()
        for point in metric.gauge.data_points
    }
    assert numbers == parsed(prometheus_text(summary))
    assert {metrics[f"loadbench_{name}"].unit for name in ("ttft_seconds", "tpot_mean_seconds")} == {"s"}
    (last,) = {point.time_unix_nano for metric in metrics.values() for point in metric.gauge.data_points}
    assert last == rundirs.STARTED_NS + round(summary.duration_s * 1e9)


def test_the_command_sends_them_and_opentelemetrys_variables_count(tmp_path: Path, collector: Collector) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_SERVICE_NAME": "nightly"}
    env |= {"OTEL_EXPORTER_OTLP_HEADERS": "x-token=abc"}
    done = reported(rundirs.closed_ladder(tmp_path), **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert sent(collector)[0]["service.name"] == "nightly"
    assert collector.bodies[0][1]["x-token"] == "abc"


def test_a_collector_that_refuses_is_told_in_one_line(
    tmp_path: Path, collector: Collector, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = write_report(rundirs.all_failed(tmp_path))
    collector.status = 400
    with pytest.raises(
        UsageError, match=rf"--export otlp: expected a collector at {collector.url}, got: .*400"
    ) as error:
        send(summary)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_a_collector_that_is_not_there_is_told_in_one_line_and_the_files_are_written(
    tmp_path: Path, collector: Collector
) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:pass@127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    done = reported(rundirs.closed_ladder(tmp_path), **env)
    assert done.returncode == 2
    assert done.stderr.startswith("loadbench: --export otlp: expected a collector at http://127.0.0.1:1, got: ")
    assert done.stderr.count("\n") == 1 and "pass@" not in done.stderr
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.parametrize(
    "said",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:TOPSECRET@127.0.0.1:1/x?api_key=TOPSECRET&k=abc"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1/x?api_key=TOP%20TOPSECRET"},
        {"OTEL_EXPORTER_OTLP_HEADERS": "Bearer TOPSECRET"},
    ],
)
def test_what_opentelemetry_says_of_a_failure_is_told_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], said: dict[str, str]
) -> None:
    summary = write_report(rundirs.all_failed(tmp_path))
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"} | said
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="expected a collector at http") as error:
        send(summary)
    shown = str(error.value).partition("got: ")[2] + capfd.readouterr().err
    assert "max retries" in shown.lower()
    assert "TOPSECRET" not in str(error.value) + shown and "abc" not in shown


def test_a_collector_that_repeats_a_key_is_quoted_without_it(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = write_report(rundirs.all_failed(tmp_path))
    collector.status, collector.reason = 400, "no: authorization Bearer TOPSECRET"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20TOPSECRET")
    with pytest.raises(UsageError, match="no: authorization") as error:
        send(summary)
    assert "TOPSECRET" not in str(error.value)


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; from loadbench.cli import main; main()"
    words = ["report", str(rundirs.closed_ladder(tmp_path)), "--quiet", "--export", "otlp"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "loadbench: --export otlp: expected the OpenTelemetry exporter, found none: pip install 'loadbench[otlp]'\n"
    )


def test_a_report_without_an_export_does_not_load_opentelemetry(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from loadbench.report.write import write_report;"
        "write_report(Path(sys.argv[1]), exports=['prometheus']);"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry', 'google'))]"
    )
    path = str(rundirs.all_failed(tmp_path))
    subprocess.run([sys.executable, "-c", code, path], env=environment(PYTHONPATH=str(ROOT)), check=True)
