"""The shapes that a stage's loads may have: ladders, ramps, stretches over time; and the rules that end a ladder early.

What a stage makes of them is ``stage``'s job.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from loadbench.records import Leg
from loadbench.scenario.part import Part, as_list, exactly_one, one_or_more, refuse
from loadbench.scenario.units import RATE, Duration, Positive, Rate, RateOrZero, Share

MOST_RUNGS = 32
"""Doublings from one user to two thousand million; a ladder with more is a slip of the factor."""

DEFAULT_FACTOR = 2
"""Of a ladder that is written 1..64: each level tells whether twice the load still brings more."""

MOST_USERS = 1_000_000
"""Of a closed loop, of all our processes together: each is a connection. What is above is a slip, or no user count."""

Steepness = Annotated[float, Field(gt=1, allow_inf_nan=False)]


def rungs(first: float, last: float, factor: float) -> tuple[float, ...]:
    """``first``, ``first`` × ``factor`` and so on below ``last``, and ``last``."""
    steps = math.ceil((math.log(last) - math.log(first)) / math.log(factor) - 1e-9)  # 1e-9: log(64) / log(2) is no 6
    if steps >= MOST_RUNGS:
        raise refuse(f"expected at most {MOST_RUNGS} loads in a ladder, got {steps + 1:,}: raise factor")
    return (*(first * factor**step for step in range(steps)), last)


class CountLadder(Part):
    """A whole number, of users or tokens, then ``factor`` times as many, and so on: one level each."""

    first: Positive = Field(alias="from", description="The first number.")
    last: Positive = Field(alias="to", description="The last number, whatever the factor.")
    factor: Steepness = Field(description="From level to level so many times as many, in whole numbers.")

    @model_validator(mode="after")
    def _climbs(self) -> CountLadder:
        if self.last < self.first:
            raise refuse(f"expected from ≤ to, got {self.first} and {self.last}")
        self.rungs()
        return self

    def rungs(self) -> tuple[int, ...]:
        """The number of each level; what rounds to the same one is one level."""
        return tuple(dict.fromkeys(round(count) for count in rungs(self.first, self.last, self.factor)))


class RateRange(Part):
    """A rate that changes evenly from one to another over the stage's duration; with ``factor`` a ladder of rates."""

    from_per_s: RateOrZero = Field(alias="from", description="Requests per second at the start; 0 without factor only.")
    to_per_s: Rate = Field(alias="to", description="Requests per second at the end of the duration, or of the ladder.")
    factor: Steepness | None = Field(
        default=None, description="Make it a ladder: a level at each rate, from level to level so many times as high."
    )

    @model_validator(mode="after")
    def _climbs(self) -> RateRange:
        if self.factor is not None and not 0 < self.from_per_s <= self.to_per_s:
            raise refuse(f"expected 0 < from ≤ to beside factor, got {self.from_per_s:g}/s and {self.to_per_s:g}/s")
        self.rungs()
        return self

    def rungs(self) -> tuple[float, ...]:
        """The rate of each level of a ladder; of a ramp none."""
        return () if self.factor is None else rungs(self.from_per_s, self.to_per_s, self.factor)


def as_loads(value: object) -> object:
    """One load is a list of one, ``1,2,4`` a list of three, and ``1..64`` a ladder, as flags write them."""
    loads = as_list(value)
    return [_spread(load) for load in loads] if isinstance(loads, list | tuple) else loads


def _spread(load: object) -> object:
    if not isinstance(load, str) or ".." not in load:
        return load
    first, _, last = load.partition("..")
    return {"from": first.strip(), "to": last.strip(), "factor": DEFAULT_FACTOR}


def _kind_of_load(value: object) -> str:
    return "range" if isinstance(value, dict | CountLadder | RateRange) else "load"


Counts = Annotated[
    tuple[
        Annotated[
            Annotated[Positive, Tag("load")] | Annotated[CountLadder, Tag("range")], Discriminator(_kind_of_load)
        ],
        ...,
    ],
    BeforeValidator(as_loads),
    Field(min_length=1),
    one_or_more({"anyOf": [{"type": "integer", "minimum": 1}, CountLadder.model_json_schema()]}),
]
Rates = Annotated[
    tuple[
        Annotated[Annotated[Rate, Tag("load")] | Annotated[RateRange, Tag("range")], Discriminator(_kind_of_load)], ...
    ],
    BeforeValidator(as_loads),
    Field(min_length=1),
    one_or_more({"anyOf": [*RATE.json_schema()["anyOf"], RateRange.model_json_schema()]}),
]


def each(counts: Sequence[int | CountLadder]) -> Iterator[int]:
    """The numbers of a list, its ladders spelt out."""
    for count in counts:
        yield from count.rungs() if isinstance(count, CountLadder) else (count,)


def is_ladder(loads: object) -> bool:
    """Whether what a file says, as ``as_loads`` gives it back, is a ladder."""
    return isinstance(loads, list) and any(isinstance(load, dict) and "factor" in load for load in loads)


