"""Which model is asked: what an endpoint has, which of it a name means, and whether that is loaded.

Where each kind of server lists, loads and unloads is in ``dialects``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from urllib.parse import quote, urlsplit

from loadbench.errors import TargetError, UsageError
from loadbench.target.control import Answer, Control
from loadbench.target.dialects import Call, read_models
from loadbench.target.endpoint import Endpoint, Headers

LIST_TIMEOUT_S = 20.0  # Foundry's public catalogue takes 5 s to find that there is no internet
LOAD_TIMEOUT_S = 600.0  # tens of gigabytes from a slow disk


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that an endpoint lists. What the server does not tell is None, ``loaded`` and ``cached`` too.

    ``cached``: it is on the service's disk. ``size_bytes`` is there, or to be downloaded; ``path`` where it is on ours.
    """

    id: str
    alias: str | None
    loaded: bool | None
    base_url: str
    size_bytes: int | None
    device: str | None
    licence: str | None
    execution_provider: str | None = None
    capabilities: tuple[str, ...] = ()
    cached: bool | None = None
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """The model that a name means: the exact id, where it is served, and in ``how`` why it is that one.

    ``load_ms`` is set where it was us who loaded it. ``members`` is what it is at each endpoint of a fleet.
    """

    id: str
    base_url: str
    loaded: bool | None
    how: str
    load_ms: float | None = None
    members: tuple[Resolved, ...] = ()

    @property
    def each(self) -> tuple[Resolved, ...]:
        """It at each endpoint there is."""
        return self.members or (self,)

    def unloaded(self) -> Resolved:
        """The same, where what we loaded has been unloaded again."""
        members = tuple(one.unloaded() for one in self.members)
        ours = self.load_ms is not None
        return replace(self, loaded=False if ours else self.loaded, load_ms=None, members=members)

    @property
    def chat_path(self) -> str:
        """The path of chat completions, for the request line."""
        return urlsplit(self.base_url).path + "/chat/completions"


async def list_models(
    endpoint: Endpoint, *, headers: Headers | None = None, base_url: str | None = None
) -> list[ModelInfo]:
    """List the models of every base or of one, loaded or not."""
    if not endpoint.dialect.listing:
        return []
    bases = [base for base in endpoint.dialect.bases if base_url in (None, endpoint.root + base)]
    async with Control(endpoint.address, headers) as control:
        return [model for base in bases for model in await _list(control, endpoint, base)]


async def resolve(endpoint: Endpoint, asked: str, *, headers: Headers | None = None) -> Resolved:
    """Find the model that ``asked`` means: an exact id, a name without its version, an alias, or ``auto``.

    With @cpu, @gpu or @npu it is the variant for that device.

    On Foundry 2, which lists no aliases, an alias is put to the service by loading it. Raises TargetError, with the
    nearest names, for a model that is not there.
    """
    if not endpoint.dialect.listing:
        if asked == "auto":
            raise TargetError(f"{endpoint.url}: lists no models, so auto cannot choose: name one")
        return Resolved(asked, endpoint.url, None, f"{asked}, as given: the endpoint lists no models")
    listed: list[ModelInfo] = []
    async with Control(endpoint.address, headers) as control:
        for base in endpoint.dialect.bases:
            found = await _list(control, endpoint, base)
            listed += found
            # A base with what is asked for ends the search: the next one may be Foundry's public catalogue.
            chosen = _loaded(found) if asked == "auto" else match(found, asked)
            if chosen is not None:
                return chosen
        if asked == "auto":
            return _first(endpoint, listed)
        if endpoint.kind == "foundry-2" and split_device(asked)[1] is None:
            by_alias = await _load_by_alias(control, endpoint, asked)
            if by_alias is not None:
                return by_alias
    raise _unknown(endpoint, asked, listed)


