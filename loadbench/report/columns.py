"""COLUMNS: what is told of a level, each column in one row; console, Markdown and CSV all read this table.

To show something new, add a row. Latencies and rates come from METRICS: a metric added there is a column here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from loadbench.analysis.metrics import LATENCIES, RATES, Series
from loadbench.analysis.road import is_over
from loadbench.analysis.slo import slo_of
from loadbench.analysis.stats import Distribution
from loadbench.analysis.summary import AtEndpoint, ClosedLoad, Kind, Level, OpenLoad
from loadbench.records import load_title
from loadbench.report.words import NONE, figure, octets, percentile, share

CUT_SHORT = "*"  # stands after the load of a level that did not end as planned
OVER = "↑"  # after the load of one that was over capacity
Value = str | int | float | None


def _firm(level: Level) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Column:
    """One thing told of a level. ``name`` is the CSV's, with its unit; the heading is made of title, series, statistic
    and unit.

    ``closed`` and ``open`` are its ranks in the tables of closed-loop and open-loop levels: where room is short, high
    ranks go first; None is never shown there. ``of_kind``: it can be told of one kind of prompt as well.
    """

    name: str
    title: str
    get: Callable[[Level], Value]
    closed: int | None = None
    open: int | None = None
    series: Series | None = None
    statistic: str = ""
    unit: str = ""
    indicative: Callable[[Level], bool] = _firm
    of_kind: bool = False
    in_csv: bool = True
    show: Callable[[Any], str] | None = None

    def rank(self, load: ClosedLoad | OpenLoad) -> int | None:
        """Its rank in the table of levels with such a load; 0 is never left out."""
        return self.closed if isinstance(load, ClosedLoad) else self.open

    def heading(self, headline: Series) -> tuple[str, ...]:
        """The heading's lines; the table's headline series goes without saying: ``TTFT``, ``p50 ms``."""
        series = "" if self.series in (None, headline) else str(self.series)
        return tuple(filter(None, (self.title, series, f"{percentile(self.statistic)} {self.unit}".strip())))

    def text(self, level: Level) -> str:
        """The value as tables show it: three digits, ``~`` before an indicative one, n/a for none."""
        value = self.get(level)
        if value is None:
            return NONE
        words = self.show(value) if self.show else _words(value)
        return f"~{words}" if self.indicative(level) else words


def _words(value: str | int | float) -> str:
    if isinstance(value, str):
        return "∞" if value == "inf" else value
    return f"{value:,}" if isinstance(value, int) else figure(value)


def failed(level: Level) -> int:
    """Requests of the level that did not succeed, dropped and censored ones included."""
    return sum(level.requests.failed.values())


def of_kind(level: Level, kind: Kind | AtEndpoint) -> Level:
    """The level as one kind of prompt saw it; only columns that are ``of_kind`` mean something in it."""
    return replace(level, requests=kind.requests, tokens=kind.tokens, latency_ms=kind.latency_ms)


def of_endpoint(level: Level, here: AtEndpoint) -> Level:
    """The level as one endpoint of a fleet saw it; rates have a meaning in it, too."""
    target = replace(level.target, state=here.state, evidence=here.evidence, rss_bytes=here.rss_bytes)
    return replace(of_kind(level, here), throughput=here.throughput, target=target)


OF_ENDPOINT = ("requests_per_s", "output_tokens_per_s", "target_rss_peak_bytes")


def ranked_columns(load: ClosedLoad | OpenLoad, part: Literal["kind", "endpoint"] | None = None) -> list[Column]:
    """The columns of a table of levels with such loads, or of their kinds of prompt, or endpoints."""
    ranked = [column for column in COLUMNS if column.rank(load) is not None]
    if part == "endpoint":  # gaps are counted by kind of prompt only
        return [x for x in ranked if (x.of_kind and not x.name.startswith("gap_")) or x.name in OF_ENDPOINT]
    return [column for column in ranked if column.of_kind or part is None]


# Of LevelMemory, for the CSV; tables have their own in ``memory``.
_OF_MEMORY = (
    *("verdict", "of", "before_bytes", "peak_bytes", "after_bytes", "exact", "limit_bytes", "available_min_bytes"),
    *("swap_peak_bytes", "gpu_shared_peak_bytes", "pressure_max_share", "streams", "tokens"),
)
# Ranks of the rates in both tables, with their short headings.
_RATES = {
    "requests_per_s": (3, "req/s"),
    "output_tokens_per_s": (1, "tok/s"),
    "output_tokens_per_s_per_user": (8, "tok/s/user"),
    "goodput_per_s": (6, "good/s"),
    "goodput_share": (3, "goodput"),
    "stalled_share": (16, "stalled"),
}
# Ranks of the latencies: as the headline of closed loop, as that of open loop, and as service time beside the latter.
_LATENCIES: dict[tuple[str, str], tuple[int | None, int, int | None]] = {
    ("ttft", "p50"): (1, 1, 5),
    ("ttft", "p95"): (2, 2, 9),
    ("ttft", "p99"): (7, 7, 16),
    ("ttft", "p99_all"): (14, 14, None),
    ("tpot", "p50"): (4, 8, None),
    ("e2e", "p50"): (11, 11, 15),
    ("e2e", "p95"): (5, 4, 13),
    ("gap", "p99"): (15, 15, None),
    ("max_gap", "p95"): (13, 13, None),
    ("lag", "p99"): (None, 12, None),
}
_LAST = (20, 20, None)  # a metric that nobody ranked is shown where there is room
_NO_STATISTICS = ("indicative", "interval_95", "not_estimable")
_STATISTICS = [field.name for field in fields(Distribution) if field.name not in _NO_STATISTICS]


def _rates() -> Iterator[Column]:
    for rate in RATES.values():
        rank, title = _RATES.get(rate.name, (None, rate.title))
        yield Column(
            rate.name,
            title,
            _throughput(rate.name),
            rank,
            rank,
            show=share if rate.unit == "share" else None,
            indicative=_per_user_indicative if rate.name == "output_tokens_per_s_per_user" else _firm,
        )


def _throughput(name: str) -> Callable[[Level], Value]:
    return lambda level: level.throughput.get(name)


def _per_user_indicative(level: Level) -> bool:
    """One user's rate is 1 / TPOT p50, and no surer than it."""
    return "p50" in level.latency_ms["tpot"]["service"].indicative


