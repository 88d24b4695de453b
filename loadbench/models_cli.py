"""The command ``models``: what there is, downloading it, loading it, and registering one's own."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import click

from loadbench.commands import given_headers
from loadbench.errors import TargetError, UsageError
from loadbench.report.escape import as_line, json_text

if TYPE_CHECKING:
    from loadbench.target.endpoint import Endpoint
    from loadbench.target.models import ModelInfo


@click.group("models")
def models_command() -> None:
    """Choose, fetch and register models: of the embedded service or, with --endpoint, of another.

    \b
    loadbench models list                          the catalogue, what is in the cache, what is registered
    loadbench models pull phi-4-mini --at 02:00    download it when nobody minds
    loadbench models add FOLDER --id my-model:1    give a model of one's own a name
    """


def _remote(required: bool = False) -> Callable[[Any], Any]:
    """The options that lead to another service."""
    help_ = "Base URL of the service." if required else "Base URL of a service, instead of the embedded one."

    def wrap(command: Any) -> Any:
        header = click.option("--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Sent to it.")
        return click.option("--endpoint", metavar="URL", help=help_)(header(command))

    return wrap


def _run(work: Any) -> Any:
    from loadbench.platform import run_in_loop

    return run_in_loop(work)


async def _endpoint(url: str, headers: Mapping[str, str]) -> Endpoint:
    from loadbench.target.endpoint import discover

    return await discover(url, headers=headers)


def _cannot(endpoint: Endpoint, verb: str, name: str) -> UsageError:
    """What its API has nothing for, and what does it instead."""
    instead = endpoint.dialect.instead.get(verb, "use its own tools on its host").format(name=name)
    what = {"pull": "download", "rm": "delete"}.get(verb, verb)
    return UsageError(f"{endpoint.url}: the API of {endpoint.title} cannot {what} a model: {instead}")


@models_command.command("list")
@_remote()
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON on stdout, and nothing else there.")
def list_command(endpoint: str | None, headers: tuple[str, ...], as_json: bool) -> None:
    """List the models: of another service what it tells, of the embedded one the catalogue and one's own.

    \b
    loaded   in the service's memory
    cached   on its disk
    online   to be downloaded
    own      registered by `models add`; broken: its folder is no longer a model
    """
    from loadbench.report.models import as_json as row_as_json
    from loadbench.report.models import print_models, state

    rows, notes = _run(
        _list_embedded() if endpoint is None else _list_remote(endpoint, given_headers(headers, os.environ))
    )
    if as_json:
        import orjson

        document = {"models": [row_as_json(model) | {"state": where or state(model)} for model, where in rows]}
        click.echo(json_text(orjson.dumps(document, option=orjson.OPT_INDENT_2)))
    else:
        print_models([(model, where or state(model)) for model, where in rows])
    for note in notes:
        click.echo(as_line(f"loadbench: {note}"), err=True)


Listed = tuple[list[tuple["ModelInfo", str | None]], list[str]]
"""Models, each with its state where that is not to be read from it, and what is to be said beside the list."""


async def _list_embedded() -> Listed:
    from loadbench.target.catalogue import UNREACHABLE, Catalogue
    from loadbench.target.foundry import cache_dir
    from loadbench.target.models import ModelInfo
    from loadbench.target.register import Register
    from loadbench.target.synthetic import SYNTHETIC

    cache, rows, notes = cache_dir(), list[tuple[ModelInfo, str | None]](), list[str]()
    for model_id, path in Register(cache).read().items():
        info, wrong = _of_register(model_id, path)
        rows.append((info, "own" if wrong is None else "broken"))
        notes += [] if wrong is None else [f"{model_id}: {wrong}"]
    catalogue = await Catalogue.read(cache)
    if not catalogue.reachable:
        past = "; listed is what it had before" if catalogue.variants else ""
        notes.append(UNREACHABLE + past)
    rows += [(info, None) for info in sorted(catalogue.infos(), key=lambda info: (info.alias or "", info.id))]
    notes.append(f"made when asked for: {', '.join(f'synthetic:{name}' for name in SYNTHETIC)}")
    return rows, notes


def _of_register(model_id: str, path: Path) -> tuple[ModelInfo, str | None]:
    """A registered model as its folder is now, and what is wrong with that."""
    from loadbench.target.models import ModelInfo
    from loadbench.target.register import read_folder

    name = model_id.rpartition(":")[0]
    try:
        folder = read_folder(path)
    except UsageError as error:
        return ModelInfo(model_id, name, False, "", None, None, None, path=path), str(error)
    told = folder.size_bytes, folder.device, None, folder.execution_provider
    return ModelInfo(model_id, name, False, "", *told, cached=True, path=path), None


async def _list_remote(url: str, headers: Mapping[str, str]) -> Listed:
    from loadbench.target.dialects import read_models
    from loadbench.target.models import ModelInfo, list_catalogue, list_models

    endpoint = await _endpoint(url, headers)
    if not endpoint.dialect.listing:
        raise UsageError(f"{endpoint.url}: lists no models: name one where a model is asked for")
    models, notes = await list_models(endpoint, headers=headers), []
    if endpoint.dialect.catalogue is not None:
        here = {model.id for model in models}
        try:
            offered = read_models(await list_catalogue(endpoint, headers=headers))
        except TargetError as error:
            notes.append(f"what it could download is not listed: {error}")
        else:
            more = [row | {"loaded": False} for row in offered if row["id"] not in here]
            models += [ModelInfo(base_url=endpoint.url, cached=False, **row) for row in more]
    return [(model, None) for model in models], notes


@models_command.command("pull")
@click.argument("names", nargs=-1, required=True, metavar="ALIAS…")
@_remote()
@click.option("--at", metavar="HH:MM", help="Wait until it is that late here.")
@click.option(
    "--stall", default="120s", show_default=True, metavar="TIME", help="Without a byte for so long: try again."
)
def pull_command(
    names: tuple[str, ...], endpoint: str | None, headers: tuple[str, ...], at: str | None, stall: str
) -> None:
    """Download models from Foundry's catalogue. A download that stalls or breaks off is tried again and resumed.

    ALIAS@gpu, @cpu or @npu names the variant for that device.
    """
    stall_s = _duration(stall)
    start = None if at is None else _next(at, datetime.now())
    _run(_pull_all(names, endpoint, given_headers(headers, os.environ), start, stall_s))


def _duration(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min)?", text)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--stall: expected a time such as 120s, got {text}")
    return float(found[1]) * (60 if found[2] in ("m", "min") else 1)


def _next(at: str, now: datetime) -> datetime:
    """When it is next that late, by this machine's clock."""
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", at)
    if found is None:
        raise UsageError(f"--at: expected a time of day such as 02:00, got {at}")
    then = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
    return then if then > now else then + timedelta(days=1)


