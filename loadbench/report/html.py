"""What report.html says: the verdict with its doubts on the first screen, then the figures, then what they stand on.

The shell, the policy and the escaping are ``page``'s; the pictures ``figures``'; the words those of the other reports.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from loadbench.analysis.assertion import WHOLE_SLO
from loadbench.analysis.metrics import METRICS
from loadbench.analysis.rundir import RunData
from loadbench.analysis.summary import Caution, Summary
from loadbench.report import content, decision, determinism, findings, gates, memory, quality
from loadbench.report.escape import plain
from loadbench.report.markdown import PRIVATE, scenario_text
from loadbench.report.page import Section, grid, listed, more, page, pairs, pointing, shown, tables, text
from loadbench.report.page import findings as found_tables
from loadbench.report.picture import Figure, LeftOut
from loadbench.report.words import count

SIGNS = {"fail": ("✗", "bad"), "invalid": ("?", "doubt"), "undecided": ("?", "doubt"), "pass": ("✓", "good")}
"""Of each result its sign and colour, the worst first."""
ENDED = {"fail": "failed", "invalid": "invalid"}
LAST = ("Asserted, ", "Bear in mind")  # what is said of all models
MOST_PLACES = 4  # of a caution on the first screen; its reasons have them all
BADGES = {"pass": ("good", "✓ SLO held"), "fail": ("bad", "✗ SLO missed"), "undecided": ("doubt", "? SLO undecided")}


def html_text(summary: Summary, run: RunData, drawn: Sequence[Figure | LeftOut]) -> str:
    """The page of a run with these figures."""
    sections = [section for section in _sections(summary, run, drawn) if section.body]
    shown_figures = [figure for figure in drawn if isinstance(figure, Figure)]
    foot = f"<p>loadbench {text(summary.loadbench)} · <code>loadbench report DIR</code> makes every number again</p>"
    return page(f"{summary.name}: loadbench", _head(summary), sections, shown_figures, foot)


def _head(summary: Summary) -> str:
    button = '<button type="button" id="theme" hidden aria-label="Change between light and dark">Dark</button>'
    return (
        f'<header><div class="wrap"><h1>{text(summary.name)} <small>{text(content.run_line(summary))}</small></h1>'
        f"{button}</div></header>"
    )


def _sections(summary: Summary, run: RunData, drawn: Sequence[Figure | LeftOut]) -> Iterator[Section]:
    by = {name: "".join(map(shown, group)) for name, group in groupby(drawn, lambda figure: figure.section)}
    levels = {level.index for level in summary.levels}
    yield Section("verdict", "Verdict", _verdict(summary, levels))
    yield Section("models", "Models side by side", _models(summary, by.get("Models side by side", "")))
    yield Section("load", "Load", by.get("Load", "") + _levels(summary))
    yield Section("percentiles", "Latency by percentile", by.get("Percentiles", ""))
    yield Section("time", "Over time", by.get("Over time", "") + _over_time(summary))
    yield Section("memory", "Memory of the target", by.get("Memory", "") + _memory(summary, levels))
    yield Section("phases", "Prefill and decode", by.get("Prefill and decode", ""))
    yield Section("kinds", "Kinds of prompt", by.get("Kinds of prompt", "") + _kinds(summary))
    yield Section("quality", "Quality of the answers", _quality(summary, levels))
    yield Section("evidence", "What the verdict stands on", _evidence(summary, levels))
    yield Section("client", "The client itself", by.get("The client itself", "") + _client(summary))
    yield Section("circumstances", "Environment and command", _circumstances(summary, run))


def _verdict(summary: Summary, levels: set[int]) -> str:
    badges = [("good" if summary.status == "complete" else "bad", summary.status.replace("_", " "))]
    if summary.verdict.slo is not None:
        badges.append(BADGES[summary.verdict.slo])
    if summary.verdict.target is not None:
        healthy = summary.verdict.target == "healthy"
        badges.append(("good" if healthy else "bad", f"target {summary.verdict.target.replace('_', ' ')}"))
    badges += _gate_badge(summary)
    marks = "".join(f'<li class="{kind}">{text(word)}</li>' for kind, word in badges)
    lead, *others = [" ".join(_marked(sentence, levels) for sentence in each) for each in _paragraphs(summary)]
    lines = [f'<p class="lead">{lead}</p>', *(f"<p>{paragraph}</p>" for paragraph in others)]
    return (
        f'<div class="verdict split"><div><ul class="badges">{marks}</ul>{"".join(lines)}</div>'
        f"<div>{_promises(summary)}{pairs(_subject(summary))}{_doubts(summary)}</div></div>"
    )


def _marked(sentence: str, levels: set[int]) -> str:
    """With links to the levels that it names, and settings in the face of code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", pointing(sentence, levels))


