"""From a file, flags and the environment to a scenario: what overrides what, and which prompt files it stands on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from loadbench.errors import UsageError
from loadbench.records import Trace
from loadbench.scenario.arrivals import within
from loadbench.scenario.explain import explained
from loadbench.scenario.memory import FAILURE
from loadbench.scenario.prompts import read_prompt_file
from loadbench.scenario.reading import Document, read_value, read_yaml
from loadbench.scenario.redaction import is_secret, redact, redact_url
from loadbench.scenario.schema import Scenario, header_problem
from loadbench.scenario.stage import Stage
from loadbench.scenario.traces import read_trace
from loadbench.scenario.units import DURATION

ENDPOINT_VARIABLE = "FOUNDRY_LOCAL_ENDPOINT"


@dataclass(frozen=True, slots=True)
class Overrides:
    """What flags say, as they were written. ``sets`` are ``path=value`` with a YAML value, ``headers`` ``Name: value``.

    ``concurrency`` and ``rate``, as ``4``, ``1,2,4`` or the ladder ``1..64``, say which loads are measured: of the
    file's stages only the first of each kind that is named stays, with the flag's value, and a kind that the file lacks
    gets a stage of its own. ``sets`` mean the stages that are left, by their new numbers. ``duration`` drops the file's
    ``min_requests``, and ``requests`` lowers it: who asks for a length means it.
    """

    sets: tuple[str, ...] = ()
    endpoint: str | None = None
    models: tuple[str, ...] = ()
    concurrency: str | None = None
    rate: str | None = None
    duration: str | None = None
    requests: int | None = None
    seed: int | None = None
    headers: tuple[str, ...] = ()
    memory_limit: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scenario, the file it came from, and who decided on the endpoint: a flag, the variable, a line, or nobody.

    ``traces`` holds, by the number of its stage, each trace as it was read. ``breaks`` is where it says that a target
    which is not ours is to be loaded until it fails, None where it does not: ``--i-own-the-target`` has to allow that.
    """

    scenario: Scenario
    path: Path
    endpoint_source: str
    traces: Mapping[int, Trace]
    breaks: str | None = None

    @property
    def folder(self) -> Path:
        """Where relative prompt files are looked up."""
        return self.path.parent

    def ask_owner(self, owned: bool) -> None:
        """Raise UsageError unless nothing is to break that is somebody else's, or ``owned``."""
        if self.breaks is not None and not owned:
            raise UsageError(f"{self.breaks}: expected --i-own-the-target to load what is not ours until it fails")


def load_scenario(path: Path, overrides: Overrides | None = None, env: Mapping[str, str] | None = None) -> Loaded:
    """Read a scenario with its prompt files, traces, flags and environment applied. Raises UsageError.

    The endpoint is the flag's, then ``FOUNDRY_LOCAL_ENDPOINT``'s, then the file's, then the embedded one.
    """
    env = env or {}
    document = read_yaml(path, env)
    document.data.setdefault("name", re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:64] or "scenario")
    if endpoint := env.get(ENDPOINT_VARIABLE):
        document.put(["endpoint"], endpoint, ENDPOINT_VARIABLE)
    _apply(overrides or Overrides(), document)
    for loc, name in document.unset.items():
        raise document.error(loc, f"expected {name} in the environment, got nothing (a default: ${{{name}:-…}})")
    try:
        scenario = Scenario.model_validate(document.data)
    except ValidationError as error:
        raise explained(error, document) from None
    scenario = _with_hashes(scenario, document, path.parent)
    scenario, traces = _with_traces(scenario, document, path.parent)
    _fits_endpoint(scenario, document)
    source = document.places.get(("endpoint",), "default")
    return Loaded(scenario, path, source, traces, _what_breaks(scenario, document))


