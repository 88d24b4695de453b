"""An HTML page of one file that asks nobody for anything: its shell, its policy, its tables and its figures.

Every text goes through ``text``; what is JSON in a script goes through ``script_json``. The security policy allows the
page's own scripts and styles by their hashes, and no network; nothing is evaluated, as Vega's expressions are
interpreted. What a page says is ``html``'s business.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loadbench.report import plots
from loadbench.report.content import Table
from loadbench.report.escape import plain
from loadbench.report.findings import Finding
from loadbench.report.picture import Figure, LeftOut

HERE = Path(__file__).parent
MOST_STACKED = 5  # columns of a table with sentences, whose rows are lists on a narrow screen
NO_PICTURES = f"Pictures are left out: {plots.MISSING}. Their numbers are in the tables."


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with its anchor; ``body`` is HTML already."""

    anchor: str
    title: str
    body: str


def text(of: object, limit: int = 2000) -> str:
    """``plain`` as HTML text or attribute value."""
    return html.escape(plain(of, limit), quote=True)


def script_json(value: Any) -> str:
    """JSON that no HTML parser takes for anything else: no tag, no comment, no line that only JavaScript ends."""
    made = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", made)


def page(title: str, head: str, sections: Sequence[Section], figures: Collection[Figure], foot: str) -> str:
    """The whole page. ``head`` is what stands above all sections, HTML already; ``figures`` those that it draws."""
    library = plots.bundle() if figures else None
    css = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8") if library else THEME
    scripts = [library, script] if library else [script]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(css)}; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{each.anchor}">{text(each.title)}</a></li>' for each in sections)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=True)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">',
        f'<link rel="icon" href="data:,"><title>{text(title, 200)}</title>',
        f"<style>{css}</style></head><body>",
        '<a class="skip" href="#verdict">Skip to the verdict</a>',
        head,
        f'<div class="wrap"><nav aria-label="Parts of this page"><ul>{links}</ul></nav></div>',
        "<main>",
        "" if library or not figures else f'<section class="out" role="note">{text(NO_PICTURES)}</section>',
        *(
            f'<section id="{each.anchor}" aria-labelledby="{each.anchor}-title">'
            f'<h2 id="{each.anchor}-title">{text(each.title)}</h2>{each.body}</section>'
            for each in sections
        ),
        f'</main><footer class="wrap">{foot}</footer><div id="tip" role="status" hidden></div>',
    ]
    if library:
        parts.append(f'<script type="application/json" id="config">{script_json(plots.config(themed=True))}</script>')
        parts += [
            f'<script type="application/json" data-plot="plot-{figure.name}">{script_json(figure.spec)}</script>'
            for figure in figures
        ]
    return "\n".join([*parts, *(f"<script>{one}</script>" for one in scripts), "</body></html>", ""])


THEME = """"use strict";
const root = document.documentElement, button = document.getElementById("theme");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const themed = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");
const label = () => (button.textContent = themed() === "dark" ? "Light" : "Dark");
button.hidden = false;
button.addEventListener("click", () => ((root.dataset.theme = themed() === "dark" ? "light" : "dark"), label()));
label();
"""
"""What is left of ``page.js`` where there are no pictures."""


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def shown(figure: Figure | LeftOut) -> str:
    """A figure with its table behind it; of what is left out the question and why."""
    if isinstance(figure, LeftOut):
        return f'<p class="out"><strong>{text(figure.title)}</strong> Left out: {text(figure.because)}.</p>'
    note = f"<figcaption>{text(figure.note)}</figcaption>" if figure.note else ""
    table = grid(figure.headings, figure.rows, caption=figure.title)
    return (
        f'<figure aria-labelledby="title-{figure.name}"><h3 id="title-{figure.name}">{text(figure.title)}</h3>'
        f'<p class="alt">{text(figure.alt)}</p>'
        f'<div class="plot" id="plot-{figure.name}" role="img" aria-label="{text(figure.alt)}"></div>{note}'
        f"<details><summary>The numbers as a table</summary>{table}</details></figure>"
    )


