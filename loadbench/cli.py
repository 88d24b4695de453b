"""Words and exit codes: what the command line understands. All work is done elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click

from loadbench import __version__
from loadbench.commands import INTERRUPTED, load, repeat_command, run_in_loop, scenario_options
from loadbench.errors import LoadbenchError, UsageError
from loadbench.records import Find
from loadbench.report.asked import gate_options
from loadbench.report.escape import as_line

ELSEWHERE = {
    "clean": ("loadbench.clean_cli", "clean_command", "Remove all but the last runs and nights from the results."),
    "compare": (
        "loadbench.compare_cli",
        "compare_command",
        "Tell whether new runs are slower or faster than old ones.",
    ),
    "fake": ("loadbench.target.fake_cli", "fake_command", "Serve the scripted endpoint, which answers as it is told."),
    "merge": ("loadbench.merge_cli", "merge_command", "Make one run of the runs of its shards."),
    "models": ("loadbench.models_cli", "models_command", "List, fetch, load and register models."),
    "nightly": ("loadbench.nightly", "nightly_command", "Run every scenario of a folder, and compare with last night."),
    "probe": (
        "loadbench.target.probe_cli",
        "probe_command",
        "Serve the memory figures of the model's host, read-only.",
    ),
    "quality": (
        "loadbench.quality_cli",
        "quality_command",
        "Gather answers of models, and find out how good they are.",
    ),
    "trend": ("loadbench.trend_cli", "trend_command", "Show what figures did from run to run, and where they changed."),
}
"""Commands of their own modules, imported when they are asked for, and not to be listed: --help would take a second."""


class _Commands(click.Group):
    """Turns our errors into one line and their exit code, wherever they come from."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in ELSEWHERE:
            return super().get_command(context, name)
        module, command, _ = ELSEWHERE[name]
        found: click.Command = getattr(import_module(module), command)
        return found

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        room = formatter.width - 6 - max(map(len, self.list_commands(context)))
        told = {name: text for name, (_, _, text) in ELSEWHERE.items()}
        told |= {name: command.get_short_help_str(room) for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(told.items()))

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except LoadbenchError as error:
            click.echo(as_line(f"loadbench: {error}"), err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe has gone: nothing to say to anybody
            sys.stderr.close()
            raise SystemExit(1) from None
        except OSError as error:  # what is read and written by us has errors of its own: this is the terminal's side
            click.echo(as_line(f"loadbench: {error.filename or 'the output'}: {error.strerror}"), err=True)
            raise SystemExit(2) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loadbench")
def main() -> None:
    """Load and concurrency tests for language models on your own machine.

    \b
    loadbench run scenarios/edge.yaml              measure an embedded Foundry Local, offline
    loadbench run S --endpoint http://HOST:5273/v1 measure any OpenAI-compatible endpoint
    loadbench check S                              validate a scenario and print its plan
    loadbench report results/X                     every number again, from the directory alone
    """


_find_option = click.option(
    "--find",
    type=click.Choice(get_args(Find)),
    help="Search for the largest load that keeps the scenario's SLO, instead of measuring its stages.",
)


_weights_option = click.option(
    "--weights",
    metavar="NAME=N,…",
    help="Rank the models by weighted criteria: ttft=3,quality=2,memory=1.",
)


def _file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Files that are written when asked for, and what is asserted; as ``write_report`` takes them."""
    stable = click.option("--stable", is_flag=True, help="Also write stable.json and stable.md, for version control.")
    about = "Also write benchmark_report.json and .md, as the Foundry Local workshop has them."
    return gate_options(stable(click.option("--format", "form", type=click.Choice(["workshop"]), help=about)(command)))


@main.command()
@scenario_options
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the results; new or empty.")
@_find_option
@click.option("--workers", metavar="N|auto", default="1", show_default=True, help="Load processes.")
@click.option("--cluster", metavar="ADDRESS", help="Put them on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT.")
@click.option("--shard", metavar="I/N", help="Be shard I, from 0, of N that run on machines of their own.")
@click.option("--start-at", metavar="TIME", help="Beside --shard: when all begin, as 2026-11-22T14:20:00Z.")
@click.option("--i-own-the-target", is_flag=True, help="Let a memory ladder load it until it fails, though not ours.")
@_weights_option
@_file_options
@click.option("--quiet", is_flag=True, help="Show nothing but errors and the last lines.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout, and nothing else there.")
def run(
    out: Path | None,
    find: Find | None,
    workers: str,
    cluster: str | None,
    shard: str | None,
    start_at: str | None,
    i_own_the_target: bool,
    weights: str | None,
    stable: bool,
    form: str | None,
    gates: Any,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run SCENARIO and report what happened.

    A bearer key for an endpoint comes from OPENAI_API_KEY, API_KEY or --header; it is sent and never stored. Ctrl-C
    once finishes what is in flight and writes the results; twice quits.

    Exit codes: 0 done, 2 usage or scenario, 3 endpoint or model not servable, 93 target died, 94 result invalid,
    99 SLO or gate missed, 130 interrupted.
    """
    from loadbench.chronicle import Chronicle
    from loadbench.order import Order
    from loadbench.repeats import run_all
    from loadbench.scenario.variables import key_headers
    from loadbench.slots import moment_of, shard_of

    place, start_at_wall_ns = shard_of(shard), moment_of(start_at, shard)
    weighed, loaded = _weights(weights), load(options, find)
    order = Order(
        loaded=loaded,
        results=Path("results"),
        out=out,
        command=repeat_command(loaded),
        headers=key_headers(os.environ),
        workers=_workers(workers),
        cluster=cluster,
        find=find,
        i_own_the_target=i_own_the_target,
        shard=place,
        start_at_wall_ns=start_at_wall_ns,
    )
    told: dict[str, Any] = {"quiet": quiet, "as_json": as_json, "weights": weighed, "stable": stable, "form": form}
    told["gates"], told["note"] = gates, Chronicle(order.results).note if shard is None else None  # a part is no run
    raise SystemExit(run_all(order, run_in_loop, partial(tell, **told), quiet=quiet, as_json=as_json))


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Write the files and show only the last lines.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout, and nothing else there.")
@click.option("--hgrm", is_flag=True, help="Also write percentile distributions for HdrHistogram's plotters.")
@click.option("--figures", "pictures", is_flag=True, help="Also write the core figures as SVG files.")
@_weights_option
@_file_options
@click.option(
    "--export",
    "exports",
    type=click.Choice(["prometheus", "otlp"]),
    multiple=True,
    help="Also write metrics.prom for Prometheus' textfile collector, or send metrics to OpenTelemetry.",
)
def report(directory: Path, quiet: bool, as_json: bool, weights: str | None, **files: Any) -> None:
    """Make every number of DIRECTORY again from its samples, and show them. Exits as the run did."""
    from loadbench.repeats import report_all

    told = partial(tell, quiet=quiet, as_json=as_json, weights=_weights(weights), **files)
    raise SystemExit(report_all(directory, told, quiet=quiet, as_json=as_json))


def _weights(text: str | None) -> dict[str, float] | None:
    """``--weights``, read before anything is measured."""
    if text is None:
        return None
    from loadbench.analysis.ranking import weights_of

    return weights_of(text)


def _workers(text: str) -> int | None:
    """``--workers``: None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise UsageError(f"--workers: expected auto or a number from 1 to 64, got {text}")
    return int(text)


def tell(directory: Path, *, quiet: bool, as_json: bool, weights: Any = None, note: Any = None, **files: Any) -> int:
    """Report a run, and say with which exit code it ends.

    ``files``: those that were asked for, as ``write_report`` takes them. ``note`` keeps what came of a new run.
    """
    from loadbench.analysis.verdict import exit_code, why
    from loadbench.report import github
    from loadbench.report.console import print_report
    from loadbench.report.write import summary_json, write_report

    if note is not None and files.get("gates"):
        files["gates"].keep(directory)
    summary = write_report(directory, weights=weights, **files)
    if as_json:
        sys.stdout.buffer.write(summary_json(summary))
    else:
        with github.verbatim():
            print_report(summary, directory, quiet=quiet)
    code = exit_code(summary)
    github.tell(summary, code, err=as_json)
    if code not in (0, INTERRUPTED):
        click.echo(as_line(f"loadbench: {why(summary, code)}"), err=True)
    if note is not None:
        note(directory, summary, code)
    return code


@main.command()
@scenario_options
@_find_option
@click.option("--probe", is_flag=True, help="Ask the endpoint and its models whether a run would work.")
@click.option("--json", "as_json", is_flag=True, help="Print the answers of --probe as JSON, and nothing else.")
def check(find: Find | None, probe: bool, as_json: bool, **options: Any) -> None:
    """Validate SCENARIO without any traffic and print its plan: levels, requests, estimated time.

    With --probe it is a checklist instead: does the endpoint answer, is every model there, does it fit, load, answer,
    stream, count tokens; if not, what to do. Exit codes: 0 nothing is amiss, 2 usage or scenario, 3 something is.
    """
    from loadbench.report.plan import print_plan

    if as_json and not probe:
        raise UsageError("--json: expected --probe beside it, got none")
    loaded, search = load(options, find), None
    if find is not None:
        from loadbench.course import sought

        search = sought(find, loaded).plan()
    if not probe:
        print_plan(loaded, search=search)
        return
    from loadbench.checklist import check_all

    raise SystemExit(run_in_loop(lambda: check_all(loaded, as_json=as_json), None))


@main.command()
@click.argument("scenario", type=click.Path(path_type=Path), required=False)
@click.option("--seconds", type=float, default=5.0, show_default=True, help="How long each of three trials goes on.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, and nothing else there.")
def calibrate(scenario: Path | None, seconds: float, as_json: bool) -> None:
    """Measure what this machine's client can take, and how far its stamps are off, with the load of SCENARIO.

    Runs the scripted endpoint beside it for some twenty seconds. The result is kept for this machine and version:
    runs read it, and mark what it does not bear out.
    """
    import orjson

    from loadbench.calibrate import calibrate as measure
    from loadbench.report.calibration import print_calibration
    from loadbench.report.live import choose_view

    loaded = None if scenario is None else load({"scenario": scenario})
    view = choose_view()
    found = run_in_loop(lambda: measure(loaded, seconds, view), None)
    if as_json:
        click.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    else:
        print_calibration(found)


@main.command()
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors."""
    from loadbench.scenario.schema import schema_json

    click.echo(schema_json(), nl=False)


@main.command()
@click.option("--model", "models", multiple=True, default=("auto",), metavar="NAME", help="As in a scenario.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, show_default="a free one", help="Port to listen on.")
def serve(models: tuple[str, ...], host: str, port: int) -> None:
    """Run the embedded Foundry Local by hand, with the models loaded, until Ctrl-C; prints the endpoint.

    Foundry Local knows neither keys nor TLS: beyond loopback whoever reaches the port may use it.
    """
    from loadbench.report.models import Download
    from loadbench.target.target import Target

    async def serve_models() -> None:
        target = await Target.embedded(models, "serve", host=host, port=port)
        try:
            for asked in models:
                model = await target.resolve(asked)
                with Download(model.id, None) as view:
                    await target.pull(asked, view.advance, say=view.say)
                model = await target.load(model)
                click.echo(as_line(f"{model.base_url}  {model.id}"))
            await target.ended()
        finally:
            await target.close()

    with contextlib.suppress(SystemExit):
        run_in_loop(serve_models, None)


if __name__ == "__main__":
    main()
