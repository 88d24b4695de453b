"""Writes junit.xml, as pipelines read it: one suite a model, one case for each level and clause, and one for the run.

Valid against both schemas that are about, Ant's (which asks for most) and that of Jenkins' xUnit plugin: cases have a
time, suites an id, a package, a host, a start without a time zone, and empty properties and streams. A promise that was
missed is a failure; one that could not be told is an error; one that does not count is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from loadbench.analysis.summary import Summary
from loadbench.analysis.verdict import exit_code, why
from loadbench.report.escape import plain
from loadbench.report.gates import Kept, Promise, promises

_TOLD_BY_CASES = (0, 99)
_ELEMENTS: dict[Kept, str] = {"fail": "failure", "invalid": "error", "skipped": "skipped"}


def junit_xml(summary: Summary) -> bytes:
    """The file's bytes. What came from a server or a file is one printable line: XML cannot write all the rest."""
    found = list(promises(summary))
    root = ElementTree.Element("testsuites")
    _suite(root, summary, plain(summary.name) or "run", [_run(summary), *(one for one in found if one.model is None)])
    for model in dict.fromkeys(one.model for one in found if one.model is not None):
        _suite(root, summary, plain(model) or "model", [one for one in found if one.model == model])
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written + b"\n"


def _run(summary: Summary) -> Promise:
    """Whether the run is worth believing: a case that every run has."""
    code = exit_code(summary)
    kept: Kept = "pass" if code in _TOLD_BY_CASES else "invalid"
    told = f"exit code {code}" + ("" if kept == "pass" else f": {why(summary, code)}")
    return Promise("the run is valid", None, None, "", kept, told)


def _suite(root: ElementTree.Element, summary: Summary, name: str, cases: Sequence[Promise]) -> None:
    levels = {case.level.index: case.level for case in cases if case.level is not None}
    seconds = sum(level.window_s for level in levels.values())
    attributes = {
        "name": name,
        "package": "loadbench",
        "id": str(len(root)),
        "tests": str(len(cases)),
        "failures": str(sum(case.kept == "fail" for case in cases)),
        "errors": str(sum(case.kept == "invalid" for case in cases)),
        "skipped": str(sum(case.kept == "skipped" for case in cases)),
        "time": f"{seconds:.3f}",
        "timestamp": summary.started[:19],
        "hostname": "localhost",  # a run directory holds no name of a machine
    }
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    ElementTree.SubElement(suite, "properties")
    for case in cases:
        _case(suite, name, case)
    ElementTree.SubElement(suite, "system-out")
    ElementTree.SubElement(suite, "system-err")


def _case(suite: ElementTree.Element, classname: str, case: Promise) -> None:
    time_s = 0.0 if case.level is None else case.level.window_s
    named = {"name": plain(case.title), "classname": classname, "time": f"{time_s:.3f}"}
    element = ElementTree.SubElement(suite, "testcase", named)
    if case.kept != "pass":
        # Ant's schema takes a skipped element with anything in it, Jenkins' one with a message.
        kind = {} if case.kept == "skipped" else {"type": case.kept}
        ElementTree.SubElement(element, _ELEMENTS[case.kept], kind | {"message": plain(case.told)})
