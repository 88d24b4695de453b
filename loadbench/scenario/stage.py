"""The loads of a scenario: closed loops of users, open loops at a rate that stays or changes, and recorded ones.

Reading a trace's file is ``load``'s job and drawing arrivals ``arrivals``'.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from loadbench.records import Closed, Load, Open, Ramp, Trace
from loadbench.scenario.part import Part, as_list, exactly_one, one_or_more, refuse
from loadbench.scenario.units import RATE, Count, Duration, Positive, Rate, RateOrZero

DEFAULT_DURATION = "15s"  # some hundred requests of a small model, and six levels stay under two minutes
DEFAULT_START_SPACING = "1ms"  # 512 users start within half a second and not in one turn of the event loop


class RateRamp(Part):
    """A rate that changes evenly from one to another over the stage's duration."""

    from_per_s: RateOrZero = Field(alias="from", description="Requests per second at the start; may be 0.")
    to_per_s: Rate = Field(alias="to", description="Requests per second at the end of the duration, and after it.")


def _kind_of_rate(value: object) -> str:
    return "ramp" if isinstance(value, dict | RateRamp) else "rate"


Concurrencies = Annotated[
    tuple[Positive, ...],
    BeforeValidator(as_list),
    Field(min_length=1),
    one_or_more({"type": "integer", "minimum": 1}),
]
Rates = Annotated[
    tuple[
        Annotated[Annotated[Rate, Tag("rate")] | Annotated[RateRamp, Tag("ramp")], Discriminator(_kind_of_rate)], ...
    ],
    BeforeValidator(as_list),
    Field(min_length=1),
    one_or_more({"anyOf": [*RATE.json_schema()["anyOf"], RateRamp.model_json_schema()]}),
]
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]

# Keys that only some loads know.
_ONLY_WITH = {
    "start_spacing": ("concurrency",),
    "arrivals": ("rate",),
    "burstiness": ("rate",),
    "max_in_flight": ("rate", "trace"),
    "timestamps": ("trace",),
    "speed": ("trace",),
    "sha256": ("trace",),
}


class Stage(Part):
    """A load held for a while: users in a closed loop, or an open loop at a rate or from a trace.

    A list of users or rates gives one level each.
    """

    concurrency: Concurrencies | None = Field(
        default=None, description="Closed loop: this many users, each sends its next request when its last is done."
    )
    rates_per_s: Rates | None = Field(
        default=None,
        alias="rate",
        description="Open loop: requests per second on a schedule, whatever the target does; or {from, to}.",
    )
    arrivals: Literal["constant", "poisson", "gamma"] | None = Field(
        default=None,
        description="Open loop: how arrivals are spaced; poisson unless stated, with burstiness gamma.",
    )
    burstiness: Factor | None = Field(
        default=None,
        description="Shape of the gamma distribution of the gaps; the mean rate stays. 1 is poisson, less comes in"
        " bursts, more is steadier: counts in long windows vary 1/burstiness times as much as poisson's.",
    )
    trace: str | None = Field(
        default=None,
        min_length=1,
        description="Open loop: replay the requests of this file, JSONL or CSV, relative to the scenario file.",
    )
    timestamps: Literal["s", "ms"] | None = Field(
        default=None, description="Unit of the trace's timestamps; as its columns say, else seconds, unless stated."
    )
    speed: Factor | None = Field(default=None, description="Replay the trace so many times as fast; 1 unless stated.")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="What the trace must hash to; saved with every run."
    )
    duration_s: Annotated[Duration, Field(gt=0)] | None = Field(
        default=None,
        alias="duration",
        description=f"Stop issuing after this; {DEFAULT_DURATION} if requests is absent too and there is no trace.",
    )
    requests: Positive | None = Field(
        default=None, description="Stop issuing after this many; with duration, whichever comes first."
    )
    min_requests: Count = Field(default=0, description="Go on past duration until so many are issued.")
    start_spacing_s: Duration | None = Field(
        default=None,
        alias="start_spacing",
        description=f"Closed loop: time between two users' first requests; {DEFAULT_START_SPACING} unless stated.",
    )
    max_in_flight: Positive | None = Field(
        default=None, description="Open loop: what would exceed it is dropped and counts as failed; no limit if absent."
    )

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [key]} for key in ("concurrency", "rate", "trace")]}
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, data: Any) -> Any:
        """Fill what depends on the kind of stage, so that a saved scenario does not depend on our defaults."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        if "trace" in given:
            return data | {"speed": given.get("speed", 1.0)}
        if "rate" in given:
            filled = {"arrivals": "gamma" if "burstiness" in given else "poisson"}
        else:
            filled = {"start_spacing": DEFAULT_START_SPACING}
        if "duration" not in given and "requests" not in given:
            filled["duration"] = DEFAULT_DURATION
        return data | {key: given.get(key, value) for key, value in filled.items()}

    @model_validator(mode="after")
    def _one_load(self) -> Stage:
        exactly_one(concurrency=self.concurrency, rate=self.rates_per_s, trace=self.trace)
        here = "concurrency" if self.concurrency else "rate" if self.rates_per_s else "trace"
        for key, loads in _ONLY_WITH.items():
            value = self.start_spacing_s if key == "start_spacing" else getattr(self, key)
            if value is not None and here not in loads:
                raise refuse(f"expected {key} in a stage with {' or '.join(loads)}, got it beside {here}")
        if self.arrivals == "gamma" and self.burstiness is None:
            raise refuse("expected burstiness beside gamma arrivals, got none")
        if self.arrivals != "gamma" and self.burstiness is not None:
            raise refuse(f"expected gamma arrivals beside burstiness, got {self.arrivals}")
        if self.duration_s is None and any(isinstance(rate, RateRamp) for rate in self.rates_per_s or ()):
            raise refuse("expected a duration beside a rate with from and to, got none")
        if self.requests is not None and self.min_requests > self.requests:
            raise refuse(f"expected min_requests ≤ requests, got {self.min_requests} and {self.requests}")
        return self

    def loads(self, trace: Trace | None = None) -> tuple[Load, ...]:
        """The loads in the order of the file, one level each. ``trace`` is this stage's, as it was read."""
        if self.concurrency is not None:
            return tuple(Closed(users) for users in self.concurrency)
        if self.rates_per_s is not None:
            return tuple(self._open(rate) for rate in self.rates_per_s)
        assert trace is not None, "a stage with a trace has loads once its file has been read"
        # Where all come at once there is no rate; over a second it is a number of the right size.
        return (Open(trace.requests / max(trace.length_s, 1.0), "trace", trace=trace),)

    def _open(self, rate: float | RateRamp) -> Open:
        arrivals = self.arrivals or "poisson"
        if not isinstance(rate, RateRamp):
            return Open(rate, arrivals, self.burstiness)
        ramp = Ramp(rate.from_per_s, rate.to_per_s, self.duration_s or 0.0)
        return Open((rate.from_per_s + rate.to_per_s) / 2, arrivals, self.burstiness, ramp)