def _apply(overrides: Overrides, document: Document) -> None:
    """Put the flags into the document, ``--set`` first: what has a flag of its own is meant more."""
    kinds = {"concurrency": overrides.concurrency, "rate": overrides.rate}
    loads = {kind: value for kind, value in kinds.items() if value is not None}
    if "stages" not in document.data:  # then the flags say what there is to measure
        document.data["stages"] = [{kind: value} for kind, value in loads.items()] or [{"concurrency": 1}]
    later = [text for text in overrides.sets if text.startswith("stages.")]
    for text in overrides.sets:
        if text not in later:
            _set(text, document)
    _keep_stages(loads, document)
    _relax(overrides, document)
    for text in later:
        _set(text, document)
    plain = {"endpoint": overrides.endpoint, "seed": overrides.seed, "memory_limit": overrides.memory_limit}
    for key, given in plain.items():
        if given is not None:
            document.put([key], given, f"--{key.replace('_', '-')}")
    if overrides.models:
        document.put(["models"], list(overrides.models), "--model")
    for header in overrides.headers:
        _put_header(header, document)
    for bound, limit in (("duration", overrides.duration), ("requests", overrides.requests)):
        for at in _stages_that_take(bound, document) if limit is not None else ():
            document.put(["stages", str(at), bound], limit, f"--{bound}")
    for at, (kind, value) in enumerate(loads.items()):
        if at < _stage_count(document):
            document.put(["stages", str(at), kind], value, f"--{kind}")


def _set(text: str, document: Document) -> None:
    path, equals, value = text.partition("=")
    steps = path.split(".")
    if not equals or not all(steps):
        raise UsageError(f"--set: expected PATH=VALUE such as stages.0.duration=5s, got {text}")
    document.put(steps, read_value(value, f"--set {path}"), f"--set {path}")


def _put_header(header: str, document: Document) -> None:
    name, colon, value = (part.strip() for part in header.partition(":"))
    if not colon or not name:
        raise UsageError("--header: expected 'Name: value', got no colon after a name")
    if problem := header_problem(name, value):
        raise UsageError(f"--header: {problem}")
    request = document.data.get("request")
    headers = request.get("headers") if isinstance(request, dict) else None
    if isinstance(headers, dict):  # HTTP does not tell Authorization from authorization
        name = next((known for known in headers if known.lower() == name.lower()), name)
    document.put(["request", "headers", name], value, "--header")


def _stage_count(document: Document) -> int:
    """How many there are to put something into; what is no list, validation refuses in better words."""
    stages = document.data["stages"]
    return len(stages) if isinstance(stages, list) else 0


def _stages_that_take(bound: str, document: Document) -> Sequence[int]:
    """The stages that a flag's bound fits; where it fits none, all: validation says why."""
    fixed = {"duration": "over_time", "requests": "memory"}[bound]
    every = range(_stage_count(document))
    stages = document.data["stages"]
    return [at for at in every if not (isinstance(stages[at], dict) and fixed in stages[at])] or every


def _keep_stages(loads: Mapping[str, str], document: Document) -> None:
    """Leave the stages whose load a flag names, one each."""
    stages = document.data["stages"]
    if loads and isinstance(stages, list):
        of_kind = [(kind, [stage for stage in stages if isinstance(stage, dict) and kind in stage]) for kind in loads]
        kept = [{**(found[0] if found else {}), kind: loads[kind]} for kind, found in of_kind]
        for stage, load in zip(kept, loads.values(), strict=True):
            for key in ("rest", "stop") if len(load.split(",")) == 1 and ".." not in load else ():
                stage.pop(key, None)  # they are about several levels
        document.put(["stages"], kept, " ".join(f"--{kind}" for kind in loads))


def _relax(overrides: Overrides, document: Document) -> None:
    """Make the file's ``min_requests`` give way to a length that a flag asks for."""
    for at in range(_stage_count(document)):
        stage = document.data["stages"][at]
        least = str(stage.get("min_requests", "")) if isinstance(stage, dict) else ""
        if isinstance(stage, dict) and "interval" in stage and overrides.duration is not None:
            _drop_interval(stage, overrides.duration)
        if least and overrides.duration is not None:
            document.put(["stages", str(at), "min_requests"], 0, "--duration")
        elif least.isdecimal() and overrides.requests is not None and int(least) > overrides.requests > 0:
            document.put(["stages", str(at), "min_requests"], overrides.requests, "--requests")