async def ensure_loaded(
    endpoint: Endpoint, model: Resolved, *, headers: Headers | None = None, timeout_s: float = LOAD_TIMEOUT_S
) -> Resolved:
    """Load the model where it is not, and where the API can; ``how`` says what was done or that nothing could be.

    Raises TargetError when the server refuses, or loads another one instead.
    """
    if model.loaded:
        return model
    call = endpoint.dialect.load
    if call is None:
        return replace(model, how=f"{model.how}; {endpoint.title} loads a model at its first request, if at all")
    async with Control(endpoint.address, headers) as control:
        before = await _loaded_ids(control, endpoint, model.base_url)
        if model.id in before:
            return replace(model, loaded=True)
        start_ns = perf_counter_ns()
        await _call(control, endpoint, model, call, "load", timeout_s)
        load_ms = (perf_counter_ns() - start_ns) / 1e6
        after = await _loaded_ids(control, endpoint, model.base_url)
        if model.id not in after:
            # An alias stands for one version, whichever is asked for. Leave the machine as it was found.
            if after - before and endpoint.dialect.unload is not None:
                await _call(control, endpoint, model, endpoint.dialect.unload, "unload", LIST_TIMEOUT_S)
            instead = ", ".join(sorted(after - before) or sorted(after)) or "nothing"
            raise TargetError(f"{model.id}: when asked for it {endpoint.title} loads {instead}; load it by hand")
    return replace(model, loaded=True, load_ms=load_ms, how=f"{model.how}; loaded for this run in {took(load_ms)}")


async def is_loaded(endpoint: Endpoint, model: Resolved, *, headers: Headers | None = None) -> bool | None:
    """Whether the server has it in memory now; None where it does not tell."""
    if endpoint.dialect.loaded is None:
        return None
    async with Control(endpoint.address, headers) as control:
        return model.id in await _loaded_ids(control, endpoint, model.base_url)


async def unload(endpoint: Endpoint, model: Resolved, *, headers: Headers | None = None) -> bool:
    """Unload the model; False where the API cannot. Raises TargetError when the server refuses; a wedged one does."""
    call = endpoint.dialect.unload
    if call is None:
        return False
    async with Control(endpoint.address, headers) as control:
        # On Foundry 2 it goes by alias, which may stand for another version that is in use.
        if model.id in await _loaded_ids(control, endpoint, model.base_url):
            await _call(control, endpoint, model, call, "unload", LIST_TIMEOUT_S)
    return True


async def _list(control: Control, endpoint: Endpoint, base: str) -> list[ModelInfo]:
    """Ask one base for its models; a path that is not there lists none."""
    first, *others = endpoint.dialect.listing
    rows = {row["id"]: row for row in await _rows(control, _path(endpoint, first, base))}
    for path in others if rows else ():
        # It only adds what it knows: no model is worse for an old Foundry's catalogue that waits for the internet.
        with suppress(TargetError):
            for row in await _rows(control, _path(endpoint, path, base)):
                rows.get(row["id"], {}).update({name: value for name, value in row.items() if value is not None})
    base_url = endpoint.root + base
    loaded = await _loaded_ids(control, endpoint, base_url) if rows and endpoint.dialect.loaded else None
    for row in rows.values():
        if loaded is not None:
            row["loaded"] = row["id"] in loaded
        elif row["loaded"] is None and endpoint.dialect.resident:
            row["loaded"] = True
    cached = True if endpoint.dialect.on_disk else None
    return [ModelInfo(base_url=base_url, cached=cached, **row) for row in rows.values()]


async def list_catalogue(endpoint: Endpoint, *, headers: Headers | None = None) -> list[dict[str, Any]]:
    """What the server could download, in its own words; TargetError where it does not answer."""
    assert endpoint.dialect.catalogue is not None
    path = _path(endpoint, endpoint.dialect.catalogue, "")
    async with Control(endpoint.address, headers) as control:
        answer = await control.ask(path, LIST_TIMEOUT_S)
    if not answer.ok:
        raise TargetError(f"{endpoint.root}{endpoint.dialect.catalogue}: {answer.status}: {answer.said}")
    rows = answer.json.get("models", []) if isinstance(answer.json, dict) else answer.json
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


