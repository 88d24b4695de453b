"""What a scenario may say: every key with its meaning, its unit and its default. Reading files is ``load``'s job.

Attributes carry their unit (``duration_s``), keys in the file do not (``duration: 15s``). The descriptions become the
JSON Schema that editors read; ``public_json`` is the scenario as saved with a run and reads back as the same scenario.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from loadbench.scenario.endpoints import EMBEDDED, PROBE_TOKEN_VARIABLE, Endpoints, Probes
from loadbench.scenario.part import Part, as_list, exactly_one, one_or_more, refuse
from loadbench.scenario.quality import Quality
from loadbench.scenario.redaction import redact, redact_url
from loadbench.scenario.stage import Stage
from loadbench.scenario.units import BYTES, VARIABLE, Count, Duration, Positive, Power, Share, Size

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # token, RFC 9110 section 5.6.2
# These say how bytes travel, which only the client knows, or what it counts on; Host is what the endpoint's URL says.
_OURS = {
    *("accept-encoding", "connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te"),
    *("trailer", "transfer-encoding", "upgrade", "x-request-id"),
}
_SENT_BY_US = {"model", "messages", "stream", "max_tokens", "temperature"}

LEAST_LIMIT = "64MiB"  # the service takes 50 MB before it has a model


def _limit(value: object) -> object:
    """A limit under which no service starts is refused as it is written; what is no size is ``Size``'s to refuse."""
    if BYTES.read(value) < BYTES.read(LEAST_LIMIT):
        context = {"least": LEAST_LIMIT}
        raise PydanticCustomError("expected", "expected {least} or more, for a service to start", context)
    return value


Models = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1)], ...],
    BeforeValidator(as_list),
    Field(min_length=1),
    one_or_more({"type": "string", "minLength": 1}),
]