def _may_be_off(schema: dict[str, Any]) -> None:
    """Null and false both switch a rule off."""
    for rule in schema["properties"].values():
        kinds = rule.setdefault("anyOf", [{"type": rule.pop("type")}] if "type" in rule else [])
        known = [kind.get("type") for kind in kinds]
        kinds += [{"type": "null"}] if "null" not in known else []
        kinds += [{"const": False}] if "boolean" not in known else []


class StopRules(Part):
    """When the rest of a ladder is not run. A ladder has those of the defaults, a list those that it names."""

    model_config = ConfigDict(json_schema_extra=_may_be_off)

    gain_share: Share | None = Field(
        default=0.05, alias="gain", description="Throughput gained less than this, twice in a row; null: never."
    )
    slo: bool = Field(default=True, description="The SLO was missed.")
    error_rate: Share | None = Field(
        default=0.1, description="A larger share of the requests failed; null: however many."
    )
    degraded: bool = Field(default=True, description="The target is not healthy any more.")
    over_capacity: bool = Field(default=True, description="Open loop: what waits for an answer kept growing.")
    time_s: Annotated[Duration, Field(gt=0)] | None = Field(
        default=None,
        alias="time",
        description="The stage has taken so long, on this model: it ends the level that is running too.",
    )

    @model_validator(mode="before")
    @classmethod
    def _off(cls, data: Any) -> Any:
        """A rule that is null or false is off, whichever of the two its kind knows."""
        if not isinstance(data, dict):
            return data
        return {name: _OFF.get(name) if rule is None or rule is False else rule for name, rule in data.items()}

    @property
    def on(self) -> bool:
        """Whether there is a rule at all."""
        return any(rule is not None and rule is not False for _, rule in self)


_OFF = {"gain": None, "slo": False, "error_rate": None, "degraded": False, "over_capacity": False, "time": None}


def spelt_out(stop: object, ladder: bool) -> object:
    """The rules as a mapping that says all that ``stop`` leaves open: true and false are all of them and none."""
    if stop is None:
        return {} if ladder else None
    if isinstance(stop, bool):
        return {} if stop else _OFF
    return {**_OFF, **stop} if isinstance(stop, dict) and not ladder else stop


def fewer(users: int) -> int:
    """So many users, if they are not too many."""
    if users > MOST_USERS:
        raise refuse(f"expected at most {MOST_USERS:,} users, got {users:,}")
    return users


def _users_or_rate(value: object) -> object:
    """Whole numbers are users, an int; what has a unit is a rate, a float in requests per second."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and float(value).is_integer():
        return fewer(int(value))
    if isinstance(value, str) and value.strip().isdecimal():  # as ${USERS:-4} gives it
        return fewer(int(value))
    if not isinstance(value, str) or "/" not in value or (per_s := RATE.read(value)) < 0:
        raise PydanticCustomError("expected", "expected users as a whole number or a rate such as 2/s")
    return per_s


def _written(value: float) -> int | str:
    return value if isinstance(value, int) else RATE.write(value)


UsersOrRate = Annotated[
    int | float,
    BeforeValidator(_users_or_rate),
    PlainSerializer(_written, when_used="json-unless-none"),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": RATE.pattern() + r"|.*\$\{.+\}.*"}]}
    ),
]


class Stretch(Part):
    """A part of a load over time: users where its number is whole, a rate where it has a unit."""

    hold: UsersOrRate | None = Field(default=None, description="Go to this load at once and stay there.")
    ramp: UsersOrRate | None = Field(default=None, description="Go evenly to this load from where it is; at first 0.")
    spike: UsersOrRate | None = Field(default=None, description="This load, and then back to where it was before.")
    for_s: Annotated[Duration, Field(gt=0)] = Field(alias="for", description="How long it lasts.")

    @model_validator(mode="after")
    def _one_kind(self) -> Stretch:
        exactly_one(hold=self.hold, ramp=self.ramp, spike=self.spike)
        return self

    def load(self) -> tuple[str, int | float]:
        """What it is called, and the load that it goes to."""
        given: dict[str, Any] = {"hold": self.hold, "ramp": self.ramp, "spike": self.spike}
        return next((name, value) for name, value in given.items() if value is not None)


def are_rates(stretches: object) -> bool:
    """Whether what a file says of a load over time is about rates: one of its loads has a unit."""
    found = stretches if isinstance(stretches, list | tuple) else ()
    values = [value for one in found if isinstance(one, dict) for key, value in one.items() if key != "for"]
    return any(isinstance(value, str) and "/" in value for value in values)


def legs_of(stretches: Sequence[Stretch]) -> tuple[Leg, ...]:
    """The legs of a load that goes through these, from 0 on."""
    legs, before = [], 0.0
    for stretch in stretches:
        name, load = stretch.load()
        legs.append(Leg(name, before if name == "ramp" else float(load), float(load), stretch.for_s))
        before = before if name == "spike" else float(load)
    return tuple(legs)