def _latencies() -> Iterator[Column]:
    for metric in LATENCIES.values():
        for series in sorted(metric.series):  # response first: the headline of open loop stands before service
            for statistic in _STATISTICS:
                yield _latency(metric.name, series, statistic)


def _latency(name: str, series: Series, statistic: str) -> Column:
    metric = LATENCIES[name]
    known = any(name == ranked for ranked, _ in _LATENCIES)
    default = (None, None, None) if known or statistic not in ("p50", "p95") else _LAST
    closed, opened, beside = _LATENCIES.get((name, statistic), default)
    alone = len(metric.series) == 1

    def get(level: Level) -> Value:
        value: Value = getattr(level.latency_ms[name][series], statistic)
        return value

    return Column(
        f"{name}_{series}_n" if statistic == "n" else f"{name}_{series}_{statistic}_{metric.unit}",
        metric.title,
        get,
        closed if series == "service" else None,
        opened if alone or series == "response" else beside,
        series=None if alone else series,
        statistic=statistic,
        unit=metric.unit,
        indicative=lambda level: statistic in level.latency_ms[name][series].indicative,
        of_kind=True,
    )


def _p95_interval(level: Level) -> str | None:
    """The headline's 95 % confidence interval, where there is one."""
    found = level.latency_ms["ttft"][level.headline].interval_95
    return None if found is None or found.p95 is None else "–".join(map(figure, found.p95))


def _of_open(name: str) -> Callable[[Level], Value]:
    return lambda level: getattr(level.load, name) if isinstance(level.load, OpenLoad) else None


def _load(level: Level) -> str:
    marks = [OVER] if is_over(level.road) else []
    return " ".join([load_title(level.load), *marks, *([] if level.complete else [CUT_SHORT])])


def _road(level: Level) -> str | None:
    return None if level.road is None else level.road.result


def _ask(name: str) -> Callable[[Level], Value]:
    return lambda level: getattr(getattr(level.load, "ask", None), name, None)


def _memory(name: str) -> Callable[[Level], Value]:
    def get(level: Level) -> Value:
        value: Value = getattr(level.memory, name, None)
        return ("yes" if value else "no") if isinstance(value, bool) else value

    return get


def _energy(name: str) -> Callable[[Level], Value]:
    return lambda level: getattr(level.energy, name, None)


def _joules(level: Level) -> str | None:
    """Never without where it comes from: what a user states is no measurement."""
    energy = level.energy
    if energy is None or energy.joules_per_output_token is None:
        return None
    return f"{figure(energy.joules_per_output_token)} {energy.source}"