def _plain_name(name: str) -> str:
    """Names end up in folder names and in the tags of histogram logs, which know neither spaces nor commas."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise PydanticCustomError("expected", "expected a name of letters, digits, - and _")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]


def header_problem(name: str, value: str) -> str | None:
    """Why a header cannot be sent with every request, if so. The value is not shown: it may be a key."""
    if not _HEADER_NAME.fullmatch(name) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
        return f"expected headers that HTTP allows, got {name!r}"
    return f"expected headers that the client does not set itself, got {name}" if name.lower() in _OURS else None


class RequestOptions(Part):
    """What every request has in common."""

    stream: bool = Field(default=True, description="Ask for a stream. Without one there is no time to first token.")
    max_tokens: Positive = Field(
        default=64, description="Most tokens per answer; always sent, because servers reserve memory for it."
    )
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=0.0, description="Sampling temperature; null leaves it to the server."
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="HTTP headers to add. Values of secret-looking ones are never saved."
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="More keys of the request body, sent as they are.")

    @model_validator(mode="after")
    def _can_be_sent(self) -> RequestOptions:
        for name, value in self.headers.items():
            if problem := header_problem(name, value):
                raise refuse(problem)
        if ours := _SENT_BY_US & self.extra.keys():
            raise refuse(f"expected keys in extra that request has not itself, got {', '.join(sorted(ours))}")
        return self


class InputTokens(Part):
    """The length of made-up prompts, from a truncated normal distribution."""

    mean: float = Field(gt=0, description="Mean of the normal distribution, in tokens.")
    stdev: float = Field(default=0.0, ge=0, description="Its standard deviation, in tokens.")
    min: Positive = Field(default=1, description="Shortest prompt, in tokens.")
    max: Positive | None = Field(default=None, description="Longest prompt, in tokens; no limit unless stated.")

    @model_validator(mode="after")
    def _in_order(self) -> InputTokens:
        if self.mean < self.min or (self.max is not None and self.mean > self.max):
            raise refuse(f"expected min ≤ mean ≤ max, got {self.min}, {self.mean:g} and {self.max or 'none'}")
        return self


class Message(Part):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: str = Field(description="What is said.")


class PromptEntry(Part):
    """One kind of prompt in the mix: a file, a text, a conversation, or made-up text of a given length."""

    name: Name = Field(description="What results call this kind of prompt.")
    weight: float = Field(default=1.0, gt=0, description="How often it is drawn, relative to the others' weights.")
    file: str | None = Field(
        default=None, description="A JSON list of prompts (texts, chats or objects), relative to the scenario file."
    )
    text: str | None = Field(default=None, min_length=1, description="One user message.")
    messages: tuple[Message, ...] | None = Field(
        default=None, min_length=1, description="One conversation, several turns."
    )
    input_tokens: InputTokens | None = Field(default=None, description="Made-up texts of about this many tokens.")
    order: Literal["shuffled", "sequential"] = Field(
        default="shuffled",
        description="Which of a file's prompts comes next: drawn at random by the seed; or in the order of the file,"
        " round and round, every level from the first on.",
    )
    max_tokens: Positive | None = Field(default=None, description="Instead of request.max_tokens.")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="What the file must hash to; saved with every run."
    )

    @model_validator(mode="after")
    def _one_source(self) -> PromptEntry:
        exactly_one(file=self.file, text=self.text, messages=self.messages, input_tokens=self.input_tokens)
        if self.order == "sequential" and self.input_tokens is not None:
            raise refuse("expected prompts of one's own beside order: sequential, got made-up ones")
        return self

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [key]} for key in ("file", "text", "messages", "input_tokens")]}
    )


def _names_differ(entries: tuple[PromptEntry, ...]) -> tuple[PromptEntry, ...]:
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise refuse(f"expected a different name for each entry, got {twice} twice")
    return entries


class Warmup(Part):
    """Requests before the measurement."""

    requests: Count = Field(
        default=2, description="Sent one after another before a model's first level, recorded but never counted."
    )


class Deadlines(Part):
    """Limits on the clock for one request, counted from when it is sent. A token stream that goes on does not help."""

    first_token_s: Annotated[Duration, Field(gt=0)] = Field(
        default=60.0, alias="first_token", description="Given up when no token has come by then."
    )
    total_s: Annotated[Duration, Field(gt=0)] = Field(
        default=180.0, alias="total", description="Given up when the answer is not complete by then."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Deadlines:
        if self.first_token_s > self.total_s:
            raise refuse(f"expected first_token ≤ total, got {self.first_token_s:g}s and {self.total_s:g}s")
        return self


Limit = Annotated[Duration, Field(gt=0)] | None


class LatencyLimits(Part):
    """The most that percentiles of one latency may be."""

    p50_s: Limit = Field(default=None, alias="p50", description="Median.")
    p90_s: Limit = Field(default=None, alias="p90", description="90th percentile.")
    p95_s: Limit = Field(default=None, alias="p95", description="95th percentile.")
    p99_s: Limit = Field(default=None, alias="p99", description="99th percentile.")


class Slo(Part):
    """What counts as good enough. Latencies are service times in closed loop and response times in open loop."""

    ttft: LatencyLimits | None = Field(default=None, description="Time to first token.")
    e2e: LatencyLimits | None = Field(default=None, description="Time to last token.")
    tpot: LatencyLimits | None = Field(default=None, description="Time per output token after the first.")
    gap: LatencyLimits | None = Field(default=None, description="Time between two chunks.")
    error_rate: Share | None = Field(default=None, description="Most requests that may fail, of those attempted.")
    goodput: Share | None = Field(
        default=None, description="Fewest requests that must succeed within every latency limit."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Slo:
        if self.error_rate is None and self.goodput is None and not any(self.limits()):
            raise refuse("expected at least one limit, got none")
        return self

    def limits(self) -> Iterator[tuple[str, str, float]]:
        """Every latency limit as (metric, percentile, seconds), for example ("ttft", "p95", 2.0)."""
        for metric in ("ttft", "e2e", "tpot", "gap"):
            given: LatencyLimits | None = getattr(self, metric)
            for attribute in LatencyLimits.model_fields if given else ():
                if (limit_s := getattr(given, attribute)) is not None:
                    yield metric, attribute.removesuffix("_s"), limit_s


class Scenario(Part):
    """A load test: whom to ask, what, under which loads, and what counts as good enough."""

    schema_version: Literal[1] = Field(default=1, alias="schema", description="Version of this format.")
    name: Name = Field(default="scenario", description="Names the run's folder; the file's name unless stated.")
    description: str = Field(default="", description="One line for the report: what is this measurement for?")
    endpoint: Endpoints = Field(
        default=EMBEDDED,
        description="Base URL of the API, with or without /v1, or embedded: a Foundry Local of our own. A list of URLs"
        " is a fleet, each of which serves every model. FOUNDRY_LOCAL_ENDPOINT and --endpoint come before it.",
    )
    balance: Literal["round_robin", "per_user"] | None = Field(
        default=None,
        description="Which endpoint of a fleet a request goes to: each in its turn (round_robin, unless stated), or"
        " every user's to one of them (per_user, closed loop only).",
    )
    models: Models = Field(
        default=("auto",),
        description="Measured one after another: aliases, exact ids, synthetic:NAME, or auto; ALIAS@cpu, @gpu and @npu"
        " are its variants for that device. BENCH_MODELS and --model come before it.",
    )
    model_order: Literal["as_written", "shuffled"] = Field(
        default="as_written",
        description="Which model comes first: the first one named, or one that the seed draws, so that what warms up"
        " or wears out does not always meet the same one.",
    )
    models_file: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        default=None,
        description="JSON of {alias: {capabilities, size_mb}}, relative to the scenario file: what is known of models."
        " Its aliases are the models where none are named.",
    )
    keep_warm_s: Annotated[Duration, Field(gt=0)] | None = Field(
        default=None,
        alias="keep_warm",
        description="Send a light prompt whenever a model has been idle so long between its levels; never counted.",
    )
    request: RequestOptions = Field(default=RequestOptions(), description="What every request has in common.")
    prompts: Annotated[tuple[PromptEntry, ...], AfterValidator(_names_differ)] = Field(
        default=(PromptEntry(name="default", input_tokens=InputTokens(mean=100, stdev=25, min=20, max=200)),),
        min_length=1,
        description="The mix: kinds of prompt, drawn by weight, seeded, without end.",
    )
    quality: Quality | None = Field(
        default=None, description="Prompts whose answers are kept, to be checked and marked; none unless stated."
    )
    warmup: Warmup = Field(default=Warmup(), description="Requests before the measurement.")
    stages: tuple[Stage, ...] = Field(
        default=(Stage(concurrency=(1,)),), min_length=1, description="The loads, one after another."
    )
    deadlines: Deadlines = Field(default=Deadlines(), description="When a request is given up.")
    drain_s: Duration = Field(
        default=30.0,
        alias="drain",
        description="How long a level waits for its last answers; the rest is censored.",
    )
    canary: bool = Field(
        default=True, description="Send one small request after every level to see that the target still answers."
    )
    on_target_death: Literal["stop", "restart", "skip_model"] | None = Field(
        default=None,
        description="When the target dies: stop the run; restart the embedded service, or wait for another to come"
        " back, and go on; or go on with the next model. restart for the embedded one, else stop, unless stated.",
    )
    target_probe: Probes | None = Field(
        default=None,
        description="URL of loadbench probe on the model's host: the target's memory is read there; of a fleet a list,"
        f" one for each endpoint in their order. Its token comes from {PROBE_TOKEN_VARIABLE}.",
    )
    memory_limit_bytes: Annotated[Size, BeforeValidator(_limit)] | None = Field(
        default=None,
        alias="memory_limit",
        description="The most memory that the embedded service may take, 2GiB; no limit unless stated.",
    )
    power_w: Power | None = Field(
        default=None,
        alias="power",
        description="What the machine draws under load, 45W: energy is reckoned with it where none can be measured.",
    )
    price_per_kwh: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Price of a kilowatt-hour, for the cost of tokens; takes currency beside it."
    )
    currency: Annotated[str, StringConstraints(pattern=r"^\S{1,8}$")] | None = Field(
        default=None, description="What the price is in: EUR."
    )
    slo: Slo | None = Field(default=None, description="What counts as good enough; without it nothing is judged.")
    repeat: Annotated[Positive, Field(le=100)] = Field(
        default=1,
        description="How many runs to make of it, one after another, each with a directory and a target of its own:"
        " five on either side let `loadbench compare` tell a regression from chance.",
    )
    seed: Annotated[Count, Field(lt=2**63)] = Field(
        default=42, description="Everything random comes from it: the same seed asks the same things at the same times."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, data: Any) -> Any:
        """Fill what depends on the endpoint, so that a saved scenario does not depend on our defaults."""
        if not isinstance(data, dict) or data.get("on_target_death") is not None:
            return data
        ours = data.get("endpoint", EMBEDDED) == EMBEDDED
        return data | {"on_target_death": "restart" if ours else "stop"}

    @property
    def embedded(self) -> bool:
        """Whether the target is a service of our own."""
        return self.endpoint == EMBEDDED

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Those of a fleet, or the one."""
        return (self.endpoint,) if isinstance(self.endpoint, str) else self.endpoint

    @property
    def probes(self) -> tuple[str, ...]:
        """Of each endpoint's host, where they are named."""
        return (self.target_probe,) if isinstance(self.target_probe, str) else self.target_probe or ()

    def redacted(self) -> Scenario:
        """The same scenario without the values of secret-looking headers and keys, nor its URL's credentials."""
        request = {"headers": redact(self.request.headers), "extra": redact(self.request.extra)}
        public = tuple(url if url == EMBEDDED else redact_url(url) for url in self.endpoints)
        endpoint = public[0] if isinstance(self.endpoint, str) else public
        return self.model_copy(update={"endpoint": endpoint, "request": self.request.model_copy(update=request)})

    def public_json(self) -> dict[str, Any]:
        """The redacted scenario as plain JSON values, quantities with their units: ``model_validate`` reads it back."""
        return self.redacted().model_dump(mode="json", by_alias=True)


def _with_variables(node: Any) -> Any:
    """The schema with ``${NAME}`` let pass where a number, true or false belongs: an editor sees no environment."""
    if isinstance(node, list):
        has_text = any(isinstance(part, dict) and part.get("type") == "string" for part in node)
        return node if has_text else [_with_variables(part) for part in node]
    if not isinstance(node, dict):
        return node
    inner = {key: _with_variables(part) for key, part in node.items()}
    if node.get("type") in ("integer", "number", "boolean") and "const" not in node:
        inner |= {"type": [node["type"], "string"], "pattern": VARIABLE}
    return inner


def schema_json() -> str:
    """The JSON Schema of scenario files, for editors: pretty, sorted, one newline at the end."""
    schema: Mapping[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_with_variables(Scenario.model_json_schema(by_alias=True, mode="validation")),
        "title": "loadbench scenario",
    }
    return json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
