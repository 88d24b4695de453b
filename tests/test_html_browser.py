"""report.html in Chromium: it draws, it fetches nothing, it fits, and it can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadbench.records import Closed, Open
from loadbench.report.write import write_report
from tests import rundirs
from tests.browser import CHROMIUM, browser
from tests.rundirs import Planned, write_run
from tests.test_html import HOSTILE, memory_ladder

pytest.importorskip("vl_convert")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: .ci/run installs one")
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SCALED = """[...document.querySelectorAll('.plot')].filter((plot) =>
  Number(plot.querySelector('svg').getAttribute('width')) > plot.clientWidth + 1).map((plot) => plot.id)"""
DRAWN = "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('svg path, svg text').length)"


def hostile(path: Path) -> Path:
    """Two loops, failures, and names that would like to be code."""
    kinds = (HOSTILE, "a-kind-with-a-name-that-is-very-much-longer-than-anybody-would-expect-it-to-be")
    levels = [
        Planned(load, model=HOSTILE, kinds=kinds, fails=0.1) for load in (Closed(1), Closed(4), Open(2.0), Open(3.0))
    ]
    return write_run(path, levels, name=HOSTILE, command=f"loadbench run {HOSTILE}")


@pytest.mark.parametrize("build", [rundirs.two_kinds, rundirs.three_models, rundirs.failures, memory_ladder, hostile])
async def test_the_page_draws_without_an_error_asks_nobody_and_fits_wide_and_narrow(
    build: object, tmp_path: Path
) -> None:
    assert callable(build)
    summary = write_report(build(tmp_path))
    page = tmp_path / "report.html"
    async with browser() as tab:
        for width, dark in ((1440, False), (390, True)):
            await tab.open(page, width=width, dark=dark)
            assert await tab.ask(WIDE) <= 0, width
            marks = await tab.ask(DRAWN)
            assert marks and min(marks) > 3
            assert await tab.ask(SCALED) == []  # a picture that is made smaller has letters that nobody reads
            assert await tab.ask("document.title") != ""
            said = " ".join((await tab.ask("document.getElementById('verdict').innerText")).split())
            assert summary.verdict.text.split()[1] in said
            assert tab.console == []
            assert set(tab.requests) == {page.as_uri()}


async def test_the_verdict_is_reached_first_by_keyboard_and_a_table_stands_behind_every_picture(tmp_path: Path) -> None:
    write_report(rundirs.closed_ladder(tmp_path))
    async with browser() as tab:
        await tab.open(tmp_path / "report.html")
        await tab.send("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        assert await tab.ask("document.activeElement.getAttribute('href')") == "#verdict"
        assert await tab.ask("document.querySelectorAll('figure').length") > 4
        assert await tab.ask(
            "[...document.querySelectorAll('figure')].every((f) => f.querySelector('details table tbody tr'))"
        )


async def test_light_and_dark_are_followed_and_can_be_changed_and_print_is_light(tmp_path: Path) -> None:
    write_report(rundirs.closed_ladder(tmp_path))
    paper = "getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()"
    line = "getComputedStyle(document.querySelector('.plot svg .mark-line path')).stroke"
    async with browser() as tab:
        await tab.open(tmp_path / "report.html", dark=True)
        dark = await tab.ask(paper), await tab.ask(line)
        await tab.ask("document.getElementById('theme').click()")
        light = await tab.ask(paper), await tab.ask(line)
        assert (dark[0], light[0]) == ("#181c21", "#ffffff")
        assert dark[1] != light[1]
        await tab.ask("document.getElementById('theme').click()")
        await tab.send("Emulation.setEmulatedMedia", media="print")
        assert await tab.ask(paper) == "#fff"
        assert tab.console == []


async def test_a_tooltip_shows_values_and_sample_counts_as_text(tmp_path: Path) -> None:
    write_report(hostile(tmp_path))
    async with browser() as tab:
        await tab.open(tmp_path / "report.html")
        place = await tab.ask(
            """(() => { const plot = document.getElementById('plot-percentiles-ttft-closed-0');
              plot.scrollIntoView({block: 'center'});
              const points = plot.querySelectorAll('.mark-symbol.role-mark path');
              const box = points[points.length - 2].getBoundingClientRect();
              return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
        )
        await tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        told = await tab.ask("document.getElementById('tip').textContent")
        assert "samples" in told and "took at most" in told
        assert await tab.ask("document.getElementById('tip').childElementCount") == 0
