"""What a server, a file or a folder says is shown as text and obeyed by nobody, in every output that there is.

One group of two runs, made for real against a scripted endpoint whose every text would like to be code, is told in
every form; each form is then held by who would obey it: a terminal, a renderer, a parser, a browser, a runner.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt
from markdown_it.token import Token
from prometheus_client.parser import text_string_to_metric_families

from loadbench.analysis import rundir
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import AtEndpoint, Interval, Summary
from loadbench.cli import main
from loadbench.quality_mark import Marking
from loadbench.report.console import print_report
from loadbench.report.escape import plain
from loadbench.report.frame import LevelProgress, Progress
from loadbench.report.live import PlainView, TerminalView
from loadbench.report.otlp import _data
from loadbench.report.tables import endpoints_csv_text, intervals_csv_text
from loadbench.target import fake_flavours
from loadbench.target.fake_faults import FAULTS
from loadbench.target.fake_flavours import FLAVOURS
from tests.asking import scripted
from tests.browser import CHROMIUM, browser
from tests.command import ended, environment, started
from tests.test_html import Parsed

MARK = "<script>alert(1)</script>"  # what must be there, as text
EVIL = (
    f"{MARK}<img src=x onerror=alert(2)></style></script>]]><!-- &amp; \" onmouseover=\"alert(3) 'q'"
    " \x1b[38;5;213mpink\x1b]8;;http://evil.test\x07link\x1b[2J\x9b35m\x85 \u202egnp.exe \u200b\x00\ufffe"
    " [x](javascript:alert(4)) ![i](http://evil.test/x.png) <http://evil.test> | `code` **bold** $m$ ~~s~~"
    "\n# heading\n- item\r\n::error title=x::boo %0A ##[error]boo\n::stop-commands::x\n@everyone \\ {{7*7}} $(x) \u2028"
    '\nx="1"} 1\r\nSet-Cookie: a=b\r\n\r\nend'
)
FORMULA, COMMAND = "=cmd|' /C calc'!A0", "::error title=x::boo"
MODEL = f"{COMMAND} model {EVIL}"
MISSING = f"missing {EVIL}"
FOLDER = (
    "out &'[l](x) - `b`"
    if os.name == "nt"
    else '::error::out <img src=x onerror=alert(5)>"\\[l](x)|`b`\x1b[2J\u202e\n# h'
)
CONTROLS = re.compile("\x1b\\[38;5;213m|\x1b\\]8;|\x1b\\[2J|\x9b|\x07|\x00|\u202e")
MOVES = re.compile("\x1b\\[\\??[\\d;]*[A-Za-z]")  # what rich paints and draws a live frame with
RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
ELEMENTS = (
    "img, iframe, object, embed, base, form:not(.vega-bindings), foreignObject, [onerror], [onmouseover], [onload],"
    " [href*=evil], [src*=evil]"
)


def hostile_list(shelf: Any) -> Any:
    """What Foundry Local tells of its models."""
    runtime = {"deviceType": f"device {EVIL}", "executionProvider": f"EP {EVIL}"}
    more = {"license": f"licence {EVIL}", "task": f"task {EVIL}", "runtime": runtime}
    return [row | more | {"alias": f"alias {EVIL}"} for row in fake_flavours._foundry_list(shelf)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The runs, and everything that was said of them."""
    with pytest.MonkeyPatch.context() as patch:
        old = FLAVOURS["foundry08"]
        patch.setitem(FLAVOURS, "foundry08", replace(old, at_root=old.at_root | {"/foundry/list": hostile_list}))
        status = FLAVOURS["vllm"].at_root | {"/version": lambda shelf: {"version": f"version {EVIL}"}}
        patch.setitem(FLAVOURS, "vllm", replace(FLAVOURS["vllm"], at_root=status))
        event, body = replace(FAULTS["stream_error"], text=f"event {EVIL}"), f"<html>{EVIL}".encode()
        patch.setitem(FAULTS, "stream_error", event)
        patch.setitem(FAULTS, "http_5xx", replace(FAULTS["http_5xx"], text=f"body {EVIL}"))
        patch.setitem(FAULTS, "protocol_html", replace(FAULTS["protocol_html"], body=body))
        made = Stage(tmp_path_factory.mktemp("hostile"))
        asyncio.run(played(made))
        for name, value in {**environment(), "GITHUB_ACTIONS": "", "CI": ""}.items():
            patch.setenv(name, value)
        retold(made)
        yield made


