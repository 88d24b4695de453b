"""Words and exit codes: what the command line understands. All work is done elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from loadbench import __version__
from loadbench.errors import LoadbenchError, UsageError
from loadbench.records import Find

if TYPE_CHECKING:
    from loadbench.scenario.load import Loaded

INTERRUPTED = 130
ELSEWHERE = {
    "fake": ("loadbench.target.fake_cli", "fake_command"),
    "probe": ("loadbench.target.probe_cli", "probe_command"),
}
"""Commands of their own modules, imported when they are asked for: no other should pay for that."""
T = TypeVar("T")


class _Commands(click.Group):
    """Turns our errors into one line and their exit code, wherever they come from."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in ELSEWHERE:
            return super().get_command(context, name)
        module, command = ELSEWHERE[name]
        found: click.Command = getattr(import_module(module), command)
        return found

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except LoadbenchError as error:
            click.echo(f"loadbench: {error}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe has gone: nothing to say to anybody
            sys.stderr.close()
            raise SystemExit(1) from None
        except OSError as error:  # what is read and written by us has errors of its own: this is the terminal's side
            click.echo(f"loadbench: {error.filename or 'the output'}: {error.strerror}", err=True)
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


def _scenario_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.argument("scenario", type=click.Path(path_type=Path)),
        click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Change any key: stages.0.duration=5s"),
        click.option("--endpoint", metavar="URL", help="Base URL of the API, or embedded."),
        click.option("--model", "models", multiple=True, metavar="NAME", help="Model to measure; may be repeated."),
        click.option("--concurrency", metavar="N,N,…", help="One closed-loop stage: 1,2,4 or 1..64."),
        click.option("--rate", metavar="N/s", help="One open-loop stage: 2/s, 1/s,4/s or 1/s..32/s."),
        click.option("--duration", metavar="TIME", help="Duration of every level; drops min_requests."),
        click.option("--requests", type=int, metavar="N", help="Stop every level after so many."),
        click.option("--seed", type=int, help="Everything random comes from it."),
        click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Sent with every request."),
        click.option("--memory-limit", metavar="SIZE", help="Most memory of the embedded service: 2GiB."),
    )
    for option in reversed(options):
        command = option(command)
    return command


_find_option = click.option(
    "--find",
    type=click.Choice(get_args(Find)),
    help="Search for the largest load that keeps the scenario's SLO, instead of measuring its stages.",
)


def _load(options: dict[str, Any], find: Find | None = None) -> Any:
    from loadbench.scenario.load import Overrides, load_scenario

    if find is not None:
        _fit_search(find, options)
    path = options.pop("scenario")
    return load_scenario(path, Overrides(**options), os.environ)


def _fit_search(find: Find, options: dict[str, Any]) -> None:
    """Refuse the flags that a search would have to ignore."""
    ours, other = ("concurrency", "rate") if find == "max-concurrency" else ("rate", "concurrency")
    bounds = "1..64" if find == "max-concurrency" else "1/s..32/s"
    if (given := options[other]) is not None:
        raise UsageError(f"--{other}: expected --{ours} {bounds}, or neither, beside --find {find}, got {given}")
    if (given := options[ours]) is not None and not ("," in given or ".." in given):
        raise UsageError(f"--{ours}: expected two loads to search between, {bounds}, beside --find {find}, got {given}")
    if (given := options["requests"]) is not None:
        raise UsageError(f"--requests: expected none beside --find, whose probes take what the SLO needs, got {given}")


