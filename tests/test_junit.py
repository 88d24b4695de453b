"""junit.xml: what pipelines read of a run, no other tale than the exit code, and what is foreign stays text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from loadbench.analysis.gates import asked
from loadbench.analysis.rundir import read
from loadbench.analysis.summarise import summarise
from loadbench.analysis.summary import Summary
from loadbench.analysis.verdict import exit_code
from loadbench.records import Closed
from loadbench.report.junit import junit_xml
from loadbench.report.write import write_report
from tests import findings, rundirs
from tests.rundirs import Planned, write_run

HOSTILE = '[red]m[/] \x1b[31m</testcase>]]><script>alert("1")</script>&amp;\u202e\x00\ufffe\ud800\n::error::x'
LEVELS = [Planned(Closed(users), duration_s=40.0) for users in (1, 8)]
SLO = {"slo": {"ttft": {"p95": "300ms"}, "error_rate": "1%"}}


def told(path: Path, *texts: str) -> Summary:
    return summarise(read(path), asked=asked(texts, allow_indicative=False))


def suites(summary: Summary) -> list[Element]:
    root = ElementTree.fromstring(junit_xml(summary))
    check(root)
    return list(root)


def cases(summary: Summary) -> dict[str, tuple[str, str]]:
    """Of every case how it went, and the message."""
    found = {}
    for case in (case for suite in suites(summary) for case in suite.iter("testcase")):
        (how, message) = next(((told.tag, told.get("message", "")) for told in case), ("passed", ""))
        found[case.get("name", "")] = (how, message)
    return found


SUITE = {"name", "package", "id", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname"}


def check(root: Element) -> None:
    """What Ant's schema (JUnit.xsd of Windy Road) and that of Jenkins' xUnit plugin (junit-10.xsd) both allow: the
    attributes that Ant's asks for and no others, its order of elements, and counts that are true."""
    assert (root.tag, root.attrib) == ("testsuites", {})
    for number, suite in enumerate(root):
        assert (suite.tag, set(suite.attrib), suite.get("id")) == ("testsuite", SUITE, str(number))
        tags = [child.tag for child in suite]
        found = suite.findall("testcase")
        assert tags == ["properties", *["testcase"] * len(found), "system-out", "system-err"]
        assert found, "some readers take a suite without a case for a broken file"
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert suite.get(attribute) == str(len(suite.findall(f"testcase/{tag}")))
        assert suite.get("tests") == str(len(found))
        assert len(suite.get("timestamp", "")) == len("2026-11-22T14:20:00")
        for case in found:
            assert set(case.attrib) == {"name", "classname", "time"}
            assert float(case.get("time", "")) >= 0
            assert len(case) <= 1
            for how in case:
                named = {"message"} if how.tag == "skipped" else {"message", "type"}
                assert (how.tag in ("failure", "error", "skipped"), set(how.attrib)) == (True, named)


def test_a_suite_is_a_model_and_a_case_a_clause_at_a_level(tmp_path: Path) -> None:
    planned = [replace(level, model=model) for model in ("a:1", "b:1") for level in LEVELS]
    summary = told(write_run(tmp_path, planned, scenario=rundirs_scenario(SLO)), "requests_per_s>1 @ 1 user")
    assert [(suite.get("name"), suite.get("tests")) for suite in suites(summary)] == [
        ("edge", "1"),
        ("a:1", "5"),
        ("b:1", "5"),
    ]
    assert [*cases(summary)][:4] == [
        "the run is valid",
        "slo ttft.p95 at 1 user of a:1",
        "slo error_rate at 1 user of a:1",
        "requests_per_s>1 at 1 user of a:1",
    ]


def rundirs_scenario(more: dict[str, Any]) -> dict[str, Any]:
    return {"name": "edge", "warmup": {"requests": 2}} | more


def test_a_miss_is_a_failure_and_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    path = write_run(tmp_path, LEVELS, scenario=rundirs_scenario(SLO))
    summary = told(path, "ttft.p99<2s @ 1 user", "e2e.p95<1s @ 1 user", "e2e.p95<1s @ 5 users")
    assert cases(summary) == {
        "the run is valid": ("passed", ""),
        "e2e.p95<1s @ 5 users": (
            "error",
            "E2E p95, asserted < 1 s (no such level was measured; there are 1 user, 8 users)",
        ),
        "slo ttft.p95 at 1 user": ("passed", ""),
        "slo error_rate at 1 user": ("passed", ""),
        "ttft.p99<2s at 1 user": (
            "error",
            "TTFT p99 is 76 ms, asserted < 2 s (186 samples; p99 is firm from 662)",
        ),
        "e2e.p95<1s at 1 user": ("passed", ""),
        "slo ttft.p95 at 8 users": ("failure", f"TTFT p95 is {p95(summary)} ms, the limit 300 ms"),
        "slo error_rate at 8 users": ("passed", ""),
    }


def p95(summary: Summary) -> str:
    return f"{summary.levels[1].latency_ms['ttft']['service'].p95:.0f}"