async def _pull_all(
    names: tuple[str, ...], url: str | None, headers: Mapping[str, str], start: datetime | None, stall_s: float
) -> None:
    """One after the other. What fails does not keep the others; the last failure is the exit code's."""
    from loadbench.report.words import clock

    if start is not None:
        await _look(names, url, headers)
        left_s = (start - datetime.now()).total_seconds()
        click.echo(f"waiting until {start:%H:%M}, {clock(left_s)} from now; Ctrl-C ends that", err=True)
        while (left_s := (start - datetime.now()).total_seconds()) > 0:  # noqa: ASYNC110  the clock sets no event
            await asyncio.sleep(min(left_s, 30.0))  # a machine that was suspended finds the time gone by
    one = await _puller(names, url, headers, stall_s)
    failures: list[TargetError] = []
    for name in names:
        try:
            await one(name)
        except TargetError as error:
            failures.append(error)
            if len(names) > 1:
                click.echo(as_line(f"loadbench: {error}"), err=True)
    if failures:
        raise failures[0] if len(names) == 1 else TargetError(f"{len(failures)} of {len(names)} not downloaded")


async def _look(names: Sequence[str], url: str | None, headers: Mapping[str, str]) -> None:
    """Refuse now what could only be refused at that hour. A catalogue that cannot be reached now may be by then."""
    from loadbench.target.catalogue import Catalogue
    from loadbench.target.foundry import cache_dir
    from loadbench.target.models import refuse_other_device
    from loadbench.target.remote_pull import can_pull

    if url is not None:
        endpoint = await _endpoint(url, headers)
        if not can_pull(endpoint):
            raise _cannot(endpoint, "pull", names[0])
        return
    for name in names:
        refuse_other_device(name)
    catalogue = await Catalogue.read(cache_dir())
    for name in names if catalogue.reachable else ():
        catalogue.find(name)
    if not catalogue.reachable:
        click.echo("the model catalogue cannot be reached now: it is asked again at that hour", err=True)


