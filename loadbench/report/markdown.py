"""Writes report.md, GitHub-flavoured: what the console says, then the environment, the scenario and the definitions.

Every text that is not ours goes through ``markdown`` or ``code``; tables get nothing else, but for the anchor of a
level's row and the links to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from loadbench.analysis.metrics import METRICS
from loadbench.analysis.summary import Caution, Summary
from loadbench.records import load_title
from loadbench.report import content, decision, determinism, findings, gates, memory, quality
from loadbench.report.content import Table
from loadbench.report.escape import code, markdown, plain
from loadbench.report.findings import Finding, Stands

PRIVATE = {"model_cache_path"}  # somebody's home, of no use to who reads a report elsewhere


def markdown_text(summary: Summary, scenario: Mapping[str, Any]) -> str:
    """The file's text. ``scenario`` is the resolved, redacted one from run.json."""
    blocks = [
        f"# loadbench: {markdown(summary.name)}",
        markdown(content.run_line(summary)),
        _pointing(markdown(summary.verdict.text, limit=10_000), summary),
        *_decision(summary),
        *_findings(summary),
        *_levels(summary),
        *_memory(summary),
        *_quality(summary),
        *_answers(summary),
        *_over_time(summary),
        *_intervals(summary),
        *_facts(summary),
        *_doubts(summary),
        *_circumstances(summary),
        "## Scenario",
        _fenced(scenario_text(scenario), "yaml"),
        "## What the numbers mean",
        *_definitions(),
        "## Repeat",
        _fenced(plain(summary.command, limit=10_000), "sh"),
    ]
    return "\n\n".join(blocks) + "\n"


def _decision(summary: Summary) -> Iterator[str]:
    """The models side by side, how they rank, and what every figure stands on."""
    if summary.decision is None:
        return
    yield "## The models side by side"
    if ranking := decision.verdict(summary.decision):
        yield markdown(ranking, limit=10_000)
    yield from tables_of(decision.tables(summary.decision))
    if notes := decision.notes(summary.decision):
        yield "\n".join(f"- {markdown(note)}" for note in notes)
    for title, headings, rows in decision.details(summary.decision):
        yield f"### {markdown(title)}"
        yield table_of(headings, rows)


def _levels(summary: Summary) -> Iterator[str]:
    tables, kinds = content.level_tables(summary), content.kind_tables(summary)
    endpoints = content.endpoint_tables(summary)
    if tables:
        yield "## Levels"
    yield from tables_of(tables)
    if endpoints:
        yield "## By endpoint"
    yield from tables_of(endpoints)
    if kinds:
        yield "## By kind of prompt"
    yield from tables_of(kinds)
    notes = content.footnotes([*tables, *endpoints, *kinds])
    if notes:
        yield "\n".join(f"- {markdown(note)}" for note in notes)


def tables_of(tables: Iterable[Table]) -> Iterator[str]:
    for table in tables:
        yield f"{code(table.model)}, {table.title}"
        rows = [[markdown(cell) for cell in row] for row in table.rows]
        for row, level in zip(rows, table.levels, strict=bool(table.levels)):
            row[0] = f'<a id="level-{level}"></a>{row[0]}'
        left = [column.left or column.rank == 0 for column in table.columns]
        yield _lines([" ".join(column.heading) for column in table.columns], rows, left)
        if table.note:
            yield markdown(table.note)


def _findings(summary: Summary) -> Iterator[str]:
    """What the verdict stands on, each row with links to its levels."""
    told, numbers, left_out = findings.findings(summary), findings.points(summary), findings.not_run(summary)
    if told or left_out:
        yield "## What the verdict stands on"
    for finding in [*told, *numbers]:
        yield from _finding(finding, summary)
    if left_out:
        yield "\n".join(f"- not run: {markdown(line)}" for line in left_out)


def _finding(finding: Finding, summary: Summary) -> Iterator[str]:
    yield f"{code(finding.model)}, {markdown(finding.title)}"
    rows = [[_cell(cell, summary) for cell in row] for row in finding.rows]
    yield _lines(finding.headings, rows, [True] * len(finding.headings))
    if finding.notes:
        yield "\n".join(f"- {_pointing(markdown(note), summary)}" for note in finding.notes)


def _cell(cell: str | Stands, summary: Summary) -> str:
    if isinstance(cell, str):
        return _pointing(markdown(cell), summary)
    named = (level for level in summary.levels if level.index in cell.levels)
    return ", ".join(f"[{markdown(load_title(level.load))}](#level-{level.index})" for level in named) or "–"


def _pointing(text: str, summary: Summary) -> str:
    """Markdown in which ``level 3`` is a link to that level's row."""
    known = {str(level.index) for level in summary.levels}
    return re.sub(r"\blevel (\d+)\b", lambda m: f"[{m[0]}](#level-{m[1]})" if m[1] in known else m[0], text)