async def _loaded_ids(control: Control, endpoint: Endpoint, base_url: str) -> set[str]:
    if endpoint.dialect.loaded is None:
        return set()
    path = _path(endpoint, endpoint.dialect.loaded, base_url.removeprefix(endpoint.root))
    return {row["id"] for row in await _rows(control, path)}


async def _rows(control: Control, path: str) -> list[dict[str, Any]]:
    answer = await control.ask(path, LIST_TIMEOUT_S)
    return read_models(answer.json) if answer.ok else []


async def _call(
    control: Control, endpoint: Endpoint, model: Resolved, call: Call, verb: str, timeout_s: float
) -> Answer:
    """Make a call for a model under the first of its names that the server knows."""
    base = model.base_url.removeprefix(endpoint.root)
    for name in call.names(model.id):
        post = call.post and {key: name if value == "{name}" else value for key, value in call.post.items()}
        answer = await control.ask(_path(endpoint, call.path, base, name), timeout_s, post)
        if answer.status == 200:
            return answer
        if answer.status != 404:
            break
    raise TargetError(f"{model.id}: {endpoint.title} refused to {verb} it with {answer.status}: {answer.said}")


def _path(endpoint: Endpoint, template: str, base: str, name: str = "") -> str:
    path = template.format(base=base, prefix=base.removesuffix("/v1"), name=quote(name, safe=":"))
    return urlsplit(endpoint.root).path + path


def _loaded(models: list[ModelInfo]) -> Resolved | None:
    loaded = [model for model in models if model.loaded]
    if not loaded:
        return None
    why = "the only model that is loaded" if len(loaded) == 1 else f"the first of {len(loaded)} loaded models"
    return _resolved(loaded[0], f"auto: {loaded[0].id}, {why}")


def _first(endpoint: Endpoint, models: list[ModelInfo]) -> Resolved:
    """Choose where nothing is loaded: the first model, but none of a catalogue, which is not on the disk."""
    if endpoint.kind == "foundry-2":
        models = [model for model in models if model.base_url.endswith(endpoint.dialect.bases[0])]
    if not models:
        raise TargetError(f"{endpoint.url}: no model is loaded for auto to choose: load one, or name one")
    told = "none is loaded" if models[0].loaded is False else "the server does not say what is loaded"
    return _resolved(models[0], f"auto: {models[0].id}, the first of {len(models)} listed; {told}")


def split_device(asked: str) -> tuple[str, str | None]:
    """(name, device in capitals) of a name such as ``phi-4-mini@gpu``; other servers' names may hold an @ as well."""
    name, _, device = asked.rpartition("@")
    return (name, device.upper()) if name and device.lower() in ("cpu", "gpu", "npu") else (asked, None)


def refuse_other_device(asked: str) -> None:
    """UsageError for a name of Foundry's catalogue, or of a model of one's own, that ends in no device after its @."""
    name, device = split_device(asked)
    if device is None and "@" in name:
        raise UsageError(f"{asked}: expected @cpu, @gpu or @npu, got @{name.rpartition('@')[2]}")


def took(load_ms: float) -> str:
    """How long a load was."""
    return f"{load_ms:.0f} ms" if load_ms < 1000 else f"{load_ms / 1e3:.1f} s"


def _for_device(models: list[ModelInfo], device: str | None) -> list[ModelInfo]:
    """Those for a device: as they say or, where the list does not tell, as Foundry's ids do (``…-cuda-gpu:4``)."""
    if device is None:
        return models
    ending = f"-{device.lower()}"
    return [
        model
        for model in models
        if (model.device or "").upper() == device
        or (model.device is None and model.id.partition(":")[0].lower().endswith(ending))
    ]