@dataclass
class Stage:
    """Where it was made, and what each output said, by its name."""

    folder: Path
    told: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def group(self) -> Path:
        return self.folder / "results" / FOLDER

    @property
    def run(self) -> Path:
        return self.group / "1"


def scenario(url: str) -> dict[str, Any]:
    return {
        "name": "hostile", "description": f"description {EVIL}", "endpoint": url, "models": [MODEL, FORMULA, MISSING],
        "request": {"max_tokens": 4, "headers": {"X-Note": "<b>`|"}},
        "prompts": [{"name": "hello", "file": "prompts.json", "order": "sequential"}],
        "quality": {"prompts": "quality.json", "max_tokens": 500}, "warmup": {"requests": 0}, "canary": False,
        "deadlines": {"first_token": "5s", "total": "10s"}, "drain": "2s", "slo": {"ttft": {"p95": "2s"}},
        "power": "45W", "price_per_kwh": 0.3, "currency": "<b>|`]", "repeat": 2,
        "stages": [{"concurrency": [1, 2], "requests": 8}],
    }  # fmt: skip


async def played(stage: Stage) -> None:
    """All that takes an endpoint, in processes of their own, as a user has it."""
    folder, told = stage.folder, stage.told
    asked: dict[str, Any] = {
        "id": f"id {EVIL}",
        "category": f"category {EVIL}",
        "prompt": "answer me",
        "rubric": f"rubric {EVIL}",
    }
    asked |= {"expected_aspects": [f"aspect {EVIL}"], "checks": {"contains": f"check {EVIL}"}}
    (folder / "quality.json").write_text(json.dumps([asked]))
    wicked = (
        folder / "scenarios" / "nightly" / ("x.yaml" if os.name == "nt" else f"{quote(MARK, safe='<>()')}\x1b[2J.yaml")
    )
    wicked.parent.mkdir(parents=True)
    wicked.write_text(json.dumps({"name": EVIL}))
    reason = json.dumps({"mark": 4, "reason": f"reason {EVIL}"})
    faults = ("stream_error", "http_5xx", "protocol_html")
    asked_in_turn = [EVIL, *(f"fake-fault:{name}" for name in faults), *[EVIL] * 4]
    (folder / "prompts.json").write_text(json.dumps(asked_in_turn))
    values: dict[str, Any] = {"tokens": 4, "first_token_ms": 1, "gap_ms": 0, "models": (MODEL, FORMULA)}
    async with (
        scripted(flavour="foundry08", answers=(f"answer me => answer {EVIL}",), **values) as server,
        scripted(flavour="vllm", answers=(reason,), **values) as other,
    ):
        (folder / "hostile.yaml").write_text(json.dumps(scenario(server.base_url)))
        (folder / "other.yaml").write_text(json.dumps(scenario(other.base_url)))
        github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(folder / "step.md")}

        async def say(name: str, *words: str, **more: str) -> None:
            code, out, err = await ended(await started(*words, cwd=folder, **more))
            told[f"{name} out"], told[f"{name} err"], told[f"{name} code"] = out, err, str(code)

        run = ("run", "hostile.yaml", "--out", f"results/{FOLDER}", "--weights", "ttft=1")
        await asyncio.gather(
            say("run", *run, **github),
            say("check --probe", "check", "other.yaml", "--probe", **github),
            say("models list", "models", "list", "--endpoint", server.base_url, **github),
            say("models list --json", "models", "list", "--json", "--endpoint", server.base_url),
            say("models load", "models", "load", MISSING.replace("\0", ""), "--endpoint", server.base_url, **github),
            say("nightly", "nightly", **github),
        )
        await say("judge", "quality", "judge", f"results/{FOLDER}/1", "--model", FORMULA, "--endpoint", other.base_url)