def _drop_interval(stage: dict[str, Any], duration: str) -> None:
    """Leave out an interval that a level so short does not have; what is no duration, validation refuses."""
    with contextlib.suppress(PydanticCustomError):
        if "over_time" not in stage and DURATION.read(stage["interval"]) > DURATION.read(duration):
            del stage["interval"]


def _fits_endpoint(scenario: Scenario, document: Document) -> None:
    """Refuse what is for the embedded service only, or for others only."""
    if scenario.memory_limit_bytes is not None and not scenario.embedded:
        raise document.error(("memory_limit",), "expected the embedded service beside it, got an endpoint elsewhere")
    if scenario.target_probe is not None and scenario.embedded:
        raise document.error(("target_probe",), "expected an endpoint elsewhere beside it, got the embedded service")


def _what_breaks(scenario: Scenario, document: Document) -> str | None:
    """Where the first memory ladder until failure stands, if the target is not ours."""
    for number, stage in enumerate(scenario.stages):
        if stage.memory is not None and stage.memory.until_failure and not scenario.embedded:
            return str(document.error(("stages", number, "memory", "until"), FAILURE))
    return None


def _with_hashes(scenario: Scenario, document: Document, folder: Path) -> Scenario:
    """Check the prompt files and note their hashes, so that a saved run says what exactly it asked."""
    entries = list(scenario.prompts)
    for at, entry in enumerate(entries):
        if entry.file is None:
            continue
        try:
            found = read_prompt_file(folder / entry.file).sha256
        except UsageError as error:
            raise document.error(("prompts", at, "file"), str(error)) from None
        if entry.sha256 not in (None, found):
            raise document.error(("prompts", at, "sha256"), f"expected {entry.sha256}, got {found} for {entry.file}")
        entries[at] = entry.model_copy(update={"sha256": found})
    return scenario.model_copy(update={"prompts": tuple(entries)})


def _with_traces(scenario: Scenario, document: Document, folder: Path) -> tuple[Scenario, Mapping[int, Trace]]:
    """Read the traces as far as their stages go, and note their hashes."""
    stages, traces = list(scenario.stages), {}
    for number, stage in enumerate(stages):
        if stage.trace is None:
            continue
        try:
            trace = traces[number] = _trace(folder / stage.trace, stage)
        except UsageError as error:
            raise document.error(("stages", number, "trace"), str(error)) from None
        if stage.sha256 not in (None, trace.sha256):
            problem = f"expected {stage.sha256}, got {trace.sha256} for {stage.trace}"
            raise document.error(("stages", number, "sha256"), problem)
        stages[number] = stage.model_copy(update={"sha256": trace.sha256})
    return scenario.model_copy(update={"stages": tuple(stages)}), traces


def _trace(path: Path, stage: Stage) -> Trace:
    speed = stage.speed or 1.0
    found = read_trace(path, stage.timestamps, speed)
    due_ns = within((row.due_ns for row in found.rows), stage.duration_s, stage.requests, stage.min_requests)
    requests, last_ns = 0, 0
    for requests, last_ns in enumerate(due_ns, start=1):  # noqa: B007 (the last pair is what is wanted)
        pass
    return Trace(path.as_posix(), found.sha256, stage.timestamps, speed, requests, last_ns / 1e9)


def public_setting(setting: str) -> str:
    """``PATH=VALUE`` of ``--set`` without what nobody else should read."""
    path, _, text = setting.partition("=")
    if "headers" in path.split(".") or is_secret(path.rpartition(".")[2]):
        return f"{path}=…"
    if path == "endpoint":
        return f"{path}={redact_url(text)}"
    value = yaml.safe_load(text)  # it has been read before, so it can be
    if not isinstance(value, dict | list):
        return setting
    if isinstance(value, dict) and isinstance(value.get("headers"), dict):
        value["headers"] = dict.fromkeys(value["headers"], "…")
    return f"{path}={yaml.safe_dump(redact(value), default_flow_style=True, width=10_000).strip()}"
