"""The command ``compare``: which directories are the base, which are new, and the exit code. The work is elsewhere."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from pydantic_core import PydanticCustomError

from loadbench.engine.merge import SAMPLES, parts
from loadbench.errors import UsageError
from loadbench.report.escape import as_line
from loadbench.scenario.units import SHARE

INVALID, REGRESSED = 94, 95
BETWEEN = "\0"  # stands for -- on its way through click, which would take it away; no path has it


class _TwoSets(click.Command):
    """Keeps the ``--`` between two sets of directories, and lets options stand on either side of it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [BETWEEN if word == "--" else word for word in args])


@click.command("compare", cls=_TwoSets, options_metavar="[OPTIONS]")
@click.argument("directories", nargs=-1, metavar="BASE… -- NEW…")
@click.option("--gate", is_flag=True, help="Exit with 95 where something regressed, 94 where it cannot tell.")
@click.option("--force", is_flag=True, help="Compare runs of different provenance, and say so.")
@click.option("--allow-doubtful", is_flag=True, help="Count runs that the client shaped, or another busy program.")
@click.option("--least", default="5%", show_default=True, metavar="SHARE", help="What a change must be to count.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; the first of NEW unless stated.")
@click.option("--quiet", is_flag=True, help="Write the files and show only what came of it.")
@click.option("--json", "as_json", is_flag=True, help="Print compare.json on stdout, and nothing else there.")
def compare_command(
    directories: tuple[str, ...],
    gate: bool,
    force: bool,
    allow_doubtful: bool,
    least: str,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare the runs in BASE with those in NEW: regressed, improved, equivalent or inconclusive, figure by figure.

    A directory is a run, or a group of runs: one that `loadbench run --repeat 5` made, or any that holds some. The run
    is the unit, so one run on either side tells nothing for sure; with five a regression can be told from chance.
    Between two directories alone the -- may be left out. Writes compare.md, compare.json and compare.html.

    \b
    loadbench compare results/main -- results/branch
    loadbench compare monday tuesday -- wednesday thursday --gate

    Exit codes: 0 done, 2 usage, or runs that do not measure the same; with --gate 95 regressed, 94 something that the
    base has could not be compared.
    """
    from loadbench.analysis.compare import ProvenanceError, compare
    from loadbench.analysis.compare_words import not_held
    from loadbench.analysis.group import load
    from loadbench.report.compare import comparison_json, print_comparison
    from loadbench.report.compare_page import write_comparison

    base, new = _sets(directories)
    effect = _least(least)
    base_runs, new_runs = _runs(base), _runs(new)
    if twice := next((path for path in base_runs if path.resolve() in {run.resolve() for run in new_runs}), None):
        raise UsageError(f"{twice}: expected different runs in the base and in the new ones, got it in both")
    _refuse_copies([*base_runs, *new_runs])
    folder = out or new[0]
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: expected a directory, found a file")
    try:
        comparison = compare(
            load(base_runs), load(new_runs), least_effect=effect, force=force, allow_doubtful=allow_doubtful
        )
    except ProvenanceError as error:
        click.echo(as_line(f"loadbench: {error}"), err=True)
        raise SystemExit(INVALID if gate else error.exit_code) from None
    written = write_comparison(comparison, folder)
    if as_json:
        sys.stdout.buffer.write(comparison_json(comparison))
    else:
        print_comparison(comparison, folder, quiet=quiet)
    if gate and comparison.answer == "regressed":
        click.echo("loadbench: regressed", err=True)
        raise SystemExit(REGRESSED)
    if gate and (comparison.missing or not comparison.compared):
        click.echo(as_line(f"loadbench: {not_held(comparison)}"), err=True)
        raise SystemExit(INVALID)
    if not written and (gate or out is not None):
        raise SystemExit(UsageError.exit_code)  # why has been told


def _sets(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    if words.count(BETWEEN) == 0 and len(words) == 2:
        return [Path(words[0])], [Path(words[1])]
    if words.count(BETWEEN) != 1 or BETWEEN in (words[0], words[-1]):
        raise UsageError("compare: expected BASE… -- NEW…, directories on both sides of one --")
    at = words.index(BETWEEN)
    return [Path(word) for word in words[:at]], [Path(word) for word in words[at + 1 :]]


def _runs(directories: Sequence[Path]) -> list[Path]:
    """Every run once."""
    from loadbench.analysis.group import runs_in

    return list({run.resolve(): run for directory in directories for run in runs_in(directory)}.values())


def _refuse_copies(runs: Sequence[Path]) -> None:
    """A run that is there twice counts twice: two runs never have the same stamps."""
    by_size: dict[int, list[Path]] = {}
    for run in runs:
        sizes = [part.stat().st_size for part in parts(run, SAMPLES) if part.exists()]
        if not sizes and _was_complete(run):
            raise UsageError(f"{run}: expected {SAMPLES}, which is gone: nothing is known of its requests")
        if sum(sizes):
            by_size.setdefault(sum(sizes), []).append(run)
    for alike in (alike for alike in by_size.values() if alike[1:]):
        seen: dict[str, Path] = {}
        for run in alike:
            first = seen.setdefault(_hash(run), run)
            if first is not run:
                raise UsageError(f"{run}: expected different runs, its samples are those of {first}")


def _was_complete(run: Path) -> bool:
    from loadbench.analysis.rundir import read_facts

    return bool(read_facts(run)["status"] == "complete")


def _hash(run: Path) -> str:
    digest = hashlib.sha256()
    for part in parts(run, SAMPLES):
        if part.exists():
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _least(text: str) -> float:
    try:
        effect = SHARE.read(text)
    except PydanticCustomError as error:
        raise UsageError(f"--least: {error.message()}, got {text}") from None
    if not 0 <= effect < 1:
        raise UsageError(f"--least: expected a share from 0 to below 100 %, got {text}")
    return effect
