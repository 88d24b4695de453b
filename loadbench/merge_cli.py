"""The command ``merge``: the runs of shards become one run, which is then reported like any other."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import click


@click.command("merge")
@click.argument("directories", nargs=-1, required=True, metavar="DIR…", type=click.Path(path_type=Path))
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Directory of the run; new or empty.")
@click.option(
    "--no-report", is_flag=True, help="Only put the directories together: of many samples a report takes long."
)
@click.option("--quiet", is_flag=True, help="Write the files and show only the last lines.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout, and nothing else there.")
def merge_command(directories: Sequence[Path], out: Path, no_report: bool, quiet: bool, as_json: bool) -> None:
    """Make one run of the runs of its shards in DIR…, each a run directory or one that holds such.

    Histograms are added up, samples and telemetry joined on the one clock that all shards went by. Samples of more than
    1 GiB stay in one file a shard, linked where the disk allows that, and are read side by side.

    \b
    loadbench run S --shard 0/2 --start-at TIME --out part-0     on one machine
    loadbench run S --shard 1/2 --start-at TIME --out part-1     on another
    loadbench merge part-0 part-1 -o results/whole

    Exit codes: those of report; 94 where shards are missing or did not end as planned, 2 where they are not of one run.
    """
    from loadbench.analysis.group import runs_in
    from loadbench.chronicle import Chronicle
    from loadbench.cli import tell
    from loadbench.shard_facts import read_parts
    from loadbench.shards import put_together

    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: what is half made goes; Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    found = read_parts([run for directory in directories for run in runs_in(directory)])
    status, reason = put_together(found, out)
    if no_report:
        click.echo(f"Results  {out}")
        if reason is not None:
            click.echo(f"loadbench: result invalid: {reason}", err=True)
        raise SystemExit({"complete": 0, "target_died": 93, "interrupted": 130}.get(status, 94))
    chronicle = Chronicle(Path("results"))
    chronicle.commit = None  # which one the shards' machines were at is not known
    raise SystemExit(tell(out, quiet=quiet, as_json=as_json, note=chronicle.note))