def _cost(level: Level) -> str | None:
    energy = level.energy
    if energy is None or energy.cost_per_million_output_tokens is None:
        return None
    price = " ".join(filter(None, (figure(energy.cost_per_million_output_tokens), energy.currency)))
    return f"{price} {energy.source}"


def _few_readings(level: Level) -> bool:
    return level.energy is not None and level.energy.firm is False


def _users(level: Level) -> int | None:
    return level.load.concurrency if isinstance(level.load, ClosedLoad) else None


def _ok_of_all(level: Level) -> str:
    return f"{level.requests.ok:,}/{level.requests.attempted:,}"


def _failures(level: Level) -> str:
    return " ".join(f"{outcome}={number}" for outcome, number in level.requests.failed.items())


def _cautions(level: Level) -> str:
    return " ".join(caution.about for caution in level.cautions)


def _mark(result: str) -> str:
    return "?" if result == "undecided" else result


COLUMNS: tuple[Column, ...] = (
    Column("level", "level", lambda level: level.index),
    Column("stage", "stage", lambda level: level.stage),
    Column("model", "model", lambda level: level.model),
    Column("load", "load", _load, closed=0, open=0, of_kind=True, in_csv=False),
    Column("load_kind", "loop", lambda level: level.load.kind),
    Column("concurrency", "users", _users),
    Column("ask_max_tokens", "max_tokens", _ask("max_tokens")),
    Column("ask_input_tokens", "input tokens", _ask("input_tokens")),
    Column("rate_per_s", "asked", _of_open("rate_per_s"), unit="/s"),
    Column("arrivals", "arrivals", _of_open("arrivals")),
    Column("purpose", "purpose", lambda level: level.purpose),
    Column("complete", "complete", lambda level: "yes" if level.complete else "no"),
    Column("window_s", "window", lambda level: level.window_s, unit="s"),
    Column("warmup_trimmed_s", "warm-up", lambda level: level.warmup_trimmed_s, unit="s"),
    Column("ok_of_attempted", "ok/all", _ok_of_all, closed=2, open=2, of_kind=True, in_csv=False),
    Column("attempted", "attempted", lambda level: level.requests.attempted),
    Column("ok", "ok", lambda level: level.requests.ok),
    Column("failed", "failed", failed, closed=10, open=10, of_kind=True),
    Column("failures", "failures", _failures),
    Column("in_flight", "in flight", lambda level: level.concurrency_reached, closed=6, open=6),
    Column("issued_per_s", "issued", lambda level: level.issued_per_s, open=11, unit="/s"),
    *_rates(),
    *_latencies(),
    Column("ttft_p95_interval", "TTFT p95", _p95_interval, closed=12, open=12, unit="95 % in ms", in_csv=False),
    Column("input_tokens_mean", "tokens in", lambda level: level.tokens.input_mean, closed=17, open=17, of_kind=True),
    Column(
        "output_tokens_mean", "tokens out", lambda level: level.tokens.output_mean, closed=17, open=17, of_kind=True
    ),
    Column("output_tokens", "tokens", lambda level: level.tokens.output_total),
    Column("slo", "SLO", slo_of, closed=3, open=3, show=_mark),
    Column("road", "road", _road),
    Column("road_left_s", "left at", lambda level: level.road.left_s if level.road else None, unit="s"),
    Column("cautions", "cautions", _cautions, closed=19, open=19, show=lambda about: about or "–"),
    Column("target_state", "target", lambda level: level.target.state, closed=18, open=18),
    Column("target_rss_before_bytes", "RSS before", lambda level: level.target.rss_bytes.before),
    Column(
        "target_rss_peak_bytes", "RSS peak", lambda level: level.target.rss_bytes.peak, closed=9, open=14, show=octets
    ),
    Column("target_rss_after_bytes", "RSS after", lambda level: level.target.rss_bytes.after),
    Column("energy", "J/token", _joules, closed=7, open=7, indicative=_few_readings, in_csv=False),
    Column("cost", "cost of", _cost, closed=8, open=8, unit="1M tokens", indicative=_few_readings, in_csv=False),
    *(Column(f"energy_{name}", name, _energy(name)) for name in ("source", "of", "watts", "readings")),
    Column("cost_per_million_output_tokens", "cost", _energy("cost_per_million_output_tokens")),
    Column("currency", "currency", _energy("currency")),
    *(Column(f"memory_{name}", name.replace("_", " "), _memory(name)) for name in _OF_MEMORY),
)
