"""Holds what a scenario did tonight against its last good night, in a process: what breaks one leaves the night going.

Which night that is: the last good one of the same thing, without a busy machine and with an answer of its own. So what
grows a little every night is held against where it began, and an upgrade begins anew, which is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from loadbench.analysis import provenance
from loadbench.analysis.compare_judge import RUNS
from loadbench.analysis.compare_words import BUSY, difference
from loadbench.analysis.compared import Comparison
from loadbench.analysis.group import runs_in
from loadbench.analysis.night import Against, Night, Turn, against, good
from loadbench.analysis.rundir import read_facts
from loadbench.errors import LoadbenchError
from loadbench.platform import apart
from loadbench.report.escape import plain
from loadbench.report.github import SUMMARY_FILE

NIGHTS = 60  # so many good nights are looked through for one of the same thing
MOST_TOLD = 2  # differences


def hold(earlier: Sequence[Night], night: Night, turn: Turn) -> None:
    """Note what came of it, and whether the next night may be held against this one."""
    assert turn.path is not None
    new = night.folder / turn.path
    turn.against = _against(earlier, night, turn.name, new)
    runs = len(list(new.glob("*/run.json"))) or 1
    untold = turn.against.answer == "inconclusive" and runs >= RUNS  # fewer can tell nothing, whatever they show
    turn.is_base = not untold and not turn.against.broke and not _is_busy(new)


def _against(earlier: Sequence[Night], night: Night, name: str, new: Path) -> Against:
    known = list(good(earlier, name))[:NIGHTS]
    if not known:
        return Against(None, None, "there is none yet")
    (base_night, base), differs = known[0], list[str]()
    try:
        ours = [read_facts(run) for run in runs_in(new)]
        for number, (other_night, other) in enumerate(known):
            found = provenance.differences([read_facts(run) for run in runs_in(other)], ours)
            told = [difference(one) for one in found if one.about != "instrument"]
            if not told:
                (base_night, base), differs = (other_night, other), []
                break
            differs = told if number == 0 else differs
    except LoadbenchError as error:
        return Against(base_night.name, None, f"not compared: {error}")
    held = _compared(base, new, force=bool(differs))
    if isinstance(held, Against):
        held.night = base_night.name
        return held
    there = (new / "compare.html").exists()
    page = f"{new.relative_to(night.folder).as_posix()}/compare.html" if there else None
    told_of = against(held, base_night.name, page)
    return _begun_anew(told_of, differs) if differs else told_of


def _begun_anew(found: Against, differs: Sequence[str]) -> Against:
    """Of a comparison by force what is worth a look; it is no answer, as it may be the difference's doing."""
    more = f" and {len(differs) - MOST_TOLD} more" if differs[MOST_TOLD:] else ""
    found.changed = "; ".join(differs[:MOST_TOLD]) + more
    shown = f"; compared all the same: {found.answer}: {found.brief}" if found.brief else ""
    found.text = f"It is a new baseline, as it is not the same thing any more ({found.changed}). By force: {found.text}"
    found.answer, found.brief = None, f"{found.changed} changed{shown}"
    return found


def _compared(base: Path, new: Path, *, force: bool) -> Comparison | Against:
    """`loadbench compare`; why there is nothing of it, where there is not."""
    words = [sys.executable, "-m", "loadbench", "compare", str(base), "--", str(new), "--json"]
    words += ["--force"] if force else []
    alone = {} if sys.platform == "win32" else apart()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False, **alone)
    if done.returncode == 0:
        try:
            return TypeAdapter(Comparison).validate_json(done.stdout)
        except ValidationError as error:
            return Against(None, None, f"not compared: compare.json cannot be read: {plain(error, 200)}", broke=True)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    why = plain(said[-1].removeprefix("loadbench: "), 400) if said else f"exit code {done.returncode}"
    return Against(None, None, f"not compared: {why}", broke=done.returncode != LoadbenchError.exit_code)


def _is_busy(folder: Path) -> bool:
    """Whether something else was busy beside a level, in more of the runs than there are spare ones."""
    runs = [run.parent for run in (folder / "run.json", *folder.glob("*/run.json")) if run.exists()]
    marked = Counter(place for run in runs for place in _marked(run))
    return any(number > max(0, len(runs) - RUNS) for number in marked.values())


def _marked(run: Path) -> set[int]:
    try:
        levels = orjson.loads((run / "summary.json").read_bytes())["levels"]
        return {level["index"] for level in levels if any(caution["about"] in BUSY for caution in level["cautions"])}
    except (OSError, ValueError, KeyError, TypeError):  # it left no summary
        return set()


def environment() -> dict[str, str]:
    """Ours, but for where GitHub wants a step's summary: the night has one, and a dozen runs would bury it."""
    return {name: value for name, value in os.environ.items() if name != SUMMARY_FILE}
