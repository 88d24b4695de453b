"""Prints what ``loadbench calibrate`` found: what one client process can take, and how far its stamps are off."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.table import Table
from rich.text import Text

from loadbench.records import load_from_json, load_title
from loadbench.report.console import console_on
from loadbench.report.escape import plain
from loadbench.report.words import NONE, figure, milliseconds

CEILINGS = {"events": "tokens", "requests": "requests"}
TIMES_FLOOR = 10  # what is ten times as long as an error is off by a tenth at the most: the share allowed to lag


def print_calibration(found: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """The figures in a table, and under it what follows from them. ``found`` is the calibration as it is kept."""
    console = console_on(stream or sys.stdout)
    machine = found["machine"]
    facts = (machine["cpu"], f"{machine['cores']} cores", machine["os"], f"Python {machine['python']}")
    console.print(Text(plain(" · ".join((*facts, machine["event_loop"])))))
    console.print()
    console.print(_table(found))
    console.print()
    for line in _follows(found):
        console.print(Text(line))


def _table(found: Mapping[str, Any]) -> Table:
    shape, endpoint = found["shape"], found["endpoint"]
    load = f"{load_title(load_from_json(shape['load']))}, {shape['tokens']} tokens {shape['gap_ms']:g} ms apart"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("this machine", justify="right", no_wrap=True)
    table.add_column("what it is")
    for row in (
        ("ceiling", _rate(found["events_per_s"], "tokens"), "one client process, each token in a read of its own"),
        ("", _rate(found["requests_per_s"], "requests"), "one client process, answers of one token"),
        ("floor p50", _error(found, "ttft_error_p50_ms"), "TTFT as we stamp it less TTFT as the endpoint sent it:"),
        ("floor p99", _error(found, "ttft_error_p99_ms"), f"{load}, {found['ttft_error_n']:,} requests"),
        ("endpoint", _rate(endpoint["events_per_s"], "tokens"), "the scripted endpoint, in a process of its own"),
        ("", _rate(endpoint["requests_per_s"], "requests"), ""),
    ):
        table.add_row(*row)
    return table


def _follows(found: Mapping[str, Any]) -> list[str]:
    """What a reader should do with the figures."""
    full = [word for what, word in CEILINGS.items() if found["limit"][what] == "endpoint"]
    lines = ["Rates are per second of a process's own CPU: a slower one beside it does not lower them."]
    lines.append(f"The endpoint's core was full with {' and '.join(full)}." if full else "The endpoint was no limit.")
    if found["usable_cores"] == 1:
        lines.append("Client and endpoint shared one core: the floor has their waiting for each other in it.")
    halves = [_rate(rate / 2, word) for what, word in CEILINGS.items() if (rate := found[f"{what}_per_s"]) is not None]
    lines.append(f"A level above half a ceiling is marked client-bound: {' or '.join(halves)} in one process.")
    if (error_ms := found["ttft_error_p99_ms"]) is not None:
        lines.append(f"A TTFT under {milliseconds(TIMES_FLOOR * error_ms)} is off by more than a tenth at its p99.")
    return [*lines, "Kept for this machine and this version: every run reads it, none measures it again."]


def _rate(value: float | None, noun: str) -> str:
    return NONE if value is None else f"{figure(value)} {noun}/s"


def _error(found: Mapping[str, Any], name: str) -> str:
    about = "~" if name in found["indicative"] else ""
    return NONE if found[name] is None else about + milliseconds(found[name])
