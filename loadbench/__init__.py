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
                            state  recovery                                verdict  sentences

    records.py   Prompt, Request, Sample, the loads and the level: the plain things that move
    outcomes.py  what can happen to a request, with pattern and advice, in one table
    hdr.py       HDR histograms and their log file: written on the left of the run directory, read on its right
    errors.py    the errors a user may see, each with its exit code
    files.py     writes a file whole
    platform.py  what differs between operating systems
    runner.py    the order of things; course.py decides what is measured next, journal.py keeps run.json
    vigil.py     watches the target's memory beside the run; aftermath.py sees to a target that has died
    afresh.py    a process of its own for each rung of a memory ladder
    progress.py  tells the live view where the run is
    calibrate.py what the client can take on this machine, and how far its stamps are off
    cli.py       words and exit codes

Left of the run directory the program measures and never summarises; right of it it summarises and never sends.
A module imports only from its own room, rooms to its left and the plain modules, which are the first six below the
picture; the others below it stand above all.
``tests/test_house.py`` walks the imports and holds this picture true.
"""

__version__ = "0.1.0"
