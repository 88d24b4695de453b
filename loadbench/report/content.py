"""What a report says, before it has a format: tables, footnotes, failures, doubts and sentences from a Summary.

``console`` and ``markdown`` lay this out and escape it; which numbers a table holds is the business of ``columns``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from loadbench.analysis.metrics import LATENCIES
from loadbench.analysis.stats import FLOORS, LEASTS, Distribution
from loadbench.analysis.summary import AtEndpoint, Caution, ClosedLoad, Level, Model, SloClause, Summary
from loadbench.outcomes import OUTCOMES
from loadbench.records import load_title
from loadbench.report.columns import COLUMNS, CUT_SHORT, OVER, Column, of_endpoint, of_kind, ranked_columns
from loadbench.report.words import NONE, clock, count, milliseconds, octets, percentile, share

CLOSED = "closed loop: service time at concurrency N"
OPEN = "open loop: response time, counted from when a request was due"
PURPOSES = {"level": "", "rung": "memory ladder, "}
SEARCH = "search, "


@dataclass(frozen=True, slots=True)
class Cells:
    """One column of a table, a cell a row. ``heading`` is lines; a high rank goes first where room is short.

    ``statistic`` is such as ``p95``, empty for what is none; ``indicative`` and ``missing``: some cell is. ``left``: it
    begins where its column does, as names do and bars.
    """

    heading: tuple[str, ...]
    rank: int
    cells: tuple[str, ...]
    statistic: str = ""
    indicative: bool = False
    missing: bool = False
    left: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Levels of one model and one kind of load; ``note`` names what no row has a value of, and why.

    ``levels`` are the indices of the rows' levels in the one table that others point to.
    """

    model: str
    title: str
    columns: tuple[Cells, ...]
    note: str | None
    levels: tuple[int, ...] = ()

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells the other way round."""
        return list(zip(*(column.cells for column in self.columns), strict=True))


def level_tables(summary: Summary) -> list[Table]:
    """One table per model and kind of load, a row a level; a search and a memory ladder have their own."""
    tables = []
    for levels in _groups(summary):
        title = CLOSED if isinstance(levels[0].load, ClosedLoad) else OPEN
        table = _table(levels, PURPOSES.get(levels[0].purpose, SEARCH) + title)
        tables.append(replace(table, levels=tuple(level.index for level in levels)))
    return tables


def kind_tables(summary: Summary) -> list[Table]:
    """The same by kind of prompt where a level has several, a row a level and kind."""
    tables = []
    for levels in _groups(summary):
        named = [(of_kind(level, kind), kind.kind) for level in levels for kind in level.by_kind]
        if named:
            parts, kinds = zip(*named, strict=True)
            tables.append(_table(parts, f"by kind of prompt, {levels[0].load.kind} loop", "kind", prompts=kinds))
    return tables


def endpoint_tables(summary: Summary) -> list[Table]:
    """The same by endpoint of a fleet, a row a level and endpoint."""
    tables = []
    for levels in _groups(summary):
        named = [(of_endpoint(level, here), _host(here), _state(here)) for level in levels for here in level.endpoints]
        if named:
            parts, hosts, states = zip(*named, strict=True)
            title = f"by endpoint, {levels[0].load.kind} loop"
            tables.append(_table(parts, title, "endpoint", endpoint=hosts, state=states))
    return tables


def _host(here: AtEndpoint) -> str:
    """What tells it from the others: all but what most have."""
    return here.url.removeprefix("http://").removesuffix("/v1")


def _state(here: AtEndpoint) -> str:
    since = "" if here.died_after_s is None else f" from {here.died_after_s:.1f} s on"
    return NONE if here.state is None else here.state.replace("_", " ") + since


def _groups(summary: Summary) -> Iterator[list[Level]]:
    for _, levels in groupby(summary.levels, lambda x: (x.model, x.load.kind, PURPOSES.get(x.purpose, SEARCH))):
        yield list(levels)


def _table(
    levels: Sequence[Level], title: str, part: Literal["kind", "endpoint"] | None = None, **named: tuple[str, ...]
) -> Table:
    """``named`` has the cells, by heading, that tell the parts of a level from one another."""
    ranked = ranked_columns(levels[0].load, part)
    cells = [_cells(column, levels) for column in ranked if _has_value(column, levels)]
    cells[1:1] = [Cells((heading,), 0, told) for heading, told in named.items()]
    return Table(levels[0].model, title, tuple(cells), _left_out(ranked, levels))


def _left_out(ranked: Sequence[Column], levels: Sequence[Level]) -> str | None:
    """What has no column because no row has a value of it."""
    counted = {column.title for column in COLUMNS if column.statistic == "n" and any(map(column.get, levels))}
    empty = [column for column in ranked if column.statistic and not _has_value(column, levels)]
    absent = dict.fromkeys(column.title for column in empty if column.title not in counted)
    too_few = dict.fromkeys(
        f"{column.title} {percentile(column.statistic)}" for column in empty if column.title in counted
    )
    notes = [f"no {', '.join(absent)}: none streamed or none succeeded"] if absent else []
    notes += [f"too few samples for {', '.join(too_few)}"] if too_few else []
    return "; ".join(notes) or None


def _has_value(column: Column, levels: Sequence[Level]) -> bool:
    return any(column.get(level) is not None for level in levels)


def _cells(column: Column, levels: Sequence[Level]) -> Cells:
    return Cells(
        column.heading(levels[0].headline),
        column.rank(levels[0].load) or 0,
        tuple(column.text(level) for level in levels),
        column.statistic,
        any(column.indicative(level) for level in levels),
        any(column.get(level) is None for level in levels),
    )


def footnotes(tables: Iterable[Table]) -> list[str]:
    """What the marks in these tables mean, with how many samples each marked percentile would take."""
    tables = list(tables)
    columns = [column for table in tables for column in table.columns]
    notes = []
    if any(column.indicative for column in columns):
        needed = _needed(FLOORS, {column.statistic for column in columns if column.indicative})
        notes.append(f"~ indicative: on fewer samples than a firm value takes{needed}")
    if any(column.missing for column in columns):
        needed = _needed(LEASTS, {column.statistic for column in columns if column.missing})
        notes.append(f"{NONE}: none, or on too few samples to tell it from the maximum{needed}")
    loads = [cell for column in columns if column.rank == 0 for cell in column.cells]
    if any(OVER in cell for cell in loads):
        notes.append(f"{OVER} over capacity: more came than went, and the latencies only say how long the level was")
    if any(CUT_SHORT in cell for cell in loads):
        notes.append(f"{CUT_SHORT} the level did not end as planned")
    return notes


def _needed(samples: Mapping[str, int], names: set[str]) -> str:
    told = [f"{percentile(name)} {needed:,}" for name, needed in samples.items() if name in names]
    return f" ({', '.join(told)})" if told else ""


def doubts(summary: Summary) -> tuple[list[list[Caution]], list[list[Caution]]]:
    """Failures by outcome, then all other cautions; each list holds one sort of them, place by place."""
    # Those of the run as a whole are each of their own sort.
    sorts = {f"run {index}": [caution] for index, caution in enumerate(summary.cautions)}
    for level in summary.levels:
        for caution in level.cautions:
            sorts.setdefault(caution.about, []).append(replace(caution, place=place(summary, level)))
    found = list(sorts.values())
    return [f for f in found if f[0].about in OUTCOMES], [f for f in found if f[0].about not in OUTCOMES]


def failure_counts(summary: Summary) -> dict[str, int]:
    """Failed requests of the run by outcome."""
    counts: dict[str, int] = {}
    for level in summary.levels:
        for name, number in level.requests.failed.items():
            counts[name] = counts.get(name, 0) + number
    return counts


def place(summary: Summary, level: Level) -> str:
    """A level's name in lists: its load, after its model where there are several."""
    title = load_title(level.load)
    return f"{level.model} {title}" if len({level.model for level in summary.levels}) > 1 else title


