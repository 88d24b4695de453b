"""From a file, flags and the environment to a scenario: what overrides what, and which prompt files it stands on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from loadbench.errors import UsageError
from loadbench.records import Closed, Find, Trace
from loadbench.scenario.arrivals import within
from loadbench.scenario.explain import explained
from loadbench.scenario.memory import FAILURE
from loadbench.scenario.models_file import ModelNote, read_models_file
from loadbench.scenario.prompts import PromptFile, read_prompt_file
from loadbench.scenario.quality_prompts import QualityPrompt, read_quality_prompts
from loadbench.scenario.reading import Document, read_value, read_yaml
from loadbench.scenario.redaction import is_secret, redact, redact_urls
from loadbench.scenario.schema import Scenario, header_problem
from loadbench.scenario.stage import Stage
from loadbench.scenario.traces import read_trace
from loadbench.scenario.units import DURATION
from loadbench.scenario.variables import in_their_place, keep_keys_out, put_variables


@dataclass(frozen=True, slots=True)
class Overrides:
    """What flags say, as they were written. ``sets`` are ``path=value`` with a YAML value, ``headers`` ``Name: value``.

    ``concurrency`` and ``rate``, as ``4``, ``1,2,4`` or the ladder ``1..64``, say which loads are measured: of the
    file's stages only the first of each kind that is named stays, with the flag's value, and a kind that the file lacks
    gets a stage of its own. ``sets`` mean the stages that are left, by their new numbers. ``duration`` drops the file's
    ``min_requests``, and ``requests`` lowers it: who asks for a length means it.
    """

    sets: tuple[str, ...] = ()
    endpoint: str | Sequence[str] | None = None
    models: tuple[str, ...] = ()
    concurrency: str | None = None
    rate: str | None = None
    duration: str | None = None
    requests: int | None = None
    seed: int | None = None
    headers: tuple[str, ...] = ()
    memory_limit: str | None = None
    repeat: int | None = None

    def fit_search(self, find: Find) -> None:
        """Refuse the flags that a search would have to ignore."""
        ours, other = ("concurrency", "rate") if find == "max-concurrency" else ("rate", "concurrency")
        bounds = "1..64" if find == "max-concurrency" else "1/s..32/s"
        if (given := getattr(self, other)) is not None:
            raise UsageError(f"--{other}: expected --{ours} {bounds}, or neither, beside --find {find}, got {given}")
        if (given := getattr(self, ours)) is not None and not ("," in given or ".." in given):
            expected = f"two loads to search between, {bounds}, beside --find {find}"
            raise UsageError(f"--{ours}: expected {expected}, got {given}")
        if (count := self.requests) is not None:
            raise UsageError(
                f"--requests: expected none beside --find, whose probes take what the SLO needs, got {count}"
            )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scenario, the file it came from, and who decided on the endpoint: a flag, the variable, a line, or nobody.

    ``traces`` holds, by the number of its stage, each trace as it was read. ``breaks`` is where it says that a target
    which is not ours is to be loaded until it fails, None where it does not: ``--i-own-the-target`` has to allow that.
    ``models_source`` is who decided on the models, ``models_file`` what the file of that name says, by alias.
    ``from_environment`` are the flags that repeat what variables said.
    """

    scenario: Scenario
    path: Path
    endpoint_source: str
    traces: Mapping[int, Trace]
    breaks: str | None = None
    models_source: str = "default"
    models_file: Mapping[str, ModelNote] = field(default_factory=dict)
    quality_prompts: tuple[QualityPrompt, ...] = ()
    from_environment: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where relative prompt files are looked up."""
        return self.path.parent

    def note_of(self, asked: str) -> ModelNote | None:
        """What the models file says of a model that the scenario names, or of the alias whose variant it is."""
        return self.models_file.get(asked) or self.models_file.get(asked.rpartition("@")[0])

    def ask_owner(self, owned: bool) -> None:
        """Raise UsageError unless nothing is to break that is somebody else's, or ``owned``."""
        if self.breaks is not None and not owned:
            raise UsageError(f"{self.breaks}: expected --i-own-the-target to load what is not ours until it fails")


def load_scenario(path: Path, overrides: Overrides | None = None, env: Mapping[str, str] | None = None) -> Loaded:
    """Read a scenario with the files it names, flags and environment applied. Raises UsageError.

    The endpoint is the flag's, then ``FOUNDRY_LOCAL_ENDPOINT``'s, then the file's, then the embedded one. The models
    are the flag's, then ``BENCH_MODELS``', then the file's, then those of its models file, then ``auto``.
    """
    env = env or {}
    return load_document(read_yaml(path, env), path, overrides, env)