@main.command()
@_scenario_options
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the results; new or empty.")
@_find_option
@click.option("--workers", metavar="N|auto", default="1", show_default=True, help="Load processes.")
@click.option("--i-own-the-target", is_flag=True, help="Let a memory ladder load it until it fails, though not ours.")
@click.option("--quiet", is_flag=True, help="Show nothing but errors and the last lines.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout, and nothing else there.")
def run(
    out: Path | None,
    find: Find | None,
    workers: str,
    i_own_the_target: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run SCENARIO and report what happened.

    A bearer key for an endpoint comes from OPENAI_API_KEY or --header; it is sent and never stored. Ctrl-C once
    finishes what is in flight and writes the results; twice quits.

    Exit codes: 0 done, 2 usage or scenario, 3 endpoint or model not servable, 93 target died, 94 result invalid,
    99 SLO missed, 130 interrupted.
    """
    from loadbench.report.live import choose_view
    from loadbench.runner import Order, Run

    loaded = _load(options, find)
    key = os.environ.get("OPENAI_API_KEY")
    order = Order(
        loaded=loaded,
        results=Path("results"),
        out=out,
        command=_repeat_command(loaded),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        workers=_workers(workers),
        find=find,
        i_own_the_target=i_own_the_target,
    )
    view = choose_view(quiet=quiet, keep=not sys.stdout.isatty())
    the_run = Run(order, view)
    _run_in_loop(the_run.execute, the_run.stop)
    raise SystemExit(_tell(the_run.folder, quiet=quiet, as_json=as_json))


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Write the files and show only the last lines.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json on stdout, and nothing else there.")
@click.option("--hgrm", is_flag=True, help="Also write percentile distributions for HdrHistogram's plotters.")
def report(directory: Path, quiet: bool, as_json: bool, hgrm: bool) -> None:
    """Make every number of DIRECTORY again from its samples, and show them. Exits as the run did."""
    raise SystemExit(_tell(directory, quiet=quiet, as_json=as_json, hgrm=hgrm))


def _workers(text: str) -> int | None:
    """``--workers``: None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise UsageError(f"--workers: expected auto or a number from 1 to 64, got {text}")
    return int(text)


def _tell(directory: Path, *, quiet: bool, as_json: bool, hgrm: bool = False) -> int:
    from loadbench.analysis.verdict import exit_code, why
    from loadbench.report.console import print_report
    from loadbench.report.write import summary_json, write_report

    summary = write_report(directory, hgrm=hgrm)
    if as_json:
        sys.stdout.buffer.write(summary_json(summary))
    else:
        print_report(summary, directory, quiet=quiet)
    code = exit_code(summary)
    if code not in (0, INTERRUPTED):
        click.echo(f"loadbench: {why(summary, code)}", err=True)
    return code


@main.command()
@_scenario_options
@_find_option
def check(find: Find | None, **options: Any) -> None:
    """Validate SCENARIO without any traffic and print its plan: levels, requests, estimated time."""
    from loadbench.report.plan import print_plan

    loaded = _load(options, find)
    if find is None:
        print_plan(loaded)
        return
    from loadbench.course import sought

    print_plan(loaded, search=sought(find, loaded).plan())


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

    loaded = None if scenario is None else _load({"scenario": scenario})
    view = choose_view()
    found = _run_in_loop(lambda: measure(loaded, seconds, view), None)
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
@click.option("--model", "models", multiple=True, default=("auto",), metavar="NAME", help="synthetic:NAME or a folder.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, show_default="a free one", help="Port to listen on.")
def serve(models: tuple[str, ...], host: str, port: int) -> None:
    """Run the embedded Foundry Local by hand, with the models loaded, until Ctrl-C; prints the endpoint.

    Foundry Local knows neither keys nor TLS: beyond loopback whoever reaches the port may use it.
    """
    from loadbench.target.target import Target

    async def serve_models() -> None:
        target = await Target.embedded(models, "serve", host=host, port=port)
        try:
            for asked in models:
                model = await target.load(await target.resolve(asked))
                click.echo(f"{model.base_url}  {model.id}")
            await target.ended()
        finally:
            await target.close()

    with contextlib.suppress(SystemExit):
        _run_in_loop(serve_models, None)


def _run_in_loop(work: Callable[[], Coroutine[Any, Any, T]], stop: Callable[[str], bool] | None) -> T:
    """Run it in the event loop. The first Ctrl-C or SIGTERM calls ``stop``; the second cancels, or where it says no."""
    from loadbench.platform import run_in_loop

    async def watched() -> T:
        loop, task, asked = asyncio.get_running_loop(), asyncio.ensure_future(work()), False

        def on_signal() -> None:
            nonlocal asked
            if stop is None or asked or not stop("interrupted"):
                task.cancel()
            asked = True

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: the terminal was closed; Windows has none
            if hasattr(signal, name):
                _on_signal(loop, getattr(signal, name), on_signal)
        return await task

    try:
        return run_in_loop(watched())
    except asyncio.CancelledError:
        raise SystemExit(INTERRUPTED) from None


def _on_signal(loop: asyncio.AbstractEventLoop, number: signal.Signals, call: Callable[[], None]) -> None:
    try:
        loop.add_signal_handler(number, call)
    except NotImplementedError:  # Windows: only the main thread hears of it, between two byte codes
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))


def _repeat_command(loaded: Loaded) -> str:
    """The command line that repeats this run: no header's value, key or password in it, and no directory of its own."""
    from loadbench.scenario.load import public_setting
    from loadbench.scenario.redaction import redact_url

    words, flag = ["loadbench"], ""
    for word in sys.argv[1:]:
        head, equals, value = word.partition("=")
        if not (equals and head in ("--header", "--set", "--endpoint", "--out")):
            head, equals, value = flag, "", word
        flag = word if not equals else ""
        if head == "--header":
            value = f"{value.partition(':')[0]}: …"
        elif head == "--set":
            value = public_setting(value)
        elif head == "--endpoint":
            value = redact_url(value)
        if "--out" not in (head, word):
            words.append(head + equals + value if equals else value)
    if loaded.endpoint_source == "FOUNDRY_LOCAL_ENDPOINT":
        words += ["--endpoint", redact_url(loaded.scenario.endpoint)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
