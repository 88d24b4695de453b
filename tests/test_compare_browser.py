"""compare.html in Chromium: both curves are drawn, nothing is fetched, it fits, and what came of it is read first."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadbench.analysis.compare import compare
from loadbench.analysis.group import load, runs_in
from loadbench.records import Closed
from loadbench.report.compare_page import write_comparison
from tests.browser import CHROMIUM, browser
from tests.rundirs import Planned, write_run
from tests.test_html import HOSTILE

pytest.importorskip("vl_convert")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: .ci/run installs one")
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
DRAWN = "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('svg path, svg text').length)"


@pytest.mark.parametrize("name", ["synthetic-edge:1", HOSTILE])
async def test_the_page_draws_without_an_error_asks_nobody_and_fits_wide_and_narrow(tmp_path: Path, name: str) -> None:
    for side, slower, seed in (("base", 1.0, 0), ("new", 1.3, 50)):
        for number in range(5):
            levels = [Planned(Closed(users), model=name, slower=slower, duration_s=6.0) for users in (1, 2, 8)]
            write_run(tmp_path / side / str(number), levels, seed=seed + number, name=name)
    found = compare(load(runs_in(tmp_path / "base")), load(runs_in(tmp_path / "new")))
    write_comparison(found, tmp_path)
    page = tmp_path / "compare.html"
    async with browser() as tab:
        for width, dark in ((1440, False), (390, True)):
            await tab.open(page, width=width, dark=dark)
            assert await tab.ask(WIDE) <= 0, width
            marks = await tab.ask(DRAWN)
            assert len(marks) == 6 and min(marks) > 3  # every change, and five figures against load
            said = await tab.ask("document.getElementById('verdict').innerText")
            assert "✗ regressed" in said and "Worse:" in said
            assert tab.console == []
            assert set(tab.requests) == {page.as_uri()}