def load_document(document: Document, path: Path, overrides: Overrides | None, env: Mapping[str, str]) -> Loaded:
    """The same of what has been read, or was never a file; the files it names are looked up beside ``path``."""
    document.data.setdefault("name", re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:64] or "scenario")
    put_variables(document, env)
    _apply(overrides or Overrides(), document)
    notes = _models_file(document, path.parent)
    for loc, name in document.unset.items():
        raise document.error(loc, f"expected {name} in the environment, got nothing (a default: ${{{name}:-…}})")
    keep_keys_out(document)
    try:
        scenario = Scenario.model_validate(document.data)
    except ValidationError as error:
        raise explained(error, document) from None
    scenario = _with_prompts(scenario, document, path.parent)
    scenario, traces = _with_traces(scenario, document, path.parent)
    _fits(scenario, document)
    _balanced(scenario, traces, document)
    return Loaded(
        scenario,
        path,
        document.places.get(("endpoint",), "default"),
        traces,
        _what_breaks(scenario, document),
        models_source=document.places.get(("models",), "default"),
        models_file=notes,
        quality_prompts=_quality_prompts(scenario, document, path.parent),
        from_environment=tuple(in_their_place(document, scenario)),
    )


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
    plain = {name: getattr(overrides, name) for name in ("endpoint", "seed", "memory_limit", "repeat")}
    for key, given in plain.items():
        if given is not None:
            document.put([key], given, f"--{key.replace('_', '-')}")
    if overrides.models:
        if not all(model.strip() for model in overrides.models):
            raise UsageError("--model: expected the name of a model, got nothing but spaces")
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
        of_kind = [next((at for at, s in enumerate(stages) if isinstance(s, dict) and k in s), None) for k in loads]
        kept = [{**({} if at is None else stages[at]), k: loads[k]} for at, k in zip(of_kind, loads, strict=True)]
        for stage, load in zip(kept, loads.values(), strict=True):
            for key in ("rest", "stop") if len(load.split(",")) == 1 and ".." not in load else ():
                stage.pop(key, None)  # they are about several levels
        taken = dict(document.taken)
        document.put(["stages"], kept, " ".join(f"--{kind}" for kind in loads))
        for to, (at, kind) in enumerate(zip(of_kind, loads, strict=True)):
            moved = {("stages", to, *loc[2:]): names for loc, names in taken.items() if loc[:2] == ("stages", at)}
            document.taken |= {loc: names for loc, names in moved.items() if loc[2] != kind and loc[2] in kept[to]}


def _relax(overrides: Overrides, document: Document) -> None:
    """Make the file's ``min_requests`` give way to a length that a flag asks for."""
    for at in range(_stage_count(document)):
        stage = document.data["stages"][at]
        least = str(stage.get("min_requests", "")) if isinstance(stage, dict) else ""
        if isinstance(stage, dict) and "interval" in stage and overrides.duration is not None:
            _drop_interval(stage, overrides.duration)
        if isinstance(stage, dict) and overrides.requests is not None:
            stage.pop("rounds", None)
            document.forget(("stages", at, "rounds"))
        if least and overrides.duration is not None:
            document.put(["stages", str(at), "min_requests"], 0, "--duration")
        elif least.isdecimal() and overrides.requests is not None and int(least) > overrides.requests > 0:
            document.put(["stages", str(at), "min_requests"], overrides.requests, "--requests")


def _drop_interval(stage: dict[str, Any], duration: str) -> None:
    """Leave out an interval that a level so short does not have; what is no duration, validation refuses."""
    with contextlib.suppress(PydanticCustomError):
        if "over_time" not in stage and DURATION.read(stage["interval"]) > DURATION.read(duration):
            del stage["interval"]


def _models_file(document: Document, folder: Path) -> Mapping[str, ModelNote]:
    """What the models file says. Its aliases are the models where nobody has named any."""
    file = document.data.get("models_file")
    if not isinstance(file, str) or not file:  # none, or nothing that validation would let pass
        return {}
    try:
        notes = read_models_file(folder / file)
    except UsageError as error:
        raise document.error(("models_file",), str(error)) from None
    if "models" not in document.data:
        document.put(["models"], list(notes), str(folder / file))
    return notes


def _fits(scenario: Scenario, document: Document) -> None:
    """Refuse what is for the embedded service only, or for others only, and keys that take another beside them."""
    for model in scenario.models:
        if (times := scenario.models.count(model)) > 1:
            raise document.error(("models",), f"expected each model once, got {model} {times} times")
    if scenario.price_per_kwh is not None and scenario.currency is None:
        raise document.error(("price_per_kwh",), "expected currency beside it, got none")
    for metric in () if scenario.request.stream or scenario.slo is None else ("ttft", "tpot", "gap"):
        if getattr(scenario.slo, metric) is not None:
            raise document.error(("slo", metric), "expected request.stream: true beside it, got false")
    if scenario.memory_limit_bytes is not None and not scenario.embedded:
        raise document.error(("memory_limit",), "expected the embedded service beside it, got an endpoint elsewhere")
    if scenario.target_probe is not None and scenario.embedded:
        raise document.error(("target_probe",), "expected an endpoint elsewhere beside it, got the embedded service")


