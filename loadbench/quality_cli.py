"""The command ``quality``: gather answers, mark them by hand, have a second model mark them. The work is elsewhere."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from loadbench.commands import INTERRUPTED, given_headers, load, repeat_command, run_in_loop, scenario_options
from loadbench.errors import TargetError, UsageError
from loadbench.report.escape import as_line, plain
from loadbench.scenario.endpoints import EMBEDDED
from loadbench.scenario.variables import ENDPOINT_VARIABLE, key_headers

if TYPE_CHECKING:
    from loadbench.analysis.summary import Summary

REASON_SHOWN = 70
PATIENCE_S = 180.0  # what a scenario's total deadline is unless it states another
SEED = 42  # a scenario's

_directory = click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))


@click.group("quality", context_settings={"help_option_names": ["-h", "--help"]})
def quality_command() -> None:
    """Gather answers of models, and find out how good they are.

    \b
    loadbench quality collect S                  ask every model the prompts of the scenario's quality
    loadbench quality mark DIR --blind           mark the answers by hand, from 1 to 5
    loadbench quality judge DIR --model ALIAS    have another model mark them
    loadbench report DIR                         what came of it, beside everything else
    """


@quality_command.command()
@scenario_options
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the results; new or empty.")
@click.option("--quiet", is_flag=True, help="Show nothing but errors and the last lines.")
def collect(out: Path | None, quiet: bool, **options: Any) -> None:
    """Ask every model of SCENARIO the prompts of its quality, one after another, and run no level.

    The answers are in answers.jsonl of the run's directory. Exit codes are those of run; 94 where no answer came.
    """
    from loadbench.order import Order
    from loadbench.report.live import choose_view
    from loadbench.report.write import write_report
    from loadbench.runner import Run

    loaded = load(options)
    if loaded.scenario.quality is None:
        raise UsageError(f"{loaded.path}: quality: expected prompts to be asked, got none")
    run = Run(
        Order(
            loaded=loaded,
            results=Path("results"),
            out=out,
            command=repeat_command(loaded),
            headers=key_headers(os.environ),
            quality_only=True,
        ),
        choose_view(quiet=quiet, keep=not sys.stdout.isatty()),
    )
    run_in_loop(run.execute, run.stop)
    summary = write_report(run.folder)
    _show(run.folder, None if quiet else summary)
    codes = {"interrupted": INTERRUPTED, "target_died": 93}
    code = codes.get(summary.status, 3 if any(model.status == "failed" for model in summary.models) else 0)
    if code == 0 and not any(told.answers > told.failed for told in summary.quality):
        code = 94
    raise SystemExit(code)


@quality_command.command()
@_directory
@click.option("--rater", default="human", show_default=True, metavar="NAME", help="Whose marks these are.")
@click.option("--blind", is_flag=True, help="Hide the models' names, and shuffle the answers to each prompt.")
@click.option("--seed", type=int, help="What the shuffling comes from; the run's unless stated.")
def mark(directory: Path, rater: str, blind: bool, seed: int | None) -> None:
    """Walk through the answers in DIRECTORY and mark each from 1 to 5.

    Every mark is kept at once, so it can be quit at any time and gone on with later. Identical answers to one prompt
    are marked once.
    """
    from loadbench.quality_mark import Marking

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    seed = _seed(directory) if seed is None else seed
    come = iter(sys.stdin.readline, "")
    marking = Marking(directory, rater, blind=blind, seed=seed, come=come, out=sys.stdout)
    if not marking.items:
        raise UsageError(f"{directory}: expected answers to mark, found none: quality collect gathers them")
    interrupted = False
    try:
        marking.run()
    except KeyboardInterrupt:  # leaves as q does, and says so
        interrupted = True
        click.echo()
    left = len(marking.items) - marking.marked
    click.echo(f"{marking.marked} of {len(marking.items)} are marked by {plain(rater)}" + _go_on(left))
    summary = _report(directory)
    _show(directory, None if blind and left else summary)  # what it says of the models would end the blindness
    if interrupted:
        raise SystemExit(INTERRUPTED)


def _go_on(left: int) -> str:
    return f"; the same command goes on with the other {left}" if left else ""


@quality_command.command()
@_directory
@click.option("--model", required=True, metavar="NAME", help="The judge: an alias, an id, synthetic:NAME or a folder.")
@click.option("--endpoint", metavar="URL", help="Where it is served; embedded unless stated.")
@click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Sent with every request.")
@click.option("--concurrency", type=click.IntRange(1, 64), default=1, show_default=True, help="Answers at a time.")
def judge(directory: Path, model: str, endpoint: str | None, headers: tuple[str, ...], concurrency: int) -> None:
    """Have another model mark the answers in DIRECTORY, with a reason for each mark.

    It is not told which model gave an answer. What it has marked already is not asked again. A reply that is no mark
    is kept as malformed, refused or failed, and counts in no mean. A bearer key comes from OPENAI_API_KEY, API_KEY or
    --header; it is sent and never stored.
    """
    from loadbench.analysis import quality_rows

    if not any(answer.can_be_marked for answer in quality_rows.answers(directory)):
        raise UsageError(f"{directory}: expected answers to mark, found none: quality collect gathers them")
    endpoint = endpoint or os.environ.get(ENDPOINT_VARIABLE, "").strip() or EMBEDDED
    given, telling = given_headers(headers, os.environ if endpoint != EMBEDDED else {}), _Telling()
    try:
        counts = run_in_loop(lambda: _judge(directory, model, endpoint, given, concurrency, telling), None)
    except SystemExit:  # Ctrl-C: what was judged until then is in the results
        if telling.of:
            _note(f"interrupted: {telling.done} of {telling.of} judged" + _go_on(telling.of - telling.done))
        else:
            _note("loadbench: interrupted before anything was judged")
        _show(directory, _report(directory))
        raise
    if not counts:
        _note(f"{model} has judged all of them already")
    _show(directory, _report(directory))
    if counts and set(counts) == {"failed"}:
        raise TargetError(f"{plain(model)}: no answer could be judged: all requests failed")


async def _judge(
    folder: Path, name: str, endpoint: str, headers: Mapping[str, str], concurrency: int, telling: _Telling
) -> dict[str, int]:
    from loadbench.quality_judge import Judge, judge_all
    from loadbench.target.target import Target

    embedded = endpoint == EMBEDDED
    _note("starting an embedded Foundry Local" if embedded else "asking the endpoint what it is")
    target = await (Target.embedded([name], "--model") if embedded else Target.at(endpoint, "--endpoint", headers))
    try:
        await target.pull(name, lambda percent: None, say=_note)
        model = await target.load(await target.resolve(name))
        try:
            return await judge_all(folder, Judge(target, model, PATIENCE_S), concurrency, telling)
        finally:
            if model.load_ms is not None and not embedded:  # leave the machine as it was found
                try:
                    await asyncio.shield(target.unload_patiently(model))
                except TargetError as error:  # the marks are there all the same
                    _note(f"{plain(model.id)} stays loaded: {plain(str(error))}")
    finally:
        await target.close()


class _Telling:
    """Says what the judge says of each answer, and keeps how many it was asked about."""

    done = of = 0

    def __call__(self, done: int, of: int, answer: Any, word: Any) -> None:
        self.done, self.of = done, of
        told = f"mark {word.mark}" if word.mark is not None else word.outcome
        reason = f": {plain(word.reason, REASON_SHOWN)}" if word.reason else ""
        _note(f"{done} of {of}, prompt {plain(answer.id, 40)}: {told}{reason}")


def _note(line: str) -> None:
    click.echo(as_line(line), err=True)


def _seed(folder: Path) -> int:
    """The run's, so that a second rater is shown the same order."""
    try:
        seed = orjson.loads((folder / "run.json").read_bytes())["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return SEED
    return seed if isinstance(seed, int) else SEED


def _report(folder: Path) -> Summary | None:
    """Make the reports of the run anew; answers without a run have none."""
    from loadbench.report.write import write_report

    return write_report(folder) if (folder / "run.json").exists() else None


def _show(folder: Path, summary: Summary | None) -> None:
    from loadbench.report.console import print_quality

    if summary is not None:
        print_quality(summary)
    click.echo(f"Results  {plain(folder)}")