def match(models: list[ModelInfo], asked: str) -> Resolved | None:
    """The one of these that a name means, None where it means none of them."""
    name, device = split_device(asked)
    models = _for_device(models, device)
    for model in models:
        if model.id == name:
            return _resolved(model, f"{model.id}, by its exact id")
    wanted = name.lower()
    meanings = {
        "its id": [model for model in models if model.id.lower() == wanted],
        "its name, newest version": [model for model in models if model.id.rpartition(":")[0].lower() == wanted],
        "its alias": [model for model in models if (model.alias or "").lower() == wanted],
    }
    for meaning, found in meanings.items():
        if found:
            # Several models may share an alias: the loaded one is meant, or the newest.
            best = max(found, key=lambda model: (meaning == "its alias" and bool(model.loaded), version_of(model.id)))
            return _resolved(best, f"{best.id} for {asked}, by {meaning}")
    return None


def version_of(model_id: str) -> float:
    """For comparing: the number after an id's colon, -1 for none."""
    version = model_id.rpartition(":")[2]
    if version == "latest":  # Ollama's
        return float("inf")
    return float(version) if version.isdecimal() else -1.0


def _resolved(model: ModelInfo, how: str) -> Resolved:
    return Resolved(model.id, model.base_url, model.loaded, how)


async def _load_by_alias(control: Control, endpoint: Endpoint, alias: str) -> Resolved | None:
    """Ask Foundry 2's public catalogue for a model by its alias, and see which one it is that gets loaded."""
    assert endpoint.dialect.load is not None
    base = endpoint.dialect.bases[-1]
    base_url = endpoint.root + base
    before = await _loaded_ids(control, endpoint, base_url)
    start_ns = perf_counter_ns()
    answer = await control.ask(_path(endpoint, endpoint.dialect.load.path, base, alias), LOAD_TIMEOUT_S)
    load_ms = (perf_counter_ns() - start_ns) / 1e6
    if answer.status == 404:
        return None
    if answer.status != 200:
        raise TargetError(f"{alias}: {endpoint.title} refused to load it with {answer.status}: {answer.said}")
    after = await _loaded_ids(control, endpoint, base_url)
    if new := sorted(after - before):
        how = f"{new[0]} for {alias}, as the service loaded it for this run in {took(load_ms)}"
        return Resolved(new[0], base_url, True, how, load_ms)
    alike = sorted(model_id for model_id in after if model_id.lower().startswith(alias.lower()))
    if len(alike) != 1:
        raise TargetError(
            f"{alias}: expected one loaded model of that alias, got {', '.join(alike or after)}: name its id"
        )
    return Resolved(alike[0], base_url, True, f"{alike[0]} for {alias}, by its alias; it was loaded")


def _unknown(endpoint: Endpoint, asked: str, models: list[ModelInfo]) -> TargetError:
    """Name the nearest of what there is, and say where it is for want of devices that nothing is meant."""
    name, device = split_device(asked)
    untold = device is not None and bool(models) and all(model.device is None for model in models)
    wanted = name.lower() if untold else asked.lower()
    names = {
        name.lower(): model.id
        for model in models
        for name in (model.id, model.id.rpartition(":")[0], model.alias)
        if name
    }
    alike = nearest(wanted, names) or [model.id for model in models[:3]]
    if not alike:
        return TargetError(f"{endpoint.url}: expected the model {asked}, but the endpoint has none")
    nearby = f"the nearest of {len(models)}: {', '.join(alike)}"
    if untold:
        ask = f"{endpoint.title} does not say for which device its models are: name one without @, as it is listed"
        return TargetError(f"{endpoint.url}: {asked}: {ask}; {nearby}")
    return TargetError(f"{endpoint.url}: there is no model {asked}; {nearby}")


def nearest(wanted: str, names: Mapping[str, str]) -> list[str]:
    """Three at most of what these names stand for: those that have it as a part, then those that read like it."""
    parts = [meant for name, meant in names.items() if wanted in name]
    alike = [names[name] for name in get_close_matches(wanted, names, n=3, cutoff=0.4)]
    return list(dict.fromkeys(parts + alike))[:3]