async def _puller(
    names: Sequence[str], url: str | None, headers: Mapping[str, str], stall_s: float
) -> Callable[[str], Awaitable[None]]:
    """What downloads one model of these: here, or by the service at ``url``."""
    from loadbench.report.models import Download
    from loadbench.report.words import milliseconds, octets
    from loadbench.target.catalogue import Catalogue, download, patiently
    from loadbench.target.foundry import cache_dir
    from loadbench.target.models import refuse_other_device
    from loadbench.target.register import folder_bytes
    from loadbench.target.remote_pull import can_pull, pull

    if url is None:
        for name in names:
            refuse_other_device(name)
        catalogue = await Catalogue.read(cache_dir())

        async def here(name: str) -> None:
            info = catalogue.obtain(name)
            if info.path is not None:
                click.echo(as_line(f"{info.id}: is in the cache already, {octets(folder_bytes(info.path))}"))
                return
            with Download(info.id, info.size_bytes) as view:
                path, took_ms = await download(cache_dir(), info.id, view.advance, say=view.say, stall_s=stall_s)
            click.echo(as_line(f"{info.id}: {octets(folder_bytes(path))} in {milliseconds(took_ms)}, {path}"))

        return here
    endpoint = await _endpoint(url, headers)

    async def there(name: str) -> None:
        if not can_pull(endpoint):
            raise _cannot(endpoint, "pull", name)
        start_ns = perf_counter_ns()
        with Download(name, None) as view:
            await patiently(
                name, lambda advance: pull(endpoint, name, advance, stall_s, headers), view.advance, view.say
            )
        took = milliseconds((perf_counter_ns() - start_ns) / 1e6)
        click.echo(as_line(f"{name}: downloaded by {endpoint.title} in {took}"))

    return there


@models_command.command("load")
@click.argument("name")
@_remote(required=True)
def load_command(name: str, endpoint: str | None, headers: tuple[str, ...]) -> None:
    """Load a model of the service at --endpoint; the embedded one lives as long as a run or `loadbench serve`."""
    _run(_load(name, _needed(endpoint, "load", name), given_headers(headers, os.environ)))


@models_command.command("unload")
@click.argument("name")
@_remote(required=True)
def unload_command(name: str, endpoint: str | None, headers: tuple[str, ...]) -> None:
    """Unload a model of the service at --endpoint; the embedded one lives as long as a run or `loadbench serve`."""
    _run(_unload(name, _needed(endpoint, "unload", name), given_headers(headers, os.environ)))


def _needed(endpoint: str | None, verb: str, name: str) -> str:
    if endpoint is None:
        raise UsageError(
            f"models {verb}: the embedded service lives as long as a run or `loadbench serve --model {name}`:"
            " expected --endpoint URL of one that is running"
        )
    return endpoint