def _memory(summary: Summary) -> Iterator[str]:
    tables, told = memory.tables(summary), memory.findings(summary, everything=True)
    sources, absent = memory.sources(summary), memory.absent(summary)
    in_short = content.memory(summary)
    if tables or told or sources or in_short:
        yield "## Memory of the target"
    if in_short:
        yield f"Resident: {markdown(in_short)}"
    yield from tables_of(tables)
    for finding in told:
        yield from _finding(finding, summary)
    if sources or absent:
        yield table_of(("from where", ""), [*sources, *((f"not given: {name}", why) for name, why in absent)])


def _quality(summary: Summary) -> Iterator[str]:
    tables = quality.tables(summary)
    if tables:
        yield "## Quality of the answers"
    yield from tables_of(tables)
    for finding in [*quality.findings(summary), *quality.reasons(summary)]:
        yield from _finding(finding, summary)


def _answers(summary: Summary) -> Iterator[str]:
    lines = determinism.lines(summary)
    if lines:
        yield "## The same answers"
        yield "\n".join(f"- {markdown(line)}" for line in lines)
    for finding in determinism.findings(summary):
        yield from _finding(finding, summary)


def _over_time(summary: Summary) -> Iterator[str]:
    tables = findings.interval_tables(summary)
    if tables:
        yield "## Over time"
    yield from tables_of(tables)


def _intervals(summary: Summary) -> Iterator[str]:
    rows = content.interval_rows(summary)
    if rows:
        yield "## How far chance reaches"
        yield (
            "In brackets the 95 % confidence interval: in 95 of 100 levels like this one it holds the value that an"
            " endless level would have. Given only where that can be estimated."
        )
        yield table_of(("level", "metric", "mean", "p50", "p95", "why there is none"), rows)


def _facts(summary: Summary) -> Iterator[str]:
    slo = content.slo_lines(summary)
    if slo:
        yield "## SLO"
        yield table_of(("clause", "result"), slo)
    asserted = gates.lines(summary)
    if asserted:
        yield "## Gates"
        yield table_of(("asserted", "result"), asserted)
    client = content.client(summary)
    if client:
        yield "## The client itself"
        yield markdown(client)
    if cluster := content.cluster(summary):
        yield markdown(cluster)


def _doubts(summary: Summary) -> Iterator[str]:
    for title, sorts in zip(("Failures", "Cautions"), content.doubts(summary), strict=True):
        if sorts:
            yield f"## {title}"
            rows = [_doubt(caution) for cautions in sorts for caution in cautions]
            yield table_of(("what", "where", "why", "advice"), rows)


def _doubt(caution: Caution) -> tuple[str, str, str, str]:
    return caution.about.replace("_", " "), caution.place, caution.reason, caution.advice


def _circumstances(summary: Summary) -> Iterator[str]:
    yield "## Endpoint and machine"
    versions = {"loadbench": summary.loadbench} | (summary.environment.get("versions") or {})
    told = {name: fact for name, fact in (summary.endpoint.get("facts") or {}).items() if name not in PRIVATE}
    facts = [
        ("endpoint", content.endpoint_line(summary)),
        *((f"model {index + 1}", content.model_line(model)) for index, model in enumerate(summary.models)),
        ("machine", content.machine_line(summary)),
        ("Python", f"{summary.environment.get('python')}, {summary.environment.get('event_loop')}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *((f"endpoint: {name.replace('_', ' ')}", _fact(fact)) for name, fact in told.items()),
    ]
    yield table_of(("", ""), [(name, fact) for name, fact in facts if fact])


def _fact(fact: object) -> str:
    """``onnxruntime 1.31.0, …`` of what is an object in JSON."""
    return ", ".join(f"{name} {value}" for name, value in fact.items()) if isinstance(fact, dict) else str(fact)


def scenario_text(scenario: Mapping[str, Any]) -> str:
    """The scenario as YAML, as a file would have it."""
    text: str = yaml.safe_dump(dict(scenario), sort_keys=False, allow_unicode=True)
    return text


def _definitions() -> Iterator[str]:
    yield (
        "Latencies are of the successful requests; p99_all counts failures as infinite. Service time counts from when"
        " a request was sent, response time from when it was due."
    )
    yield table_of(
        ("metric", "unit", "definition"), [(row.title, row.unit, row.definition) for row in METRICS.values()]
    )


def table_of(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of words."""
    return _lines(headings, [[markdown(cell) for cell in row] for row in rows], [True] * len(headings))


def _lines(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[bool]) -> str:
    """A table of cells that are Markdown already; columns that are not ``left`` are aligned to the right."""
    rule = ["---" if begins else "---:" for begins in left]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*map(markdown, headings)], rule, *rows])


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any inside, its lines free of unprintable characters."""
    lines = ["".join(c if c.isprintable() else plain(c) for c in line) for line in text.rstrip("\n").split("\n")]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join([f"{fence}{language}", *lines, fence])