def _gate_badge(summary: Summary) -> Iterator[tuple[str, str]]:
    """What came of all that was asserted; a miss comes before what could not be told, as in the exit code."""
    asserted = gates.results(summary)
    worst = Counter(next(result for result in SIGNS if result in told) for told in asserted.values())
    for result in ("fail", "invalid"):
        if worst[result]:
            sign, kind = SIGNS[result]
            yield kind, f"{sign} {worst[result]} of {count(len(asserted), 'gate')} {ENDED[result]}"
            return
    if asserted:
        yield "good", f"✓ {count(len(asserted), 'gate')} passed"


def _promises(summary: Summary) -> str:
    """Every clause of the SLO and every gate: where it passed, failed or could not be told; by what value behind it."""
    whole = any(gate.asserted == WHOLE_SLO for gate in summary.gates)  # then its clauses are among the gates
    slo = {} if whole else content.slo_results(summary)
    asserted = gates.results(summary)
    lines = dict(content.slo_lines(summary)), dict(gates.lines(summary))
    made = [_promise(f"SLO {clause}", told, lines[0][clause], summary) for clause, told in slo.items()]
    made += [_promise(f"gate {title}", told, lines[1][title], summary) for title, told in asserted.items()]
    made = made or ['<li class="doubt">SLO: none was given</li>']
    return f'<ul class="promises" aria-label="SLO and gates">{"".join(made)}</ul>'


def _promise(name: str, told: Mapping[str, Sequence[tuple[str, str]]], line: str, summary: Summary) -> str:
    parts: list[str] = []
    for result, (sign, kind) in SIGNS.items():
        if result in told:
            places = [where for where, _ in told[result] if where]
            where = _where(places, summary) if places else told[result][0][1]
            where = f"at {len(places)} more" if parts and result == "pass" else where
            parts.append(f'<b class="{kind}">{sign} {result}</b> {text(where, 400)}')
    worst = next(kind for result, (_, kind) in SIGNS.items() if result in told)
    return (
        f'<li class="{worst}"><details><summary>{text(name)}: <span>{"; ".join(parts)}</span></summary>'
        f"<p>{text(line, 10_000)}</p></details></li>"
    )


def _paragraphs(summary: Summary) -> list[list[str]]:
    """One lead, then a line each; of several models the sentences about each together."""
    sentences = _sentences(summary)
    names = tuple(f"{plain(model.id or model.asked)} on " for model in summary.models)
    if len(names) < 2:
        return [sentences[:2], *([sentence] for sentence in sentences[2:])]
    made: list[list[str]] = []
    for sentence in sentences:
        if not made or sentence.startswith((*names, *LAST)):
            made.append([])
        made[-1].append(sentence)
    return made


def _sentences(summary: Summary) -> list[str]:
    """The verdict in lines: one ends before a capital or a model's name; a wrong end costs a break."""
    names = "|".join(re.escape(plain(model.id or model.asked)) for model in summary.models)
    return re.split(
        rf"(?<=[\w)%][.]) (?=[A-Z]{f'|{names}' if names else ''})", plain(summary.verdict.text, limit=10_000)
    )