def slo_lines(summary: Summary) -> list[tuple[str, str]]:
    """Each clause of the SLO with where it passed, failed or could not be decided, and by what value."""
    return [
        (clause, "; ".join(_told(told[result], result) for result in _RESULTS if result in told))
        for clause, told in slo_results(summary).items()
    ]


def slo_results(summary: Summary) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """By clause and result the places that it is of, each with its value or its reason."""
    clauses: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for level in summary.levels:
        for clause in level.slo if level.purpose == "level" else ():  # a search tells of its probes itself
            why = ""
            if clause.value is None or (clause.result == "fail" and clause.because):
                why = f" ({clause.because})"
            elif clause.result != "pass":
                why = f" ({'~' if clause.result == 'undecided' else ''}{_clause_value(clause, clause.value)})"
            told = clauses.setdefault(f"{clause.clause} {_limit(clause)}", {})
            told.setdefault(clause.result, []).append((place(summary, level), why))
    return clauses


def _told(found: Sequence[tuple[str, str]], result: str) -> str:
    """The places of a result, those with the same reason together."""
    by: dict[str, list[str]] = {}
    for where, why in found:
        by.setdefault(why, []).append(where)
    return f"{result} at {', '.join(', '.join(places) + why for why, places in by.items())}"


_RESULTS = ("pass", "fail", "undecided")


