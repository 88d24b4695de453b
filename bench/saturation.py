"""How often the capacity verdict names the right nature, and how far its figures and the search's answer are off.

`make bench-saturation`: servers whose truth is known, on the virtual clock, each with 20 seeds; what is measured goes
through run directories and the report's own analysis. Exits with 1 where fewer than 19 of 20 runs are right, or within
10 % of the truth; of levels that are too short or too uneven for that, where more than 1 of 20 is wrong, or a firm N*
is further off than a firm one may be. ``--write`` puts the table into RESULTS-saturation.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from loadbench.analysis import estimates, rundir, summarise
from loadbench.analysis.findings import Capacity
from loadbench.analysis.search import Bounds
from loadbench.records import Closed, Level
from tests.played import Machine, Usl, play, searched, shared, write

HERE = Path(__file__).parent
RIGHT_SHARE = 0.95
WITHIN = 0.1
ALONE_S = 0.5
LADDER = (1, 2, 4, 8, 16, 32, 64)
CROSSTALK = Usl(0.02, 0.01)  # its peak: 9.9
USERS = Bounds("max-concurrency", 1, 256, 0.05)


@dataclass(frozen=True)
class Kind:
    """A server, the nature that it has, N* (None: it has none), and what a search finds under ``slo`` (None: no end).

    ``estimate`` is the one that is held against N*; a probe has so many ``requests``. It ``falls`` past its peak, or
    ``rejects`` from so many users on. Its levels last ``seconds``, too short for a firm answer where ``unsure``: then
    what counts is that none is wrong. ``chance`` is how work varies in them.
    """

    title: str
    machine: Machine
    nature: str | None
    users: float | None
    slo: dict[str, Any] | None
    truth: float | None
    estimate: str = "asymptotic"
    find: Bounds = USERS
    requests: int = 1000
    falls: bool = False
    rejects: float | None = None
    seconds: float = 30.0
    chance: str = "uniform"
    unsure: bool = False


def p95(limit_s: float) -> dict[str, Any]:
    return {"e2e": {"p95": f"{limit_s}s"}}


def most_users(limit_s: float, p95_s: Callable[[int], float]) -> int:
    """The most users whose p95 keeps the limit."""
    return next(users for users in range(1, 1000) if p95_s(users + 1) > limit_s)


def queued(slots: int, limit_s: float) -> int:
    """Closed loop on exponential servers that are always busy.

    N - k of N users wait, for as many departures of mean s/k each, and are then served themselves.
    """
    chance = np.random.default_rng(1)
    own = chance.exponential(ALONE_S, 400_000)

    def p95_s(users: int) -> float:
        waits = chance.gamma(users - slots, ALONE_S / slots, own.size) if users > slots else 0.0
        return float(np.quantile(own + waits, 0.95))

    return most_users(limit_s, p95_s)


def slowed(speed: Callable[[int], float], limit_s: float) -> int:
    """All users always in service: an answer's work, exponential, at the speed that N leave each."""
    return most_users(limit_s, lambda users: math.log(20) * ALONE_S / speed(users))


def kinds() -> tuple[Kind, ...]:
    """The limits leave at least ten users within them, so that one user is no more than a tenth."""
    peak, rates = CROSSTALK.peak, Bounds("max-rate", 2.0, 32.0, 0.05)
    one, turns, errors = Machine(1), Machine(speed=shared), {"error_rate": "5%"}
    worse, single = Machine(speed=CROSSTALK), Machine(1, service_s=0.05)
    slow = Machine(1, service_s=0.8, first_share=0.25)
    slows = replace(slow, slots=None, speed=shared)
    return (
        Kind("1 slot", one, "serves_one_at_a_time", 1, p95(16), queued(1, 16)),
        Kind("4 slots", Machine(4), "batches", 4, p95(7), queued(4, 7)),
        Kind("16 slots", Machine(16), "batches", 16, p95(6), queued(16, 6), requests=3000),
        Kind("never saturates", Machine(), "scales", None, p95(6), None),
        Kind("shares the processor", turns, "shares_the_processor", 1, p95(15.7), slowed(shared, 15.7)),
        Kind("worse past its peak", worse, "batches", peak, p95(7), slowed(CROSSTALK, 7), "usl_peak", falls=True),
        Kind("4 slots, refuses beyond 4 waiting", Machine(4, queue=4), "batches", 4, errors, 8, rejects=16),
        Kind("1 slot, 0.8 s in 15 s", slow, "serves_one_at_a_time", 1, None, None, seconds=15, unsure=True),
        Kind("shares, 0.8 s in 15 s", slows, "shares_the_processor", 1, None, None, seconds=15, unsure=True),
        Kind("1 slot, exponential", one, "serves_one_at_a_time", 1, None, None, chance="exponential", unsure=True),
        Kind("4 slots, exponential", Machine(4), "batches", 4, None, None, chance="exponential", unsure=True),
        # M/M/1: p95 of the response time is ln 20 / (μ - λ).
        Kind("M/M/1", single, None, None, p95(0.5), 20 - math.log(20) / 0.5, find=rates, requests=8000),
    )


