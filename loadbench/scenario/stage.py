"""The loads of a scenario: closed loops of users, open loops at a rate, either over time, recorded ones, and memory
ladders.

What shapes they may have is written in ``shapes`` and ``memory``. Reading a trace's file is ``load``'s job, drawing
arrivals ``arrivals``'.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from loadbench.records import Closed, Leg, Load, Open, Trace
from loadbench.scenario.memory import MemoryLadder
from loadbench.scenario.part import Part, exactly_one, refuse
from loadbench.scenario.shapes import (
    CountLadder,
    Counts,
    RateRange,
    Rates,
    StopRules,
    Stretch,
    are_rates,
    as_loads,
    each,
    fewer,
    is_ladder,
    legs_of,
    spelt_out,
)
from loadbench.scenario.units import DURATION, Count, Duration, Positive

DEFAULT_DURATION = "15s"  # some hundred requests of a small model, and six levels stay under two minutes
DEFAULT_RUNG = "20s"  # 16 streams of 4,096 tokens have reserved what they need, or failed, long before
DEFAULT_START_SPACING = "1ms"  # 512 users start within half a second and not in one turn of the event loop

INTERVALS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)
"""The intervals that results are told for unless the stage says: of them the first that makes no more than so many."""

MOST_INTERVALS = 30
LONG_S = 60.0  # a level of a minute, or a load over time, is told interval by interval

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
    "stop": ("concurrency", "rate"),
    "requests": ("concurrency", "rate", "trace"),
    "rounds": ("concurrency", "rate"),
    "interval": ("concurrency", "rate", "trace"),
}


def _may_be_bool(schema: dict[str, Any]) -> None:
    schema["anyOf"].insert(0, {"type": "boolean"})


class Stage(Part):
    """A load held for a while, or changing by plan: users in a closed loop, or an open loop at a rate or from a trace.

    A list or a ladder of users or rates gives one level each, a load over time one level as a whole, a memory ladder
    one for each of its rungs.
    """

    concurrency: Counts | None = Field(
        default=None,
        description="Closed loop: this many users, each sends its next request when its last is done; or a ladder"
        " {from, to, factor}.",
    )
    rates_per_s: Rates | None = Field(
        default=None,
        alias="rate",
        description="Open loop: requests per second on a schedule, whatever the target does; or {from, to} over the"
        " duration; or a ladder {from, to, factor}.",
    )
    over_time: Annotated[tuple[Stretch, ...], Field(min_length=1)] | None = Field(
        default=None, description="One level whose load changes: hold, ramp and spike, of users or of rates."
    )
    memory: MemoryLadder | None = Field(
        default=None, description="A memory ladder: users × tokens are raised until the target's memory is at a limit."
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
        description=f"Stop issuing after this; {DEFAULT_DURATION} if requests and rounds are absent too and there is no"
        f" trace. Of a memory ladder the most that a rung may take; {DEFAULT_RUNG} unless stated.",
    )
    requests: Positive | None = Field(
        default=None, description="Stop issuing after this many; with duration, whichever comes first."
    )
    rounds: Positive | None = Field(
        default=None,
        description="Stop issuing after every prompt had so many turns. Takes a mix of one kind, in sequential order.",
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

    stop: StopRules | None = Field(
        default=None,
        description="When to leave out the levels that are left: true for all the rules, false for none; a ladder has"
        " them unless it says otherwise, a list those that it names.",
        json_schema_extra=_may_be_bool,
    )
    rest_s: Duration = Field(default=0.0, alias="rest", description="Wait so long between the levels of this stage.")
    interval_s: Annotated[Duration, Field(ge=1)] | None = Field(
        default=None,
        alias="interval",
        description="Tell results for every so much of a level too; for a load over time, and a level of a minute or"
        f" more, some {MOST_INTERVALS} intervals unless stated.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [key]} for key in ("concurrency", "rate", "over_time", "trace", "memory")]
        }
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, data: Any) -> Any:
        """Fill what depends on the kind of stage, so that a saved scenario does not depend on our defaults."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        stop = spelt_out(given.get("stop"), is_ladder(as_loads(given.get("concurrency", given.get("rate")))))
        if "memory" in given:
            return data | {"duration": given.get("duration", DEFAULT_RUNG), "stop": stop}
        if "trace" in given:
            return data | {"speed": given.get("speed", 1.0), "stop": stop}
        filled: dict[str, Any] = {}
        if "rate" in given or are_rates(given.get("over_time")):
            filled["arrivals"] = "gamma" if "burstiness" in given else "poisson"
        else:
            filled["start_spacing"] = DEFAULT_START_SPACING
        if not given.keys() & {"duration", "requests", "rounds", "over_time"}:
            filled["duration"] = DEFAULT_DURATION
        return data | {key: given.get(key, value) for key, value in filled.items()} | {"stop": stop}

    @model_validator(mode="after")
    def _one_load(self) -> Stage:
        exactly_one(
            concurrency=self.concurrency,
            rate=self.rates_per_s,
            over_time=self.over_time,
            trace=self.trace,
            memory=self.memory,
        )
        here = self._kind()
        fields = {field.alias or name: name for name, field in type(self).model_fields.items()}
        found = {key: getattr(self, name) for key, name in fields.items()}
        for key, loads in _ONLY_WITH.items():
            if found[key] is not None and here not in loads:
                raise refuse(f"expected {key} in a stage with {' or '.join(loads)}, got it beside {here}")
        unfit = ("duration", "min_requests", "stop") if self.over_time else ("min_requests",) if self.memory else ()
        for key in unfit:
            if found[key]:
                shape = "over_time" if self.over_time else here
                raise refuse(f"expected {key} in a stage whose load stays, got it beside {shape}")
        for users in each(self.concurrency or ()):
            fewer(users)
        if self.rest_s and self._is_one_level():
            raise refuse("expected several levels beside rest, got one")
        if self.stop is not None and self.stop.on and self._is_one_level():
            raise refuse("expected several levels beside stop, got one")
        if self.interval_s and self.length_s and self.interval_s > self.length_s:
            interval, length = DURATION.write(self.interval_s), DURATION.write(self.length_s)
            raise refuse(f"expected interval ≤ the length of a level, got {interval} and {length}")
        for entries in (self.concurrency, self.rates_per_s):
            if entries is not None and self.ladder and len(entries) > 1:
                raise refuse(f"expected a ladder on its own, got it in a list of {len(entries)}")
        if self.arrivals == "gamma" and self.burstiness is None:
            raise refuse("expected burstiness beside gamma arrivals, got none")
        if self.arrivals != "gamma" and self.burstiness is not None:
            raise refuse(f"expected gamma arrivals beside burstiness, got {self.arrivals}")
        if (
            self.duration_s is None
            and not self.ladder
            and any(isinstance(r, RateRange) for r in self.rates_per_s or ())
        ):
            raise refuse("expected a duration beside a rate with from and to, got none")
        if self.requests is not None and self.min_requests > self.requests:
            raise refuse(f"expected min_requests ≤ requests, got {self.min_requests} and {self.requests}")
        return self

    def _kind(self) -> str:
        """What makes the load: users, a rate, a trace, memory. Refuses a load over time of both kinds, or of none."""
        if self.over_time is None:
            plain = {"concurrency": self.concurrency, "rate": self.rates_per_s, "memory": self.memory}
            return next((name for name, given in plain.items() if given), "trace")
        kinds = {type(load) for load in (stretch.load()[1] for stretch in self.over_time) if load > 0}
        if len(kinds) != 1:
            raise refuse(f"expected users or rates in over_time, got {'both' if kinds else 'nothing but 0'}")
        return "concurrency" if kinds == {int} else "rate"

    def _is_one_level(self) -> bool:
        """Whether it can be no more than one; a ladder is one as well where it begins at its end."""
        if self.memory is not None:
            return len(self.memory.rungs()) == 1
        return not self.ladder and len(self.concurrency or self.rates_per_s or ((),)) == 1

    @property
    def ladder(self) -> bool:
        """Whether its loads climb by a factor, and so may end early."""
        entries = (*(self.concurrency or ()), *(self.rates_per_s or ()))
        return any(isinstance(entry, CountLadder | RateRange) and entry.factor is not None for entry in entries)

    @property
    def length_s(self) -> float | None:
        """How long each of its levels issues requests, in seconds; None: their number decides."""
        if self.memory is not None:
            return None
        return self.duration_s if self.over_time is None else sum(stretch.for_s for stretch in self.over_time)

    @property
    def budget_s(self) -> float | None:
        """How long it may take on one model, all its levels together; None: as long as it takes."""
        return None if self.stop is None else self.stop.time_s

    @property
    def telling_s(self) -> float | None:
        """The interval that its levels' results are told for, in seconds; None: as a whole only."""
        if self.interval_s is not None or self.length_s is None:
            return self.interval_s
        if self.over_time is None and self.length_s < LONG_S:
            return None
        return next((each for each in INTERVALS_S if each * MOST_INTERVALS >= self.length_s), INTERVALS_S[-1])

    def loads(self, trace: Trace | None = None) -> tuple[Load, ...]:
        """The loads in the order of the file, one level each. ``trace`` is this stage's, as it was read."""
        if self.memory is not None:
            return self.memory.rungs()
        if self.over_time is not None:
            return (self._over(legs_of(self.over_time)),)
        if self.concurrency is not None:
            return tuple(Closed(users) for users in each(self.concurrency))
        if self.rates_per_s is not None:
            return tuple(chain.from_iterable(self._open(rate) for rate in self.rates_per_s))
        assert trace is not None, "a stage with a trace has loads once its file has been read"
        # Where all come at once there is no rate; over a second it is a number of the right size.
        return (Open(trace.requests / max(trace.length_s, 1.0), "trace", trace=trace),)

    def _open(self, rate: float | RateRange) -> tuple[Load, ...]:
        if isinstance(rate, RateRange) and rate.factor is None:
            return (self._over((Leg("ramp", rate.from_per_s, rate.to_per_s, self.duration_s or 0.0),)),)
        rates_per_s = rate.rungs() if isinstance(rate, RateRange) else (rate,)
        return tuple(Open(per_s, self.arrivals or "poisson", self.burstiness) for per_s in rates_per_s)

    def _over(self, legs: tuple[Leg, ...]) -> Load:
        if self._kind() == "concurrency":
            return Closed(int(max(leg.end for leg in legs)), legs)
        requests = sum((leg.start + leg.end) / 2 * leg.over_s for leg in legs)
        mean_per_s = requests / sum(leg.over_s for leg in legs)
        return Open(mean_per_s, self.arrivals or "poisson", self.burstiness, legs)
