"""The page of one night: each scenario with how it ended, against the last good night, and links to its reports.

One file without scripts; everything that came from a file passes ``text``. Colours are those of the report's page.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from loadbench.analysis.compare_words import OF_FEW
from loadbench.analysis.history import FIGURES, Place, Row
from loadbench.analysis.night import Against, Night, Turn
from loadbench.outcomes import OUTCOMES
from loadbench.report.escape import plain
from loadbench.report.night_words import ended, held, lead, moment, news, since, status
from loadbench.report.trend import told
from loadbench.report.words import clock, count

SHOWN = ("ttft.p50", "ttft.p95", "output_tokens_per_s", "failures", "peak_rss")
REPORTS = ("report.html", "report.md")
BEFORE = 14  # earlier nights on the page: two weeks
AGAIN_S = 20  # how often the page of a night that goes on is loaded anew
IN_ROW = 160  # characters of an error in the first table: its whole text is below
SIGNS = {"good": "✓", "bad": "✗", "doubt": "…"}
STYLE = """
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: 400; border-bottom: 1px solid var(--grid); }
td.n, th.n { text-align: right; white-space: nowrap; } .scroll { overflow-x: auto; }
td small { display: block; color: var(--muted); } td small.doubt { color: var(--doubt); }
.night th[scope=row] { min-width: 9rem; } p, h2, h3 { overflow-wrap: anywhere; }
.mark { font-weight: 700; } .nights { list-style: none; padding: 0; margin: 0; }
.night td, .night th { white-space: normal; } .night td.n, .night .strip { white-space: nowrap; }
.strip a, .strip span { display: inline-block; padding: 0 .16rem; text-decoration: none; font-weight: 700; }
@media (max-width: 45rem) {
  .night thead { display: none; } .night tr, .night th, .night td { display: block; border: 0; padding: .1rem 0; }
  .night td.n, .night .strip { text-align: left; white-space: normal; }
  .night tr { border-bottom: 1px solid var(--grid); padding: .5rem 0; }
  .night td:empty { display: none; }
  .night td[data-t]::before { content: attr(data-t) ": "; color: var(--muted); }
  .night .n small { display: inline; margin-left: .6rem; }
}
h2 .badge { font-size: .95rem; margin-left: .6rem; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""


def text(foreign: object, limit: int = 2000) -> str:
    """A foreign text as HTML that shows it, in an attribute too."""
    return escape(plain(foreign, limit))


@dataclass(frozen=True, slots=True)
class Nights:
    """The night, those before it, the last first, and the history's rows by their places below ``results/nightly``."""

    night: Night
    earlier: Sequence[Night]
    rows: Mapping[str, Row]

    def runs(self, night: Night, name: str) -> list[tuple[str, Row]]:
        """What the history has of a scenario in one of the nights: its run, or those of its group by their names."""
        path = next((turn.path for turn in night.turns if turn.name == name), None)
        place = f"{night.name}/{path}"
        found = [(key, row) for key, row in self.rows.items() if path and (key == place or key.startswith(place + "/"))]
        return [(key.rpartition("/")[2], row) for key, row in found if row.levels]

    def base(self, against: Against | None) -> Night | None:
        """The night that was compared with; None where nothing was."""
        name = None if against is None or against.answer is None else against.night
        return next((night for night in self.earlier if night.name == name), None)


def page(night: Night, earlier: Sequence[Night], rows: Mapping[str, Row]) -> str:
    """index.html."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    title, known = f"Night of {night.name}", Nights(night, earlier, rows)
    again = f'<meta http-equiv="refresh" content="{AGAIN_S}">' if night.status == "running" else ""
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}',
            f"<title>{text(title)}: {text(lead(night))}</title>",
            f"<style>\n{css}{STYLE}</style>\n</head>\n<body>",
            f'<header><div class="wrap"><h1>{text(title)}<small>{text(night.scenarios)}</small></h1></div></header>',
            "<main>",
            *_first(known),
            *(part for turn in night.worst_first for part in _turn(turn, known)),
            *_earlier(earlier),
            "</main>\n</body>\n</html>\n",
        )
    )


def front(night: Night) -> str:
    """An address that stays: it leads to the last night."""
    href = f"{quote(night.name)}/index.html"
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="refresh" content="0; url={href}">\n<title>The last night</title>\n'
        f'<a href="{href}">Night of {text(night.name)}</a>\n</html>\n'
    )


def _first(known: Nights) -> Iterator[str]:
    night, earlier = known.night, known.earlier
    kind = _kind_of(night)
    yield f'<section class="verdict"><p class="lead {kind}">{_mark(kind)} {text(lead(night))}.</p>'
    if said := list(news(night, earlier)):
        yield f"<p>{text(' '.join(said))}</p>"
    if note := status(night):
        yield f"<p>{text(note)}</p>"
    yield f'<p class="note">{text(_when(night, earlier))}</p>'
    before = '<th title="the last at the right">nights before</th>' if earlier else ""
    yield '<div class="scroll"><table class="night"><thead><tr><th>scenario</th><th>how it ended</th>'
    yield f'<th>against the last good night</th>{before}<th class="n">took</th><th>reports</th></tr></thead><tbody>'
    for turn in night.worst_first:
        took = "" if turn.took_s is None else clock(turn.took_s)
        strip = f'<td class="strip" data-t="before">{_strip(earlier, turn.name)}</td>' if earlier else ""
        yield f'<tr><th scope="row"><a href="#{quote(turn.name)}">{text(turn.name)}</a></th>'
        yield f"<td>{_ended(turn)}{_small(since(turn, earlier))}{_small(turn.why, '', IN_ROW)}</td>"
        yield f"<td>{_against(turn.against)}</td>{strip}"
        yield f'<td class="n"{" data-t=took" if took else ""}>{took}</td><td>{_links(night, turn)}</td></tr>'
    yield "</tbody></table></div></section>"


def _when(night: Night, earlier: Sequence[Night]) -> str:
    """When, how long, at which commit, and the exit code."""
    ended_at = f", ended {moment(night.ended)}" if night.ended else ""
    parts = [f"Started {moment(night.started)}{ended_at}; the runs took {clock(night.took_s)}"]
    if night.commit is not None:
        changes = " with changes" if night.dirty else ""
        before = next((one.commit for one in earlier if one.commit), None)
        moved = "" if before is None or before == night.commit else f"; {before[:12]} the night before"
        parts.append(f"commit {night.commit[:12]}{changes}{moved}")
    return " · ".join([*parts, f"exit code {night.code}"])


def _mark(kind: str) -> str:
    """A sign beside the colour, for who does not see that."""
    return f'<span class="mark" aria-hidden="true">{SIGNS[kind]}</span>'


def _kind(turn: Turn) -> str:
    return "doubt" if turn.code is None else "good" if turn.code == 0 else "bad"


def _kind_of(night: Night) -> str:
    if night.code == 0:
        return {"complete": "good", "running": "doubt"}.get(night.status, "bad")
    return "bad"


def _ended(turn: Turn) -> str:
    return f'<span class="{_kind(turn)}">{_mark(_kind(turn))} {text(ended(turn))}</span>'


def _small(told: str | None, kind: str = "", limit: int = 2000) -> str:
    return f'<small class="{kind}">{text(told, limit)}</small>' if told else ""


def _against(against: Against | None) -> str:
    if against is None:
        return ""
    kinds = {"regressed": "bad", "improved": "good", "equivalent": "good"}
    kind = kinds.get(against.answer or "", "doubt" if against.night else "note")
    words = text(held(against))
    words = words if against.page is None else f'<a href="{quote(against.page)}">{words}</a>'
    night = f" ({text(against.night)})" if against.night else ""
    doubts = f"bear in mind: {against.doubts}" if against.doubts else None
    return f'<span class="{kind}">{words}</span>{night}{_small(against.brief)}{_small(doubts, "doubt")}'


def _strip(earlier: Sequence[Night], name: str) -> str:
    """How it ended in each of the nights before, the last at the right."""
    marks = []
    for night in reversed(earlier[:BEFORE]):
        turn = next((turn for turn in night.turns if turn.name == name and turn.is_over), None)
        if turn is None:
            marks.append(f'<span title="{text(night.name)}: not run">·</span>')
            continue
        href, said = f"../{quote(night.name)}/index.html#{quote(name)}", f"{night.name}: {ended(turn)}"
        marks.append(f'<a class="{_kind(turn)}" href="{href}" title="{text(said)}">{SIGNS[_kind(turn)]}</a>')
    return "".join(marks)


def _links(night: Night, turn: Turn) -> str:
    """To what there is to read."""
    found = []
    if turn.path is not None:
        folder = night.folder / turn.path
        found += [(name, f"{turn.path}/{name}") for name in REPORTS if (folder / name).exists()]
        runs = sorted((path.parent for path in folder.glob("*/run.json")), key=lambda run: (len(run.name), run.name))
        found += [
            (f"run {run.name}" if run == runs[0] else run.name, f"{turn.path}/{run.name}/{name}")
            for run in runs
            if (name := next((name for name in REPORTS if (run / name).exists()), None))
        ]
    if turn.log is not None and (night.folder / turn.log).exists():
        found.append(("log", turn.log))
    return " · ".join(f'<a href="{quote(href)}">{text(name)}</a>' for name, href in found)


def _earlier(earlier: Sequence[Night]) -> Iterator[str]:
    if not earlier:
        return
    yield '<section><h2>The nights before</h2><ul class="nights">'
    for night in earlier[:BEFORE]:
        href, kind = f"../{quote(night.name)}/index.html", _kind_of(night)
        yield f'<li><span class="{kind}">{_mark(kind)}</span> <a href="{href}">{text(night.name)}</a> '
        yield f"{text(lead(night))}, {clock(night.took_s)}</li>"
    yield "</ul></section>"


def _turn(turn: Turn, known: Nights) -> Iterator[str]:
    yield f'<section id="{text(turn.name)}"><h2>{text(turn.name)} <span class="badge">{_ended(turn)}</span></h2>'
    yield f'<p class="note">{text(turn.file)}</p>'
    if turn.why:
        yield f'<p class="{_kind(turn)}">{text(turn.why)}</p>'
    if turn.against is not None and turn.against.night is not None:
        accepted = " That was accepted: it is what is good from now on." if turn.accepted else ""
        which = "" if turn.against.changed else "Against the last good night: "
        yield f"<p>{which}{text(turn.against.text)}{accepted}</p>"
    if turn.path is not None:
        yield from _said(known.night.folder / turn.path)
        base = known.base(turn.against)
        was = [] if base is None else known.runs(base, turn.name)
        yield from _figures([row for _, row in known.runs(known.night, turn.name)], [row for _, row in was], base)
    yield "</section>"


def _said(folder: Path) -> Iterator[str]:
    """What the report of a run says on top; of several what to bear in mind, and the rest to be unfolded."""
    paths = [folder] if (folder / "run.json").exists() else [path.parent for path in folder.glob("*/run.json")]
    runs = [(run.name, _summary(run)) for run in sorted(paths, key=lambda run: (len(run.name), run.name))]
    told = [(name, _verdict(summary)) for name, summary in runs]
    doubts = Counter(about for _, summary in runs for about in _doubts(summary))
    if doubts and len(runs) > 1:
        said = [f"{about.replace('_', ' ')} in {number} of {len(runs)} runs" for about, number in doubts.items()]
        yield f'<p class="doubt">Bear in mind: {text(", ".join(said))}.</p>'
    if len(runs) == 1:
        yield f"<p>{text(told[0][1], 10_000)}</p>"
    elif runs:
        yield f"<details><summary>The {count(len(runs), 'run')} in words</summary>"
        yield from (f"<p><b>{text(name)}</b> {text(verdict, 10_000)}</p>" for name, verdict in told)
        yield "</details>"


def _summary(run: Path) -> dict[str, Any]:
    try:
        found = orjson.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _verdict(summary: Mapping[str, Any]) -> str:
    try:
        return str(summary["verdict"]["text"])
    except (KeyError, TypeError):
        return "It left no summary."


def _doubts(summary: Mapping[str, Any]) -> set[str]:
    """Of its levels, but for failures and few samples: the figures show those."""
    try:
        found = {str(caution["about"]) for level in summary["levels"] for caution in level["cautions"]}
    except (KeyError, TypeError):
        return set()
    return found - {*OUTCOMES, *OF_FEW}


def _figures(rows: Sequence[Row], base: Sequence[Row], night: Night | None) -> Iterator[str]:
    """A line for each level: medians over the runs, how far these lie apart, and those of the night compared with."""
    places = list(dict.fromkeys(place for row in rows for place in row.levels))
    shown = [name for name in SHOWN if any(_values(rows, place, name) for place in places)]
    if not shown:
        return
    models = list(dict.fromkeys(model for model, _, _ in places))
    of = f"Medians of {len(rows)} runs, least … most" if len(rows) > 1 else "One run"
    was = f"; was: that of {night.name}" if base and night is not None else ""
    few = any(_few([*rows, *base], place, name) for place in places for name in shown)
    was += "; ~: on few samples" if few else ""
    yield f'<p class="note">{text(of + was)}{"" if models[1:] else " · " + text(models[0])}</p>'
    heads = "".join(f'<th class="n">{text(FIGURES[name].title)}</th>' for name in shown)
    which = "<th>model</th>" if models[1:] else ""
    yield f'<div class="scroll"><table class="night"><thead><tr><th>load</th>{which}{heads}</tr></thead><tbody>'
    for place in places:
        model = f"<td>{text(place[0])}</td>" if models[1:] else ""
        cells = "".join(_cell(rows, base, place, name) for name in shown)
        yield f'<tr><th scope="row">{text(place[1])}</th>{model}{cells}</tr>'
    yield "</tbody></table></div>"


def _values(rows: Sequence[Row], place: Place, name: str) -> list[float]:
    found = (row.levels.get(place, {}).get(name) for row in rows)
    return [value for value in found if value is not None]


def _few(rows: Sequence[Row], place: Place, name: str) -> bool:
    """Whether the figure stands on few samples in any of these."""
    return any(name in row.indicative.get(place, ()) for row in rows)


def _cell(rows: Sequence[Row], base: Sequence[Row], place: Place, name: str) -> str:
    figure, values, were = FIGURES[name], _values(rows, place, name), _values(base, place, name)
    about, was_about = ("~" if values and _few(runs, place, name) else "" for runs in (rows, base))
    middle = about + told(figure, statistics.median(values) if values else None)
    apart = ""
    if len(values) > 1 and min(values) < max(values):
        apart = f"{told(figure, min(values))} … {told(figure, max(values))}"
    few = f"in {len(values)} of {len(rows)} runs" if 0 < len(values) < len(rows) else ""
    was = f"was {was_about}{told(figure, statistics.median(were))}" if were else ""
    said = _small(", ".join(filter(None, (apart, few)))) + _small(was)
    return f'<td class="n" data-t="{text(figure.title)}">{text(middle)}{said}</td>'
