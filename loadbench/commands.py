"""What several commands have in common: the options of a scenario, Ctrl-C, headers, and the line that repeats a run."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loadbench.errors import UsageError
from loadbench.records import Find

if TYPE_CHECKING:
    from loadbench.scenario.load import Loaded

INTERRUPTED = 130
T = TypeVar("T")


def scenario_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A scenario's file, and what may be said in place of it; as ``load`` takes them."""
    options = (
        click.argument("scenario", type=click.Path(path_type=Path)),
        click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Change any key: stages.0.duration=5s"),
        click.option(
            "--endpoint", multiple=True, metavar="URL", help="Base URL of the API, or embedded; several are a fleet."
        ),
        click.option("--model", "models", multiple=True, metavar="NAME", help="Model to measure; may be repeated."),
        click.option("--concurrency", metavar="N,N,…", help="One closed-loop stage: 1,2,4 or 1..64."),
        click.option("--rate", metavar="N/s", help="One open-loop stage: 2/s, 1/s,4/s or 1/s..32/s."),
        click.option("--duration", metavar="TIME", help="Duration of every level; drops min_requests."),
        click.option("--requests", type=int, metavar="N", help="Stop every level after so many."),
        click.option("--seed", type=int, help="Everything random comes from it."),
        click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Sent with every request."),
        click.option("--memory-limit", metavar="SIZE", help="Most memory of the embedded service: 2GiB."),
        click.option("--repeat", type=int, metavar="N", help="Make so many runs, each in its own directory."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def load(options: dict[str, Any], find: Find | None = None) -> Any:
    """The scenario that these options say."""
    from loadbench.scenario.load import Overrides, load_scenario
    from loadbench.scenario.redaction import urls

    path, endpoints = options.pop("scenario"), [url for text in options.pop("endpoint", ()) for url in urls(text)]
    overrides = Overrides(**options, endpoint=endpoints if len(endpoints) > 1 else "".join(endpoints) or None)
    if find is not None:
        overrides.fit_search(find)
    return load_scenario(path, overrides, os.environ)


def run_in_loop(work: Callable[[], Coroutine[Any, Any, T]], stop: Callable[[str], bool] | None) -> T:
    """Run it in the event loop. The first Ctrl-C or SIGTERM calls ``stop``; the second cancels, or where it says no."""
    from loadbench import platform

    asked = early = False

    async def watched() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())

        def on_signal() -> None:
            nonlocal asked, early
            if stop is None or asked or not stop("interrupted"):
                early = stop is not None and not asked
                task.cancel()
            asked = True

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: the terminal was closed; Windows has none
            if hasattr(signal, name):
                _on_signal(loop, getattr(signal, name), on_signal)
        return await task

    try:
        return platform.run_in_loop(watched())
    except asyncio.CancelledError:
        if early:
            click.echo("loadbench: interrupted before anything was measured", err=True)
        raise SystemExit(INTERRUPTED) from None


def given_headers(given: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """``--header``, and the key that the environment has unless one of them stands in its place."""
    from loadbench.scenario.schema import header_problem
    from loadbench.scenario.variables import key_headers

    headers = key_headers(env)
    for text in given:
        name, colon, value = (part.strip() for part in text.partition(":"))
        if not (name and colon):
            raise UsageError("--header: expected 'Name: value', got no colon after a name")
        if problem := header_problem(name, value):
            raise UsageError(f"--header: {problem}")
        headers = {known: old for known, old in headers.items() if known.lower() != name.lower()} | {name: value}
    return headers


def _on_signal(loop: asyncio.AbstractEventLoop, number: signal.Signals, call: Callable[[], None]) -> None:
    try:
        loop.add_signal_handler(number, call)
    except NotImplementedError:  # Windows: only the main thread hears of it, between two byte codes
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))


def repeat_command(loaded: Loaded) -> str:
    """The command line that repeats this run: no header's value, key or password in it, and no directory of its own."""
    from loadbench.scenario.load import public_setting
    from loadbench.scenario.redaction import redact_urls

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
            value = redact_urls(value)
        if "--out" not in (head, word):
            words.append(head + equals + value if equals else value)
    return shlex.join([*words, *loaded.from_environment])