def retold(stage: Stage) -> None:
    """All that a run directory gives by itself, in this process."""
    folder, told, group, run = stage.folder, stage.told, stage.group, stage.run

    def say(name: str, *words: str | Path, **env: str) -> None:
        result = CliRunner().invoke(main, [str(word) for word in words], env=env)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        told[f"{name} out"], told[f"{name} err"] = result.stdout, result.stderr

    marked = io.StringIO()
    typed = iter((f"n {plain(EVIL)}\n", f"{EVIL}".replace("\n", " ") + "\n", "4\n", "b\n", "q\n"))
    Marking(run, f"rater {EVIL}", blind=False, seed=1, come=typed, out=marked).run()
    told["mark"] = marked.getvalue()
    files = ("--figures", "--stable", "--format", "workshop", "--export", "prometheus", "--hgrm")
    say("report", "report", run, "--weights", "ttft=1", *files, GITHUB_ACTIONS="true")
    say("compare", "compare", group / "1", group / "2", "--force", GITHUB_ACTIONS="true")
    say("trend", "trend", "--results", folder / "results", GITHUB_ACTIONS="true")
    say("trend --json", "trend", "--results", folder / "results", "--json")
    say("check", "check", folder / "hostile.yaml", GITHUB_ACTIONS="true")
    (folder / "broken.yaml").write_text(json.dumps({EVIL: EVIL}))
    say("usage", "check", folder / "broken.yaml", GITHUB_ACTIONS="true")
    say("clean", "clean", "--dry-run", "--keep", "0", "--results", folder / "results", GITHUB_ACTIONS="true")
    baseline = folder / "results" / "baseline"
    baseline.write_text(EVIL, encoding="utf-8")
    say("baseline", "clean", "--dry-run", "--results", folder / "results", GITHUB_ACTIONS="true")
    baseline.unlink()
    another = shutil.copytree(group / "2", folder / "another")
    facts = json.loads((another / "run.json").read_text(encoding="utf-8"))
    facts["endpoint"]["title"] = EVIL
    (another / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    say("refused", "compare", run, another, "--gate", GITHUB_ACTIONS="true")
    say("asserted", "report", run, "--quiet", "--assert", f"ttft.p50<1s @ {EVIL}", GITHUB_ACTIONS="true")
    summary = summarise(rundir.read(run), {"ttft": 1.0})
    told |= tabled(summary)
    for width in (80, 120):
        for colours in ({"NO_COLOR": "1"}, {"NO_COLOR": ""}):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {"COLUMNS": str(width), "TERM": "xterm-256color", **colours}.items():
                    patch.setenv(name, value)
                terminal = Terminal()
                print_report(summary, run, terminal)
                told[f"console {width}{' in colour' if not colours['NO_COLOR'] else ''}"] = terminal.getvalue()
    told["live"], told["plain view"] = lived()
    others = *(folder / "results" / "nightly").glob("*/index.html"), folder / "step.md"
    stage.files |= {path.relative_to(group).as_posix(): path for path in group.rglob("*") if path.is_file()}
    stage.files |= {path.name: path for path in others}
    told |= {name: path.read_text(encoding="utf-8") for name, path in stage.files.items()}


def tabled(summary: Summary) -> dict[str, str]:
    """What takes a level of a minute, a fleet or a collector: of the same levels."""
    fleet, soak = [], []
    for level in summary.levels:
        latency_ms = {metric: next(iter(series.values())) for metric, series in level.latency_ms.items()}
        at = AtEndpoint(
            EVIL,
            level.requests,
            level.throughput,
            level.tokens,
            level.latency_ms,
            EVIL,
            (EVIL,),
            level.target.rss_bytes,
            None,
        )
        part = Interval(0.0, 1.0, 1.0, level.requests, level.throughput, None, latency_ms)
        fleet.append(replace(level, endpoints=(at,)))
        soak.append(replace(level, intervals=(part,)))
    return {
        "endpoints.csv": endpoints_csv_text(replace(summary, levels=tuple(fleet))) or "",
        "intervals.csv": intervals_csv_text(replace(summary, levels=tuple(soak))) or "",
        "otlp": _data(summary).to_json() if find_spec("opentelemetry.sdk") else "",
    }


class Terminal(io.StringIO):
    """Keeps what a terminal would have been sent."""

    def isatty(self) -> bool:
        return True


def lived() -> tuple[str, str]:
    """What both views show of a run with such names."""
    levels = tuple(LevelProgress(EVIL, model, ended=model == MODEL) for model in (MODEL, MISSING))
    progress = Progress(EVIL, levels, 1, EVIL, 3.0, failures={EVIL: 2}, message=EVIL)
    said = []
    for stream, view in ((Terminal(), TerminalView), (io.StringIO(), PlainView)):
        shown = view(stream)
        shown.start()
        shown.note(MODEL)
        shown.update(progress)
        shown.stop()
        said.append(stream.getvalue())
    return said[0], said[1]


# --- who would obey ---------------------------------------------------------------------------------------------------


def hold_terminal(text: str, mark: str = MARK) -> None:
    """It gets colours and moves from rich, line ends and the tabs of a list, and nothing else that it would obey."""
    assert not CONTROLS.search(text)
    left = MOVES.sub("", text).replace("\r", "")
    assert {c for c in left if not c.isprintable()} <= {"\n", "\t"}
    assert squeezed(mark) in squeezed(left)


def hold_runner(text: str, mark: str = MARK) -> None:
    """GitHub's runner obeys no command of the payload: those that are ours say so in their titles."""
    hold_terminal(text, mark)
    for command in obeyed(text):
        assert re.match(r"::(error|warning) title=loadbench%3A [^:,]*::|::stop-commands::[0-9a-f]{32}$", command), (
            command
        )


def hold_error(text: str, lines: int = 1) -> None:
    """What is wrong, in one line."""
    hold_runner(text)
    assert all(line.startswith("loadbench: ") for line in text.splitlines())
    assert text.count("\n") == lines


def obeyed(text: str) -> Iterator[str]:
    """The lines that are commands, as actions/runner reads them; after stop-commands none until its token."""
    token = None
    for line in text.split("\n"):
        if token is not None:
            token = None if line == f"::{token}::" else token
        elif line.lstrip().startswith("::") or "##[" in line:
            yield line
            token = line.removeprefix("::stop-commands::") if line.startswith("::stop-commands::") else None
    assert token is None


def hold_markdown(text: str) -> None:
    """A renderer makes text, code and our own links of it, and no cell of a table has ended early."""
    tokens = list(leaves(RENDERER.parse(text)))
    for token in tokens:
        if token.type == "html_inline":
            assert re.fullmatch(r'<a id="level-\d+">|</a>', token.content), token.content
        elif token.type == "link_open":
            assert str(token.attrs["href"]).startswith("#")
        assert token.type not in ("image", "html_block", "em_open", "s_open")
    said = [token.content for token in tokens if token.type == "inline"]
    assert not any(re.match(r"`?code`|\*\*bold|heading|item", content.lstrip("\\")) for content in said)
    assert squeezed(MARK) in squeezed("".join(token.content for token in tokens if not token.children))
    assert {c for c in text if not c.isprintable()} <= {"\n"}


def leaves(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from leaves(token.children or [])


def hold_html(text: str) -> None:
    """A parser finds no element, attribute, script or address of the payload's."""
    page = Parsed(text)
    assert not {tag for tag, _ in page.elements} & {"img", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("href", "src", "action", "srcdoc", "style"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(javascript|https?|//)", value) and "evil" not in value, (tag, attributes)
        assert {name for name in attributes if not name.startswith(("aria-", "data-"))} <= ATTRIBUTES, (tag, attributes)
    for attributes, script in page.scripts:
        assert MARK not in script
        if "json" in str(attributes.get("type")):
            json.loads(script)
    assert squeezed(MARK) in squeezed(page.text)


def hold_svg(text: str) -> None:
    """Nothing in it runs, links or loads."""
    root = ElementTree.fromstring(text)
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= SHAPES
    assert not any(name.startswith("on") or "href" in name for element in root.iter() for name in element.attrib)


def hold_junit(text: str) -> None:
    values = [value for element in ElementTree.fromstring(text).iter() for value in element.attrib.values()]
    assert any(plain(MODEL) in value for value in values)
    assert all(value.isprintable() for value in values)


def hold_json(text: str) -> None:
    """Parsers get what was said, unchanged; a terminal that is shown the file gets nothing."""
    assert {c for c in text if not c.isprintable()} <= {"\n"}
    assert MODEL in strings(json.loads(text))


def strings(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        yield from found
        found = list(found.values())
    if isinstance(found, list):
        for each in found:
            yield from strings(each)
    elif isinstance(found, str):
        yield found


def hold_jsonl(text: str) -> None:
    assert any(EVIL in value for line in text.split("\n") if line for value in strings(json.loads(line)))


def hold_csv(text: str) -> None:
    """As many fields in each row as in its head, and no formula among them."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len({len(row) for row in rows}) == 1
    fields = [value for row in rows for value in row]
    assert {plain(MODEL), f"'{FORMULA}"} <= set(fields)
    assert all(value.isprintable() for value in fields)
    assert not any(re.match("[=+@-]", value) and not re.fullmatch(r"-[\d.e-]+", value) for value in fields)


def hold_otlp(text: str) -> None:
    """Attributes that a collector's terminal may show."""
    if not text:
        pytest.skip("the extra loadbench[otlp] is not installed")
    found = set(strings(json.loads(text)))
    assert {plain(MODEL), FORMULA} <= found
    assert all(value.isprintable() for value in found)


def hold_prometheus(text: str) -> None:
    labels = [s.labels for family in text_string_to_metric_families(text) for s in family.samples]
    assert {label.get("model") for label in labels} == {None, plain(MODEL), FORMULA}
    assert {name for label in labels for name in label} <= LABELS


def hold_hgrm(text: str) -> None:
    assert text.isascii() and "alert" not in text


def squeezed(text: str) -> str:
    """Without white space, which stands wherever a line was broken."""
    return re.sub(r"\s", "", text)


ATTRIBUTES = {
    *("charset", "http-equiv", "content", "name", "lang", "rel", "href", "class", "id", "role", "hidden", "type"),
    *("tabindex", "scope", "title"),
}
SHAPES = {"svg", "g", "path", "text", "tspan", "rect", "line", "title", "defs", "clipPath"}
LABELS = {
    *("scenario", "model", "level", "load", "series", "percentile", "indicative", "outcome", "moment", "of", "state"),
    *("clause", "version", "status", "engine"),
}

HELD: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(("console 80", "console 120", "console 80 in colour", "console 120 in colour"), hold_terminal),
    **dict.fromkeys(("live", "mark", "judge out", "judge err"), hold_terminal),
    **dict.fromkeys(("plain view", "run out", "run err", "report out", "compare out", "trend out"), hold_runner),
    **dict.fromkeys(("check out", "check --probe out", "models list out"), hold_runner),
    **dict.fromkeys(("nightly out", "nightly err"), hold_runner),
    **dict.fromkeys(("1/report.md", "2/compare.md", "report.md", "step.md", "1/stable.md"), hold_markdown),
    "1/benchmark_report.md": hold_markdown,
    **dict.fromkeys(("1/report.html", "2/compare.html", "index.html"), hold_html),
    **dict.fromkeys(("1/summary.json", "1/stable.json", "2/compare.json", "1/benchmark_report.json"), hold_json),
    **dict.fromkeys(("trend --json out", "models list --json out"), hold_json),
    **dict.fromkeys(("1/answers.jsonl", "1/judgements.jsonl", "1/marks.jsonl"), hold_jsonl),
    **dict.fromkeys(("1/summary.csv", "1/decision.csv", "intervals.csv", "endpoints.csv"), hold_csv),
    **dict.fromkeys(("1/figures/models.svg", "1/figures/over-time.svg", "1/figures/throughput-closed-0.svg"), hold_svg),
    "clean out": lambda text: hold_runner(text, FOLDER.partition("\x1b")[0]),
    **dict.fromkeys(("usage err", "models load err", "baseline err", "refused err"), hold_error),
    "report err": partial(hold_error, lines=2),  # where the figures are, and what is wrong
    **dict.fromkeys(("compare err", "clean err"), lambda text: hold_runner(text, "")),
    "asserted err": lambda text: hold_runner(text, ""),
    "otlp": hold_otlp,
    "1/junit.xml": hold_junit,
    "1/metrics.prom": hold_prometheus,
    "1/ttft.service.L0.hgrm": hold_hgrm,
}


@pytest.mark.parametrize("output", HELD)
def test_what_is_hostile_shows_as_text_and_commands_nobody(stage: Stage, output: str) -> None:
    HELD[output](stage.told[output])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: .ci/run installs one")
@pytest.mark.parametrize("output", [name for name, hold in HELD.items() if hold is hold_html])
async def test_a_browser_makes_nothing_of_it_either(stage: Stage, output: str) -> None:
    page = stage.files[output]
    async with browser() as tab:
        await tab.open(page)
        assert await tab.ask(f"document.querySelectorAll({json.dumps(ELEMENTS)}).length") == 0
        assert squeezed(MARK) in squeezed(await tab.ask("document.body.textContent"))
        assert tab.console == []
        assert set(tab.requests) == {page.as_uri()}