def red(summary: Summary) -> bool:
    return any(how in ("failure", "error") for how, _ in cases(summary).values())


def ladder(path: Path) -> Summary:
    stages = [{"concurrency": [{"from": 1, "to": 8, "factor": 8}]}]
    return told(write_run(path, LEVELS, scenario=rundirs_scenario(SLO | {"stages": stages})))


def undecided(path: Path) -> Summary:
    return told(rundirs.closed_ladder(path, scenario=rundirs_scenario(SLO)))


def searched(path: Path, result: str) -> Summary:
    found = told(write_run(path, [Planned(Closed(users)) for users in (1, 2, 4)]))
    levels = [
        replace(findings.judged(level, how), purpose=purpose)
        for level, how, purpose in zip(
            found.levels, ("pass", "pass", "fail"), ("probe", "confirmation", "probe"), strict=True
        )
    ]
    slo = {"none": "fail", "undecided": "undecided"}.get(result, "pass")
    verdict = replace(found.verdict, slo=slo)  # type: ignore[arg-type]
    return findings.with_levels(found, levels, searches=(findings.search(result, answer=2.0),), verdict=verdict)


def every_end(path: Path) -> Iterator[Summary]:
    for number, build in enumerate(
        (rundirs.closed_ladder, rundirs.all_failed, rundirs.failures, rundirs.torn, rundirs.three_models)
    ):
        yield told(build(path / str(number)))
    yield ladder(path / "ladder")
    yield undecided(path / "undecided")
    yield from (searched(path / result, result) for result in ("confirmed", "none", "undecided"))
    yield told(rundirs.non_streaming(path / "empty"), "ttft.p50<2s")
    yield told(rundirs.non_streaming(path / "missed"), "e2e.p50<1ms")
    yield told(rundirs.closed_ladder(path / "interrupted", status="interrupted"))


def test_it_is_red_where_the_exit_code_is_not_0_and_green_where_it_is(tmp_path: Path) -> None:
    codes = set()
    for summary in every_end(tmp_path):
        code = exit_code(summary)
        codes.add(code)
        assert red(summary) == (code != 0), (code, cases(summary))
    assert codes >= {0, 3, 94, 99, 130}


def test_a_miss_that_does_not_count_is_skipped_and_says_why(tmp_path: Path) -> None:
    found = cases(ladder(tmp_path / "ladder"))
    assert found["slo ttft.p95 at 1 user"] == ("passed", "")
    assert found["slo ttft.p95 at 8 users"][0] == "skipped"
    assert found["slo ttft.p95 at 8 users"][1].endswith("the limit 300 ms; only the lowest load has to keep it")
    few = cases(undecided(tmp_path / "few"))["slo ttft.p95 at 1 user"]
    assert (few[0], few[1].endswith("(70 samples; p95 is firm from 130)")) == ("error", True)


def test_a_search_is_a_case_of_its_own(tmp_path: Path) -> None:
    for result, how in (("confirmed", "passed"), ("none", "failure"), ("undecided", "error")):
        assert cases(searched(tmp_path / result, result))["search max-concurrency"][0] == how


def test_an_slo_that_is_asserted_is_told_once(tmp_path: Path) -> None:
    found = cases(told(write_run(tmp_path, LEVELS, scenario=rundirs_scenario(SLO)), "slo"))
    assert [name for name in found if "8 users" in name] == ["slo ttft.p95 at 8 users", "slo error_rate at 8 users"]


def test_a_run_without_any_clause_has_a_case_still(tmp_path: Path) -> None:
    assert cases(told(rundirs.closed_ladder(tmp_path))) == {"the run is valid": ("passed", "")}


@pytest.mark.parametrize("text", [HOSTILE, "", "\x00", " "])
def test_foreign_text_is_text_in_xml(text: str, tmp_path: Path) -> None:
    found = told(rundirs.non_streaming(tmp_path), "ttft.p50<2s")
    levels = tuple(replace(level, model=text) for level in found.levels)
    gates = tuple(replace(gate, because=text) for gate in found.gates)
    data = junit_xml(replace(found, name=text, reason=text, levels=levels, gates=gates))
    for wrong in (b"<script", b"\x1b", b"\x00", b"\xe2\x80\xae", b"]]>"):
        assert wrong not in data
    (_, suite) = check_and(data)
    assert suite.get("name")
    if text == HOSTILE:
        assert r'[red]m[/] \x1b[31m</testcase>]]><script>alert("1")</script>&amp;\u202e' in str(suite.get("name"))
        assert not any(line.lstrip().startswith(b"::") for line in data.splitlines())


def check_and(data: bytes) -> list[Element]:
    root = ElementTree.fromstring(data)
    check(root)
    return list(root)


def test_every_report_writes_it(tmp_path: Path) -> None:
    write_report(rundirs.closed_ladder(tmp_path))
    assert check_and((tmp_path / "junit.xml").read_bytes())