def capacity(kind: Kind, seed: int) -> Capacity:
    """The verdict on a ladder of levels."""
    varied, least = replace(kind.machine, chance=kind.chance), 0 if kind.unsure else 60
    levels = [
        Level(rung, 0, "m:1", Closed(users), kind.seconds, None, least, 1000 * seed + rung)
        for rung, users in enumerate(LADDER)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), [(level, play(level, varied)) for level in levels])
        (found,) = summarise.summarise(rundir.read(path)).capacity
    return found


def _told(kind: Kind, found: Capacity) -> str | None:
    """The nature, as it is called where all of it is right; None: undecided, which is never wrong."""
    if found.nature is None:
        return None
    wrong = []
    if found.up_to and kind.users and abs(found.up_to / kind.users - 1) > WITHIN:
        wrong.append(f"up to {found.up_to}")
    if (found.falls_to is not None) != kind.falls:
        wrong.append("does not fall" if kind.falls else "falls")
    if found.rejects_from != kind.rejects:
        wrong.append(f"rejects from {found.rejects_from}")
    return " ".join([found.nature, *wrong])


def once(kind: Kind, seed: int) -> tuple[str | None, float | None, float | None, str]:
    """The nature, N*, and the search's answer with its result."""
    nature, users = None, None
    if kind.nature:
        found = capacity(kind, seed)
        nature = _told(kind, found)
        users = next((e.value for e in found.estimates if e.name == kind.estimate and e.result == "firm"), None)
    if kind.slo is None:
        return nature, users, None, "none"
    machine = replace(kind.machine, chance="exponential")
    with tempfile.TemporaryDirectory() as folder:
        answer = searched(Path(folder), kind.find, machine, kind.slo, seed=seed, seconds=15, requests=kind.requests)
    return nature, users, answer.answer, answer.result


def off(values: Sequence[float | None], truth: float, within: float = WITHIN) -> tuple[int, str]:
    """How many are within the bound, and the errors: median and largest."""
    errors = [abs(value / truth - 1) for value in values if value is not None]
    right = sum(error <= within + 1e-9 for error in errors)
    told = f"{np.median(errors):.1%} / {max(errors):.1%}" if errors else "–"
    return right, told


def line(kind: Kind, seeds: int, pool: ProcessPoolExecutor) -> tuple[str, bool]:
    """A row of the table, and whether it is good enough."""
    got = list(pool.map(once, repeat(kind, seeds), range(seeds)))
    natures, users, answers, results = zip(*got, strict=True)
    counts, cells = [], [kind.title]
    if kind.nature:
        named, undecided = natures.count(kind.nature), natures.count(None)
        counts.append(named + undecided if kind.unsure else named)
        cells += [_title(kind), f"{named}/{seeds}", str(undecided), str(seeds - named - undecided)]
    else:
        cells += ["–", "–", "–", "–"]
    if kind.users is None:
        cells += ["–", "–", "–"]
    else:
        right, told = off(users, kind.users, estimates.WIDEST if kind.unsure else WITHIN)
        firm = seeds - users.count(None)
        counts.append(seeds - firm + right if kind.unsure else right)
        cells += [f"{kind.users:.3g}", told, f"{right}/{firm} (25 %)" if kind.unsure else f"{right}/{seeds}"]
    if kind.slo is None:
        cells += ["–", "–", "–"]
    elif kind.truth is None:
        counts.append(results.count("unbounded"))
        cells += ["unbounded", "–", f"{counts[-1]}/{seeds}"]
    else:
        right, told = off(answers, kind.truth)
        counts.append(right)
        cells += [f"{kind.truth:.4g}", told, f"{right}/{seeds}"]
    return "| " + " | ".join(cells) + " |", min(counts) >= RIGHT_SHARE * seeds


def _title(kind: Kind) -> str:
    assert kind.nature is not None
    also = [", degrades past it"] * kind.falls + ([f", rejects from {kind.rejects:g}"] if kind.rejects else [])
    return kind.nature.replace("_", " ") + "".join(also)


HEAD = (
    "| server | nature | named | undecided | wrong | N* | error of N*, median / most | within 10 % |"
    " most within the SLO | error of the search | within 10 % |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="servers whose title contains this")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS-saturation.md")
    options = parser.parse_args()
    lines, good = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)], True
    print("\n".join(lines), flush=True)
    with ProcessPoolExecutor() as pool:
        for kind in (kind for kind in kinds() if options.only in kind.title):
            row, well = line(kind, options.seeds, pool)
            lines.append(row)
            good &= well
            print(row, flush=True)
    if options.write:
        title = f"# What `make bench-saturation` showed\n\n{time.strftime('%Y-%m-%d')}, {options.seeds} seeds each.\n\n"
        (HERE / "RESULTS-saturation.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
