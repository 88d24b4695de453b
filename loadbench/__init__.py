"""loadbench: an asynchronous load-and-concurrency harness for language models on people's own machines.

One path, five rooms::

    scenarios/edge.yaml
       │  WHAT IS ASKED      WHO IS ASKED        ASKING                     WHAT HAPPENED          TELLING
       ▼
     scenario/ ───────────▶ target/ ──────────▶ engine/ ── results/…/ ───▶ analysis/ ──────────▶ report/
     schema  prompts        endpoint foundry     sse  client  load         histogram stats        console tables
     arrivals plan          synthetic fake       recorder pulse            metrics summary        live
     units   load           memory                                         rundir  verdict

    records.py   Prompt, Request, Sample, the loads and the level: the plain things that move
    outcomes.py  what can happen to a request, with pattern and advice, in one table
    errors.py    the errors a user may see, each with its exit code
    runner.py    the order of things
    cli.py       words and exit codes

Left of the run directory the program measures and never summarises; right of it it summarises and never sends.
A module imports only from rooms to its left and from the four plain modules; ``runner`` and ``cli`` stand above all.
``tests/test_house.py`` walks the imports and holds this picture true.
"""

__version__ = "0.1.0"