def _subject(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "machine", content.machine_line(summary)
    yield "endpoint", content.endpoint_line(summary)
    for model in summary.models:
        yield "model", content.model_line(model)


def _doubts(summary: Summary) -> str:
    """Every failure and caution: what and where at once, why and what to do behind it."""
    made = []
    for kind, sorts in zip(("failure", "caution"), content.doubts(summary), strict=True):
        for cautions in sorts:
            places = list(dict.fromkeys(caution.place for caution in cautions if caution.place != "run"))
            where = _where(places, summary) if places else cautions[0].reason
            reasons = "".join(f"<p>{text(_reason(caution))}</p>" for caution in cautions)
            made.append(
                f'<li class="{kind}"><details><summary><strong>{text(cautions[0].about.replace("_", " "))}</strong> '
                f"{text(where, 400)}</summary>{reasons}</details></li>"
            )
    return f'<ul class="cautions" aria-label="Failures and cautions">{"".join(made)}</ul>' if made else ""


def _where(places: Sequence[str], summary: Summary) -> str:
    if len(places) > 1 and len(places) == len({content.place(summary, level) for level in summary.levels}):
        return "on every level"
    more = f" and {len(places) - MOST_PLACES} more" if len(places) > MOST_PLACES + 1 else ""
    return f"at {', '.join(places[:MOST_PLACES] if more else places)}{more}"


def _reason(caution: Caution) -> str:
    where = "" if caution.place == "run" else f"{caution.place}: "
    return f"{where}{caution.reason}" + (f" → {caution.advice}" if caution.advice else "")


def _models(summary: Summary, picture: str) -> str:
    if summary.decision is None or len(summary.decision.candidates) < 2:
        return ""
    ranking = decision.verdict(summary.decision)
    details = "".join(
        grid(headings, rows, caption=title, left=range(len(headings)))
        for title, headings, rows in decision.details(summary.decision)
    )
    return (
        (f"<p>{text(ranking, 10_000)}</p>" if ranking else "")
        + picture
        + tables(decision.tables(summary.decision))
        + listed(decision.notes(summary.decision))
        + more("Every figure, with what it stands on", details)
    )


def _levels(summary: Summary) -> str:
    found = [*content.level_tables(summary), *content.endpoint_tables(summary)]
    left_out = listed(f"not run: {line}" for line in findings.not_run(summary))
    return f"<h3>Level by level</h3>{tables(found)}{listed(content.footnotes(found))}{left_out}" if found else left_out


def _over_time(summary: Summary) -> str:
    return more("Results by interval", tables(findings.interval_tables(summary)))


def _memory(summary: Summary, levels: set[int]) -> str:
    in_short = content.memory(summary)
    rows = [*memory.sources(summary), *((f"not given: {name}", why) for name, why in memory.absent(summary))]
    return (
        (f"<p>Resident: {text(in_short)}</p>" if in_short else "")
        + tables(memory.tables(summary))
        + found_tables(memory.findings(summary), levels)
        + more("From where the figures came", pairs(rows) if rows else "")
    )


def _kinds(summary: Summary) -> str:
    found = content.kind_tables(summary)
    return more("Every figure by kind of prompt", tables(found) + listed(content.footnotes(found)) if found else "")


def _quality(summary: Summary, levels: set[int]) -> str:
    answers = determinism.lines(summary)
    return (
        tables(quality.tables(summary))
        + found_tables(quality.findings(summary), levels)
        + (f"<h3>The same answers</h3>{listed(answers)}" if answers else "")
        + found_tables(determinism.findings(summary), levels)
    )


def _evidence(summary: Summary, levels: set[int]) -> str:
    rows = content.interval_rows(summary)
    reach = grid(
        ("level", "metric", "mean", "p50", "p95", "why there is none"),
        rows,
        caption="95 % confidence intervals",
        left=(0, 1),
    )
    return (
        found_tables(findings.findings(summary), levels)
        + more("The numbers it stands on", found_tables(findings.points(summary), levels))
        + (more("How far chance reaches", reach) if rows else "")
    )


def _client(summary: Summary) -> str:
    line, cluster = content.client(summary), content.cluster(summary)
    told = f"<p>At its worst: {text(line)}.</p>" if line else ""
    return told + (f"<p>{text(cluster[:1].upper() + cluster[1:], 10_000)}.</p>" if cluster else "")


def _circumstances(summary: Summary, run: RunData) -> str:
    versions = {"loadbench": summary.loadbench} | (summary.environment.get("versions") or {})
    facts = {name: fact for name, fact in (summary.endpoint.get("facts") or {}).items() if name not in PRIVATE}
    rows = [
        ("Python", f"{summary.environment.get('python')}, {summary.environment.get('event_loop')}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *((f"endpoint: {name.replace('_', ' ')}", _fact(fact)) for name, fact in facts.items()),
        ("seed", str(run.facts.get("seed"))),
        ("levels", f"{len(summary.levels)} of {summary.levels_planned} were started"),
    ]
    scenario = scenario_text(run.facts["scenario"])
    words = grid(
        ("metric", "unit", "definition"),
        [(row.title, row.unit, row.definition) for row in METRICS.values()],
        caption="What the numbers mean",
        left=(0, 1, 2),
    )
    return (
        f"<p>The command that repeats it:</p><pre tabindex='0'><code>{text(summary.command, 10_000)}</code></pre>"
        + pairs([("machine", content.machine_line(summary)), ("endpoint", content.endpoint_line(summary)), *rows])
        + more("The scenario", f"<pre tabindex='0'><code>{_lines(scenario)}</code></pre>")
        + more("What the numbers mean", words)
    )


def _lines(document: str) -> str:
    """A document line by line, each as it is indented."""
    lines = document.rstrip("\n").split("\n")
    return "\n".join(" " * (len(line) - len(line.lstrip(" "))) + text(line, 10_000) for line in lines)


def _fact(fact: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in fact.items()) if isinstance(fact, dict) else str(fact)