def _balanced(scenario: Scenario, traces: Mapping[int, Trace], document: Document) -> None:
    """Refuse what one endpoint or a fleet cannot have."""
    if scenario.probes and len(scenario.probes) != len(scenario.endpoints):
        told = f"expected one for each endpoint, {len(scenario.endpoints)}, got {len(scenario.probes)}"
        raise document.error(("target_probe",), told)
    if len(scenario.endpoints) == 1:
        if scenario.balance is not None:
            raise document.error(("balance",), "expected a list of endpoints beside it, got one")
        return
    for number, stage in enumerate(scenario.stages):
        if stage.memory is not None:
            raise document.error(("stages", number, "memory"), "expected one endpoint, whose memory it is, got a fleet")
        if scenario.balance == "per_user" and not isinstance(stage.loads(traces.get(number))[0], Closed):
            raise document.error(("balance",), f"expected stages with users beside per_user, got stages.{number}")


def _what_breaks(scenario: Scenario, document: Document) -> str | None:
    """Where the first memory ladder until failure stands, if the target is not ours."""
    for number, stage in enumerate(scenario.stages):
        if stage.memory is not None and stage.memory.until_failure and not scenario.embedded:
            return str(document.error(("stages", number, "memory", "until"), FAILURE))
    return None


def _with_prompts(scenario: Scenario, document: Document, folder: Path) -> Scenario:
    """Check the prompt files and note their hashes, so that a saved run says what exactly it asked; count rounds."""
    entries, files = list(scenario.prompts), dict[int, PromptFile]()
    for at, entry in enumerate(entries):
        if entry.file is None:
            continue
        try:
            found = files[at] = read_prompt_file(folder / entry.file)
        except UsageError as error:
            raise document.error(("prompts", at, "file"), str(error)) from None
        if entry.sha256 not in (None, found.sha256):
            problem = f"expected {entry.sha256}, got {found.sha256} for {entry.file}"
            raise document.error(("prompts", at, "sha256"), problem)
        entries[at] = entry.model_copy(update={"sha256": found.sha256})
    in_a_round = len(files[0].chats) if 0 in files else 1
    stages = (
        _with_requests(stage, number, scenario, in_a_round, document) for number, stage in enumerate(scenario.stages)
    )
    return scenario.model_copy(update={"prompts": tuple(entries), "stages": tuple(stages)})


def _with_requests(stage: Stage, number: int, scenario: Scenario, in_a_round: int, document: Document) -> Stage:
    """The stage with its rounds as a number of requests."""
    if stage.rounds is None:
        return stage
    entry, loc = scenario.prompts[0], ("stages", number)
    if len(scenario.prompts) > 1 or entry.input_tokens or (entry.file and entry.order != "sequential"):
        raise document.error((*loc, "rounds"), "expected a mix of one kind in sequential order beside it, got another")
    requests = stage.rounds * in_a_round
    if stage.requests not in (None, requests):
        told = f"{stage.rounds} rounds of {in_a_round} prompts"
        raise document.error(
            (*loc, "requests"), f"expected {requests}, which are {told}, or none, got {stage.requests}"
        )
    if stage.min_requests > requests:
        raise document.error((*loc, "min_requests"), f"expected at most {requests}, got {stage.min_requests}")
    return stage.model_copy(update={"requests": requests})


def _quality_prompts(scenario: Scenario, document: Document, folder: Path) -> tuple[QualityPrompt, ...]:
    if scenario.quality is None:
        return ()
    try:
        return read_quality_prompts(folder / scenario.quality.prompts)
    except UsageError as error:
        raise document.error(("quality", "prompts"), str(error)) from None


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
    value = yaml.safe_load(text)  # it has been read before, so it can be
    if path.partition(".")[0] == "endpoint":
        redacted = [redact_urls(str(url)) for url in value] if isinstance(value, list) else redact_urls(text)
        return f"{path}={redacted}"
    if not isinstance(value, dict | list):
        return setting
    if isinstance(value, dict) and isinstance(value.get("headers"), dict):
        value["headers"] = dict.fromkeys(value["headers"], "…")
    return f"{path}={yaml.safe_dump(redact(value), default_flow_style=True, width=10_000).strip()}"