def _limit(clause: SloClause) -> str:
    return f"{'≥' if clause.clause == 'goodput' else '≤'} {_clause_value(clause, clause.limit)}"


def _clause_value(clause: SloClause, value: float) -> str:
    return milliseconds(value) if clause.unit == "ms" else share(value)


def interval_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Level, metric, mean, p50 and p95 with their 95 % confidence intervals, and why one is missing."""
    rows = []
    for level in summary.levels:
        for name in ("ttft", "e2e", "tpot"):
            series = level.headline if level.headline in level.latency_ms[name] else "service"
            told = level.latency_ms[name][series]
            if told.n:
                title = LATENCIES[name].title + ("" if series == "service" else f" {series}")
                found = (_with_interval(told, statistic) for statistic in ("mean", "p50", "p95"))
                rows.append((place(summary, level), title, *found, told.not_estimable or ""))
    return rows


def _with_interval(told: Distribution, statistic: str) -> str:
    """``60.4 ms (58.1 to 63.0)``, the value alone where the interval cannot be estimated."""
    value = f"{'~' if statistic in told.indicative else ''}{milliseconds(told.value(statistic))}"
    found = getattr(told.interval_95, statistic, None)
    return f"{value} ({milliseconds(found[0])} to {milliseconds(found[1])})" if found else value


def memory(summary: Summary) -> str | None:
    """The target's resident memory over the run; None where nobody could read it."""
    figures = [level.target.rss_bytes for level in summary.levels]
    before = next((rss.before for rss in figures if rss.before is not None), None)
    after = next((rss.after for rss in reversed(figures) if rss.after is not None), None)
    highest = max(
        (level for level in summary.levels if level.target.rss_bytes.peak is not None),
        key=lambda level: level.target.rss_bytes.peak or 0,
        default=None,
    )
    parts = [] if before is None else [f"{octets(before)} before"]
    if highest is not None:
        parts.append(f"peak {octets(highest.target.rss_bytes.peak)} at {place(summary, highest)}")
    parts += [] if after is None else [f"{octets(after)} after"]
    return ", ".join(parts) or None


