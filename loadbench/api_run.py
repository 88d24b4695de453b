"""Runs a scenario for a program or a notebook, beside whatever loop is running there, and loads what it left.

As ``loadbench run`` does, without its words: errors are raised, and nothing is printed unless it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from loadbench import runner
from loadbench.analysis.gates import Asked, asked
from loadbench.analysis.verdict import exit_code
from loadbench.api import Run, load_run
from loadbench.chronicle import Chronicle
from loadbench.errors import UsageError
from loadbench.order import Order
from loadbench.platform import run_in_loop
from loadbench.records import Find
from loadbench.report.escape import as_line
from loadbench.report.live import choose_view
from loadbench.report.write import write_report
from loadbench.scenario.load import Loaded, Overrides, load_document, load_scenario, public_setting
from loadbench.scenario.reading import Document
from loadbench.scenario.redaction import redact_urls
from loadbench.scenario.variables import key_headers

MAPPING = Path("<mapping>")  # what stands for the file of a scenario that is none
WAKE_S = 0.2  # Windows hears of Ctrl-C only between waits


def run(
    scenario: str | os.PathLike[str] | Mapping[str, Any],
    *,
    endpoint: str | Sequence[str] | None = None,
    models: Sequence[str] = (),
    concurrency: int | str | Sequence[int] | None = None,
    rate: float | str | Sequence[float] | None = None,
    duration: float | str | None = None,
    requests: int | None = None,
    seed: int | None = None,
    headers: Mapping[str, str] | None = None,
    memory_limit: int | str | None = None,
    sets: Mapping[str, Any] | None = None,
    find: Find | None = None,
    workers: int | Literal["auto"] = 1,
    i_own_the_target: bool = False,
    asserts: str | Sequence[str] = (),
    allow_indicative: bool = False,
    out: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] = "results",
    quiet: bool = True,
) -> Run:
    """Run a scenario to its end, write its reports, and load it. Works where an event loop is running; it blocks.

    ``scenario`` is a file, or a mapping with the keys of one, whose files are looked up from the working directory. The
    others are the flags of ``loadbench run``: ``duration`` in seconds or as in a file (``"15s"``), ``rate`` in requests
    per second, ``sets`` any key by its path (``{"stages.0.duration": "5s"}``), ``asserts`` gates (``"ttft.p95<2s"``)
    with their results in ``summary.gates``. The environment counts as it does there.
    ``out`` is the directory of the results, new or empty, else one is made in ``results``. ``quiet=False`` shows
    on stderr how far the run is.

    The load comes from a thread of this process: what other threads do meanwhile makes it late, which the levels'
    ``figures.client`` tell.

    UsageError: the scenario, a flag or a path is wrong; a scenario with ``repeat`` is to be run in a loop.
    TargetError: the endpoint or the model cannot be served. A target that dies, or a missed SLO, is no error but a
    result: see `Run.exit_code`. After Ctrl-C what is in flight ends and is written, then KeyboardInterrupt comes.
    """
    overrides = Overrides(
        sets=tuple(f"{path}={_plain(value, path)}" for path, value in (sets or {}).items()),
        endpoint=_listed(endpoint),
        models=(models,) if isinstance(models, str) else tuple(models),
        concurrency=_listed(concurrency),
        rate=_listed(rate),
        duration=None if duration is None else str(duration),
        requests=requests,
        seed=seed,
        headers=tuple(f"{name}: {value}" for name, value in (headers or {}).items()),
        memory_limit=None if memory_limit is None else str(memory_limit),
    )
    processes = _processes(workers)
    gates = asked([asserts] if isinstance(asserts, str) else asserts, allow_indicative)
    if find is not None:
        overrides.fit_search(find)
    loaded = _load(scenario, overrides)
    folder = None if out is None else Path(out)
    order = Order(loaded, Path(results), folder, "", key_headers(os.environ), processes, find, i_own_the_target)
    order = replace(order, command=_repeats(order, overrides, gates))
    return load_run(_run_and_report(order, gates, quiet))


def _processes(workers: int | Literal["auto"]) -> int | None:
    """As an order has them: None for auto."""
    if workers != "auto" and not (isinstance(workers, int) and 1 <= workers <= 64):
        raise UsageError(f"workers: expected auto or a number from 1 to 64, got {workers}")
    return None if workers == "auto" else workers


def _run_and_report(order: Order, gates: Asked | None, quiet: bool) -> Path:
    """Returns the directory. KeyboardInterrupt where Ctrl-C ended it, once all is written."""
    running = runner.Run(order, choose_view(quiet=quiet))
    chronicle = Chronicle(order.results)
    interrupted = _run_aside(running)
    if gates is not None:
        gates.keep(running.folder)

    def warn(line: str) -> None:
        warnings.warn(as_line(line), stacklevel=5)  # where run is called

    summary = write_report(running.folder, warn=warn)
    chronicle.note(running.folder, summary, exit_code(summary), warn)
    if interrupted:
        stopped = KeyboardInterrupt()
        stopped.add_note(f"what was measured until then is in {running.folder}")
        raise stopped
    return running.folder


def _load(scenario: str | os.PathLike[str] | Mapping[str, Any], overrides: Overrides) -> Loaded:
    if isinstance(scenario, Mapping):
        data = json.loads(_plain(dict(scenario), str(MAPPING)))
        document = Document(data, {(): str(MAPPING)} | {(key,): str(MAPPING) for key in data})
        loaded = load_document(document, MAPPING, overrides, os.environ)
    else:
        loaded = load_scenario(Path(scenario), overrides, os.environ)
    if (times := loaded.scenario.repeat) > 1:
        raise UsageError(
            f"{loaded.path}: repeat: expected 1, got {times}: a call makes one run and returns it; call that often"
        )
    return loaded


def _plain(value: Any, place: str) -> str:
    """As JSON, which is YAML too. UsageError for what a scenario cannot hold."""
    try:
        return json.dumps(value, default=_path)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{place}: expected values that a scenario file can hold, got {error}") from None


def _path(value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise TypeError(f"a value of type {type(value).__name__}")


def _listed(given: float | str | Sequence[float | str] | None) -> str | None:
    """As the flag has them: ``1,2,4``."""
    if given is None or isinstance(given, str):
        return given
    return ",".join(map(str, given)) if isinstance(given, Sequence) else str(given)


def _repeats(order: Order, overrides: Overrides, gates: Asked | None) -> str:
    """What repeats this run, without secrets: the command, or of a mapping, into which all has gone, the call."""
    loaded, workers = order.loaded, order.workers or "auto"
    given = {
        "find": order.find,
        "workers": None if workers == 1 else workers,
        "i_own_the_target": order.i_own_the_target or None,
        "asserts": tuple(gate.text for gate in gates.assertions) or None if gates else None,
        "allow_indicative": (gates and gates.allow_indicative) or None,
    }
    more = {name: value for name, value in given.items() if value is not None}
    if loaded.path is MAPPING:
        said = loaded.scenario.redacted().model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for name in said.get("request", {}).get("headers", {}):
            said["request"]["headers"][name] = "…"
        return f"loadbench.run({', '.join([repr(said), *(f'{name}={value!r}' for name, value in more.items())])})"
    words = ["loadbench", "run", str(loaded.path)]
    names = {"sets": "--set", "models": "--model", "headers": "--header", "asserts": "--assert"}
    public: dict[str, Callable[[str], str]] = {
        "sets": public_setting,
        "endpoint": redact_urls,
        "headers": lambda header: f"{header.partition(':')[0]}: …",
    }
    for name, given in (asdict(overrides) | more).items():
        for value in given if isinstance(given, tuple) else [] if given is None else [given]:
            words.append(names.get(name, f"--{name.replace('_', '-')}"))
            words += [] if value is True else [public.get(name, str)(value)]
    return shlex.join([*words, *loaded.from_environment])


def _run_aside(running: runner.Run) -> bool:
    """Run to the end in a thread, whose event loop nobody else has; True where Ctrl-C ended it early.

    What the engine asks of the garbage collector is taken back: the program goes on.
    """
    began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def execute() -> None:
        task = asyncio.current_task()
        assert task is not None
        began.set_result((asyncio.get_running_loop(), task))
        await running.execute()

    interrupted, thresholds = False, gc.get_threshold()
    try:
        with ThreadPoolExecutor(1, "loadbench") as pool:
            ended = pool.submit(lambda: run_in_loop(execute()))
            while not ended.done():
                try:
                    wait([ended], WAKE_S)
                except KeyboardInterrupt:
                    if began.done():
                        _stop(running, began, again=interrupted)
                        interrupted = True
        ended.result()
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    return interrupted


def _stop(
    running: runner.Run, began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]], *, again: bool
) -> None:
    """Let what is in flight end; the second time, or where nothing has been measured, break off."""
    loop, task = began.result()

    def stop() -> None:
        if again or not running.stop("interrupted"):
            task.cancel()

    with contextlib.suppress(RuntimeError):  # it has ended meanwhile
        loop.call_soon_threadsafe(stop)