async def _load(name: str, url: str, headers: Mapping[str, str]) -> None:
    from loadbench.target.models import ensure_loaded, resolve

    endpoint = await _endpoint(url, headers)
    if endpoint.dialect.load is None:
        raise _cannot(endpoint, "load", name)
    model = await ensure_loaded(endpoint, await resolve(endpoint, name, headers=headers), headers=headers)
    how = model.how.replace(" for this run", "")  # there is none
    click.echo(as_line(f"{model.base_url}  {how}" + ("" if model.load_ms is not None else "; it was loaded")))


async def _unload(name: str, url: str, headers: Mapping[str, str]) -> None:
    from loadbench.target.models import list_models, match, unload

    endpoint = await _endpoint(url, headers)
    if endpoint.dialect.unload is None:
        raise _cannot(endpoint, "unload", name)
    # Not ``resolve``, which puts an alias that it does not know to the service by loading it.
    loaded = [model for model in await list_models(endpoint, headers=headers) if model.loaded]
    model = match(loaded, name)
    if model is None:
        there = ", ".join(model.id for model in loaded) or "none"
        raise TargetError(f"{endpoint.url}: no model {name} is loaded; loaded: {there}")
    await unload(endpoint, model, headers=headers)
    click.echo(as_line(f"{model.base_url}  {model.id} unloaded"))


@models_command.command("add")
@click.argument("folder", type=click.Path(path_type=Path), metavar="PATH")
@click.option("--id", "model_id", required=True, metavar="NAME:1", help="What it is to be called, with its version.")
def add_command(folder: Path, model_id: str) -> None:
    """Register a folder in ONNX Runtime GenAI's format for the embedded service. It stays where it is."""
    from loadbench.report.words import octets
    from loadbench.target.foundry import cache_dir
    from loadbench.target.register import Register

    found = Register(cache_dir()).add(model_id, folder)
    what = f"{octets(found.size_bytes)}, {found.execution_provider}"
    click.echo(as_line(f"{model_id}: {found.path} ({what}); in a scenario: models: [{model_id.rpartition(':')[0]}]"))


@models_command.command("rm")
@click.argument("name")
@_remote()
def rm_command(name: str, endpoint: str | None, headers: tuple[str, ...]) -> None:
    """Forget a registered model, whose folder stays, or delete a downloaded one from the cache."""
    _run(_remove(name) if endpoint is None else _remove_there(name, endpoint, given_headers(headers, os.environ)))


async def _remove(name: str) -> None:
    from loadbench.report.words import octets
    from loadbench.target.catalogue import Catalogue, remove
    from loadbench.target.foundry import cache_dir, catalogue_dir
    from loadbench.target.register import Register, folder_bytes

    cache = cache_dir()
    register = Register(cache)
    if (model_id := register.find(name)) is not None:
        click.echo(as_line(f"{model_id}: no longer registered; its folder stays, {register.remove(model_id)}"))
        return
    if name.startswith("synthetic"):
        raise UsageError(f"{name}: synthetic models are made when asked for; they lie in {cache / 'synthetic'}")
    if (model_id := register.name_of(Path(name))) is not None:
        raise UsageError(f"{name}: it is registered as {model_id}: `loadbench models rm {model_id}` forgets it")
    info = None
    if any(path.is_dir() for path in catalogue_dir(cache).glob("*/*")):
        with suppress(TargetError):  # what nobody knows is not here either
            info = (await Catalogue.read(cache)).find(name)
    if info is None or info.path is None:
        raise TargetError(f"{name}: neither registered nor in the cache; `loadbench models list` shows what is")
    size = folder_bytes(info.path)
    await remove(cache, info)
    click.echo(as_line(f"{info.id}: deleted from the cache, {octets(size)}"))


async def _remove_there(name: str, url: str, headers: Mapping[str, str]) -> None:
    raise _cannot(await _endpoint(url, headers), "rm", name)