def grid(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    left: Collection[int] = (0,),
    anchors: Sequence[str] = (),
    made: bool = False,
) -> str:
    """A table that scrolls by itself. Columns of words begin at the left; ``made``: cells are HTML already."""
    rows = [list(row) for row in rows]
    words = {place for place in range(len(headings)) if _is_words(row[place] for row in rows if place < len(row))}
    lines, stacked = [], bool(words) and len(headings) <= MOST_STACKED
    words -= set() if stacked else {0}  # what a row is named by stays as narrow as it can be
    side = [' class="w"' if place in words else ' class="l"' if place in left else "" for place in range(len(headings))]
    head = "".join(f'<th scope="col"{side[place]}>{text(name)}</th>' for place, name in enumerate(headings))
    look = ' class="stacked"' if stacked else ""
    for number, row in enumerate(rows):
        anchor = f' id="{anchors[number]}"' if number < len(anchors) else ""
        cells = [
            f"<{begin}{side[place]}{_named(headings, place, stacked)}>{cell if made else text(cell)}</{end}>"
            for place, cell in enumerate(row)
            for begin, end in [('th scope="row"', "th") if not place else ("td", "td")]
        ]
        lines.append(f"<tr{anchor}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table{look}><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _named(headings: Sequence[str], place: int, stacked: bool) -> str:
    """The heading again, for a narrow screen that has each row's cells below one another."""
    return f' data-of="{text(headings[place])}"' if stacked and 0 < place < len(headings) else ""


def _is_words(cells: Iterable[str]) -> bool:
    return any(len(cell) > 24 for cell in cells)


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Words and what they stand for."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(fact)}</dd>' for name, fact in rows if fact)}</dl>"


def more(title: str, body: str) -> str:
    """What is there to be opened."""
    return f'<details class="more"><summary>{text(title)}</summary>{body}</details>' if body else ""


def tables(found: Iterable[Table]) -> str:
    """Tables of ``content`` and its like; rows of levels have their anchors."""
    made = []
    for table in found:
        headings = [" ".join(column.heading) for column in table.columns]
        left = {place for place, column in enumerate(table.columns) if column.left or column.rank == 0}
        anchors = [f"level-{level}" for level in table.levels]
        made.append(grid(headings, table.rows, caption=f"{table.model}, {table.title}", left=left, anchors=anchors))
        if table.note:
            made.append(f'<p class="note">{text(table.note)}</p>')
    return "".join(made)


def findings(found: Iterable[Finding], levels: Collection[int]) -> str:
    """Tables of findings, each row with links to the levels it stands on."""
    made = []
    for finding in found:
        rows = [
            [
                pointing(cell, levels)
                if isinstance(cell, str)
                else ", ".join(f'<a href="#level-{index}">{text(index)}</a>' for index in cell.levels[:12])
                + f" ({text(cell.text)})"
                for cell in row
            ]
            for row in finding.rows
        ]
        every = range(len(finding.headings))
        made.append(grid(finding.headings, rows, caption=f"{finding.model}, {finding.title}", left=every, made=True))
        if finding.notes:
            made.append(listed(finding.notes, levels))
    return "".join(made)


def listed(lines: Iterable[str], levels: Collection[int] = ()) -> str:
    body = "".join(f"<li>{pointing(line, levels)}</li>" for line in lines)
    return f"<ul>{body}</ul>" if body else ""


def pointing(of: str, levels: Collection[int], limit: int = 10_000) -> str:
    """Text in which ``level 3`` is a link to that level's row."""
    return re.sub(
        r"\blevel (\d+)\b",
        lambda match: f'<a href="#level-{match[1]}">{match[0]}</a>' if int(match[1]) in levels else match[0],
        text(of, limit),
    )
