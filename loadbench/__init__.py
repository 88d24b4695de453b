"""loadbench: an asynchronous load-and-concurrency harness for language models on people's own machines.

One path, five rooms::

    scenarios/edge.yaml
       │  WHAT IS ASKED      WHO IS ASKED        ASKING                     WHAT HAPPENED          TELLING
       ▼
     scenario/ ───────────▶ target/ ──────────▶ engine/ ── results/…/ ───▶ analysis/ ──────────▶ report/
     load  schema           target  endpoint    shard  load                rundir  metrics       write  console
     stage  shapes          models  foundry     client  exchange           stats  summary        markdown  tables
     prompts  arrivals      synthetic  fake     sse  recorder  merge       cautions  slo  road   live  frame  plan
     plan  units            memory  probe       crew  worker  pulse        saturation  search    findings
                            state  recovery    seat  post  cluster         verdict  sentences   figures  html
                                                                           candidates  energy    decision

    records.py   Prompt, Request, Sample, the loads and the level: the plain things that move
    outcomes.py  what can happen to a request, with pattern and advice, in one table
    hdr.py       HDR histograms and their log file: written on the left of the run directory, read on its right
    errors.py    the errors a user may see, each with its exit code
    files.py     writes a file whole
    platform.py  what differs between operating systems
    order.py     what a run is asked to do beside its scenario, and who is asked
    runner.py    the order of things; course.py decides what is measured next, journal.py keeps run.json
    lineup.py    the models of a run: found, downloaded, loaded, unloaded, failed; keep_warm.py has one not fall asleep
    hosts.py     watches the memory of a fleet's hosts, where they have probes
    vigil.py     watches the target's memory beside the run; aftermath.py sees to a target that has died
    slots.py     when the levels of a shard begin that runs by itself; shards.py makes one run of such shards' runs,
                 shard_facts.py sees that they are of one, and merge_cli.py is the command merge
    stall.py     ends a level whose target has stopped for ever
    afresh.py    a process of its own for each rung of a memory ladder
    progress.py  tells the live view where the run is
    calibrate.py what the client can take on this machine, and how far its stamps are off
    quality_answers.py asks prompts whose answers are to be marked; quality_mark.py walks a person through them,
                 quality_judge.py has a second model mark them, quality_cli.py is the command
    checklist.py asks, for check --probe, whether a run would work, and has a cure for each answer that is no
    chronicle.py notes every run in the history of its results folder, with the commit; trend_cli.py is the command
                 trend
    nightly.py   runs every scenario of a folder in a process of its own, nightly_compare.py holds it against its last
                 good night; clean_cli.py removes old runs
    models_cli.py  the command models: list, pull, load, unload, add, rm
    repeats.py   the same run several times, and the report of such a group
    compare_cli.py the command compare: which runs are the base, which are new, and the exit code
    cli.py       words and exit codes; commands.py what several commands have in common
    api.py       a run as numpy arrays, histograms and dataclasses, for programs and notebooks; api_run.py runs a
                 scenario for them. The package's public names are theirs, imported when they are first asked for

Left of the run directory the program measures and never summarises; right of it it summarises and never sends.
A module imports only from its own room, rooms to its left and the plain modules, which are the first six below the
picture; the others below it stand above all.
``tests/test_house.py`` walks the imports and holds this picture true.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadbench.analysis.summary import Summary
    from loadbench.api import Histogram, Run, RunLevel, Samples, load_run, load_runs
    from loadbench.api_run import run
    from loadbench.errors import LoadbenchError, TargetError, UsageError

__version__ = "0.1.0"
__all__ = [
    "Histogram",
    "LoadbenchError",
    "Run",
    "RunLevel",
    "Samples",
    "Summary",
    "TargetError",
    "UsageError",
    "__version__",
    "load_run",
    "load_runs",
    "run",
]

_HOMES = {
    **dict.fromkeys(("Histogram", "Run", "RunLevel", "Samples", "load_run", "load_runs"), "loadbench.api"),
    **dict.fromkeys(("LoadbenchError", "TargetError", "UsageError"), "loadbench.errors"),
    "Summary": "loadbench.analysis.summary",
    "run": "loadbench.api_run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
