"""How often `loadbench compare` calls runs that do not differ worse, and how often it finds what is 20 % slower.

`make bench-compare`: servers of known arithmetic on the virtual clock, 5 runs against 5, through run directories and
the comparison itself. Each run's server is 2 % faster or slower than the next, as real ones are from start to start,
and draws arrivals and work of its own: every pair is a trial of its own. Exits with 1 where more than 3 of 100
identical pairs are called worse, or fewer than 80 of 100 slowdowns are found.

``--real 48`` adds runs of the scripted endpoint on the real clock, which nothing else here touches. They take 20 s each
and are as good as the machine: 72 of them, made in mixed order so that both kinds meet the same weather, and sets of
five drawn of them again and again, which are no independent trials. Two rows tell of them: as they came, and of those
alone that are not client-bound, which one would repeat. What drifts between two sets is in neither. ``--write`` puts it
all into RESULTS-compare.md.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from loadbench.analysis.compare import compare
from loadbench.analysis.compared import Comparison
from loadbench.analysis.group import Loaded, load
from loadbench.records import Closed, Load, Open
from tests.played import Machine, shared, write_levels

HERE = Path(__file__).parent
RUNS = 5
SLOWER = 1.2
FROM_START_TO_START = 0.02
MOST_ALARMS, LEAST_FOUND = 0.03, 0.80
SERVICE_S = 0.1


@dataclass(frozen=True)
class Kind:
    """A server under loads. ``scatter`` is how its speed differs from start to start."""

    title: str
    machine: Machine
    loads: tuple[Load, ...]
    seconds: float = 60.0
    scatter: float = FROM_START_TO_START


def at_70_percent(slots: int) -> tuple[Load, ...]:
    return (Open(0.7 * slots / SERVICE_S),)


ONE = Machine(1, service_s=SERVICE_S, chance="uniform")
KINDS = (
    Kind("1 slot at 70 %", ONE, at_70_percent(1)),
    Kind("1 slot at 70 %, speed differs by 5 %", ONE, at_70_percent(1), scatter=0.05),
    Kind("4 slots at 70 %", replace(ONE, slots=4), at_70_percent(4), seconds=20.0),
    Kind("shares the processor, at 70 %", replace(ONE, slots=None, speed=shared), at_70_percent(1)),
    Kind("1 slot at 70 %, exponential work", replace(ONE, chance="exponential"), at_70_percent(1), seconds=120.0),
    Kind("4 slots, 1, 2, 4 and 8 users", replace(ONE, slots=4), tuple(map(Closed, (1, 2, 4, 8))), seconds=10.0),
)


def made(folder: Path, kind: Kind, seed: int, slower: float = 1.0) -> Loaded:
    """One run."""
    speed = random.Random(seed).lognormvariate(0.0, kind.scatter)
    machine = replace(kind.machine, service_s=kind.machine.service_s * speed * slower)
    (run,) = load([write_levels(folder / str(seed), machine, kind.loads, duration_s=kind.seconds, seed=seed)])
    return run


def pair(kind: Kind, number: int) -> tuple[Comparison, Comparison]:
    """Five runs against five that do not differ, and against five that are slower."""
    first = 1 + 3 * RUNS * number
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = [made(folder, kind, first + run) for run in range(RUNS)]
        same = [made(folder, kind, first + RUNS + run) for run in range(RUNS)]
        slow = [made(folder, kind, first + 2 * RUNS + run, SLOWER) for run in range(RUNS)]
        return compare(base, same), compare(base, slow)


def lone_alarms(comparison: Comparison) -> bool:
    """Whether the interval of any figure alone would have said so: what the family's test is there for."""
    for row in (row for level in comparison.levels for row in level.rows if row.gates and row.low is not None):
        assert row.low is not None and row.high is not None
        if row.kind == "ratio" and (row.low > 1 if row.lower_is_better else row.high < 1):
            return True
    return False


HEAD = (
    "| runs | figures judged | A/A pairs | called regressed | some interval wholly on the worse side |"
    " figures equivalent | 20 % slower pairs | found regressed | TTFT p50, median change found |"
)
ABOUT = """The pairs of a row do not differ, or one of the two is 20 % slower. *Some interval wholly on the worse side*:
how often the 95 % interval of some figure alone, without a least effect and however many figures there are, would have
raised the alarm.

Rows of *known arithmetic* are on the virtual clock, and every pair of theirs is a trial of its own. Rows of the
*scripted endpoint* are on the real clock: runs made in mixed order, of which sets of five are drawn again and again, so
that their pairs are no hundred independent trials, and what drifts between two sets is not in them. *As they came* has
client-bound runs, too, which the comparison leaves out: fewer than five may count then. The other row has none, as one
would repeat them: it says what is found on a machine with room. The change of TTFT under Poisson arrivals is far beyond
20 %, because the server comes from 70 % to 84 % of its capacity.
"""


