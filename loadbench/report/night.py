"""The page of one night: each scenario with how it ended, against the last good night, and links to its reports.

One file without scripts; everything that came from a file passes ``text``. Colours are those of the report's page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import orjson

from loadbench.analysis.history import FIGURES, Row
from loadbench.analysis.night import OUTCOMES, Against, Night, Turn
from loadbench.report.escape import plain
from loadbench.report.trend import told
from loadbench.report.words import clock

STATES = {
    "waiting": "waiting for its turn",
    "running": "running",
    "overtime": "stopped: it took longer than it may",
    "no_room": "not run: the disk is nearly full",
}
STATUS = {
    "running": "It goes on.",
    "interrupted": "It was interrupted: the same command goes on with the others.",
    "cut_short": "It was cut short: the program or the machine ended in the middle of it.",
}
SHOWN = ("ttft.p50", "ttft.p95", "output_tokens_per_s", "failures")
REPORTS = ("report.html", "report.md")
BEFORE = 14  # earlier nights on the page: two weeks
STYLE = """
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: 400; border-bottom: 1px solid var(--grid); }
td.n, th.n { text-align: right; white-space: nowrap; } .scroll { overflow-x: auto; }
p, h2, h3 { overflow-wrap: anywhere; }
.mark { font-weight: 700; } .nights { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; padding: 0; }
.night td, .night th { white-space: normal; } details + .scroll { margin-top: .8rem; }
@media (max-width: 45rem) {
  .night thead { display: none; } .night tr, .night th, .night td { display: block; border: 0; padding: .1rem 0; }
  .night td.n { text-align: left; } .night tr { border-bottom: 1px solid var(--grid); padding: .5rem 0; }
  .night td:empty { display: none; }
}
h2 .badge { font-size: .95rem; margin-left: .6rem; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""


def text(foreign: object, limit: int = 2000) -> str:
    """A foreign text as HTML that shows it, in an attribute too."""
    return escape(plain(foreign, limit))


def page(night: Night, earlier: Sequence[Night], rows: Mapping[str, Row]) -> str:
    """index.html. ``earlier`` are the nights before, the last first, ``rows`` the history's by their place in it."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    title = f"Night of {night.name}"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}: {text(_lead(night))}</title>",
            f"<style>\n{css}{STYLE}</style>\n</head>\n<body>",
            f'<header><div class="wrap"><h1>{text(title)}<small>{text(night.scenarios)}</small></h1></div></header>',
            "<main>",
            *_first(night),
            *_earlier(earlier),
            *(part for turn in night.turns for part in _turn(night, turn, rows)),
            "</main>\n</body>\n</html>\n",
        )
    )


def _lead(night: Night) -> str:
    """The night in one line."""
    well = sum(turn.code == 0 for turn in night.turns)
    lead = f"{well} of {len(night.turns)} good"
    codes = dict.fromkeys(turn.code for turn in night.turns if turn.code)
    bad = ", ".join(f"{sum(turn.code == code for turn in night.turns)} {OUTCOMES[code]}" for code in codes if code)
    left = sum(not turn.is_over for turn in night.turns)
    return lead + (f"; {bad}" if bad else "") + (f"; {left} not run" if left else "")


def _first(night: Night) -> Iterator[str]:
    kind = "good" if night.code == 0 and night.status == "complete" else "bad"
    kind = "doubt" if night.status == "running" else kind
    yield f'<section class="verdict"><p class="lead {kind}">{_mark(kind)} {text(_lead(night))}.</p>'
    if note := STATUS.get(night.status):
        yield f"<p>{note}</p>"
    commit = "" if night.commit is None else f" at commit {text(night.commit[:12])}"
    commit += " with changes" if night.dirty else ""
    ended = f", ended {text(night.ended)}" if night.ended else ""
    yield f'<p class="note">Started {text(night.started)}{ended}{commit}. Exit code {night.code}.</p>'
    yield '<div class="scroll"><table class="night"><thead><tr><th>scenario</th><th>how it ended</th>'
    yield '<th>against the last good night</th><th class="n">took</th><th>reports</th></tr></thead><tbody>'
    for turn in night.turns:
        took = "" if turn.took_s is None else clock(turn.took_s)
        links = " · ".join(f'<a href="{quote(href)}">{text(name)}</a>' for name, href in _links(night, turn))
        yield f'<tr><th scope="row"><a href="#{quote(turn.name)}">{text(turn.name)}</a></th><td>{_ended(turn)}</td>'
        yield f'<td>{_against(turn.against)}</td><td class="n">{took}</td><td>{links}</td></tr>'
    yield "</tbody></table></div></section>"


def _mark(kind: str) -> str:
    """A sign beside the colour, for who does not see that."""
    return f'<span class="mark" aria-hidden="true">{ {"good": "✓", "bad": "✗", "doubt": "…"}[kind] }</span>'


def _kind(turn: Turn) -> str:
    return "doubt" if turn.code is None else "good" if turn.code == 0 else "bad"


def _ended(turn: Turn) -> str:
    words = STATES.get(turn.state)
    if words is None or turn.state == "running":
        words = words or f"{OUTCOMES[turn.code or 0]} (exit code {turn.exit_code})"
    return f'<span class="{_kind(turn)}">{_mark(_kind(turn))} {text(words)}</span>'


def _against(against: Against | None) -> str:
    if against is None:
        return ""
    kind = {"regressed": "bad", "improved": "good", "equivalent": "good"}.get(against.answer or "", "doubt")
    answer = against.answer or "not compared"
    words = answer if against.page is None else f'<a href="{quote(against.page)}">{answer}</a>'
    return f'<span class="{kind}">{words}</span>' + (f" ({text(against.night)})" if against.night else "")


def _links(night: Night, turn: Turn) -> Iterator[tuple[str, str]]:
    """Names and addresses of what there is to read."""
    if turn.path is not None:
        folder = night.folder / turn.path
        for name in REPORTS:
            if (folder / name).exists():
                yield name, f"{turn.path}/{name}"
        for run in sorted(path.parent.name for path in folder.glob("*/run.json")):
            html = (folder / run / "report.html").exists()
            yield f"run {run}", f"{turn.path}/{run}/report.{'html' if html else 'md'}"
    if turn.log is not None and (night.folder / turn.log).exists():
        yield "log", turn.log


def _earlier(earlier: Sequence[Night]) -> Iterator[str]:
    if not earlier:
        return
    yield '<section><h2>The nights before</h2><ul class="nights">'
    for night in earlier[:BEFORE]:
        kind = "good" if night.code == 0 and night.status == "complete" else "bad"
        href = f"../{quote(night.name)}/index.html"
        yield f'<li><a href="{href}" title="{text(_lead(night))}">{text(night.name)}</a> '
        yield f'<span class="{kind}">{_mark(kind)}<span class="skip">{text(_lead(night))}</span></span></li>'
    yield "</ul></section>"


def _turn(night: Night, turn: Turn, rows: Mapping[str, Row]) -> Iterator[str]:
    yield f'<section id="{text(turn.name)}"><h2>{text(turn.name)} <span class="badge">{_ended(turn)}</span></h2>'
    yield f'<p class="note">{text(turn.file)}</p>'
    if turn.why:
        yield f'<p class="{_kind(turn)}">{text(turn.why)}</p>'
    if turn.against is not None:
        accepted = " That was accepted: it is what is good from now on." if turn.accepted else ""
        yield f"<p>Against the last good night: {text(turn.against.text)}{accepted}</p>"
    if turn.path is not None:
        folder = night.folder / turn.path
        runs = [folder] if (folder / "run.json").exists() else sorted(path.parent for path in folder.glob("*/run.json"))
        several = len(runs) > 1
        yield from (_verdict(run, f"Run {run.name}" if several else None) for run in runs)
        known = ((run, rows.get(run.relative_to(night.folder).as_posix())) for run in runs)
        yield from _figures([(run.name, row) for run, row in known if row is not None and row.levels], several)
    yield "</section>"


def _verdict(run: Path, name: str | None) -> str:
    """What a run's report says on top; of several runs to be unfolded."""
    try:
        summary = orjson.loads((run / "summary.json").read_bytes())
        doubts = len(summary["cautions"]) + sum(len(level["cautions"]) for level in summary["levels"])
        said = (
            f'<p>{text(summary["verdict"]["text"], 10_000)}</p>\n<p class="note">Cautions in its report: {doubts}.</p>'
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        said = '<p class="note">It left no summary.</p>'
    return said if name is None else f"<details><summary>{text(name)} in words</summary>{said}</details>"


def _figures(rows: Sequence[tuple[str, Row]], several: bool) -> Iterator[str]:
    """A line for each level, of several runs with the run's name."""
    if not rows:
        return
    heads = "".join(f'<th class="n">{text(FIGURES[name].title)}</th>' for name in SHOWN)
    which = "<th>run</th>" if several else ""
    yield f'<div class="scroll"><table><thead><tr><th>load</th>{which}<th>model</th>{heads}</tr></thead><tbody>'
    for place in dict.fromkeys(place for _, row in rows for place in row.levels):
        for name, row in rows:
            if (figures := row.levels.get(place)) is not None:
                numbers = "".join(f'<td class="n">{text(told(FIGURES[shown], figures[shown]))}</td>' for shown in SHOWN)
                which = f"<td>{text(name)}</td>" if several else ""
                yield f'<tr><th scope="row">{text(place[1])}</th>{which}<td>{text(place[0])}</td>{numbers}</tr>'
    yield "</tbody></table></div>"