def client(summary: Summary) -> str | None:
    """Our own state at its worst over the levels; None where it was not recorded."""

    def worst(name: str) -> float | None:
        values = (getattr(level.client, name) for level in summary.levels)
        return max((value for value in values if value is not None), default=None)

    cpu, lag, rss, ceiling = (worst(name) for name in ("cpu_share", "loop_lag_p99_ms", "rss_bytes", "ceiling_share"))
    opened = [level.client.new_connections for level in summary.levels if level.client.new_connections is not None]
    bound = [place(summary, level) for level in summary.levels if level.client.bound]
    parts = [
        None if cpu is None else f"CPU up to {share(cpu)} of a core",
        None if ceiling is None else f"up to {share(ceiling)} of the calibrated ceiling",
        None if lag is None else f"event-loop lag p99 up to {milliseconds(lag)}",
        None if rss is None else f"memory up to {octets(rss)}",
        f"{count(sum(opened), 'new connection')} inside the levels" if opened else None,
        f"client-bound at {', '.join(bound)}" if bound else None,
    ]
    return ", ".join(filter(None, parts)) or None


def cluster(summary: Summary) -> str | None:
    """Where the load processes were, and how far their clocks may have been apart; None where they were here."""
    workers = () if summary.cluster is None else summary.cluster.workers
    if summary.cluster is None or not workers:
        return None
    on = Counter(worker.node for worker in workers)
    nodes = ", ".join(f"{number} on {node}" for node, number in on.items())
    worst = max(workers, key=lambda worker: worker.apart_ms)
    ends = [worker.end_error_ms for worker in workers if worker.end_error_ms is not None]
    read = f"{milliseconds(max(worker.error_ms for worker in workers))} when it began"
    read += f" and {milliseconds(max(ends))} when it ended" if ends else ""
    apart = f"clocks read to {read}, and apart by at most {milliseconds(worst.apart_ms)} ({worst.name})"
    return f"{count(len(workers), 'worker')} of a Ray {summary.cluster.ray} cluster: {nodes}; {apart}"


def run_line(summary: Summary) -> str:
    """The run in one line: how it ended, when, for how long."""
    status = summary.status.replace("_", " ") + (f" ({summary.reason})" if summary.reason else "")
    return f"{status} · {summary.started[:16].replace('T', ' ')} UTC · {clock(summary.duration_s)}"


def endpoint_line(summary: Summary) -> str:
    """What was asked, and where."""
    endpoint = summary.endpoint
    embedded = ", embedded" if endpoint.get("embedded") else ""
    return f"{endpoint.get('title') or endpoint.get('kind')} at {endpoint.get('url')}{embedded}"


def machine_line(summary: Summary) -> str:
    """The machine that sent the load."""
    facts = summary.environment
    size = facts.get("memory_bytes")
    parts = [facts.get("cpu"), count(facts["cores"], "core") if facts.get("cores") else None]
    parts += [octets(size) if size else None, facts.get("os")]
    if spread := facts.get("shards"):
        size = f"{count(spread['machines'], 'machine')}, load processes: {spread['processes']}"
        parts.append(f"shard 0's of {spread['count']} (on {size})")
    return ", ".join(str(part) for part in parts if part)


def model_line(model: Model) -> str:
    """A model as asked for and found, why it is that one, and how long it took to load."""
    name = model.id or model.asked
    if model.how:  # which says the loading, too
        parts = [model.how if name in model.how else f"{name} ({model.how})"]
    else:
        parts = [name + (f" (asked for as {model.asked})" if model.asked != name else "")]
        parts += [] if model.load_ms is None else [f"loaded in {milliseconds(model.load_ms)}"]
    if model.downloaded_ms is not None:
        parts.append(f"downloaded in {milliseconds(model.downloaded_ms)}")
    parts += ["synthetic: random weights"] if model.synthetic else []
    parts += [] if model.first_ms is None else [f"first answer in {milliseconds(model.first_ms)}"]
    if model.kept_warm is not None:
        failed = sum(model.kept_warm.failed.values())
        lost = f", {failed:,} of which failed" if failed else ""
        parts.append(f"kept warm by {count(model.kept_warm.attempted, 'light prompt')}{lost}, which no figure counts")
    parts += [] if model.status == "ok" else [f"{model.status}: the reason is among the cautions"]
    return "; ".join(parts)