def row(title: str, pairs: Sequence[tuple[Comparison, Comparison]]) -> tuple[str, bool]:
    """A row of the table, and whether it is good enough."""
    same, slow = zip(*pairs, strict=True)
    alarms = sum(found.answer == "regressed" for found in same)
    lone = sum(map(lone_alarms, same))
    answers = [row.answer for found in same for level in found.levels for row in level.rows if row.gates]
    equal = f"{answers.count('equivalent') / len(answers):.0%}"
    found = sum(found.answer == "regressed" for found in slow)
    changes = sorted(
        row.change
        for found in slow
        for row in found.levels[0].rows
        if row.metric == "ttft.p50" and row.change is not None
    )
    judged = Counter(sum(row.gates for level in found.levels for row in level.rows) for found in same)
    cells = [title, str(judged.most_common(1)[0][0]), str(len(pairs)), str(alarms), str(lone), equal]
    cells += [str(len(pairs)), str(found), f"×{changes[len(changes) // 2]:.2f}" if changes else "–"]
    good = alarms <= MOST_ALARMS * len(pairs) and found >= LEAST_FOUND * len(pairs)
    return "| " + " | ".join(cells) + " |", good


SCENARIO = """
name: bench-compare
models: [fake-model:1]
warmup: {requests: 1}
prompts: [{name: chat, text: hello}]
request: {max_tokens: 8}
stages: [{rate: 7/s, arrivals: poisson, duration: 20s}]
"""
# 40 ms and up to 10 more to the first token, 7 gaps: 0.1 s of work on average, one at a time.
SCRIPT = {"slots": 1.0, "first-token-ms": 40.0, "first-token-jitter-ms": 10.0, "gap-ms": 55 / 7}
TIMES = ("first-token-ms", "first-token-jitter-ms", "gap-ms")
AT_ONCE = 4  # real runs, each beside an endpoint of its own: it and its client take 2 % of a core


def real(folder: Path, job: tuple[int, float]) -> Path:
    """One run of the scripted endpoint, each in a process of its own."""
    number, slower = job
    script = SCRIPT | {knob: SCRIPT[knob] * slower for knob in TIMES}
    flags = [word for knob, value in script.items() for word in (f"--{knob}", f"{value:g}")]
    loadbench = [sys.executable, "-m", "loadbench"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    fake = subprocess.Popen(
        [*loadbench, "fake", *flags, "--seed", str(number), "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert fake.stdout is not None and fake.stdin is not None
    url, out = fake.stdout.readline().strip(), folder / str(number)
    words = ["run", str(folder / "scenario.yaml"), "--endpoint", url, "--out", str(out), "--quiet"]
    subprocess.run([*loadbench, *words], check=True, capture_output=True, env=environment)
    fake.stdin.close()
    fake.wait()
    return out


def run_is_ours(run: Loaded) -> bool:
    """Whether the client shaped its numbers: the comparison leaves such a run out, and one would repeat it."""
    return any(level.client.bound for level in run.summary.levels)


Drawn = list[tuple[Comparison, Comparison]]


def real_pairs(runs: int, pairs: int) -> Iterator[tuple[str, Drawn]]:
    """Sets of five, drawn of so many real runs and half as many slower ones; then of those not client-bound."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scenario.yaml").write_text(SCENARIO, encoding="utf-8")
        jobs = [(number, 1.0 if number < runs else SLOWER) for number in range(runs + runs // 2)]
        random.Random(1).shuffle(jobs)  # what else goes on here must not meet one kind only
        with ThreadPoolExecutor(AT_ONCE) as pool:
            done = dict(zip(jobs, pool.map(real, repeat(folder), jobs), strict=True))
        same, slow = (load(done[job] for job in sorted(jobs) if job[1] == slower) for slower in (1.0, SLOWER))
        yield f"as they came, drawn of {runs} and {runs // 2}", drawn(same, slow, pairs)
        same, slow = (tuple(run for run in side if not run_is_ours(run)) for side in (same, slow))
        if len(same) >= 2 * RUNS and len(slow) >= RUNS:  # else this machine has no room for a measurement
            yield f"not client-bound, drawn of {len(same)} and {len(slow)}", drawn(same, slow, pairs)


def drawn(same: Sequence[Loaded], slow: Sequence[Loaded], pairs: int) -> Drawn:
    """So many pairs of sets of five."""
    chance, found = random.Random(2), Drawn()
    for _ in range(pairs):
        ten = chance.sample(same, 2 * RUNS)
        found.append((compare(ten[:RUNS], ten[RUNS:]), compare(ten[:RUNS], chance.sample(slow, RUNS))))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--only", default="", help="servers whose title contains this")
    parser.add_argument("--real", type=int, default=0, metavar="RUNS", help="so many runs on the real clock, too")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS-compare.md")
    options = parser.parse_args()
    lines, good = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)], True
    print("\n".join(lines), flush=True)

    def tell(title: str, pairs: Sequence[tuple[Comparison, Comparison]]) -> None:
        nonlocal good
        line, well = row(title, pairs)
        lines.append(line)
        good &= well
        print(line, flush=True)

    if options.real:
        for which, pairs in real_pairs(options.real, options.pairs):
            tell(f"scripted endpoint, real clock, 1 slot at 70 %: {which}", pairs)
    with ProcessPoolExecutor() as pool:
        for kind in (kind for kind in KINDS if options.only in kind.title):
            trials = pool.map(pair, repeat(kind, options.pairs), range(options.pairs))
            tell(f"known arithmetic: {kind.title}", list(trials))
    if options.write:
        head = f"# What `make bench-compare` showed\n\n{time.strftime('%Y-%m-%d')}, {RUNS} runs against {RUNS}.\n\n"
        (HERE / "RESULTS-compare.md").write_text(f"{head}{ABOUT}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
