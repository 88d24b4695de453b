"""The command ``trend``: which scenarios, which figures, how many runs. The work is elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import orjson

from loadbench.errors import UsageError
from loadbench.report.escape import json_text

FIRST = ("ttft.p50", "ttft.p95", "output_tokens_per_s", "failures")
"""What is shown unless other figures are asked for."""


@click.command("trend")
@click.argument("scenarios", nargs=-1, metavar="[SCENARIO…]")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="ttft.p95, output_tokens_per_s, …, or all.")
@click.option("--last", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="Of so many runs.")
@click.option("--results", default="results", show_default=True, type=click.Path(path_type=Path), help="Whose history.")
@click.option("--json", "as_json", is_flag=True, help="Print the series and their changes as JSON, and nothing else.")
def trend_command(
    scenarios: tuple[str, ...], metrics: tuple[str, ...], last: int, results: Path, as_json: bool
) -> None:
    """Show what the figures of SCENARIO, of all unless named, did from run to run, and since which commit.

    Reads history.jsonl of the results folder, which has a row for every run that went there. Only runs that are like
    the last one are held together: the same scenario, machine and target. A change is told from ten runs on.
    """
    from loadbench.analysis.history import FIGURES, HISTORY, read
    from loadbench.analysis.trend import trend
    from loadbench.report.trend import metric_names, print_trends, trends_json

    if unknown := next((name for name in metrics if name not in (*FIGURES, "all")), None):
        raise UsageError(f"--metric: expected one of {metric_names()} or all, got {unknown}")
    figures = tuple(FIGURES) if "all" in metrics else metrics or FIRST
    rows, unreadable = read(results / HISTORY)
    known = dict.fromkeys(row.scenario for row in rows)
    asked = dict.fromkeys(map(_name, scenarios)) if scenarios else known
    if missing := next((name for name in asked if name not in known), None):
        raise UsageError(f"{missing}: expected a scenario of {', '.join(known) or 'some run'}, as {results} has them")
    if not asked:
        raise UsageError(f"{results / HISTORY}: expected a row for a run at least, found none")
    trends = [trend([row for row in rows if row.scenario == name], figures, last) for name in asked]
    if as_json:
        click.echo(json_text(orjson.dumps(trends_json(trends, unreadable), option=orjson.OPT_INDENT_2)))
    else:
        print_trends(trends, unreadable, sys.stdout)


def _name(word: str) -> str:
    """What a scenario is called: a name, or the file that says it."""
    if not word.endswith((".yaml", ".yml")):
        return word
    from loadbench.scenario.load import Overrides, load_scenario

    return load_scenario(Path(word), Overrides(), os.environ).scenario.name
